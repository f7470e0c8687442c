// What the warps of the lookup body share: the block's memory, and how a row of a table is found.
#pragma once

#include "../step.h"

namespace couplet::cuda::attend::lookup {

constexpr int head_dim = 128;
constexpr int pairs = head_dim / 2;
constexpr int rows = lookup_rows;
constexpr int page_tokens = 64;
constexpr int pages = 8;  // of a unit: one for each key warp, and for the value warp behind it
constexpr int unit_tokens = pages * page_tokens;
constexpr int role_threads = pages * 32;
constexpr int threads = 2 * role_threads;
static_assert(unit_tokens == rotary_block, "the query's angle is one block step and one offset");
static_assert(role_threads == rows * pairs, "a thread of a value warp rotates one pair of one query");

constexpr int key_registers = 136;  // of a thread: 64 of them angles
constexpr int value_registers = 120;
static_assert(role_threads * (key_registers + value_registers) == 65536);

constexpr int value_barrier = 1;  // of the value warps
constexpr int key_barrier = 2;    // of the key warps

constexpr float nothing = -1e30f;  // the maximum of no logits
constexpr float unseen = -1e38f;   // the logit of a token that is not seen: 2^(unseen - nothing) is 0

constexpr int row_bytes = 16;    // 8 channels
constexpr int code_bytes = 256;  // the rows of one code
constexpr int key_bytes = 256 * code_bytes;
constexpr int value_bytes = 2 * key_bytes;  // each row twice
constexpr int query_part = rows * head_dim;
constexpr int page_bytes = page_tokens * head_dim / 8;  // one side
constexpr int query_buffers = 4;

// A key warp and the value warp behind it.
struct Pair {
  unsigned char key_codes[page_bytes];    // [group][64 tokens]; the halves of groups 2 and 3 of 4 change places
  unsigned char value_codes[page_bytes];  // likewise
  // Those of an odd row: the halves of each 8 tokens change places. With value_codes in one: what a value warp leaves for fold_warps.
  float logits[rows][page_tokens];
  gpu::PhaseBarrier written;  // the logits of a page; one arrival
  gpu::PhaseBarrier taken;    // they may be written over; one arrival
};
static_assert(offsetof(Pair, logits) == offsetof(Pair, value_codes) + page_bytes);
static_assert(page_bytes + sizeof(Pair::logits) == rows * head_dim * sizeof(float));

enum class Next { none, same_tables, other_tables };  // segment

struct Shared {
  unsigned char keys[key_bytes];  // [code][group]
  // [group % 8 / 4][code][channel / 4][group % 4][group / 8][2 copies][4 channels]
  unsigned char values[value_bytes];
  // [page of this warp % 4][half][row][channel]: rotated for tokens 0 to 3 of 8, and back by 4 for the others. The halves of
  // each 128 bytes of odd rows change places, so that two rows' 64 bytes lie in different banks. Before the first page of a segment
  // the first of them holds the plain queries, float [row][channel].
  __half queries[query_buffers][2][query_part];
  Pair pairs[pages];
  float2 query[role_threads];    // one pair of one query, scaled, rotated by its offset in its own block
  gpu::PhaseBarrier rotated[2];  // queries of even and odd pages are written; an arrival of each value warp
  float2 sums[pages][rows];      // maximum, sum of a value warp
  float2 total[rows];            // of the segment so far
  Segment segment;
  const uint8_t* const* page_table;
  int64_t key_offset;  // bytes into a page
  int64_t value_offset;
  int64_t at;  // the next segment's first unit
  int table_head;
  Next next;
};

__device__ __forceinline__ int warp_of_role() { return static_cast<int>(threadIdx.x) / 32 % pages; }
__device__ __forceinline__ int thread_of_role() { return static_cast<int>(threadIdx.x) % role_threads; }

struct Row {
  uint32_t words[4];
};

__device__ __forceinline__ Row load_row(const void* at) {
  uint4 const row = *static_cast<const uint4*>(at);
  return {{row.x, row.y, row.z, row.w}};
}

// Where the row of a code lies that is byte `byte` of a word: its 256 bytes, and what `column` says in its other bytes.
__device__ __forceinline__ unsigned row_offset(uint32_t codes, int byte, unsigned column) {
  return __byte_perm(codes, column, 0x7604 | byte << 4);
}

// Units of the segment's codes.
__device__ __forceinline__ int first_unit(const Shared& shared) {
  return shared.segment.seen.codes.begin / unit_tokens;
}
__device__ __forceinline__ int end_unit(const Shared& shared) {
  return blocks_of(shared.segment.seen.codes.end, unit_tokens);
}

// This warp's page of a unit; NULL where the segment has no token of it.
__device__ __forceinline__ const uint8_t* page_of(const Shared& shared, int unit) {
  Interval const codes = shared.segment.seen.codes;
  int const begin = unit * unit_tokens + warp_of_role() * page_tokens;
  return begin < codes.end && begin + page_tokens > codes.begin ? shared.page_table[begin / page_tokens] : nullptr;
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

}  // namespace couplet::cuda::attend::lookup
