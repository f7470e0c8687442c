// One register of float32 lanes, spelled once for each instruction set: what nearest_body.h is written in.
// Included by files that define COUPLET_ISA; everything here is inside that namespace and has internal linkage.
#pragma once

#include <stdint.h>

#include "half.h"

#if defined(__AVX2__)
#include "intrinsics.h"
#endif

namespace couplet::cpu::COUPLET_ISA {
namespace {

#if defined(__AVX512F__)

constexpr int lanes = 16;
using Floats = __m512;
using Indices = __m512i;

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }
inline Floats broadcast(float a) { return _mm512_set1_ps(a); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats square(Floats a) { return _mm512_mul_ps(a, a); }
inline Floats add_square(Floats sum, Floats a) { return _mm512_fmadd_ps(a, a, sum); }
inline Indices broadcast_index(int32_t a) { return _mm512_set1_epi32(a); }
inline Indices count_up() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Indices add(Indices a, Indices b) { return _mm512_add_epi32(a, b); }
inline void store_low(uint16_t* to, Indices a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(a));
}

// Where candidate < best: best = candidate, index = candidate_index.
inline void keep_smaller(Floats& best, Indices& index, Floats candidate, Indices candidate_index) {
  __mmask16 const smaller = _mm512_cmp_ps_mask(candidate, best, _CMP_LT_OQ);
  best = _mm512_min_ps(candidate, best);
  index = _mm512_mask_mov_epi32(index, smaller, candidate_index);
}

// The smallest lane of best, and of the lanes that hold it the smallest index.
inline int32_t smallest(Floats best, Indices index, float* distance) {
  *distance = _mm512_reduce_min_ps(best);
  __mmask16 const ties = _mm512_cmp_ps_mask(best, _mm512_set1_ps(*distance), _CMP_EQ_OQ);
  return _mm512_mask_reduce_min_epi32(ties, index);
}

// Bit i is set where lane i is not inside [low, high).
inline uint32_t outside(Floats a, float low, float high) {
  return _mm512_cmp_ps_mask(a, _mm512_set1_ps(low), _CMP_LT_OQ) |
         _mm512_cmp_ps_mask(a, _mm512_set1_ps(high), _CMP_GE_OQ);
}

inline float widen(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }

#elif defined(__AVX2__)

constexpr int lanes = 8;
using Floats = __m256;
using Indices = __m256i;

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Floats a) { _mm256_storeu_ps(to, a); }
inline Floats broadcast(float a) { return _mm256_set1_ps(a); }
inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats square(Floats a) { return _mm256_mul_ps(a, a); }
inline Floats add_square(Floats sum, Floats a) { return _mm256_fmadd_ps(a, a, sum); }
inline Indices broadcast_index(int32_t a) { return _mm256_set1_epi32(a); }
inline Indices count_up() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline Indices add(Indices a, Indices b) { return _mm256_add_epi32(a, b); }
inline void store_low(uint16_t* to, Indices a) {
  __m128i const packed = _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}

inline void keep_smaller(Floats& best, Indices& index, Floats candidate, Indices candidate_index) {
  Floats const smaller = _mm256_cmp_ps(candidate, best, _CMP_LT_OQ);
  best = _mm256_min_ps(candidate, best);
  index = _mm256_blendv_epi8(index, candidate_index, _mm256_castps_si256(smaller));
}

inline int32_t smallest(Floats best, Indices index, float* distance) {
  __m128 low = _mm_min_ps(_mm256_castps256_ps128(best), _mm256_extractf128_ps(best, 1));
  low = _mm_min_ps(low, _mm_movehl_ps(low, low));
  low = _mm_min_ss(low, _mm_movehdup_ps(low));
  *distance = _mm_cvtss_f32(low);
  Floats const ties = _mm256_cmp_ps(best, _mm256_broadcastss_ps(low), _CMP_EQ_OQ);
  __m256i const held = _mm256_blendv_epi8(_mm256_set1_epi32(INT32_MAX), index, _mm256_castps_si256(ties));
  __m128i least = _mm_min_epi32(_mm256_castsi256_si128(held), _mm256_extracti128_si256(held, 1));
  least = _mm_min_epi32(least, _mm_shuffle_epi32(least, 0x4e));
  least = _mm_min_epi32(least, _mm_shuffle_epi32(least, 0xb1));
  return _mm_cvtsi128_si32(least);
}

