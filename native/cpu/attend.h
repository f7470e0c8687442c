// Attention on packed codes: what attend.cc offers beside the entries of the waist.
#pragma once

#include "../abi/operations.h"
#include "isa.h"

namespace couplet::cpu {

// The entries with the instruction set named by the caller, which the processor must have. Parameters are taken as checked.
size_t attend_workspace(const couplet_attend_params& params, Isa isa);
void attend_run(const couplet_attend_params& params, Isa isa, void* workspace);

}  // namespace couplet::cpu
