// Kernel and launcher of lookup, for the translation units that make them: decode attention at headDim 128, up to 4 query heads of a kv head
// at once. Both codebooks of the kv head lie in shared memory as float16, are looked up without bank conflicts, and multiplied by tensor
// cores. docs/decisions/0001 has the argument of 8c8b's layout, 0003 that of 4c8b's, 0002 that of the pairs of warps.
//
// A block takes 512 positions at a time, a page of 64 tokens for each of 8 pairs of warps. One warp of a pair turns codes and queries
// into logits (take_keys), the other one logits and codes into weighted sums (take_values), a page behind:
//
//   value warps   rotated[page]: the queries of the page's unit are there  ->  key warps
//   key warp      written: the logits of its page are there                ->  the value warp of its pair
//   value warp    taken: it has them in registers                          ->  the key warp of its pair
//
// Queries are written two pages ahead of their use. A key warp that reads those of page p knows that all value warps have come to page
// p - 2, so that all key warps are done with it: the queries in use are those of pages p - 1 to p + 2, four buffers.
//
// A body is a `Shared`, which begins with Block and names its KeyAngles, key_registers and value_registers, and beside it, found by its type:
//   load_values, load_query, plain_queries, left_by, dense_left_by, make_key_angles, clear_key_angles, take_keys, take_values
// and begin_values where it begins_early: its first queries are written before tokens in full precision are taken.
#pragma once

#include "dense.h"
#include "fold.h"
#include "launch.h"

