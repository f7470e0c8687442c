// What attention_weights.cc hands to a body: one query head at a time.
#pragma once

#include "../abi/operations.h"

namespace couplet::cpu {

constexpr int32_t attention_weights_rows = 24;  // queries that share a pass over keys and values; 4 and 6 divide it

constexpr int64_t attention_weights_padded(int64_t count) { return (count + 15) / 16 * 16; }
// Elements from one channel to the next where tokens are contiguous. Not a multiple of 4096 bytes: such rows would all
// fall into the same few cache lines.
constexpr int64_t attention_weights_stride(int64_t tokens) { return (tokens + 63) / 64 * 64 + 16; }

struct AttentionWeightsTask {
  const couplet_attention_weights_params* params;
  int32_t query_head;
  float* scratch;      // float32 [attention_weights_scratch]
  double* key_sums;    // out, [tokens]: this head's part of the key weights
  double* value_sums;  // out, [tokens]
};

// Elements of scratch: keys and values by channel, values by token, two blocks of rows by token, queries, outputs, angles.
constexpr int64_t attention_weights_scratch(int64_t tokens, int64_t head_dim) {
  int64_t const stride = attention_weights_stride(tokens), padded = attention_weights_padded(head_dim);
  return (2 * head_dim + 2 * attention_weights_rows + 2) * stride + padded * tokens +
         2 * attention_weights_rows * padded + 512;
}

using AttentionWeightsBody = void (*)(const AttentionWeightsTask& task);

extern const AttentionWeightsBody attention_weights_portable;
extern const AttentionWeightsBody attention_weights_avx2;
extern const AttentionWeightsBody attention_weights_avx512;

}  // namespace couplet::cpu
