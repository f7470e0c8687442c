#define COUPLET_ISA avx512
#include "nearest_body.h"

namespace couplet::cpu {

const NearestBody nearest_avx512 = {
    .name = "avx512",
    .lanes = avx512::lanes,
    .finite = avx512::finite,
    .across_tokens = avx512::across_tokens,
    .across_centroids = avx512::across_centroids,
};

}  // namespace couplet::cpu
