#pragma once

#include "../abi/operations.h"

namespace couplet::cpu {

// COUPLET_OK when attend can run with these parameters; otherwise why not, in the report.
couplet_status attend_check(const couplet_attend_params* params, couplet_report* report);

}  // namespace couplet::cpu
