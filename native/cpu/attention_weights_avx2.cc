#define COUPLET_BODY weights_avx2
#include "attention_weights_body.h"

namespace couplet::cpu {
const AttentionWeightsBody attention_weights_avx2 = COUPLET_BODY::run_weights;
}  // namespace couplet::cpu
