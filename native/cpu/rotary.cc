#include "backend.h"
#include "../common/report.h"

namespace couplet::cpu {
const couplet_rotary_entries rotary_entries = {
    .create = [](const couplet_rotary_params*, couplet_rotary**, couplet_report* report) { return fail(report, COUPLET_UNSUPPORTED, {}, "rotary is not built yet"); },
    .destroy = [](couplet_rotary*) {},
    .bytes = [](const couplet_rotary*) -> size_t { return 0; },
};
}  // namespace couplet::cpu
