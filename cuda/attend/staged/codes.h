// Codes of one group in registers, and the addresses of their rows.
#pragma once

#include "shape.h"

namespace couplet::cuda::attend::staged {

// Codes of 8 or 16 tokens in a row, of which the first is in the lowest bits.
template <class C, int Tokens>
struct Codes {
  static constexpr int count = Tokens * C::bits / 32 + (Tokens * C::bits % 32 ? 1 : 0);
  uint32_t words[count];

  // `row` holds the codes of a group of a page; `part` counts parts of `Tokens` tokens. 8 codes of 10 bits begin in the middle of a word where
  // part is odd; the last words of a row are then its end.
  __device__ __forceinline__ void load(const uint8_t* row, int part) {
    if constexpr (C::bits == 8 && Tokens == 8) {
      uint2 const pair = __ldg(reinterpret_cast<const uint2*>(row) + part);
      words[0] = pair.x;
      words[1] = pair.y;
    } else if constexpr (C::bits == 8) {
      uint4 const quad = __ldg(reinterpret_cast<const uint4*>(row) + part);
      words[0] = quad.x;
      words[1] = quad.y;
      words[2] = quad.z;
      words[3] = quad.w;
    } else {
      const uint32_t* const from = reinterpret_cast<const uint32_t*>(row + (part * (Tokens * C::bits / 8) & ~3));
#pragma unroll
      for (int i = 0; i < count; ++i) words[i] = __ldg(from + i);
    }
  }
  // Once, after load and before the codes are read.
  __device__ __forceinline__ void align(int part) {
    if constexpr (C::bits == 10 && Tokens == 8) {
      int const shift = part % 2 * 16;
      words[0] = __funnelshift_r(words[0], words[1], shift);
      words[1] = __funnelshift_r(words[1], words[2], shift);
      words[2] >>= shift;
    }
  }
  // Tokens 2 and on become tokens 0 and on.
  __device__ __forceinline__ void advance_two() {
#pragma unroll
    for (int i = 0; i < count; ++i)
      words[i] = i + 1 < count ? __funnelshift_r(words[i], words[i + 1], 2 * C::bits) : words[i] >> (2 * C::bits);
  }
  // The code of token i, times 2^Shift; the other bits are 0. i is a constant once loops are unrolled.
  template <int Shift>
  __device__ __forceinline__ uint32_t scaled(int i) const {
    uint32_t const mask = static_cast<uint32_t>(C::centroids - 1) << Shift;
    int const bit = i * C::bits;
    int const low = bit % 32;
    if (low + C::bits > 32) return __funnelshift_r(words[bit / 32], words[bit / 32 + 1], low - Shift) & mask;
    return (low >= Shift ? words[bit / 32] >> (low - Shift) : words[bit / 32] << (Shift - low)) & mask;
  }
};

}  // namespace couplet::cuda::attend::staged
