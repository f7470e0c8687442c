// Decode attention on cq-2c8b, 4c8b and 8c8b codes: both codebooks of a kv head in shared memory as float16, products by tensor cores.
// This file has what is known of a shape at compile time, and which lane looks up what. docs/decisions/0003-cuda-attention-gather.md
// has the argument.
//
//   place    channels come in chunks of 8; a rotated chunk and its partner, or two others, are the lower and the upper one of a place.
//            Slot channel x of a half, 0 to dim / 2 - 1, lies in place x / 8. head_dim is rounded up to `dim`; places beyond it are 0
//   keys     are the B operand, columns = tokens, k = channels. Lane (g, t), with g = lane / 4 and t = lane % 4, looks up groups
//            4 step + t of both halves of token g of a tile, in the order of the token's class: two bits, 0 = g ^ g >> 2 and 1 = g >> 1, chosen
//            so that the lanes of one phase of a load never meet in a bank
//   queries  are the A operand. Its 8 lower rows, (bit 0, head), have some words in the order of a class with bit 1 = 0, its 8 upper rows the
//            words that change places with those where bit 1 is set. So a token's logit is the sum of a lower and an upper row
//   values   are the A operand, rows = (word, g), k = (token, channel of a word). A unit is 8 lanes' two words, 32 channels; lanes visit
//            unit u ^ bit 0 of the token
//   powers   are the B operand, columns = (channel of a word, head), k as above; once for the tokens of either bit 0. They are where the
//            logits are, or 16 lanes away
#pragma once

#include "../step.h"

namespace couplet::cuda::attend::gather {

inline constexpr int page_tokens = 64;
inline constexpr int unit_tokens = rotary_block;  // the query's angle is one block step and one offset

inline constexpr float nothing = -1e30f;  // the maximum of no logits
inline constexpr float unseen = -1e38f;   // the logit of a token that is not seen: 2^(unseen - nothing) is 0
inline constexpr float headroom = 10;     // powers stay below 2^10, far below the end of float16

inline constexpr int code_bytes = 256;  // from one code's rows to the next: a code is byte 1 of an address
inline constexpr int slab_bytes = 256 * code_bytes;

// Channels of a group; head_dim, rounded up; query heads in sets of four.
template <int Channels, int Dim, int Quads>
struct Shape {
  static_assert(Dim == 64 || Dim == 128);
  static constexpr int channels = Channels;
  static constexpr int dim = Dim;
  static constexpr int quads = Quads;
  static constexpr int heads = 4 * quads;
  static constexpr int warps = 8;
  static constexpr int threads = warps * 32;
  static constexpr int row_bytes = 2 * channels;
  static constexpr int words = channels / 2;  // of a row, 4 bytes each

  // Tokens: a warp has a part of a page after the other, whose codes are in registers; a tile is 8 of its tokens.
  static constexpr int warp_tokens = unit_tokens / warps;
  static constexpr int tiles = channels == 2 || quads == 2 ? 4 : 8;  // of a part
  static constexpr int part_tokens = 8 * tiles;
  static constexpr int parts = warp_tokens / part_tokens;
  static constexpr int phases = 2;  // tiles after which the angles of keys repeat and those of queries change
  static constexpr int sets = warp_tokens / 8 / phases;  // of query operands in a unit

  // Keys. Bits of a visit's (step, half) that bits 0 and 1 of a class change. 8 lanes with rows of 16 bytes make a phase, which two orders
  // part; 16 with rows of 8, which needs four; 32 with rows of 4 would need eight, and meet in twos.
  static constexpr int steps = dim / 8 / channels;
  static constexpr int key_words = dim / 8;  // of a token in one lane
  static constexpr int step_bit0 = channels == 2 ? 2 : steps > 1 ? 1 : 0;
  static constexpr int step_bit1 = channels == 2 ? (steps > 4 ? 4 : 1) : channels == 4 && steps > 2 ? 2 : 0;
  static constexpr int half_bit0 = step_bit0 == 0;
  static constexpr int half_bit1 = channels == 4 && step_bit1 == 0;
  __host__ __device__ static constexpr unsigned word_of(unsigned step, unsigned half, unsigned word) {
    return (step * 2 + half) * words + word;
  }

