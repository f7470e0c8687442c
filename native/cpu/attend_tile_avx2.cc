#define COUPLET_BODY attend_avx2
#include "attend_tile.h"

namespace couplet::cpu {
const AttendBody attend_tile_avx2 = {.scratch = COUPLET_BODY::TileBody::scratch, .run = COUPLET_BODY::run_tiles};
}  // namespace couplet::cpu
