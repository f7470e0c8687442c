#define COUPLET_BODY attend_tile_body_avx512
#include "attend_tile.h"

namespace couplet::cpu {
const AttendTile attend_tile_avx512 = {.scratch = COUPLET_BODY::TileBody::scratch, .run = COUPLET_BODY::run_tiles};
}  // namespace couplet::cpu
