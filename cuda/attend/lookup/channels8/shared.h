// 8c8b: the block's memory.
#pragma once

#include "../shared.h"

namespace couplet::cuda::attend::lookup::channels8 {

constexpr int row_bytes = 16;  // 8 channels
constexpr int query_buffers = 4;
constexpr int query_part = rows * head_dim;
constexpr int page_bytes = page_tokens * head_dim / 8;  // one side

constexpr int values_at = key_bytes;  // in a block's memory
static_assert(offsetof(Block, keys) == 0 && offsetof(Block, values) == values_at);

struct KeyAngles;

// A key warp and the value warp behind it.
struct Pair {
  unsigned char key_codes[page_bytes];    // [group][64 tokens]; the halves of groups 2 and 3 of 4 change places
  unsigned char value_codes[page_bytes];  // likewise
  // Those of four tokens lie where `row & 1 | (row & 2) * 2` says in the bits of their number: so neither who writes nor who reads four rows
  // meets another in a bank. With value_codes in one: what a value warp leaves for fold_warps.
  float logits[rows][page_tokens];
  gpu::PhaseBarrier written;  // the logits of a page; one arrival
  gpu::PhaseBarrier taken;    // they may be written over; one arrival
};
static_assert(offsetof(Pair, logits) == offsetof(Pair, value_codes) + page_bytes);
static_assert(page_bytes + sizeof(Pair::logits) == rows * head_dim * sizeof(float));

// `values` is [group % 8 / 4][code][channel / 4][group % 4][group / 8][2 copies][4 channels].
struct Shared : Block {
  using KeyAngles = channels8::KeyAngles;
  static constexpr int key_registers = 136;  // of a thread: 64 of them angles
  static constexpr int value_registers = 120;
  static constexpr bool begins_early = false;

  // [page of this warp % 4][half][row][channel]: rotated for tokens 0 to 3 of 8, and back by 4 for the others. Before the first page of a
  // segment the first of them holds the plain queries, float [row][channel].
  __half queries[query_buffers][2][query_part];
  Pair pairs[pages];
  float2 query[role_threads];  // one pair of one query, scaled, rotated by its offset in its own block
};

__device__ __forceinline__ float* plain_queries(Shared& shared) { return reinterpret_cast<float*>(shared.queries[0]); }

// A value warp's weighted sums, [rows][head_dim]: of codes, and of tokens in full precision.
__device__ __forceinline__ float* left_by(Shared& shared, int warp) {
  return reinterpret_cast<float*>(shared.pairs[warp].value_codes);
}
__device__ __forceinline__ float* dense_left_by(Shared& shared, int warp) { return left_by(shared, warp); }

// Where the values' centroids lie on levels. The first half of `values` is [code][group % 8][group / 8][2 copies][8 channels], a byte each; in
// the other half there is room for what Shared has among the queries and pairs, so that the first of these are made and taken while value
// warps take tokens in full precision.
struct LevelShared : Shared {
  static constexpr bool begins_early = true;
};

struct LevelRoom {
  float2 scales[head_dim];  // least, step * 2^24
  float plain[rows][head_dim];
  float dense_left[pages][rows][head_dim];
};
static_assert(sizeof(LevelRoom) <= key_bytes);

__device__ __forceinline__ LevelRoom& room_of(LevelShared& shared) {
  return *reinterpret_cast<LevelRoom*>(shared.values + key_bytes);
}
__device__ __forceinline__ float* plain_queries(LevelShared& shared) { return room_of(shared).plain[0]; }
__device__ __forceinline__ float* dense_left_by(LevelShared& shared, int warp) {
  return room_of(shared).dense_left[warp][0];
}

struct Row {
  uint32_t words[4];
};

__device__ __forceinline__ Row load_row(const void* at) {
  uint4 const row = *static_cast<const uint4*>(at);
  return {{row.x, row.y, row.z, row.w}};
}

// Issues the copy of one side of a page by a warp, zeros for a page that is not there.
__device__ __forceinline__ void fetch_codes(unsigned char* to, const uint8_t* page, int64_t offset,
                                            const void* nowhere) {
  int const at = gpu::fresh_lane_id() * 16;
  const uint8_t* const from = page ? page + offset + at : static_cast<const uint8_t*>(nowhere);
  for (int part = 0; part < page_bytes; part += 512)
    gpu::cp_async<16>(to + part + (at ^ (at >> 2 & 32)), from + (page ? part : 0), page ? 16 : 0);
  gpu::cp_async_commit();
}

}  // namespace couplet::cuda::attend::lookup::channels8
