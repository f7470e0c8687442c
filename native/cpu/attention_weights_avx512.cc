#define COUPLET_BODY weights_avx512
#include "attention_weights_body.h"

namespace couplet::cpu {
const AttentionWeightsBody attention_weights_avx512 = COUPLET_BODY::run_weights;
}  // namespace couplet::cpu
