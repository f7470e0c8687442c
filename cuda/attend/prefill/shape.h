// Attention of sequences with several queries on tiles of float16: which warp does what, the block's memory, and the tasks that both kinds of
// warps go through. docs/decisions/0008-cuda-prefill.md has the argument.
//
//   task      128 rows of one kv head and sequence, a row being one query head of one query token
//   stretch   what the rows see of one kind: rows in full precision before the codes, codes, rows in full precision behind them
//   tile      64 positions of a stretch; of codes, a page
//   place     two chunks of 8 channels of a token whose 8 pairs are rotated together: pairs 8 place to 8 place + 7
//
//   producers, 4 warps   wait for an empty stage -> keys, rotated to their positions, and values of a tile -> filled
//   consumers, 8 warps   wait for a filled one -> scores, powers, weighted sums of 16 rows each            -> emptied
#pragma once

#include "../step.h"

namespace couplet::cuda::attend::prefill {

inline constexpr int tile_tokens = 64;
inline constexpr int warp_rows = 16;
inline constexpr int consumers = 8;
inline constexpr int producers = 4;
inline constexpr int threads = (consumers + producers) * 32;
inline constexpr int producer_threads = producers * 32;
inline constexpr int producer_barrier = 1;
inline constexpr int rows = consumers * warp_rows;
inline constexpr int stages = 2;
inline constexpr int producer_tokens = tile_tokens / producers;  // of a tile, for each producer warp

inline constexpr float nothing = -1e30f;  // the maximum of no logits
inline constexpr float unseen = -1e38f;   // the logit of a token that is not seen: 2^(unseen - nothing) is 0
inline constexpr float headroom = 10;     // powers reach 2^10, so that few of those that count are subnormal as float16

// What float16 tiles may hold; where something is beyond, the sequence's rows of the kv head are computed anew by the wide body. Queries are times
// scale and log2(e). With these ends a subnormal key or query is off by 2^-25 and a logit by less than 2e-3.
inline constexpr uint32_t most_query = 0x6800;  // 2^11, as float16
inline constexpr uint32_t most_key = 0x6c00;    // 2^12
inline constexpr uint32_t most_value = 0x7800;  // 2^15
inline constexpr uint32_t least_value =
    0x0100;  // 2^-16: the largest of 16 tokens' values, if not 0, is rounded by 2^-9 of itself at most

template <int Dim>
struct Shape {
  static_assert(Dim == 64 || Dim == 128);
  static constexpr int dim = Dim;                 // head_dim, rounded up
  static constexpr int row_bytes = 2 * Dim;       // of a token in a tile
  static constexpr int places = Dim / 16;         // a lane of a producer has one place
  static constexpr int lane_tokens = places / 2;  // and this many tokens of it, one after the other
  static_assert(32 / places * lane_tokens == producer_tokens);
};

// Chunk c of row r lies where chunk c ^ r % 8 would: 8 rows of a chunk, as ldmatrix reads them, and 8 chunks of a row, as they are written,
// lie in different banks.
template <int Dim>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * Shape<Dim>::row_bytes + ((chunk ^ (row & 7)) << 4);
}

// From the address of chunk 0 or 1 to that of one an even number of chunks behind it.
__device__ __forceinline__ int chunk_behind(int at, int chunks) {
  return (at ^ (chunks & 7) << 4) + (chunks >> 3 << 7);
}

// Whether a half of `word`, two float16, is `least` or more in magnitude, or no number: bit 15 or 31.
__device__ __forceinline__ uint32_t reaches(uint32_t word, uint32_t least) {
  return ((word & 0x7fff7fffu) + (0x8000u - least) * 0x10001u) & 0x80008000u;
}

// ---- tasks ---------------------------------------------------------------------------------------------------------------------
struct Task {
  const couplet_attend_sequence* sequence;
  int number;  // of the task
  int index;   // of the sequence
  int kv_head;
  int count;        // rows
  int first_token;  // of the queries, row 0
  int first_head;   // of the kv head's, row 0
  Seen first;       // by the first row
  Seen last;

