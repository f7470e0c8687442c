#include "backend.h"
#include "../common/report.h"

namespace couplet::cpu {
const couplet_attend_entries attend_entries = {
    .check = [](const couplet_attend_params*, couplet_report* report) { return fail(report, COUPLET_UNSUPPORTED, {}, "attend is not built yet"); },
    .workspace = [](const couplet_attend_params*) -> size_t { return 0; },
    .run = [](const couplet_attend_params*, void*, void*, couplet_report* report) { return fail(report, COUPLET_UNSUPPORTED, {}, "attend is not built yet"); },
    .describe = [](const couplet_attend_params*, char* text, size_t) { text[0] = 0; },
};
}  // namespace couplet::cpu
