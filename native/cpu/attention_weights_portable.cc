#define COUPLET_BODY weights_portable
#include "attention_weights_body.h"

namespace couplet::cpu {
const AttentionWeightsBody attention_weights_portable = COUPLET_BODY::run_weights;
}  // namespace couplet::cpu
