#define COUPLET_BODY attend_tile_body_portable
#include "attend_tile.h"

namespace couplet::cpu {
const AttendTile attend_tile_portable = {.scratch = COUPLET_BODY::TileBody::scratch, .run = COUPLET_BODY::run_tiles};
}  // namespace couplet::cpu
