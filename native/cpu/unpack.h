// Codes out of a packed row (native/abi/layout.h): a little-endian stream of `bits` bits a code.
//
// Eight codes fill exactly `bits` bytes, so slots that are multiples of 8 start on a byte: eights are unpacked by whole words
// whose load is as long as the codes, and nothing outside the bytes of the asked slots is ever read.
// Internal linkage (static) and no std, so that files with different instruction sets may include it.
#pragma once

#include <stdint.h>

namespace couplet::cpu {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are loaded and stored as the stream has them");

// The code of one slot.
static inline uint16_t unpack_code(const uint8_t* row, int32_t bits, int64_t slot) {
  int64_t const bit = slot * bits;
  const uint8_t* const byte = row + (bit >> 3);
  int32_t const shift = static_cast<int32_t>(bit & 7);
  uint32_t word = byte[0];
  if (shift + bits > 8) word |= static_cast<uint32_t>(byte[1]) << 8;
  if (shift + bits > 16) word |= static_cast<uint32_t>(byte[2]) << 16;
  return static_cast<uint16_t>(word >> shift & ((1u << bits) - 1));
}

// 4 * bits low bits -> four uint16 lanes of a word, in two steps that each halve the distance still to go.
template <int bits>
static inline uint64_t spread_four(uint64_t packed) {
  constexpr uint64_t one = (uint64_t{1} << bits) - 1;
  constexpr uint64_t two = (uint64_t{1} << 2 * bits) - 1;
  constexpr uint64_t lanes = one | one << 32;
  uint64_t const pairs = (packed & two) | (packed >> 2 * bits & two) << 32;
  return (pairs & lanes) | (pairs >> bits & lanes) << 16;
}

// bits bytes -> codes[8].
template <int bits>
static inline void unpack_eight(const uint8_t* bytes, uint16_t* codes) {
  static_assert(bits >= 1 && bits <= 12);
  uint64_t low = 0;
  uint64_t high = 0;
  if constexpr (bits <= 8) {
    __builtin_memcpy(&low, bytes, bits);
    high = low >> 4 * bits;
  } else {
    __builtin_memcpy(&low, bytes, 8);
    __builtin_memcpy(&high, bytes + 8, bits - 8);
    high = high << (64 - 4 * bits) | low >> 4 * bits;
  }
  low = spread_four<bits>(low);
  high = spread_four<bits>(high);
  __builtin_memcpy(codes, &low, 8);
  __builtin_memcpy(codes + 4, &high, 8);
}

// Codes of slots first .. first + count - 1 -> codes[count].
template <int bits>
static inline void unpack_codes(const uint8_t* row, int64_t first, int32_t count, uint16_t* codes) {
  int64_t const end = first + count;
  int64_t slot = first;
  for (; slot < end && slot % 8 != 0; ++slot) *codes++ = unpack_code(row, bits, slot);
  for (; slot + 8 <= end; slot += 8, codes += 8) {
    const uint8_t* const bytes = row + slot / 8 * bits;
    if constexpr (bits == 8) {
      for (int i = 0; i < 8; ++i) codes[i] = bytes[i];
    } else {
      unpack_eight<bits>(bytes, codes);
    }
  }
  for (; slot < end; ++slot) *codes++ = unpack_code(row, bits, slot);
}

static inline void unpack_codes(const uint8_t* row, int32_t bits, int64_t first, int32_t count, uint16_t* codes) {
  switch (bits) {
    case 1: return unpack_codes<1>(row, first, count, codes);
    case 2: return unpack_codes<2>(row, first, count, codes);
    case 3: return unpack_codes<3>(row, first, count, codes);
    case 4: return unpack_codes<4>(row, first, count, codes);
    case 5: return unpack_codes<5>(row, first, count, codes);
    case 6: return unpack_codes<6>(row, first, count, codes);
    case 7: return unpack_codes<7>(row, first, count, codes);
    case 8: return unpack_codes<8>(row, first, count, codes);
    case 9: return unpack_codes<9>(row, first, count, codes);
    case 10: return unpack_codes<10>(row, first, count, codes);
    case 11: return unpack_codes<11>(row, first, count, codes);
    case 12: return unpack_codes<12>(row, first, count, codes);
    default: return;
  }
}

}  // namespace couplet::cpu
