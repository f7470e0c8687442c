// A segment: its queries, its tokens in full precision, its chapters.
#pragma once

#include "../../device/elements.h"
#include "keys.h"
#include "values.h"

namespace couplet::cuda::attend::staged {

// ---- queries -------------------------------------------------------------------------------------------------------------------
// Channels of pair p of all head_dim / 2: rotated ones first, the others two by two.
__device__ __forceinline__ int2 channels_of(const Angles& angles, int pair) {
  return pair < angles.pairs && angles.kind == COUPLET_ROTARY_HALF ? int2{pair, pair + angles.pairs}
                                                                   : int2{2 * pair, 2 * pair + 1};
}

// Of the segment's heads, as they are times scale; zeros for heads that there are not.
template <int Quads>
__device__ __forceinline__ void load_queries(const Step& step, Fixed<Quads>& fixed) {
  constexpr float log2_e = 1.4426950408889634f;
  const Segment& segment = fixed.segment;
  const couplet_attend_sequence& sequence = step.params.sequences[segment.sequence];
  for (int index = thread_here(); index < 4 * Quads * COUPLET_MAX_HEAD_DIM; index += threads) {
    int const head = index / COUPLET_MAX_HEAD_DIM;
    int const channel = index % COUPLET_MAX_HEAD_DIM;
    bool const there = head < segment.rows && channel < step.params.head_dim;
    int64_t const at = (segment.first_head + head) * sequence.query_head_stride + channel;
    fixed.queries[head][channel] =
        there ? load_element(sequence.queries, step.params.query_dtype, at) * (step.params.scale * log2_e) : 0;
    fixed.weighted[head][channel] = 0;
  }
}

// In place, by the position's offset in its block of 512, with the amplitudes of both query and key.
template <int Quads>
__device__ __forceinline__ void rotate_queries(const Step& step, Fixed<Quads>& fixed) {
  const Angles& angles = step.angles;
  int const offset = fixed.segment.position % rotary_block;
  for (int index = thread_here(); index < 4 * Quads * angles.pairs; index += threads) {
    int const pair = index % angles.pairs;
    int2 const at = channels_of(angles, pair);
    float* const query = fixed.queries[index / angles.pairs];
    float const amplitude = angles.amplitudes[pair] * angles.amplitudes[pair];
    float2 const turned = add_angles({query[at.x], query[at.y]}, angles.offsets[offset * angles.pairs + pair]);
    query[at.x] = turned.x * amplitude;
    query[at.y] = turned.y * amplitude;
  }
}

// ---- tokens in full precision ----------------------------------------------------------------------------------------------------
// A warp has every 16th token; a lane pairs lane + 32 k of the channels. Keys are rotated by their distance to the query, two heads at a time.
template <int Quads>
__device__ __forceinline__ void take_dense(const Step& step, const Shared<Quads>& shared) {
  constexpr int parts = COUPLET_MAX_HEAD_DIM / 64;
  constexpr int together = 2;  // heads: registers are few
  Fixed<Quads>& fixed = *shared.fixed;
  const Segment& segment = fixed.segment;
  const couplet_attend_sequence& sequence = step.params.sequences[segment.sequence];
  const Angles& angles = step.angles;
  int const head_dim = step.params.head_dim;
  int const warp = static_cast<int>(threadIdx.x) / 32;
  int const below = size_of(segment.seen.below);
  int const count = below + size_of(segment.seen.above);
  for (int first = 0; first < 4 * Quads; first += together) {
    float maxima[together];
    float sums[together];
    float2 weighted[together][parts];
#pragma unroll
    for (int head = 0; head < together; ++head) {
      maxima[head] = nothing;
      sums[head] = 0;
      for (float2& pair : weighted[head]) pair = {0, 0};
    }
    for (int index = warp; index < count; index += warps) {
      int const lane = gpu::unknown(gpu::lane_id());
      int const position = index < below ? segment.seen.below.begin + index : segment.seen.above.begin + index - below;
      DenseToken const token = dense_token(sequence, position, segment.kv_head);
      if (!token.key) continue;
      float products[together] = {};
      float2 values[parts];
#pragma unroll
      for (int k = 0; k < parts; ++k) {
        int const pair = lane + 32 * k;
        values[k] = {0, 0};
        if (2 * pair >= head_dim) continue;
        int2 const at = channels_of(angles, pair);
        float2 key{token.key[at.x], token.key[at.y]};
        values[k] = {token.value[at.x], token.value[at.y]};
        if (pair < angles.pairs) {
          float2 const away = position_angle(angles, segment.position, pair);
          key = add_angles(key, add_angles(position_angle(angles, position, pair), {away.x, -away.y}));
        }
#pragma unroll
        for (int head = 0; head < together; ++head) {
          const float* const query = fixed.queries[first + head];
          products[head] += query[at.x] * key.x + query[at.y] * key.y;
        }
      }
#pragma unroll
      for (int head = 0; head < together; ++head) {
        float logit = products[head];
        for (int offset = 16; offset > 0; offset /= 2) logit += __shfl_xor_sync(~0u, logit, offset);
        if (step.params.softcap > 0) logit = capped(step, logit);
        float const maximum = max(maxima[head], logit);
        float const factor = gpu::ex2_approx(maxima[head] - maximum);
        float const power = gpu::ex2_approx(logit - maximum);
        maxima[head] = maximum;
        sums[head] = sums[head] * factor + power;
#pragma unroll
        for (int k = 0; k < parts; ++k)
          weighted[head][k] = {weighted[head][k].x * factor + power * values[k].x,
                               weighted[head][k].y * factor + power * values[k].y};
      }
    }
    __syncthreads();  // the results before are read
    int const lane = gpu::unknown(gpu::lane_id());
    float* const result = shared.results() + warp * together * head_dim;
#pragma unroll
    for (int head = 0; head < together; ++head) {
      if (lane == 0) fixed.sums[warp][head] = {maxima[head], sums[head]};
#pragma unroll
      for (int k = 0; k < parts; ++k) {
        int const pair = lane + 32 * k;
        if (2 * pair >= head_dim) continue;
        int2 const at = channels_of(angles, pair);
        result[head * head_dim + at.x] = weighted[head][k].x;
        result[head * head_dim + at.y] = weighted[head][k].y;
      }
    }
    __syncthreads();
    auto const maximum_of = [&](int head) {
      float maximum = nothing;
      for (int other = 0; other < warps; ++other) maximum = max(maximum, fixed.sums[other][head].x);
      return maximum;
    };
    for (int element = thread_here(); element < together * head_dim; element += threads) {
      int const head = element / head_dim;
      float const maximum = maximum_of(head);
      float sum = 0;
      for (int other = 0; other < warps; ++other)
        sum += shared.results()[other * together * head_dim + element] *
               gpu::ex2_approx(fixed.sums[other][head].x - maximum);
      fixed.weighted[first + head][element % head_dim] = sum;
    }
    if (threadIdx.x < together) {
      float const maximum = maximum_of(static_cast<int>(threadIdx.x));
      float sum = 0;
      for (int other = 0; other < warps; ++other)
        sum += fixed.sums[other][threadIdx.x].y * gpu::ex2_approx(fixed.sums[other][threadIdx.x].x - maximum);
      fixed.total[first + static_cast<int>(threadIdx.x)] = {maximum, sum};
    }
  }
}

// ---- segments --------------------------------------------------------------------------------------------------------------------
template <class Keys, bool Interleaved, int Quads>
__device__ __forceinline__ void take_chapter(const Step& step, const Shared<Quads>& shared, const Chapter& chapter) {
  take_keys<Keys, Interleaved>(step, shared, chapter);
  take_powers(step, shared, chapter);
  couplet_codec const values = step.params.value_codec;
  if (values.code_bits == 10)
    take_values<Codec<8, 10>>(step, shared, chapter);
  else if (values.group_channels == 8)
    take_values<Codec<8, 8>>(step, shared, chapter);
  else if (values.group_channels == 4)
    take_values<Codec<4, 8>>(step, shared, chapter);
  else
    take_values<Codec<2, 8>>(step, shared, chapter);
}

// The segments of this block's range, one after the other.
template <class Keys, bool Interleaved, int Quads>
__device__ __forceinline__ void run_segments(const Step& step, int most) {
  constexpr int heads = 4 * Quads;
  GPU_DYNAMIC_SHARED(unsigned char, memory);
  Shared<Quads> const shared(step, memory, most);
  Fixed<Quads>& fixed = *shared.fixed;
  int const head_dim = step.params.head_dim;
  int const begin = Ranges(step).begin(blockIdx.x);
  if (begin == Ranges(step).end(blockIdx.x)) return;
  if (threadIdx.x == 0) {
    fixed.at = begin;
    fixed.end = Ranges(step).end(blockIdx.x);
  }
  for (;;) {
    __syncthreads();  // the segment before is done
    int const at = fixed.at;
    if (at == fixed.end) break;
    Segment const segment = segment_at(step, at);
    __syncthreads();
    if (threadIdx.x == 0) {
      fixed.at = at + segment.units;
      fixed.segment = segment;
      fixed.sequence_pages = step.params.sequences[segment.sequence].pages;
    }
    if (static_cast<int>(threadIdx.x) < heads) fixed.total[threadIdx.x] = {nothing, 0};
    __syncthreads();
    load_queries(step, fixed);
    __syncthreads();
    if (size_of(fixed.segment.seen.below) + size_of(fixed.segment.seen.above) > 0) take_dense(step, shared);
    Interval const codes = fixed.segment.seen.codes;
    if (size_of(codes) > 0) {
      __syncthreads();  // the queries are read as they are
      rotate_queries(step, fixed);
      int const end = blocks_of(codes.end, page_tokens);
      for (int first = codes.begin / page_tokens; first < end; first += most) {
        Chapter const chapter{first, min(most, end - first), codes};
        __syncthreads();  // nobody reads the pages before
        if (static_cast<int>(threadIdx.x) < chapter.pages)
          fixed.pages[threadIdx.x] = fixed.sequence_pages[first + threadIdx.x];
        take_chapter<Keys, Interleaved>(step, shared, chapter);
      }
    }
    __syncthreads();
    int64_t const slot = static_cast<int64_t>(fixed.segment.slot) * heads;
    for (int element = thread_here(); element < fixed.segment.rows * head_dim; element += threads)
      step.weighted[slot * head_dim + element] = fixed.weighted[element / head_dim][element % head_dim];
    if (static_cast<int>(threadIdx.x) < fixed.segment.rows) step.sums[slot + threadIdx.x] = fixed.total[threadIdx.x];
  }
}

}  // namespace couplet::cuda::attend::staged
