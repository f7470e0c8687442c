#include "backend.h"
#include "../common/report.h"

namespace couplet::cpu {
const couplet_table_entries table_entries = {
    .create = [](const couplet_table_params*, couplet_table**, couplet_report* report) { return fail(report, COUPLET_UNSUPPORTED, {}, "tables are not built yet"); },
    .destroy = [](couplet_table*) {},
    .bytes = [](const couplet_table*) -> size_t { return 0; },
};
}  // namespace couplet::cpu
