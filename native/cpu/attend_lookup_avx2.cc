#define COUPLET_BODY attend_lookup_body_avx2
#include "attend_lookup.h"

namespace couplet::cpu {
const AttendLookup attend_lookup_avx2 = {
    .fits = COUPLET_BODY::LookupBody::fits,
    .scratch = COUPLET_BODY::LookupBody::scratch,
    .run = [](const AttendTask& task, AttendState state,
              void* scratch) { COUPLET_BODY::LookupBody(task, state, scratch).run(); },
};
}  // namespace couplet::cpu
