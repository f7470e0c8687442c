#include "float_attention.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#if !defined(__AVX512F__)
#error "the float peers are written for AVX-512"
#endif

namespace couplet::bench {
namespace {

constexpr int kTile =
    32;  // tokens a tile: 32 x 128 x 4 bytes of keys are 16 KB, half of the first cache with the values
constexpr float kSlack =
    8.0f;  // the running maximum follows only when it grew by more: e^8 x 32768 tokens fit in float32

__m512 load16(const float* from) { return _mm512_loadu_ps(from); }
__m512 load16(const half_bits* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Lane i of the result is the sum of the lanes of rows[i].
__m512 sum_rows(__m512 (&rows)[16]) {
  for (int i = 0; i < 8; ++i)
    rows[i] = _mm512_add_ps(_mm512_shuffle_f32x4(rows[i], rows[i + 8], 0x44),
                            _mm512_shuffle_f32x4(rows[i], rows[i + 8], 0xEE));
  for (int i = 0; i < 4; ++i)
    rows[i] = _mm512_add_ps(_mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88),
                            _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xDD));
  for (int i = 0; i < 2; ++i)
    rows[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[i], rows[i + 2]), _mm512_unpackhi_ps(rows[i], rows[i + 2]));
  __m512 const sums = _mm512_add_ps(_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[0], rows[1]));
  return _mm512_shuffle_f32x4(sums, sums, _MM_SHUFFLE(3, 1, 2, 0));
}

// e^x for x <= 0: 2^n times a polynomial of the rest r, |r| <= ln 2 / 2; relative error below 2e-7.
__m512 exp16(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  __m512 const n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  for (float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, n);
}

// Scores of a tile, [token][head]: 16 / Heads tokens at a time, one accumulator for each pair of token and head.
template <int Heads, class Element>
void score_tile(const float* queries, const Element* keys, int head_dim, int tokens, float* scores) {
  constexpr int kBlock = 16 / Heads;
  for (int t = 0; t < tokens; t += kBlock) {
    __m512 sums[16];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int c = 0; c < head_dim; c += 16) {
      __m512 query[Heads];
#pragma GCC unroll 8
      for (int h = 0; h < Heads; ++h) query[h] = _mm512_loadu_ps(queries + h * head_dim + c);
#pragma GCC unroll 16
      for (int i = 0; i < kBlock; ++i) {
        __m512 const key = load16(keys + static_cast<int64_t>(std::min(t + i, tokens - 1)) * head_dim + c);
#pragma GCC unroll 8
        for (int h = 0; h < Heads; ++h) sums[i * Heads + h] = _mm512_fmadd_ps(key, query[h], sums[i * Heads + h]);
      }
    }
    _mm512_storeu_ps(scores + t * Heads, sum_rows(sums));
  }
}

// out[head][channel] += p[token][head] * value[token][channel], 64 channels at a time in registers.
template <int Heads, class Element>
void add_values(const float* p, const Element* values, int head_dim, int tokens, float* out) {
  constexpr int kWide = Heads >= 8 ? 2 : 4;
  for (int c = 0; c < head_dim; c += kWide * 16) {
    __m512 sums[Heads][kWide];
#pragma GCC unroll 8
    for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) sums[h][w] = _mm512_loadu_ps(out + h * head_dim + c + w * 16);
    for (int t = 0; t < tokens; ++t) {
      __m512 value[kWide];
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) value[w] = load16(values + static_cast<int64_t>(t) * head_dim + c + w * 16);
#pragma GCC unroll 8
      for (int h = 0; h < Heads; ++h) {
        __m512 const weight = _mm512_set1_ps(p[t * Heads + h]);
#pragma GCC unroll 4
        for (int w = 0; w < kWide; ++w) sums[h][w] = _mm512_fmadd_ps(weight, value[w], sums[h][w]);
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) _mm512_storeu_ps(out + h * head_dim + c + w * 16, sums[h][w]);
  }
}

template <int Heads>
__mmask16 lanes_of(int head) {
  unsigned mask = 0;
  for (int lane = head; lane < 16; lane += Heads) mask |= 1u << lane;
  return static_cast<__mmask16>(mask);
}

template <int Heads, class Element>
void attend_head(const float* queries, const Element* keys, const Element* values, FloatShape shape, float* out) {
  alignas(64) float scores[kTile * Heads + 16];
  float highest[Heads];
  std::fill_n(highest, Heads, -INFINITY);
  __m512 totals = _mm512_setzero_ps();  // lane l: head l % Heads
  std::fill_n(out, Heads * shape.head_dim, 0.0f);
  for (int first = 0; first < shape.tokens; first += kTile) {
    int const tokens = std::min(kTile, shape.tokens - first);
    int64_t const at = static_cast<int64_t>(first) * shape.head_dim;
    score_tile<Heads>(queries, keys + at, shape.head_dim, tokens, scores);
    for (int h = 0; h < Heads; ++h) {
      float top = scores[h];
      for (int t = 1; t < tokens; ++t) top = std::max(top, scores[t * Heads + h]);
      if (top <= highest[h] + kSlack) continue;
      float const shrink = std::exp(highest[h] - top);
      totals = _mm512_mask_mul_ps(totals, lanes_of<Heads>(h), totals, _mm512_set1_ps(shrink));
      for (int c = 0; c < shape.head_dim; ++c) out[h * shape.head_dim + c] *= shrink;
      highest[h] = top;
    }
    for (int i = tokens * Heads; i < kTile * Heads; ++i) scores[i] = -INFINITY;
    alignas(64) float tops[16];
    for (int i = 0; i < 16; ++i) tops[i] = highest[i % Heads];
    for (int i = 0; i < kTile * Heads; i += 16) {
      __m512 const p = exp16(_mm512_sub_ps(_mm512_load_ps(scores + i), _mm512_load_ps(tops)));
      totals = _mm512_add_ps(totals, p);
      _mm512_store_ps(scores + i, p);
    }
    add_values<Heads>(scores, values + at, shape.head_dim, tokens, out);
  }
  for (int h = 0; h < Heads; ++h) {
    float const total = _mm512_mask_reduce_add_ps(lanes_of<Heads>(h), totals);
    for (int c = 0; c < shape.head_dim; ++c) out[h * shape.head_dim + c] /= total;
  }
}

}  // namespace

template <class Element>
void float_attention(FloatShape shape, float scale, const float* queries, const Element* keys, const Element* values,
                     float* out) {
  int const heads = shape.query_heads / shape.kv_heads;
  auto const attend = heads == 1   ? attend_head<1, Element>
                      : heads == 2 ? attend_head<2, Element>
                      : heads == 4 ? attend_head<4, Element>
                                   : attend_head<8, Element>;
  std::vector<float> scaled(queries, queries + static_cast<int64_t>(shape.query_heads) * shape.head_dim);
  for (float& x : scaled) x *= scale;
  int64_t const rows = static_cast<int64_t>(shape.tokens) * shape.head_dim;
  for (int h = 0; h < shape.kv_heads; ++h) {
    int64_t const at = static_cast<int64_t>(h) * heads * shape.head_dim;
    attend(scaled.data() + at, keys + h * rows, values + h * rows, shape, out + at);
  }
}

template void float_attention<float>(FloatShape, float, const float*, const float*, const float*, float*);
template void float_attention<half_bits>(FloatShape, float, const float*, const half_bits*, const half_bits*, float*);

std::vector<half_bits> to_half(const float* from, int64_t count) {
  std::vector<half_bits> out(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) out[static_cast<size_t>(i)] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
  return out;
}

}  // namespace couplet::bench