namespace couplet::cuda::attend::lookup {

// ---- device helpers ----------------------------------------------------------------------------------------------------------
// Issues the copy of the key codebook, by the key warps: as it lies.
__device__ __forceinline__ void load_keys(const Step& step, int kv_head, Block& block) {
  const unsigned char* const rows =
      reinterpret_cast<const unsigned char*>(step.key_by_code) + int64_t{kv_head} * key_bytes;
  int const thread = warp_of_role() * 32 + gpu::fresh_lane_id();
#pragma unroll 1
  for (int at = thread * 16; at < key_bytes; at += role_threads * 16) gpu::cp_async<16>(block.keys + at, rows + at);
  gpu::cp_async_commit();
}

// Finds the next segment of this block's range, by one warp.
__device__ __forceinline__ void find_segment(const Step& step, Block& block) {
  int const at = block.at;
  bool const none = at == Ranges(step).end(blockIdx.x);
  Segment segment{};
  if (!none) segment = segment_at(step, at);
  bool const same = segment.kv_head == block.table_head;
  __syncwarp();
  if (gpu::lane_id() != 0) return;
  block.upcoming.next = none ? Next::none : same ? Next::same_tables : Next::other_tables;
  if (none) return;
  block.upcoming.pages_before = block.pages_done;
  if (size_of(segment.seen.codes) > 0) block.pages_done += end_unit(segment) - first_unit(segment);
  block.at = at + segment.units;
  block.table_head = segment.kv_head;
  block.upcoming.segment = segment;
  block.upcoming.page_table = step.params.sequences[segment.sequence].pages;
  block.upcoming.key_offset = step.params.key_page_offset + segment.kv_head * step.params.key_page_stride;
  block.upcoming.value_offset = step.params.value_page_offset + segment.kv_head * step.params.value_page_stride;
}

// Of the current segment.
__device__ __forceinline__ bool has_dense(const Block& block) {
  return size_of(block.work.segment.seen.below) + size_of(block.work.segment.seen.above) > 0;
}
__device__ __forceinline__ bool has_codes(const Block& block) { return size_of(block.work.segment.seen.codes) > 0; }

// Makes the segment that was found the current one.
__device__ __forceinline__ Next next_segment(Block& block) {
  __syncthreads();  // the segment before is done
  constexpr unsigned words = sizeof(Work) / sizeof(uint32_t);
  static_assert(words <= threads);
  if (unsigned const word = gpu::fresh_thread_id(); word < words)
    reinterpret_cast<uint32_t*>(&block.work)[word] = reinterpret_cast<const uint32_t*>(&block.upcoming)[word];
  __syncthreads();
  return block.work.next;
}

template <class Shared>
__device__ __forceinline__ void run_key_warp(const Step& step, Shared& shared) {
  gpu::take_registers<Shared::key_registers>();
  typename Shared::KeyAngles angles;
  if (step.angles.pairs)
    make_key_angles(step.angles, gpu::lane_id(), angles);
  else
    clear_key_angles(angles);
  for (Next next; (next = next_segment(shared)) != Next::none;) {
    if (next == Next::other_tables) load_keys(step, shared.work.segment.kv_head, shared);
    if (has_codes(shared)) take_keys(step, shared, angles);
  }
  gpu::cp_async_wait<0>();  // a block of dense units alone has never waited for its tables
}

template <bool Softcap, class Shared>
__device__ __forceinline__ void run_value_warp(const Step& step, Shared& shared) {
  gpu::release_registers<Shared::value_registers>();
  gpu::let_next_start();
  gpu::wait_for_last();
  if (warp_of_role() == 0) {  // while key warps make their angles
    if (gpu::lane_id() == 0) {
      shared.at = Ranges(step).begin(blockIdx.x);
      shared.table_head = -1;
      shared.pages_done = 0;
      for (gpu::PhaseBarrier& rotated : shared.rotated) gpu::initialize(rotated, pages);
      for (auto& pair : shared.pairs) {
        gpu::initialize(pair.written, 1);
        gpu::initialize(pair.taken, 1);
      }
    }
    __syncwarp();
    find_segment(step, shared);
  }
  for (Next next; (next = next_segment(shared)) != Next::none;) {
    if (next == Next::other_tables) load_values(step, shared.work.segment.kv_head, shared);
    load_query(step, shared);
    gpu::barrier_sync(value_barrier, role_threads);
    if (fresh_thread_of_role() / 32 == pages - 1) find_segment(step, shared);  // of a short window it has no tokens
    if constexpr (Shared::begins_early)
      if (has_codes(shared)) begin_values(step, shared);
    if (has_dense(shared)) {
      take_dense<Softcap>(step, shared);
      fold_warps(step, shared, false, [&](int warp) { return dense_left_by(shared, warp); });
    }
    if (has_codes(shared)) {
      take_values<Softcap>(step, shared);
      fold_warps(step, shared, has_dense(shared), [&](int warp) { return left_by(shared, warp); });
    }
  }
  gpu::cp_async_wait<0>();
}

// ---- kernel ------------------------------------------------------------------------------------------------------------------
// 16 warps, one block a multiprocessor: 128 registers each at the start, of which value warps give some to key warps.
template <class Shared, bool Softcap>
__global__ void __launch_bounds__(threads, 1) decode([[maybe_unused]] Step const step) {
  if (!gpu::moves_registers) return;
  static_assert(role_threads * (Shared::key_registers + Shared::value_registers) == 65536);
  static_assert(sizeof(Shared) <= 227 << 10);
  GPU_DYNAMIC_SHARED(Shared, shared);
  if (threadIdx.x < role_threads)
    run_key_warp(step, *shared);
  else
    run_value_warp<Softcap>(step, *shared);
}

// ---- launchers ---------------------------------------------------------------------------------------------------------------
template <class Shared>
bool has_body() {
  int const available = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return static_cast<size_t>(available) >= sizeof(Shared) && gpu::has_body(decode<Shared, false>);
}

template <class Shared>
cudaError_t launch(const Step& step, cudaStream_t stream) {
  return gpu::launch_early(step.params.softcap > 0 ? decode<Shared, true> : decode<Shared, false>, step.blocks, threads,
                           sizeof(Shared), stream, step);
}

}  // namespace couplet::cuda::attend::lookup
