// Codes into a packed row (native/abi/layout.h): the inverse of unpack.h, bit by bit the same stream.
//
// Only bits of the given slots change: a byte shared with another slot is read, merged and written back, so two threads
// must not pack into the same row at the same time (encode gives a row to one task).
#pragma once

#include <stdint.h>

namespace couplet::cpu {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are loaded and stored as the stream has them");

static inline void pack_code(uint8_t* row, int32_t bits, int64_t slot, uint16_t code) {
  int64_t const bit = slot * bits;
  uint8_t* byte = row + (bit >> 3);
  int32_t const shift = static_cast<int32_t>(bit & 7);
  uint32_t mask = ((1u << bits) - 1) << shift;
  uint32_t value = static_cast<uint32_t>(code) << shift;
  for (; mask; mask >>= 8, value >>= 8, ++byte) *byte = static_cast<uint8_t>((*byte & ~mask) | (value & mask));
}

// Four uint16 lanes of a word -> 4 * bits low bits.
template <int bits>
static inline uint64_t squeeze_four(uint64_t codes) {
  constexpr uint64_t lanes = 0x0000ffff0000ffffu;
  uint64_t const pairs = (codes & lanes) | (codes >> 16 & lanes) << bits;
  return (pairs & 0xffffffffu) | pairs >> 32 << 2 * bits;
}

// codes[8], each below 2^bits -> bits bytes.
template <int bits>
static inline void pack_eight(const uint16_t* codes, uint8_t* bytes) {
  static_assert(bits >= 1 && bits <= 12);
  uint64_t low;
  uint64_t high;
  __builtin_memcpy(&low, codes, 8);
  __builtin_memcpy(&high, codes + 4, 8);
  low = squeeze_four<bits>(low);
  high = squeeze_four<bits>(high);
  low |= high << 4 * bits;
  if constexpr (bits <= 8) {
    __builtin_memcpy(bytes, &low, bits);
  } else {
    high >>= 64 - 4 * bits;
    __builtin_memcpy(bytes, &low, 8);
    __builtin_memcpy(bytes + 8, &high, bits - 8);
  }
}

// codes[count] -> slots first .. first + count - 1.
template <int bits>
static inline void pack_codes(uint8_t* row, int64_t first, int32_t count, const uint16_t* codes) {
  int64_t const end = first + count;
  int64_t slot = first;
  for (; slot < end && slot % 8 != 0; ++slot) pack_code(row, bits, slot, *codes++);
  for (; slot + 8 <= end; slot += 8, codes += 8) pack_eight<bits>(codes, row + slot / 8 * bits);
  for (; slot < end; ++slot) pack_code(row, bits, slot, *codes++);
}

static inline void pack_codes(uint8_t* row, int32_t bits, int64_t first, int32_t count, const uint16_t* codes) {
  switch (bits) {
    case 1: return pack_codes<1>(row, first, count, codes);
    case 2: return pack_codes<2>(row, first, count, codes);
    case 3: return pack_codes<3>(row, first, count, codes);
    case 4: return pack_codes<4>(row, first, count, codes);
    case 5: return pack_codes<5>(row, first, count, codes);
    case 6: return pack_codes<6>(row, first, count, codes);
    case 7: return pack_codes<7>(row, first, count, codes);
    case 8: return pack_codes<8>(row, first, count, codes);
    case 9: return pack_codes<9>(row, first, count, codes);
    case 10: return pack_codes<10>(row, first, count, codes);
    case 11: return pack_codes<11>(row, first, count, codes);
    case 12: return pack_codes<12>(row, first, count, codes);
    default: return;
  }
}

}  // namespace couplet::cpu