inline uint32_t outside(Floats a, float low, float high) {
  Floats const below = _mm256_cmp_ps(a, _mm256_set1_ps(low), _CMP_LT_OQ);
  Floats const above = _mm256_cmp_ps(a, _mm256_set1_ps(high), _CMP_GE_OQ);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_or_ps(below, above)));
}

inline float widen(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }

#else

// GCC and Clang vectors of four: SSE2 or NEON, whatever the target always has.
constexpr int lanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Indices __attribute__((vector_size(16)));

inline Floats load(const float* from) {
  Floats a;
  __builtin_memcpy(&a, from, sizeof a);
  return a;
}
inline void store(float* to, Floats a) { __builtin_memcpy(to, &a, sizeof a); }
inline Floats broadcast(float a) { return Floats{a, a, a, a}; }
inline Floats subtract(Floats a, Floats b) { return a - b; }
inline Floats square(Floats a) { return a * a; }

#if defined(__FP_FAST_FMAF)
inline Floats add_square(Floats sum, Floats a) {
  for (int i = 0; i < lanes; ++i) sum[i] = __builtin_fmaf(a[i], a[i], sum[i]);
  return sum;
}
#else
// fma(a, a, sum) for sum >= 0 on a machine without it; the library's fmaf is a call per number. The square of a float is
// exact in double. The sum of the doubles is rounded to odd (a neighbour with an odd last bit, unless it is exact), so the
// second rounding, to float, cannot see a tie that is none: 53 >= 2 * 24 + 2 bits make the result the fma's, bit for bit.
typedef double Doubles __attribute__((vector_size(16)));
typedef int64_t Bits __attribute__((vector_size(16)));

inline Doubles add_rounding_to_odd(Doubles sum, Doubles square) {
  Doubles const rounded = sum + square;
  Doubles const rest = rounded - square;
  Doubles const lost =
      (square - (rounded - rest)) + (sum - rest);  // exactly sum + square - rounded; NaN for infinities
  Bits bits;
  __builtin_memcpy(&bits, &rounded, sizeof bits);
  Bits const even = (bits & 1) - 1;  // all ones or zero
  bits -= (lost > 0) & even;         // a true comparison is -1
  bits += (lost < 0) & even;
  Doubles odd;
  __builtin_memcpy(&odd, &bits, sizeof odd);
  return odd;
}

inline Floats add_square(Floats sum, Floats a) {
  Doubles const low_a = {a[0], a[1]}, high_a = {a[2], a[3]};
  Doubles const low = add_rounding_to_odd(Doubles{sum[0], sum[1]}, low_a * low_a);
  Doubles const high = add_rounding_to_odd(Doubles{sum[2], sum[3]}, high_a * high_a);
  return Floats{static_cast<float>(low[0]), static_cast<float>(low[1]), static_cast<float>(high[0]),
                static_cast<float>(high[1])};
}
#endif

inline Indices broadcast_index(int32_t a) { return Indices{a, a, a, a}; }
inline Indices count_up() { return Indices{0, 1, 2, 3}; }
inline Indices add(Indices a, Indices b) { return a + b; }
inline void store_low(uint16_t* to, Indices a) {
  for (int i = 0; i < lanes; ++i) to[i] = static_cast<uint16_t>(a[i]);
}

inline void keep_smaller(Floats& best, Indices& index, Floats candidate, Indices candidate_index) {
  Indices const smaller = candidate < best;
  best = smaller ? candidate : best;
  index = smaller ? candidate_index : index;
}

inline int32_t smallest(Floats best, Indices index, float* distance) {
  int lane = 0;
  for (int i = 1; i < lanes; ++i)
    if (best[i] < best[lane] || (best[i] == best[lane] && index[i] < index[lane])) lane = i;
  *distance = best[lane];
  return index[lane];
}

inline uint32_t outside(Floats a, float low, float high) {
  uint32_t mask = 0;
  for (int i = 0; i < lanes; ++i) mask |= static_cast<uint32_t>(a[i] < low || a[i] >= high) << i;
  return mask;
}

inline float widen(uint16_t half) { return half_to_float(half); }

#endif

}  // namespace
}  // namespace couplet::cpu::COUPLET_ISA
