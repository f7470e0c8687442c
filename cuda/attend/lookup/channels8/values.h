// Value warps of 8c8b: logits and codes -> weighted sums. They also rotate the queries for the key warps.
//   Values are the A operand, rows = groups, one mma for each of the 8 channels of a group. Lanes with odd t swap the two groups of their
//   rows, the table lies there twice for the lanes' other bit, and the halves of the sums are added once, at the end. Lane (g, t)
//   has tokens 8t to 8t + 7 and those 32 further on; the weights are the B operand, columns = rows of queries, twice: columns 0-3
//   for even t, columns 4-7 for odd t, and 0 in the other half ("the lane's class").
//   Where centroids lie on levels the table has a byte for each in place of two: half the bytes from shared memory, and the sums are scaled
//   when a segment ends.
#pragma once

#include "shared.h"

namespace couplet::cuda::attend::lookup::channels8 {

// ---- table ----------------------------------------------------------------------------------------------------------------
// Issues the copies of the value codebook, by the value warps. 16 lanes write to 16 different columns of 8 bytes: those of the
// groups of a code, where bit 2 of the group chooses which copy comes first.
__device__ __forceinline__ void load_values(const Step& step, int kv_head, Shared& shared) {
  const unsigned char* const rows =
      reinterpret_cast<const unsigned char*>(step.value_by_code) + int64_t{kv_head} * key_bytes;
  int const thread = warp_of_role() * 32 + gpu::fresh_lane_id();
#pragma unroll 1
  for (int index = thread; index < key_bytes / row_bytes; index += role_threads) {
    int const code = index / 16;
    int const group = index % 16;
    int const first = group >> 2 & 1;
    unsigned char* const to = shared.values + (group >> 2 & 1) * key_bytes + code * code_bytes +
                              ((group & 3) * 4 + (group >> 3) * 2) * row_bytes / 2;
#pragma unroll
    for (int four = 0; four < 2; ++four)
#pragma unroll
      for (int copy = 0; copy < 2; ++copy)
        gpu::cp_async<8>(to + four * code_bytes / 2 + (copy ^ first) * 8, rows + index * row_bytes + four * 8);
  }
  gpu::cp_async_commit();
}

__device__ __forceinline__ void load_values(const Step& step, int kv_head, LevelShared& shared) {
  const unsigned char* const rows = step.value_levels + int64_t{kv_head} * key_bytes / 2;
  int const thread = warp_of_role() * 32 + gpu::fresh_lane_id();
#pragma unroll 1
  for (int index = thread; index < key_bytes / row_bytes; index += role_threads) {
    int const code = index / 16;
    int const group = index % 16;
    int const first = group >> 2 & 1;
    unsigned char* const to = shared.values + code * code_bytes + ((group & 7) * 4 + (group >> 3) * 2) * 8;
#pragma unroll
    for (int copy = 0; copy < 2; ++copy) gpu::cp_async<8>(to + (copy ^ first) * 8, rows + index * 8);
  }
  if (thread < head_dim / 2)
    gpu::cp_async<16>(room_of(shared).scales + thread * 2, step.value_scales + kv_head * head_dim + thread * 2);
  gpu::cp_async_commit();
}

// ---- queries -----------------------------------------------------------------------------------------------------------------
// A thread rotates one pair of one query for all units.
__device__ __forceinline__ int query_row() { return gpu::unknown(thread_of_role()) / pairs; }
__device__ __forceinline__ int query_pair() { return gpu::unknown(thread_of_role()) % pairs; }

template <class AnyShared>
__device__ __forceinline__ void load_query(const Step& step, AnyShared& shared) {
  constexpr float log2_e = 1.4426950408889634f;
  const Segment& segment = shared.work.segment;
  int const row = query_row();
  int const pair = query_pair();
  float2 value{0, 0};
  if (row < segment.rows) {
    const couplet_attend_sequence& sequence = step.params.sequences[segment.sequence];
    int64_t const query = (segment.first_head + row) * sequence.query_head_stride + pair;
    float const factor = step.params.scale * log2_e;
    value = {load_element(sequence.queries, step.params.query_dtype, query) * factor,
             load_element(sequence.queries, step.params.query_dtype, query + pairs) * factor};
  }
  float* const plain = plain_queries(shared);
  plain[row * head_dim + pair] = value.x;
  plain[row * head_dim + pair + pairs] = value.y;
  if (step.angles.pairs) {
    float const amplitude = step.angles.amplitudes[pair];  // the query carries the key's as well
    float2 const offset = step.angles.offsets[segment.position % unit_tokens * pairs + pair];
    value = add_angles(value, {offset.x * amplitude * amplitude, offset.y * amplitude * amplitude});
  }
  shared.query[gpu::unknown(thread_of_role())] = value;
}

// The angle by which the query is rotated for keys of a unit: its distance in blocks, below 4096 (see select).
__device__ __forceinline__ float2 step_angle(const Step& step, int distance) {
  return step.angles.pairs ? step.angles.steps[distance * pairs + query_pair()] : float2{1, 0};
}

// The angle between the two halves of a page's queries.
__device__ __forceinline__ float2 load_back(const Step& step) {
  if (!step.angles.pairs) return {1, 0};
  float2 const by_four = step.angles.offsets[4 * pairs + query_pair()];
  return {by_four.x, -by_four.y};
}

// Comes with this warp's arrival at the barrier of the page's queries.
__device__ __forceinline__ void write_query(Shared& shared, float2 angle, float2 back, unsigned page) {
  float2 turned = add_angles(shared.query[gpu::unknown(thread_of_role())], angle);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __half* const to = shared.queries[page % query_buffers][half] + query_row() * head_dim + query_pair();
    to[0] = __float2half_rn(turned.x);
    to[pairs] = __float2half_rn(turned.y);
    turned = add_angles(turned, back);
  }
  __syncwarp();
  if (gpu::lane_id() == 0) gpu::arrive(shared.rotated[page % 2]);
}

