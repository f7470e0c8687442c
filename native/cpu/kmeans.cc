#include "backend.h"
#include "../common/report.h"

namespace couplet::cpu {
const couplet_kmeans_entries kmeans_entries = {
    .check = [](const couplet_kmeans_params*, couplet_report* report) { return fail(report, COUPLET_UNSUPPORTED, {}, "kmeans is not built yet"); },
    .workspace = [](const couplet_kmeans_params*) -> size_t { return 0; },
    .run = [](const couplet_kmeans_params*, void*, void*, couplet_report* report) { return fail(report, COUPLET_UNSUPPORTED, {}, "kmeans is not built yet"); },
    .describe = [](const couplet_kmeans_params*, char* text, size_t) { text[0] = 0; },
};
}  // namespace couplet::cpu