  // Query operands: a quad of registers has words w, w ^ partner, w + 1 and (w + 1) ^ partner.
  static constexpr bool has_bit1 = step_bit1 || half_bit1;
  static constexpr int partner = has_bit1 ? word_of(step_bit1, half_bit1, 0) : key_words / 4;
  static_assert(partner % 2 == 0);
  static constexpr int operand_quads = key_words / 4;
  __host__ __device__ static constexpr unsigned quad_of(unsigned word) {
    return word / 2 % (partner / 2) + word / 2 / partner * (partner / 2);
  }
  __host__ __device__ static constexpr unsigned place_in_quad(unsigned word) {
    return word % 2 * 2 + (word & partner ? 1 : 0);
  }
  __host__ __device__ static constexpr int word_in_quad(int quad) {
    return 2 * (quad % (partner / 2) + quad / (partner / 2) * partner);
  }
  static constexpr int quad_flip = quad_of(word_of(step_bit0, half_bit0, 0));  // by bit 0
  static constexpr int operand_words = operand_quads * 64;                     // of four heads and one set

  // A visit's column in the table of keys, in bytes: what the lane's class changes, and the rest.
  __host__ __device__ static constexpr int column_of(int step, int half) { return step * 4 * row_bytes + half * dim; }
  static constexpr int class_mask = column_of(step_bit0, half_bit0) | column_of(step_bit1, half_bit1);
  // Number of the combination of the bits in class_mask, of which there are up to two.
  __host__ __device__ static constexpr int class_index(int column) {
    int const low = class_mask & -class_mask;
    return (column & low ? 1 : 0) + (column & class_mask & ~low ? 2 : 0);
  }
  __host__ __device__ static constexpr int class_column(int index) {
    int const low = class_mask & -class_mask;
    return (index & 1 ? low : 0) + (index & 2 ? class_mask & ~low : 0);
  }
  static constexpr int class_columns = has_bit1 ? 4 : 2;

  // Values. Word w of lane g in a unit belongs to group 8 slot + g. With 8 channels a unit is half of a group's row, of 2 channels each word
  // is one.
  static constexpr int slots = steps;
  static constexpr int units = dim / 32;
  static constexpr int unit_words = channels == 2 ? 1 : 2;  // that lie side by side
  __host__ __device__ static constexpr int slot_of(int unit, int word) {
    return channels == 2 ? 2 * unit + word : channels == 4 ? unit : unit % slots;
  }
  // First channel of the word in its group.
  __host__ __device__ static constexpr int channel_of(int unit, int word) {
    return channels == 2 ? 0 : channels == 4 ? 2 * word : unit / slots * 4 + 2 * word;
  }
  static constexpr int slot_flip = slots == 1 ? 0 : channels == 2 ? 2 : 1;  // of a unit's slots, when its bit 0 changes
  // Bytes from the rows of code 0, which are cut into slabs of 256 bytes a code: [pair of units][word][g][unit % 2][2 copies].
  static constexpr int value_slabs = units / 2;
  __host__ __device__ static constexpr int value_offset(int unit, int word, int g, int copy) {
    int const line = channels == 2 ? unit / 2 * 2 + word : unit / 2;
    int const at = ((line * 8 + g) * 4 + unit % 2 * 2 + copy) * 4 * unit_words + (channels == 2 ? 0 : 4 * word);
    return at / code_bytes * slab_bytes + at % code_bytes;
  }
};

// ---- places --------------------------------------------------------------------------------------------------------------------
// The chunk of 8 channels at a place of a half: a rotated one and its partner, or two that are not.
struct Places {
  int rotated;  // places whose chunks are rotated
  int count;

  __device__ __forceinline__ Places(const couplet_attend_params& params, const Angles& angles)
      : rotated(angles.pairs / 8), count(params.head_dim / 16) {}
  __device__ __forceinline__ int chunk(int place, int half) const {
    return place < rotated ? place + half * rotated : 2 * place + half;
  }
  // Of a slot channel below dim / 2 with a place.
  __device__ __forceinline__ int channel(int slot_channel, int half) const {
    return chunk(slot_channel / 8, half) * 8 + slot_channel % 8;
  }
};

// ---- shared memory -------------------------------------------------------------------------------------------------------------
template <class S>
struct Shared {
  static constexpr int results = 4;  // warps whose weighted sums are added at a time

