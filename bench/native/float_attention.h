// Decode attention over an uncompressed cache, float32 or float16: the peers that couplet's kernels are measured against,
// written with the same care. One query token, grouped query heads, keys already rotated.
// For the benchmark only; compiled for the machine it runs on.
#pragma once

#include <cstdint>
#include <vector>

namespace couplet::bench {

using half_bits = uint16_t;

struct FloatShape {
  int query_heads, kv_heads, head_dim, tokens;
};

// queries, out: [query_heads][head_dim]; keys, values: [kv_heads][tokens][head_dim], float or half_bits.
// scale multiplies q.k. query_heads / kv_heads is 1, 2, 4 or 8; head_dim a multiple of 64, at most 256.
template <class Element>
void float_attention(FloatShape shape, float scale, const float* queries, const Element* keys, const Element* values,
                     float* out);

std::vector<half_bits> to_half(const float* from, int64_t count);

}  // namespace couplet::bench