// ---- codes -------------------------------------------------------------------------------------------------------------------
struct ValueLane {
  unsigned g;
  unsigned t;
  unsigned column[2];     // by row g or g + 8: bytes from the start of shared.values to the lane's column
  unsigned logit_column;  // bytes: those of row g % 4, tokens 8t on, or 32 + 8t where g is 4 or more
  unsigned weighted_by;   // all bits where the lane's column is of its class, otherwise none

  __device__ __forceinline__ ValueLane(int lane, const Shared&)
      : g(static_cast<unsigned>(lane) / 4), t(static_cast<unsigned>(lane) % 4) {
    for (unsigned r = 0; r < 2; ++r)
      column[r] = (g >> 2) * key_bytes + ((g & 3) * 4 + (r ^ (t & 1)) * 2 + (t >> 1)) * row_bytes / 2;
    logit_column = (g & 3) * page_tokens * 4 + (((2 * t + 8 * (g >> 2)) ^ (g & 1) ^ (g & 2) * 2) * 16);
    weighted_by = (t & 1) == g >> 2 ? ~0u : 0u;
  }
  __device__ __forceinline__ ValueLane(int lane, const LevelShared& shared)
      : ValueLane(lane, static_cast<const Shared&>(shared)) {
    for (unsigned r = 0; r < 2; ++r) column[r] = ((g & 7) * 4 + (r ^ (t & 1)) * 2 + (t >> 1)) * 8;
  }
};

// A warp's softmax in progress over its pages. The maximum is that of row g % 4, the sum its part that this lane added.
struct Progress {
  float maximum = nothing;
  float sum = 0;
  float weighted[8][4] =
      {};  // [channel of a group]: D operand, rows g and g + 8 are groups, columns 2t and 2t + 1 of the weights
};

// Codes of the lane's 16 tokens: [row g or g + 8][tokens 8t, 8t + 4, 8t + 32, 8t + 36], four each.
__device__ __forceinline__ void load_value_codes(const Pair& pair, const ValueLane& lane, uint32_t (&codes)[2][4]) {
  unsigned const at = lane.g * page_tokens + (8 * lane.t ^ (lane.g >> 1 & 1) * 32) + (lane.t & 1) * 512;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint2 const eight = *reinterpret_cast<const uint2*>(pair.value_codes + (at ^ r * 512 ^ half * 32));
      codes[r][2 * half] = eight.x;
      codes[r][2 * half + 1] = eight.y;
    }
}

// logits[i]: of the lane's tokens 8t (+ 32) + i.
__device__ __forceinline__ void load_logits(const Pair& pair, const ValueLane& lane, float (&logits)[8]) {
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    float4 const four = *reinterpret_cast<const float4*>(reinterpret_cast<const unsigned char*>(pair.logits) +
                                                         (lane.logit_column ^ part * 16));
    logits[4 * part] = four.x;
    logits[4 * part + 1] = four.y;
    logits[4 * part + 2] = four.z;
    logits[4 * part + 3] = four.w;
  }
}

