#define COUPLET_ISA avx2
#include "nearest_body.h"

namespace couplet::cpu {

const NearestBody nearest_avx2 = {
    .name = "avx2",
    .lanes = avx2::lanes,
    .finite = avx2::finite,
    .across_tokens = avx2::across_tokens,
    .across_centroids = avx2::across_centroids,
};

}  // namespace couplet::cpu
