#include "backend.h"
#include "../common/report.h"

namespace couplet::cpu {
const couplet_encode_entries encode_entries = {
    .check = [](const couplet_encode_params*, couplet_report* report) { return fail(report, COUPLET_UNSUPPORTED, {}, "encode is not built yet"); },
    .workspace = [](const couplet_encode_params*) -> size_t { return 0; },
    .run = [](const couplet_encode_params*, void*, void*, couplet_report* report) { return fail(report, COUPLET_UNSUPPORTED, {}, "encode is not built yet"); },
    .describe = [](const couplet_encode_params*, char* text, size_t) { text[0] = 0; },
};
}  // namespace couplet::cpu