// Raises the maximum where a logit lies more than `headroom` above it.
__device__ __forceinline__ void raise_maximum(const ValueLane& lane, const float (&logits)[8], Progress& progress) {
  float largest = logits[0];
#pragma unroll
  for (float const logit : logits) largest = max(largest, logit);
  if (!__any_sync(~0u, largest > progress.maximum + headroom)) return;
  for (int offset : {1, 2, 16}) largest = max(largest, __shfl_xor_sync(~0u, largest, offset));
  largest = max(largest, progress.maximum);
  float const factor = gpu::ex2_approx(progress.maximum - largest);
  progress.maximum = largest;
  progress.sum *= factor;
  int const row_lane = static_cast<int>(2 * lane.t & 3) * 4;  // holds the factor of column 2t
  float const factors[2] = {__shfl_sync(~0u, factor, row_lane), __shfl_sync(~0u, factor, row_lane + 4)};
#pragma unroll
  for (auto& channel : progress.weighted)
#pragma unroll
    for (int c = 0; c < 4; ++c) channel[c] *= factors[c % 2];
}

// weights[b]: B operand of tokens b and 4 + b of each 8.
__device__ __forceinline__ void take_powers(const ValueLane& lane, const float (&logits)[8], Progress& progress,
                                            uint32_t (&weights)[4][2]) {
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    float const first = gpu::ex2_approx(logits[b] - progress.maximum);
    float const second = gpu::ex2_approx(logits[4 + b] - progress.maximum);
    progress.sum += first + second;
    uint32_t const own = gpu::cvt_f16x2(first, second);
    uint32_t const other = __shfl_xor_sync(~0u, own, 16);
    weights[b][0] = (lane.g < 4 ? own : other) & lane.weighted_by;
    weights[b][1] = (lane.g < 4 ? other : own) & lane.weighted_by;
  }
}

// Four channels of every group, or the other four: half the registers of eight, and as many bytes a clock.
template <int Four>
__device__ __forceinline__ void add_values_of(const Shared& shared, const ValueLane& lane,
                                              const uint32_t (&codes)[2][4], int b, const uint32_t (&weights)[2],
                                              Progress& progress) {
  uint32_t value[4][2][2];  // [token][row g or g + 8][two channels]
#pragma unroll
  for (int token = 0; token < 4; ++token)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      gpu::load_dynamic_shared<2, values_at + Four * code_bytes / 2>(value[token][r], &shared,
                                                                     row_offset(codes[r][token], b, lane.column[r]));
#pragma unroll
  for (int channel = 0; channel < 4; ++channel) {
    unsigned const halves = channel % 2 ? 0x7632 : 0x5410;
    auto const two_tokens = [&](int token, int r) {
      return __byte_perm(value[token][r][channel / 2], value[token + 1][r][channel / 2], halves);
    };
    gpu::mma_m16n8k16_f16(progress.weighted[4 * Four + channel],
                          {two_tokens(0, 0), two_tokens(0, 1), two_tokens(2, 0), two_tokens(2, 1)}, weights);
  }
}

__device__ __forceinline__ void add_values(const Shared& shared, const ValueLane& lane, const uint32_t (&codes)[2][4],
                                           int b, const uint32_t (&weights)[2], Progress& progress) {
  add_values_of<0>(shared, lane, codes, b, weights, progress);
  add_values_of<1>(shared, lane, codes, b, weights, progress);
}

// A level becomes level * 2^-24 by a byte of zeros above it, in float16's subnormal numbers, which a product takes as they are. The zeros are
// its first bit, which no level sets, eight times: two tokens' bytes and their zeros are one permutation.
__device__ __forceinline__ void add_values(const LevelShared& shared, const ValueLane& lane,
                                           const uint32_t (&codes)[2][4], int b, const uint32_t (&weights)[2],
                                           Progress& progress) {
  uint32_t value[4][2][2];  // [token][row g or g + 8][channels 0 to 3 or 4 to 7]
#pragma unroll
  for (int token = 0; token < 4; ++token)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      gpu::load_dynamic_shared<2, values_at>(value[token][r], &shared, row_offset(codes[r][token], b, lane.column[r]));
#pragma unroll
  for (int channel = 0; channel < 8; ++channel) {
    unsigned const halves = 0xc480 + 0x1111 * (channel % 4);
    auto const two_tokens = [&](int token, int r) {
      return gpu::prmt(value[token][r][channel / 4], value[token + 1][r][channel / 4], halves);
    };
    gpu::mma_m16n8k16_f16(progress.weighted[channel],
                          {two_tokens(0, 0), two_tokens(0, 1), two_tokens(2, 0), two_tokens(2, 1)}, weights);
  }
}

// What a sum of weighted table entries is worth, and the sum of the weights.
__device__ __forceinline__ float value_of(Shared&, int, float weighted, float) { return weighted; }
__device__ __forceinline__ float value_of(LevelShared& shared, int channel, float weighted, float sum) {
  float2 const scale = room_of(shared).scales[channel];
  return weighted * scale.y + sum * scale.x;
}

