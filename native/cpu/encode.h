// encode with a given body: what tests and benchmarks call to compare bodies. Everybody else calls encode_entries.
#pragma once

#include "../abi/operations.h"
#include "nearest.h"

namespace couplet::cpu {

// As encode_entries.run, for parameters that encode_entries.check accepts.
couplet_status encode(const NearestBody& body, const couplet_encode_params& params, couplet_report* report);

}  // namespace couplet::cpu
