// Value warps of 4c8b: logits and codes -> weighted sums. They also rotate the queries for the key warps.
#pragma once

#include "shared.h"

namespace couplet::cuda::attend::lookup::channels4 {

// ---- table -------------------------------------------------------------------------------------------------------------------
// Issues the copies of the value codebook, by the value warps. 16 lanes write to 16 different columns of 8 bytes: those of 16 groups of a
// code, where bit 2 of the group chooses which copy comes first.
__device__ __forceinline__ void load_values(const Step& step, int kv_head, Shared& shared) {
  const unsigned char* const rows =
      reinterpret_cast<const unsigned char*>(step.value_by_code) + int64_t{kv_head} * key_bytes;
  int const thread = warp_of_role() * 32 + gpu::fresh_lane_id();
#pragma unroll 1
  for (int index = thread; index < key_bytes / row_bytes; index += role_threads) {
    int const code = index / 32;
    int const unit = index / 8 % units;
    int const g = index % 8;
    unsigned char* const to =
        shared.values + unit / 2 * key_bytes + code * code_bytes + (g * 2 + unit % 2) * 2 * row_bytes;
#pragma unroll
    for (int copy = 0; copy < 2; ++copy) gpu::cp_async<8>(to + (copy ^ (g >> 2)) * row_bytes, rows + index * row_bytes);
  }
  gpu::cp_async_commit();
}

// ---- queries -----------------------------------------------------------------------------------------------------------------
// A thread rotates two pairs of one query for one half of all pages.
struct QueryThread {
  int thread;
  __device__ __forceinline__ int row() const { return thread / pairs; }
  __device__ __forceinline__ int half() const { return thread / 32 % 2; }
  __device__ __forceinline__ int pair() const { return thread % 32 * 2; }
  // Word w of quad w / 2 % 4, see `quads`: of step pair / 16, channels pair % 4 and the next of group pair / 4.
  __device__ __forceinline__ int word() const {
    return half() * sets * set_words + pair() / 16 % 2 * 2 * quad_words + (row() * 4 + pair() / 4 % 4) * 4 +
           pair() % 4 + pair() / 32;
  }
};

__device__ __forceinline__ float4 add_two_angles(float4 a, float4 b) {
  float2 const first = add_angles({a.x, a.y}, {b.x, b.y});
  float2 const second = add_angles({a.z, a.w}, {b.z, b.w});
  return {first.x, first.y, second.x, second.y};
}
__device__ __forceinline__ float4 two_angles(const float2* rows, int row, int pair) {
  return *reinterpret_cast<const float4*>(rows + row * pairs + pair);
}
__device__ __forceinline__ float4 backwards(float4 angles) { return {angles.x, -angles.y, angles.z, -angles.w}; }

__device__ __forceinline__ void load_query(const Step& step, Shared& shared) {
  constexpr float log2_e = 1.4426950408889634f;
  const Segment& segment = shared.work.segment;
  QueryThread const own{fresh_thread_of_role()};
  int const row = own.row();
  int const pair = own.pair();
  float4 value{0, 0, 0, 0};
  if (row < segment.rows) {
    const couplet_attend_sequence& sequence = step.params.sequences[segment.sequence];
    int64_t const query = (segment.first_head + row) * sequence.query_head_stride + pair;
    float const factor = step.params.scale * log2_e;
    auto const at = [&](int channel) {
      return load_element(sequence.queries, step.params.query_dtype, query + channel) * factor;
    };
    value = {at(0), at(pairs), at(1), at(pairs + 1)};
  }
  if (own.half() == 0) {
    shared.plain[row][pair] = value.x;
    shared.plain[row][pair + 1] = value.z;
    shared.plain[row][pair + pairs] = value.y;
    shared.plain[row][pair + pairs + 1] = value.w;
  }
  if (step.angles.pairs) {
    float2 const amplitude = {step.angles.amplitudes[pair], step.angles.amplitudes[pair + 1]};
    float2 const squared = {amplitude.x * amplitude.x,
                            amplitude.y * amplitude.y};  // the query carries the key's as well
    float4 const offset = two_angles(step.angles.offsets, segment.position % unit_tokens, pair);
    value =
        add_two_angles(value, {offset.x * squared.x, offset.y * squared.x, offset.z * squared.y, offset.w * squared.y});
    value = add_two_angles(value, backwards(two_angles(step.angles.offsets, own.half() * half_tokens, pair)));
  }
  shared.query[own.thread] = value;
}

// The angles by which the query is rotated for keys of a unit: its distance in blocks, below 4096 (see select).
__device__ __forceinline__ float4 step_angles(const Step& step, QueryThread own, int distance) {
  return step.angles.pairs ? two_angles(step.angles.steps, distance, own.pair()) : float4{1, 0, 1, 0};
}

// The angles between two sets of query operands.
__device__ __forceinline__ float4 load_back(const Step& step, QueryThread own) {
  return step.angles.pairs ? backwards(two_angles(step.angles.offsets, phases, own.pair())) : float4{1, 0, 1, 0};
}

// Comes with this warp's arrival at the barrier of the page's queries.
__device__ __forceinline__ void write_query(Shared& shared, QueryThread own, float4 angles, float4 back,
                                            unsigned page) {
  float4 turned = add_two_angles(shared.query[own.thread], angles);
  uint32_t* const to = shared.queries[page % query_buffers][0][0] + own.word();
#pragma unroll
  for (int set = 0; set < sets; ++set) {
    if (set > 0) turned = add_two_angles(turned, back);
    to[set * set_words] = gpu::cvt_f16x2(turned.x, turned.z);
    to[set * set_words + quad_words] = gpu::cvt_f16x2(turned.y, turned.w);
  }
  __syncwarp();
  if (gpu::lane_id() == 0) gpu::arrive(shared.rotated[page % 2]);
}

// ---- codes -------------------------------------------------------------------------------------------------------------------
struct ValueLane : Lane {
  unsigned codes;           // bytes into half a page, unit 0
  unsigned column[2];       // address of a row of code 0, by bit 0 of the unit
  uint32_t power_bytes[4];  // selectors: from the power here and the one 16 lanes away to the B operands