  __device__ __forceinline__ int token(const Step& step, int row) const {
    return first_token + (first_head + row) / step.group_heads;
  }
  __device__ __forceinline__ int head(const Step& step, int row) const {
    return kv_head * step.group_heads + (first_head + row) % step.group_heads;
  }
  __device__ __forceinline__ Seen seen(const Step& step, int row) const {
    return seen_by(step.params, *sequence, sequence->first_query + token(step, row));
  }
  __device__ __forceinline__ static Interval part_of(const Seen& seen, int part) {
    return part == 0 ? seen.below : part == 1 ? seen.codes : seen.above;
  }
  // From the first position that the first row sees to the last that the last one sees; codes from the begin of a page.
  __device__ __forceinline__ Interval stretch(int part) const {
    Interval const all{part_of(first, part).begin, part_of(last, part).end};
    if (all.begin >= all.end) return {0, 0};
    return {part == 1 ? all.begin / tile_tokens * tile_tokens : all.begin, all.end};
  }
};

// What 16 rows see of a stretch.
struct Limits {
  int part;
  int end;        // of the stretch
  Interval some;  // from the first position that any of them sees to the last
  Interval all;   // positions that all of them see
};

template <int Dim>
struct Shared {
  struct Tile {
    unsigned char keys[tile_tokens * Shape<Dim>::row_bytes];
    unsigned char values[tile_tokens * Shape<Dim>::row_bytes];
  };
  Tile tiles[stages];
  unsigned char queries[consumers][warp_rows * Shape<Dim>::row_bytes];
  gpu::PhaseBarrier filled[stages];              // an arrival of each producer warp
  gpu::PhaseBarrier emptied[stages];             // of each consumer warp
  alignas(8) uint16_t there[stages][producers];  // a bit for each token of a tile that there is
  Task tasks[consumers + producers];             // of each warp
  Limits limits[consumers];                      // of its rows, in the stretch
  alignas(16) unsigned char tables[16];          // keys, then values, as by_code has them, where they fit
};

__device__ __forceinline__ int tasks_of(const Step& step) {
  return step.row_begin[step.params.sequence_count] * step.params.kv_heads;
}

// Writes task `number` by a warp. The last rows of all come first: they see most.
__device__ __forceinline__ void find_task(const Step& step, int number, Task& task) {
  int const sequences = step.params.sequence_count;
  int const row_block = step.row_begin[sequences] - 1 - number / step.params.kv_heads;
  int const at = find_begin(step.row_begin, sequences, row_block);
  const couplet_attend_sequence& sequence = step.params.sequences[at];
  int64_t const first_row = static_cast<int64_t>(row_block - step.row_begin[at]) * rows;
  int64_t const left = static_cast<int64_t>(sequence.query_tokens) * step.group_heads - first_row;
  __syncwarp();  // all lanes are done with the task before
  if (gpu::lane_id() == 0) {
    task.sequence = &sequence;
    task.number = number;
    task.index = at;
    task.kv_head = number % step.params.kv_heads;
    task.count = left < rows ? static_cast<int>(left) : rows;
    task.first_token = static_cast<int>(first_row / step.group_heads);
    task.first_head = static_cast<int>(first_row % step.group_heads);
    task.first = task.seen(step, 0);
    task.last = task.seen(step, task.count - 1);
  }
  __syncwarp();
}

// Tasks of a warp, one after the other. What a loop over them needs is in shared memory: registers are what limits the kernel.
template <class Visit>
__device__ __forceinline__ void for_each_task(const Step& step, Task& task, Visit visit) {
#pragma unroll 1
  for (int number = static_cast<int>(blockIdx.x); number < tasks_of(step);
       number = task.number + static_cast<int>(gridDim.x)) {
    find_task(step, number, task);
    visit();
  }
}

// Leaves the task's rows to the wide body.
__device__ __forceinline__ void leave_to_wide(const Step& step, const Task& task) {
  atomicOr(step.wide + task.index * step.params.kv_heads + task.kv_head, 1);
}

}  // namespace couplet::cuda::attend::prefill