  unsigned char keys[slab_bytes];  // [256][half][dim / 2 channels], 256 bytes from one code to the next
  unsigned char values[S::value_slabs * slab_bytes];  // [slab][256][256 bytes]
  union {
    uint32_t operands[2][S::sets][S::quads][S::operand_words];  // [buffer][set][..][quad][head % 4][t][4]
    float results_of[results][S::heads * S::dim];
  };
  float4 query[S::heads][S::dim / 4];     // two pairs (x, y, x, y), scaled, rotated by the position in its block
  float4 step[2][S::dim / 4];             // angles of two pairs for the next unit
  float4 shift[S::sets][S::dim / 4];      // and for each set, backwards
  float plain_queries[S::heads][S::dim];  // scaled, before rotary; channels in their own order, as everywhere below
  float weighted[S::heads][S::dim];       // of the segment so far
  float2 total[S::heads];                 // maximum, sum
  float2 sums[S::warps][S::heads];
  uint32_t key_rows[S::steps][4];  // [step][t]: bytes to the codes of the group in the lower half, and in the upper one
  // In shared memory because registers are what limits the kernel.
  int at;  // the next segment's first unit
  int table_head;
  Segment segment;
  const uint8_t* const* pages;
};

// ---- lanes ---------------------------------------------------------------------------------------------------------------------
template <class S>
struct Lane {
  int g;
  int t;
  int step_flip;  // what the class of token g changes in a visit's index
  int half_flip;
  uint32_t key_column[S::class_columns];  // addresses of code 0, by class_index
  uint32_t value_column[2];               // by bit 0 of the unit
  int operand;                            // word of the query operand's quad 0
  int operand_flip;                       // by which quads change places where bit 0 of the row is set
  bool first;                             // of tokens 2t and 2t + 1, the one whose logits this lane has
  bool bit1;                              // of that token
  uint32_t power_bytes[4];                // selectors: from the power here and the one 16 lanes away to the B operands

  __device__ __forceinline__ explicit Lane(int lane) : g(lane / 4), t(lane % 4) {
    int const bit0_of_g = (g ^ g >> 2) & 1;
    int const bit1_of_g = g >> 1 & 1;
    step_flip = bit0_of_g * S::step_bit0 ^ bit1_of_g * S::step_bit1;
    half_flip = bit0_of_g * S::half_bit0 ^ bit1_of_g * S::half_bit1;
    int const column = S::column_of(step_flip, half_flip);
    for (int i = 0; i < S::class_columns; ++i)
      key_column[i] = static_cast<uint32_t>((column ^ S::class_column(i)) + t * S::row_bytes);
    for (int i = 0; i < 2; ++i) value_column[i] = static_cast<uint32_t>(S::value_offset(i ^ t >> 1, 0, g, t & 1));
    operand = (g % 4 * 4 + t) * 4;
    operand_flip = g / 4 * S::quad_flip * 64;
    first = g >> 2 == t >> 1;
    bit1 = S::has_bit1 && t & 1;
    // Bit 0 of a token is i ^ t >> 1 for token 2t + i. Bytes 0 and 1 are the power of this lane's token, 4 and 5 the other's, 2 and 3 are 0.
    for (int bit0 = 0; bit0 < 2; ++bit0)
      for (int i = 0; i < 2; ++i) {
        uint32_t const power = bit0 == g >> 2 ? 0x10 : 0x54;
        uint32_t const place = g >> 2 ? power << 8 | 0x32 : 0x3200 | power;  // the channel of a word
        power_bytes[2 * bit0 + i] = bit0 == (i ^ t >> 1) ? place : 0x3232;
      }
  }
  // The token of a part that this lane has the logits of, in tile 0.
  __device__ __forceinline__ int token() const { return (2 * t + !first) * S::tiles; }
};

}  // namespace couplet::cuda::attend::gather