  __device__ __forceinline__ explicit ValueLane(int lane) : Lane(lane) {
    codes = static_cast<unsigned>(((t >> 1) * 8 + g) * page_tokens + t * 2 * tiles);
    for (int i = 0; i < 2; ++i) column[i] = static_cast<unsigned>((g * 2 + (i ^ t >> 1)) * 2 + (t & 1)) * row_bytes;
    // Bit 0 of a token is i ^ t >> 1 for token 2t + i. Bytes 0 and 1 are the power of this lane's token, 4 and 5 the other's, 2 and 3 are 0.
    for (int bit0 = 0; bit0 < 2; ++bit0)
      for (int i = 0; i < 2; ++i) {
        uint32_t const power = bit0 == g >> 2 ? 0x10 : 0x54;
        uint32_t const place = g >> 2 ? power << 8 | 0x32 : 0x3200 | power;  // the channel of a word
        power_bytes[2 * bit0 + i] = bit0 == (i ^ t >> 1) ? place : 0x3232;
      }
  }
};

// Codes of tokens 8t to 8t + 7 of half a page: those of number 2t, those of 2t + 1. Units in the order of token 2t.
struct ValueCodes {
  uint32_t words[units][2];
};

__device__ __forceinline__ void load_value_codes(const ValueLane& lane, const uint8_t* page, int half,
                                                 ValueCodes& codes) {
#pragma unroll
  for (unsigned unit = 0; unit < units; ++unit) {
    const uint8_t* const from = page + (lane.codes ^ unit * 8 * page_tokens) + half * half_tokens;
    uint2 const two = __ldg(reinterpret_cast<const uint2*>(from));
    codes.words[unit][0] = two.x;
    codes.words[unit][1] = two.y;
  }
}

// A warp's softmax in progress over its pages. The maximum is that of head g % 4, the sum its part that this lane added.
struct Progress {
  float maximum = nothing;
  float sum = 0;
  float weighted[units][4] = {};  // D operand: rows (word, g), columns (channel of a word, head)
};

// Raises the maximum where a logit lies more than `headroom` above it.
__device__ __forceinline__ void raise_maximum(const ValueLane& lane, const float (&logits)[2][tiles],
                                              Progress& progress) {
  float largest = unseen;
#pragma unroll
  for (auto const& half : logits)
#pragma unroll
    for (float const logit : half) largest = max(largest, logit);
  if (!__any_sync(~0u, largest > progress.maximum + headroom)) return;
  for (int offset : {1, 2, 16}) largest = max(largest, __shfl_xor_sync(~0u, largest, offset));
  largest = max(largest, progress.maximum);
  float const factor = gpu::ex2_approx(progress.maximum - largest);
  progress.maximum = largest;
  progress.sum *= factor;
  float const even = __shfl_sync(~0u, factor, lane.t % 2 * 8);  // of heads 2t % 4 and the next
  float const odd = __shfl_sync(~0u, factor, lane.t % 2 * 8 + 4);
#pragma unroll
  for (auto& unit : progress.weighted)
#pragma unroll
    for (int i = 0; i < 4; ++i) unit[i] *= i % 2 ? odd : even;
}

// powers[bit 0 of a token]: B operand of a tile.
__device__ __forceinline__ void take_power(const ValueLane& lane, float logit, Progress& progress,
                                           uint32_t (&powers)[2][2]) {
  float const power = gpu::ex2_approx(logit - progress.maximum);
  progress.sum += power;
  uint32_t const own = gpu::cvt_f16x2(power, 0);
  uint32_t const other = __shfl_xor_sync(~0u, own, 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) powers[i / 2][i % 2] = __byte_perm(own, other, lane.power_bytes[i]);
}

template <int Unit>
__device__ __forceinline__ void add_unit(const Shared& shared, const ValueLane& lane, const ValueCodes& codes, int tile,
                                         const uint32_t (&powers)[2][2], Progress& progress) {
  constexpr int slab = static_cast<int>(offsetof(Block, values)) + Unit / 2 * key_bytes;
  uint2 value[2];  // of tokens 2t and 2t + 1
#pragma unroll
  for (int i = 0; i < 2; ++i)
    value[i] = load_row<slab>(shared, row_offset(codes.words[Unit ^ i][i], tile, lane.column[(Unit ^ i) % 2]));
#pragma unroll
  for (int bit0 = 0; bit0 < 2; ++bit0)
    gpu::mma_m16n8k16_f16(progress.weighted[Unit ^ bit0], {value[0].x, value[0].y, value[1].x, value[1].y},
                          powers[bit0]);
}

// Comes with a barrier of the value warps, behind which no logits and queries are read.
__device__ __forceinline__ void leave_progress(const ValueLane& lane, Progress& progress, Shared& shared) {
  int const warp = gpu::unknown(warp_of_role());  // no address waits in a register for the end of the segment
  for (int offset : {1, 2, 16}) progress.sum += __shfl_xor_sync(~0u, progress.sum, offset);
  if (lane.t == 0 && lane.g < rows) shared.sums[warp][lane.g] = {progress.maximum, progress.sum};
  gpu::barrier_sync(value_barrier, role_threads);
  float* const out = left_by(shared, warp);
#pragma unroll
  for (int unit = 0; unit < units; ++unit)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const channel = (8 * unit + lane.g) * 4 + i / 2 * 2 + (lane.t >> 1);
      out[(lane.t % 2 * 2 + i % 2) * head_dim + channel] = progress.weighted[unit][i];
    }
}

