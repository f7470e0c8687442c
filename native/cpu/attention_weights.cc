#include "backend.h"
#include "../common/report.h"

namespace couplet::cpu {
const couplet_attention_weights_entries attention_weights_entries = {
    .check = [](const couplet_attention_weights_params*, couplet_report* report) { return fail(report, COUPLET_UNSUPPORTED, {}, "attention_weights is not built yet"); },
    .workspace = [](const couplet_attention_weights_params*) -> size_t { return 0; },
    .run = [](const couplet_attention_weights_params*, void*, void*, couplet_report* report) { return fail(report, COUPLET_UNSUPPORTED, {}, "attention_weights is not built yet"); },
    .describe = [](const couplet_attention_weights_params*, char* text, size_t) { text[0] = 0; },
};
}  // namespace couplet::cpu
