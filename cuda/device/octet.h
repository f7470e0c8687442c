// Eight codes of neighbouring slots, the first slot a multiple of 8: code_bits whole bytes of a packed row (native/abi/layout.h).
// An octet is what one thread reads or writes, so that no two threads of a launch touch the same byte.
#pragma once

#include "../gpu.h"

namespace couplet::cuda {

// Where octets of one kv head lie, in pages of a page table; octets are counted from the first page of the call.
struct Octets {
  uint8_t* const* pages;  // device, of the first page on
  int64_t page_offset;    // bytes
  int64_t page_stride;    // bytes, from one kv head to the next
  int32_t row_bytes;      // of one group
  uint32_t page_octets;   // page_tokens / 8
  uint32_t first;         // octet of the first token
  uint32_t count;         // octets that hold a token of the call
  int32_t first_slot;     // of the first token in its octet, 0 to 7
  int32_t tokens;

  // Tokens [first_token, first_token + token_count) of a page table; the other members are known. A division of 64 bits would be a
  // call, and spill: first_token is below 2^35.
  __host__ __device__ void hold(uint8_t* const* page_table, int64_t first_token, int32_t token_count) {
    uint32_t const octet = static_cast<uint32_t>(first_token / 8);
    pages = page_table + octet / page_octets;
    first = octet % page_octets;
    first_slot = static_cast<int32_t>(first_token % 8);
    count = static_cast<uint32_t>((first_slot + int64_t{token_count} + 7) / 8);
    tokens = token_count;
  }

  // Of the octet's first slot, counted from the first token of the call: negative before it.
  __device__ int32_t token(uint32_t octet) const { return static_cast<int32_t>(8 * octet) - first_slot; }

  __device__ uint8_t* address(uint32_t octet, int32_t kv_head, int32_t group, int32_t code_bits) const {
    uint32_t const at = first + octet;
    uint32_t const page = at / page_octets;
    return pages[page] + page_offset + kv_head * page_stride + int64_t{group} * row_bytes +
           int64_t{at - page * page_octets} * code_bits;
  }
};

// The codes as two quads of 4 * code_bits bits.
struct Octet {
  uint64_t quads[2];

  __device__ __forceinline__ uint32_t code(int slot, int32_t code_bits) const {
    return static_cast<uint32_t>(quads[slot / 4] >> (slot % 4 * code_bits)) & ((1u << code_bits) - 1);
  }
};

__device__ __forceinline__ Octet load_octet(const uint8_t* bytes, int32_t code_bits) {
  if (code_bits == 8 && reinterpret_cast<uintptr_t>(bytes) % 8 == 0) {
    uint2 const words = *reinterpret_cast<const uint2*>(bytes);
    return {{words.x, words.y}};
  }
  if (code_bits == 10 && reinterpret_cast<uintptr_t>(bytes) % 2 == 0) {
    const uint16_t* const words = reinterpret_cast<const uint16_t*>(bytes);
    uint64_t const middle = words[2];
    return {{words[0] | uint64_t{words[1]} << 16 | (middle & 0xff) << 32,
             middle >> 8 | uint64_t{words[3]} << 8 | uint64_t{words[4]} << 24}};
  }
  // The second quad starts at bit 4 * code_bits: in the middle of a byte when that is odd.
  Octet octet{};
  int32_t const half = code_bits / 2;
  for (int32_t i = 0; i < half; ++i) octet.quads[0] |= uint64_t{bytes[i]} << (8 * i);
  if (code_bits % 2 == 0) {
    for (int32_t i = half; i < code_bits; ++i) octet.quads[1] |= uint64_t{bytes[i]} << (8 * (i - half));
    return octet;
  }
  octet.quads[0] |= uint64_t{bytes[half] & 0xfu} << (8 * half);
  octet.quads[1] = bytes[half] >> 4;
  for (int32_t i = half + 1; i < code_bits; ++i) octet.quads[1] |= uint64_t{bytes[i]} << (8 * (i - half) - 4);
  return octet;
}

// Writes the codes of slots [first, end) and leaves all other bits. Codes of other slots have to be 0.
__device__ __forceinline__ void store_octet(uint8_t* bytes, int32_t code_bits, const Octet& octet, int32_t first,
                                            int32_t end) {
  int32_t const first_bit = first * code_bits;
  int32_t const end_bit = end * code_bits;
  for (int32_t i = first_bit / 8; 8 * i < end_bit; ++i) {
    // Bits 8 i to 8 i + 7 of the stream: from the first quad, the second, or both.
    int32_t const into_second = 8 * i - 4 * code_bits;
    uint64_t value = into_second >= 0 ? octet.quads[1] >> into_second : octet.quads[0] >> (8 * i);
    if (into_second < 0 && into_second > -8) value |= octet.quads[1] << -into_second;
    int32_t const low = max(first_bit - 8 * i, 0);
    int32_t const high = min(end_bit - 8 * i, 8);
    if (high - low == 8) {
      bytes[i] = static_cast<uint8_t>(value);
      continue;
    }
    uint32_t const mask = (1u << high) - (1u << low);
    bytes[i] = static_cast<uint8_t>((bytes[i] & ~mask) | (static_cast<uint32_t>(value) & mask));
  }
}

}  // namespace couplet::cuda