// The segment's pages of this warp.
template <bool Softcap>
__device__ __forceinline__ void take_values(const Step& step, Shared& shared) {
  unsigned count = shared.work.pages_before;
  int const warp = fresh_thread_of_role() / 32;
  Pair& pair = shared.pairs[warp];
  ValueLane const lane(gpu::lane_id());
  int const first = first_unit(shared.work.segment);
  int const end = end_unit(shared.work.segment);
  Interval const seen = shared.work.segment.seen.codes;
  PageWalk walk(shared);
  int64_t const offset = shared.work.value_offset;
  auto const page_codes = [&] { return codes_of(walk.page(), offset, step.value_by_code); };
  ValueCodes codes[2];
  for (int half = 0; half < 2; ++half) load_value_codes(lane, page_codes(), half, codes[half]);
  walk.advance();
  QueryThread const own{fresh_thread_of_role()};
  float4 const back = load_back(step, own);
  int const distance = shared.work.segment.position / unit_tokens;
  auto const load_step = [&](int unit) { return step_angles(step, own, unit < end ? distance - unit : 0); };
  write_query(shared, own, load_step(first), back, count);
  if (first + 1 < end) write_query(shared, own, load_step(first + 1), back, count + 1);
  float4 angles = load_step(first + 2);
  gpu::cp_async_wait<0>();
  gpu::barrier_sync(value_barrier, role_threads);  // the table is there
  Progress progress;
  for (int unit = first; unit < end; ++unit, ++count) {
    gpu::wait(pair.written, count & 1);
    float logits[2][tiles];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float4 const four = shared.logits[warp][half][lane.g * 4 + lane.t];
      logits[half][0] = four.x;
      logits[half][1] = four.y;
      logits[half][2] = four.z;
      logits[half][3] = four.w;
    }
    __syncwarp();
    if (gpu::lane_id() == 0) gpu::arrive(pair.taken);
    if (unit + 2 < end) {
      write_query(shared, own, angles, back, count + 2);
      angles = load_step(unit + 3);
    }
    if constexpr (Softcap)
#pragma unroll
      for (auto& half : logits)
#pragma unroll
        for (float& logit : half) logit = capped(step, logit);
    int const page_begin = unit * unit_tokens + warp * page_tokens;
    if (page_begin < seen.begin || page_begin + page_tokens > seen.end)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) {
          int const position = page_begin + half * half_tokens + lane.token() + tile;
          if (position < seen.begin || position >= seen.end) logits[half][tile] = unseen;
        }
    raise_maximum(lane, logits, progress);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) {
        uint32_t powers[2][2];
        take_power(lane, logits[half][tile], progress, powers);
        add_unit<0>(shared, lane, codes[half], tile, powers, progress);
        add_unit<1>(shared, lane, codes[half], tile, powers, progress);
        add_unit<2>(shared, lane, codes[half], tile, powers, progress);
        add_unit<3>(shared, lane, codes[half], tile, powers, progress);
      }
      load_value_codes(lane, page_codes(), half, codes[half]);
    }
    walk.advance();
  }
  leave_progress(lane, progress, shared);
}

}  // namespace couplet::cuda::attend::lookup::channels4
