#include "backend.h"
#include "../common/report.h"

namespace couplet::cpu {
const couplet_decode_entries decode_entries = {
    .check = [](const couplet_decode_params*, couplet_report* report) { return fail(report, COUPLET_UNSUPPORTED, {}, "decode is not built yet"); },
    .workspace = [](const couplet_decode_params*) -> size_t { return 0; },
    .run = [](const couplet_decode_params*, void*, void*, couplet_report* report) { return fail(report, COUPLET_UNSUPPORTED, {}, "decode is not built yet"); },
    .describe = [](const couplet_decode_params*, char* text, size_t) { text[0] = 0; },
};
}  // namespace couplet::cpu
