// What the warps of a lookup body share, whatever the channels of a group: tables, the segment, and how a row of a table is found.
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
static_assert(role_threads == rows * pairs,
              "a thread of a value warp rotates one pair of one query, or two by two angles");

constexpr int value_barrier = 1;  // of the value warps
constexpr int key_barrier = 2;    // of the key warps

constexpr float nothing = -1e30f;  // the maximum of no logits
constexpr float unseen = -1e38f;   // the logit of a token that is not seen: 2^(unseen - nothing) is 0
constexpr float headroom =
    10;  // powers stay below 2^10, far below the end of float16; smaller rises of the maximum rescale nothing

constexpr int code_bytes = 256;  // the rows of one code
constexpr int key_bytes = 256 * code_bytes;
constexpr int value_bytes = 2 * key_bytes;  // each row twice

enum class Next { none, same_tables, other_tables };  // segment

// A segment, and what its warps look for in it.
struct Work {
  Next next;
  Segment segment;
  const uint8_t* const* page_table;
  int64_t key_offset;  // bytes into a page
  int64_t value_offset;
  unsigned pages_before;  // of a warp, in this kernel
};

// The part of shared memory that is the same for all bodies. Theirs begin with it.
struct Block {
  unsigned char keys[key_bytes];      // [code][group]
  unsigned char values[value_bytes];  // see load_values of the body
  gpu::PhaseBarrier rotated[2];       // queries of even and odd pages are written; an arrival of each value warp
  float2 sums[pages][rows];           // maximum, sum of a value warp
  float2 total[rows];                 // of the segment so far
  Work work;
  Work upcoming;        // found while the last of `work` is done
  int at;               // the first unit behind upcoming
  int table_head;       // of upcoming
  unsigned pages_done;  // of a warp, behind upcoming
};

__device__ __forceinline__ int warp_of_role() { return static_cast<int>(threadIdx.x) / 32 % pages; }
__device__ __forceinline__ int thread_of_role() { return static_cast<int>(threadIdx.x) % role_threads; }
// Likewise, asked for where it is needed and not kept in a register.
__device__ __forceinline__ int fresh_thread_of_role() {
  return static_cast<int>(gpu::fresh_thread_id()) % role_threads;
}

// Where the row of a code lies that is byte `byte` of a word: its 256 bytes, and what `column` says in its other bytes.
__device__ __forceinline__ unsigned row_offset(uint32_t codes, int byte, unsigned column) {
  return __byte_perm(codes, column, 0x7604 | byte << 4);
}

// Units of a segment's codes, of which it has some.
__device__ __forceinline__ int first_unit(const Segment& segment) { return segment.seen.codes.begin / unit_tokens; }
__device__ __forceinline__ int end_unit(const Segment& segment) {
  return blocks_of(segment.seen.codes.end, unit_tokens);
}

// This warp's pages of a segment, one of each unit.
class PageWalk {
 public:
  __device__ __forceinline__ explicit PageWalk(const Block& block)
      : entry_(block.work.page_table + first_unit(block.work.segment) * pages + warp_of_role()) {
    Interval const codes = block.work.segment.seen.codes;
    left_ = blocks_of(codes.end - warp_of_role() * page_tokens, unit_tokens) - first_unit(block.work.segment);
    bool const begun = first_unit(block.work.segment) * unit_tokens + (warp_of_role() + 1) * page_tokens > codes.begin;
    page_ = begun && left_ > 0 ? *entry_ : nullptr;
  }
  // NULL where the segment has no token of it.
  __device__ __forceinline__ const uint8_t* page() const { return page_; }
  // Asks for the next page, for which page() then waits.
  __device__ __forceinline__ void advance() {
    entry_ += pages;
    page_ = --left_ > 0 ? *entry_ : nullptr;
  }

 private:
  int left_;  // units that have a page for this warp
  const uint8_t* const* entry_;
  const uint8_t* page_;
};

}  // namespace couplet::cuda::attend::lookup
