// The oracle of attend: scalar, double, written from the ABI alone and sharing nothing with the fast bodies.
#pragma once

#include "../../abi/operations.h"

namespace couplet::cpu {

// Same parameters and outputs as attend. Angles come from what the rotary embedding was made of, NULL for none.
void reference_attend(const couplet_attend_params& params, const couplet_rotary_params* rotary);

}  // namespace couplet::cpu
