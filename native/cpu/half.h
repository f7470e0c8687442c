// IEEE binary16 <-> float32 in plain integer and float operations: what F16C instructions compute, bit for bit.
// Internal linkage (static), so that files with different instruction sets may include it.
#pragma once

#include <stdint.h>

namespace couplet::cpu {

// Exact; an infinity or a NaN stays one.
static inline float half_to_float(uint16_t half) {
  uint32_t const magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  // 2^112 moves the exponent bias from 15 to 127 and normalizes subnormals on the way.
  float const scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  uint32_t bits = (half & 0x7c00u) == 0x7c00u ? (0x7f800000u | magnitude) : __builtin_bit_cast(uint32_t, scaled);
  bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
  return __builtin_bit_cast(float, bits);
}

// Rounds to nearest, ties to even; 65520 and more becomes an infinity.
static inline uint16_t float_to_half(float value) {
  uint32_t const bits = __builtin_bit_cast(uint32_t, value);
  uint32_t const sign = bits >> 16 & 0x8000u;
  uint32_t const magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);  // a quiet NaN with the upper payload bits
  } else if (magnitude >= 0x47800000u) {          // 65536 and infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5, whose last bit is 2^-24, rounds to a subnormal
    float const rounded = __builtin_bit_cast(float, magnitude) + 0.5f;
    half = __builtin_bit_cast(uint32_t, rounded) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;  // 0x38000000 = (127 - 15) << 23
  }
  return static_cast<uint16_t>(sign | half);
}

}  // namespace couplet::cpu
