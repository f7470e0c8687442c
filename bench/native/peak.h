// What one core can do of the arithmetic of a nearest-centroid search and of nothing else: d = x - c; sum = fma(d, d, sum),
// all in registers, eight sums at a time (an fma takes 4 cycles, two start in each). GFLOP/s, 3 operations a lane.
#pragma once

#include "measure.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace couplet::bench {

[[gnu::target("avx512f")]] inline void squares_avx512(int rounds) {
  __m512 sums[8], values[8];
  for (int i = 0; i < 8; ++i) sums[i] = values[i] = _mm512_set1_ps(1e-3f * static_cast<float>(i));
  __m512 centroid = _mm512_set1_ps(1e-4f);
  for (int round = 0; round < rounds; ++round) {
    asm volatile("" : "+v"(centroid));  // or the subtractions would leave the loop
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __m512 const difference = _mm512_sub_ps(values[i], centroid);
      sums[i] = _mm512_fmadd_ps(difference, difference, sums[i]);
    }
  }
  for (int i = 0; i < 8; ++i) asm volatile("" : "+v"(sums[i]));
}

[[gnu::target("avx2,fma")]] inline void squares_avx2(int rounds) {
  __m256 sums[8], values[4];
  for (int i = 0; i < 8; ++i) sums[i] = _mm256_set1_ps(1e-3f * static_cast<float>(i));
  for (int i = 0; i < 4; ++i) values[i] = sums[i];
  __m256 centroid = _mm256_set1_ps(1e-4f);
  for (int round = 0; round < rounds; ++round) {
    asm volatile("" : "+x"(centroid));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __m256 const difference = _mm256_sub_ps(values[i & 3], centroid);
      sums[i] = _mm256_fmadd_ps(difference, difference, sums[i]);
    }
  }
  for (int i = 0; i < 8; ++i) asm volatile("" : "+x"(sums[i]));
}

inline double peak_gflops(void (*squares)(int rounds), int lanes) {
  constexpr int rounds = 20000;
  return 3.0 * lanes * 8 * rounds / seconds_of([&] { squares(rounds); }) * 1e-9;
}

}  // namespace couplet::bench
#endif
