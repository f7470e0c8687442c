// 4c8b: the block's memory, and which lane has what. docs/decisions/0003-cuda-attention-gather.md has the argument, gather's.
//
//   tokens   a tile is 8 tokens of half a page, 4 apart: number `index` of tile j is token 4 index + j of the half
//   keys     are the B operand, columns = tokens of a tile, k = channels. Lane (g, t), with g = lane / 4 and t = lane % 4, looks up
//            groups 4 step + t and 16 further on of token g, steps in the order of the token's class: with bits 0 = g ^ g >> 2 and
//            1 = g >> 1 changed. So the 16 lanes of a phase touch 16 columns of 8 bytes
//   queries  are the A operand. Its 8 lower rows, (bit 0, head), have their words in the order of a class with bit 1 = 0, its upper rows
//            the words that change places with those where bit 1 is set. A token's logit is the sum of a lower and an upper row
//   values   are the A operand, rows = (word of a group's 2, g), k = (token, channel of a word). A unit is 8 groups; lanes visit unit
//            u ^ bit 0 of the token, and odd t the second copy
//   powers   are the B operand, columns = (channel of a word, head), k as above; once for the tokens of either bit 0
#pragma once

#include "../shared.h"

namespace couplet::cuda::attend::lookup::channels4 {

constexpr int row_bytes = 8;
constexpr int half_tokens = page_tokens / 2;
constexpr int tiles = half_tokens / 8;
constexpr int steps = 4;       // of keys: 8 groups each
constexpr int key_words = 16;  // of a token in one lane: [step][channels 64 further on or not][2]
constexpr int units = 4;       // of values: 8 groups each

// Tiles after which the angles of keys repeat. For the tiles behind them the query is rotated back.
constexpr int phases = 2;
constexpr int sets = tiles / phases;  // of query operands, for half a page
// A quad of registers has words w, w ^ 8, w + 1 and (w + 1) ^ 8, with w = 2 quad.
constexpr int quads = 4;
constexpr int quad_words = 64;  // [head][t][4]
constexpr int set_words = quads * quad_words;
constexpr int query_buffers = 4;

struct KeyAngles;

// A key warp and the value warp behind it.
struct Pair {
  gpu::PhaseBarrier written;  // the logits of a page; one arrival
  gpu::PhaseBarrier taken;    // they may be written over; one arrival
};

// `values` is [unit / 2][code][g][unit % 2][2 copies][4 channels].
struct Shared : Block {
  using KeyAngles = channels4::KeyAngles;
  static constexpr int key_registers = 144;  // of a thread: 32 of them angles, 16 codes
  static constexpr int value_registers = 112;
  static constexpr bool begins_early = false;

  union {
    struct {
      uint32_t queries[query_buffers][2][sets][set_words];  // [page of this warp % 4][half]
      float4 logits[pages][2][32];                          // [half][lane], of its token of each tile
    };
    float left[pages][rows * head_dim];  // at the end of a segment: what the value warps came to
  };
  Pair pairs[pages];
  // Two pairs of one query, scaled, rotated by its offset in its own block, and for the second half of a page back by 32.
  float4 query[role_threads];
  float plain[rows][head_dim];  // queries
};

__device__ __forceinline__ float* plain_queries(Shared& shared) { return shared.plain[0]; }
__device__ __forceinline__ float* left_by(Shared& shared, int warp) { return shared.left[warp]; }
__device__ __forceinline__ float* dense_left_by(Shared& shared, int warp) { return left_by(shared, warp); }

// 8 bytes of a table, at a row's address and Offset.
template <int Offset>
__device__ __forceinline__ uint2 load_row(const Shared& shared, uint32_t at) {
  uint32_t words[2];
  gpu::load_dynamic_shared<2, Offset>(words, &shared, at);
  return {words[0], words[1]};
}

// A lane has the logits, and the powers, of head g % 4 and of one token of each tile: with numbers 2t and 2t + 1, that whose bit 0 is g / 4.
struct Lane {
  int g;
  int t;
  bool first;  // the token is 2t

  __device__ __forceinline__ explicit Lane(int lane) : g(lane / 4), t(lane % 4), first(g >> 2 == t >> 1) {}
  __device__ __forceinline__ int token() const { return (2 * t + !first) * tiles; }  // of tile 0, in a half
};

// The codes of a page, of the segment's kv head. A page that is not there reads some of the table: its logits are not seen.
__device__ __forceinline__ const uint8_t* codes_of(const uint8_t* page, int64_t offset, const void* nowhere) {
  return page ? page + offset : static_cast<const uint8_t*>(nowhere);
}

}  // namespace couplet::cuda::attend::lookup::channels4