// Both classes' sums of a warp. Class 1 has its rows swapped: lane t ^ 2, rows g and g + 8.
template <class AnyShared>
__device__ __forceinline__ void leave_progress(const ValueLane& lane, Progress& progress, AnyShared& shared) {
  int const warp = gpu::unknown(warp_of_role());
  int const row = static_cast<int>(2 * lane.t & 3);
  int const g = static_cast<int>(lane.g);
  float* const out = left_by(shared, warp);
  __syncwarp();  // codes, which lie there, are no longer read
  for (int offset : {1, 2, 16}) progress.sum += __shfl_xor_sync(~0u, progress.sum, offset);
  if (lane.t == 0 && g < rows) shared.sums[warp][g] = {progress.maximum, progress.sum};
  float const row_sums[2] = {__shfl_sync(~0u, progress.sum, row * 4), __shfl_sync(~0u, progress.sum, row * 4 + 4)};
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int channel = 0; channel < 8; ++channel) {
      float const low = progress.weighted[channel][c] + __shfl_xor_sync(~0u, progress.weighted[channel][c + 2], 2);
      float const high = progress.weighted[channel][c + 2] + __shfl_xor_sync(~0u, progress.weighted[channel][c], 2);
      if (lane.t < 2) {
        out[(row + c) * head_dim + g * 8 + channel] = value_of(shared, g * 8 + channel, low, row_sums[c]);
        out[(row + c) * head_dim + (g + 8) * 8 + channel] = value_of(shared, (g + 8) * 8 + channel, high, row_sums[c]);
      }
    }
}

// Asks for the segment's first page of this warp, and writes the queries of its first two.
__device__ __forceinline__ void begin_values(const Step& step, Shared& shared) {
  unsigned const count = shared.work.pages_before;
  const Segment& segment = shared.work.segment;
  int const begin = first_unit(segment);
  int const distance = segment.position / unit_tokens - begin;
  fetch_codes(shared.pairs[warp_of_role()].value_codes, PageWalk(shared).page(), shared.work.value_offset,
              step.value_by_code);
  float2 const back = load_back(step);
  write_query(shared, step_angle(step, distance), back, count);
  if (begin + 1 < end_unit(segment)) write_query(shared, step_angle(step, distance - 1), back, count + 1);
}

// The segment's pages of this warp.
template <bool Softcap, class AnyShared>
__device__ __forceinline__ void take_values(const Step& step, AnyShared& shared) {
  if constexpr (!AnyShared::begins_early) begin_values(step, shared);
  unsigned count = shared.work.pages_before;
  Pair& pair = shared.pairs[warp_of_role()];
  int const begin = first_unit(shared.work.segment);
  int const end = end_unit(shared.work.segment);
  Interval const seen = shared.work.segment.seen.codes;
  PageWalk walk(shared);
  walk.advance();
  int const distance = shared.work.segment.position / unit_tokens;
  auto const load_step = [&](int unit) { return step_angle(step, unit < end ? distance - unit : 0); };
  float2 const back = load_back(step);
  float2 angle = load_step(begin + 2);
  gpu::cp_async_wait<0>();
  gpu::barrier_sync(value_barrier, role_threads);  // the table is there
  ValueLane const lane(gpu::lane_id(), shared);
  Progress progress;
  uint32_t codes[2][4];
  load_value_codes(pair, lane, codes);
  for (int unit = begin; unit < end; ++unit, ++count) {
    gpu::wait(pair.written, count & 1);
    float logits[8];
    load_logits(pair, lane, logits);
    __syncwarp();  // and the codes are in registers
    if (gpu::lane_id() == 0) gpu::arrive(pair.taken);
    if (unit + 1 < end) {
      fetch_codes(pair.value_codes, walk.page(), shared.work.value_offset, step.value_by_code);
      walk.advance();
    }
    if constexpr (Softcap)
#pragma unroll
      for (float& logit : logits) logit = capped(step, logit);
    int const page_begin = unit * unit_tokens + gpu::unknown(warp_of_role()) * page_tokens;
    if (page_begin < seen.begin || page_begin + page_tokens > seen.end) {
      int const first = page_begin + static_cast<int>(8 * lane.t + 32 * (lane.g >> 2));
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (first + i < seen.begin || first + i >= seen.end) logits[i] = unseen;
    }
    raise_maximum(lane, logits, progress);
    uint32_t weights[4][2];
    take_powers(lane, logits, progress, weights);
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      if (b == 2 && unit + 2 < end) {
        write_query(shared, angle, back, count + 2);
        angle = load_step(unit + 3);
      }
      add_values(shared, lane, codes, b, weights[b], progress);
    }
    gpu::cp_async_wait<0>();
    __syncwarp();
    load_value_codes(pair, lane, codes);
  }
  leave_progress(lane, progress, shared);
}

}  // namespace couplet::cuda::attend::lookup::channels8
