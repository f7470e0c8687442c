// Rows and tokens of the bodies that take any codec and shape.
#pragma once

#include "step.h"

namespace couplet::cuda::attend {

// Rows of one kv head and sequence: row r is query token (first_row + r) / group_heads, head (first_row + r) % group_heads of the
// kv head.
struct Rows {
  const couplet_attend_sequence* sequence;
  int64_t first_row;
  int count;
  int kv_head;
};

__device__ __forceinline__ int position_of(const Step& step, const Rows& rows, int row) {
  return rows.sequence->first_query + static_cast<int>((rows.first_row + row) / step.group_heads);
}

// A tile's token: nothing, a slot of a page, or a row in full precision.
struct Token {
  const uint8_t* page;
  DenseToken dense;
  int slot;
};

template <bool Coded>
__device__ __forceinline__ Token token_at(const couplet_attend_params& params, const couplet_attend_sequence& sequence,
                                          int position, int kv_head) {
  if constexpr (Coded)
    return {sequence.pages[position / params.page_tokens], {nullptr, nullptr}, position % params.page_tokens};
  else
    return {nullptr, dense_token(sequence, position, kv_head), 0};
}

// A code may straddle three bytes; none behind the row's end is read.
__device__ __forceinline__ int read_code(const uint8_t* row, int slot, int code_bits) {
  int const bit = slot * code_bits;
  const uint8_t* const bytes = row + bit / 8;
  int const end = bit % 8 + code_bits;
  unsigned word = bytes[0];
  if (end > 8) word |= static_cast<unsigned>(bytes[1]) << 8;
  if (end > 16) word |= static_cast<unsigned>(bytes[2]) << 16;
  return static_cast<int>(word >> bit % 8 & ((1u << code_bits) - 1));
}

}  // namespace couplet::cuda::attend
