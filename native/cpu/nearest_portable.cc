#define COUPLET_ISA portable
#include "nearest_body.h"

namespace couplet::cpu {

const NearestBody nearest_portable = {
    .name = "portable",
    .lanes = portable::lanes,
    .finite = portable::finite,
    .across_tokens = portable::across_tokens,
    .across_centroids = portable::across_centroids,
};

}  // namespace couplet::cpu
