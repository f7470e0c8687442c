// Vectors of float32 for code that is written once and compiled for each instruction set. Included only by the bodies'
// own files (_portable, _avx2, _avx512), each of which names a namespace of its own in COUPLET_BODY: nothing here may be
// shared between them, or the linker would keep one copy for all processors.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include "intrinsics.h"
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace couplet::cpu::COUPLET_BODY {

#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif

typedef float Floats __attribute__((vector_size(width * 4)));
typedef int32_t Ints __attribute__((vector_size(width * 4)));
typedef float FloatsAnywhere __attribute__((vector_size(width * 4), aligned(4), may_alias));

// A list of all lanes, to name the lanes of shuffles by.
template <int... lanes>
struct Lanes {};
template <int count, int... lanes>
struct CountLanes : CountLanes<count - 1, count - 1, lanes...> {};
template <int... lanes>
struct CountLanes<0, lanes...> {
  using Type = Lanes<lanes...>;
};
using AllLanes = typename CountLanes<width>::Type;

static inline Floats load(const float* from) { return *reinterpret_cast<const FloatsAnywhere*>(from); }
static inline void store(float* to, Floats value) { *reinterpret_cast<FloatsAnywhere*>(to) = value; }
static inline Floats all(float value) { return value - Floats{}; }
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// a * b + c
static inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// c - a * b
static inline Floats fused_negative(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fnmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fnmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmsq_f32(c, a, b);
#else
  return c - a * b;
#endif
}

static inline float sum_of(Floats value) {
  float sum = 0;
  for (int lane = 0; lane < width; ++lane) sum += value[lane];
  return sum;
}

static inline float largest_of(Floats value) {
  float largest = value[0];
  for (int lane = 1; lane < width; ++lane) largest = value[lane] > largest ? value[lane] : largest;
  return largest;
}

// Lane i of the result is v[i ^ distance].
template <int distance, int... lane>
static inline Floats swapped(Floats v, Lanes<lane...>) {
  return __builtin_shufflevector(v, v, (lane ^ distance)...);
}

static inline bool any(Ints lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(lanes), reinterpret_cast<__m512i>(lanes)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(lanes)) != 0;
#else
  return (lanes[0] | lanes[1] | lanes[2] | lanes[3]) != 0;
#endif
}

// 2^fraction for |fraction| <= 1/2: minimax polynomial, relative error 9.1e-8 before rounding.
static inline Floats exp2_of_fraction(Floats fraction) {
  Floats power = all(1.326472726e-3f);
  power = fused(power, fraction, all(9.671512700e-3f));
  power = fused(power, fraction, all(5.550733744e-2f));
  power = fused(power, fraction, all(2.402224208e-1f));
  power = fused(power, fraction, all(6.931469776e-1f));
  return fused(power, fraction, all(1.0f));
}

// 2^x for x <= 127; 0 (or a denormal number) below -126.
static inline Floats exp2_of(Floats x) {
#if defined(__AVX512F__)
  Floats const bounded = _mm512_max_ps(x, all(-200.0f));  // of -infinity no fraction can be taken
  Floats const whole = _mm512_roundscale_ps(bounded, 0);
  return _mm512_scalef_ps(exp2_of_fraction(bounded - whole), whole);
#else
  Floats const magic = all(12582912.0f);  // 1.5 * 2^23: its sum with x has round(x) in the low bits
  Floats const bounded = larger(x, all(-126.0f));
  Floats const shifted = bounded + magic;
  Ints const exponent = (reinterpret_cast<Ints>(shifted) << 23) + 0x3f800000;
  Floats const result = exp2_of_fraction(bounded - (shifted - magic)) * reinterpret_cast<Floats>(exponent);
  return x < -126.0f ? Floats{} : result;
#endif
}

// tanh(x): an odd polynomial below 0.625 (relative error 4.2e-9 before rounding), 1 - 2 / (e^2x + 1) above.
static inline Floats tanh_of(Floats x) {
  Floats const square = x * x;
  Floats small = all(-5.717044657e-3f);
  small = fused(small, square, all(2.065058701e-2f));
  small = fused(small, square, all(-5.374349802e-2f));
  small = fused(small, square, all(1.333149129e-1f));
  small = fused(small, square, all(-3.333328393e-1f));
  small = fused(small * square, x, x);
  Floats const magnitude = x < 0 ? -x : x;
  Floats const bounded = magnitude > 20.0f ? all(20.0f) : magnitude;
  Floats const large = 1.0f - 2.0f / (exp2_of(bounded * 2.885390082f) + 1.0f);
  return magnitude < 0.625f ? small : (x < 0 ? -large : large);
}

// c[row][column] = (add ? c : 0) + sum over depth of a[row][depth] * b[depth][column].
struct Product {
  int32_t rows;
  int32_t columns;  // a multiple of `width`
  int32_t depth;
  bool add;
  const float* a;
  int64_t a_row_stride;
  int64_t a_depth_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
};

// `rows` rows and `vectors` vectors of columns: b is read once for all rows; the sums stay in registers.
template <int rows, int vectors>
static inline void multiply_block(const Product& of) {
  Floats sums[rows][vectors] = {};
  const float* a = of.a;
  const float* b = of.b;
  int64_t const a_row_stride = of.a_row_stride, a_depth_stride = of.a_depth_stride, b_stride = of.b_stride;
  for (int32_t depth = of.depth; depth > 0; --depth, a += a_depth_stride, b += b_stride) {
    Floats columns[vectors];
    for (int v = 0; v < vectors; ++v) columns[v] = load(b + v * width);
    for (int r = 0; r < rows; ++r) {
      Floats const factor = all(a[r * a_row_stride]);
      for (int v = 0; v < vectors; ++v) sums[r][v] = fused(factor, columns[v], sums[r][v]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      float* const to = of.c + r * of.c_stride + v * width;
      store(to, of.add ? load(to) + sums[r][v] : sums[r][v]);
    }
}

// Registers: rows * vectors sums, `vectors` columns and one factor: 6 * 4 + 5 of 32 (AVX-512), 6 * 2 + 3 of 16 (AVX2),
// 4 * 2 + 3 of 16 (SSE; NEON has 32).
constexpr int block_rows = width == 4 ? 4 : 6;
constexpr int block_vectors = width == 16 ? 4 : 2;

template <int vectors>
static inline void multiply_columns(Product of) {
  for (; of.rows >= block_rows; of.rows -= block_rows) {
    multiply_block<block_rows, vectors>(of);
    of.a += block_rows * of.a_row_stride;
    of.c += block_rows * of.c_stride;
  }
  switch (of.rows) {
    case 5: return multiply_block<5, vectors>(of);
    case 4: return multiply_block<4, vectors>(of);
    case 3: return multiply_block<3, vectors>(of);
    case 2: return multiply_block<2, vectors>(of);
    case 1: return multiply_block<1, vectors>(of);
    default: return;
  }
}

static inline void multiply(Product of) {
  constexpr int block = block_vectors * width;
  for (; of.columns >= block; of.columns -= block, of.b += block, of.c += block) multiply_columns<block_vectors>(of);
  for (; of.columns > 0; of.columns -= width, of.b += width, of.c += width) multiply_columns<1>(of);
}

}  // namespace couplet::cpu::COUPLET_BODY
