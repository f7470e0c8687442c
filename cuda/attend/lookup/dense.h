// Tokens in full precision, by the value warps.
//   A warp takes 8 of each 64 tokens, whose loads are under way together. A lane holds channels lane + 32 k, of which k and k + 2 are a pair,
//   and its part of the logits of all 8 tokens and 4 rows. The parts are added while they are handed out, half of them at a time: lane
//   4 token + row ends up with that token's logit.
#pragma once

#include "shared.h"

namespace couplet::cuda::attend::lookup {

constexpr int dense_chunk = 8;  // tokens of a warp
constexpr int dense_parts = head_dim / 32;
static_assert(dense_chunk * rows == 32, "a logit for each lane");

// The token at `position`, which is that of lane % 8; the answer is in the lanes below 8. Four runs are looked at together.
__device__ __forceinline__ DenseToken find_dense(const couplet_attend_sequence& sequence, int position, int kv_head) {
  int const lane = gpu::lane_id();
  DenseToken found{nullptr, nullptr};
  for (int first = 0; first < sequence.dense_count; first += 32 / dense_chunk) {
    DenseToken here{nullptr, nullptr};
    if (int const run = first + lane / dense_chunk; run < sequence.dense_count) {
      couplet_dense_rows const rows = sequence.dense[run];
      int64_t const i = position - rows.first_token;
      if (i >= 0 && i < rows.tokens)
        here = {rows.keys + i * rows.key_token_stride + kv_head * rows.key_head_stride,
                rows.values + i * rows.value_token_stride + kv_head * rows.value_head_stride};
    }
    for (int offset = 32 / 2; offset >= dense_chunk; offset /= 2) {
      auto const further = [&](const float* row) {
        return reinterpret_cast<const float*>(__shfl_xor_sync(~0u, reinterpret_cast<unsigned long long>(row), offset));
      };
      DenseToken const there{further(here.key), further(here.value)};
      if (!here.key) here = there;
    }
    if (!found.key) found = here;
  }
  return found;
}

// What the lane of token i has.
__device__ __forceinline__ const float* row_of_token(const float* row, int i) {
  return reinterpret_cast<const float*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(row), i));
}

// Zeros where token i is not there.
__device__ __forceinline__ void load_dense(const float* rows, int i, float (&parts)[dense_parts]) {
  const float* const row = row_of_token(rows, i);
#pragma unroll
  for (int k = 0; k < dense_parts; ++k) parts[k] = row ? row[gpu::lane_id() + 32 * k] : 0;
}

// Sums over the lanes of parts[i], for each i of 2 Half: a lane keeps those whose number has its own bits from Half down, so that the sum of
// parts[lane] is left of 32.
template <int Half>
__device__ __forceinline__ float hand_out_sums(float (&parts)[2 * Half]) {
  bool const upper = gpu::lane_id() & Half;
  float kept[Half];
#pragma unroll
  for (int i = 0; i < Half; ++i) {
    float const sent = gpu::select(upper, parts[i], parts[i + Half]);
    kept[i] = gpu::select(upper, parts[i + Half], parts[i]) + __shfl_xor_sync(~0u, sent, Half);
  }
  if constexpr (Half == 1)
    return kept[0];
  else
    return hand_out_sums<Half / 2>(kept);
}

// Rotates the keys to the query, which is the plain one: back by the distance of token i, at the amplitude of both. Four tokens' angles are
// under way together.
template <class Distance>
__device__ __forceinline__ void rotate_dense(const Angles& angles, const Distance& distance,
                                             float (&keys)[dense_chunk][dense_parts]) {
  int const lane = gpu::fresh_lane_id();
  float amplitudes[2];
  for (int k = 0; k < 2; ++k) amplitudes[k] = angles.amplitudes[lane + 32 * k];
#pragma unroll
  for (int first = 0; first < dense_chunk; first += 4) {
    float2 back[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        back[i][k] = angles.offsets[distance(first + i) % rotary_block * pairs + lane + 32 * k];
    if (distance(first) >= rotary_block)  // the largest
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          back[i][k] = add_angles(back[i][k], angles.steps[distance(first + i) / rotary_block * pairs + lane + 32 * k]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float(&key)[dense_parts] = keys[first + i];
        float const factor = amplitudes[k] * amplitudes[k];
        float2 const turned = add_angles({key[k], key[k + 2]}, {back[i][k].x * factor, -back[i][k].y * factor});
        key[k] = turned.x;
        key[k + 2] = turned.y;
      }
  }
}

template <bool Softcap, class Shared>
__device__ __forceinline__ void take_dense(const Step& step, Shared& shared) {
  int const warp = warp_of_role();
  int const lane = gpu::fresh_lane_id();
  const float* const queries = plain_queries(shared);
  const Segment& segment = shared.work.segment;
  const couplet_attend_sequence& sequence = step.params.sequences[segment.sequence];
  int const below = size_of(segment.seen.below);
  int const count = below + size_of(segment.seen.above);
  auto const position_of = [&](int index) {
    return index < below ? segment.seen.below.begin + index : segment.seen.above.begin + index - below;
  };
  float maximum = nothing;  // of row lane % 4
  float sum = 0;
  float weighted[rows][dense_parts] = {};
  for (int first = warp * dense_chunk; first < count; first += pages * dense_chunk) {
    int const own = first + lane % dense_chunk;
    DenseToken mine = find_dense(sequence, position_of(own), segment.kv_head);
    if (own >= count) mine = {nullptr, nullptr};
    float keys[dense_chunk][dense_parts];
#pragma unroll
    for (int i = 0; i < dense_chunk; ++i) load_dense(mine.key, i, keys[i]);
#pragma unroll
    for (int i = 0; i < dense_chunk; ++i)
      if (const float* const value = row_of_token(mine.value, i)) gpu::prefetch_l2(value + lane * dense_parts);
    if (step.angles.pairs)
      rotate_dense(
          step.angles, [&](int i) { return max(0, segment.position - position_of(first + i)); }, keys);
    float parts[dense_chunk * rows];
#pragma unroll
    for (int i = 0; i < dense_chunk; ++i)
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        float part = 0;
        for (int k = 0; k < dense_parts; ++k) part += queries[row * head_dim + lane + 32 * k] * keys[i][k];
        parts[i * rows + row] = part;
      }
    float values[dense_chunk][dense_parts];
#pragma unroll
    for (int i = 0; i < dense_chunk; ++i) load_dense(mine.value, i, values[i]);
    bool const there = __ballot_sync(~0u, mine.key != nullptr) >> lane / rows & 1;
    float const product = hand_out_sums<16>(parts);
    float const logit = !there ? unseen : Softcap ? capped(step, product) : product;
    float largest = max(maximum, logit);
    for (int offset = rows; offset < 32; offset *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, offset));
    float const factor = gpu::ex2_approx(maximum - largest);
    float const power = gpu::ex2_approx(logit - largest);
    float added = power;
    for (int offset = rows; offset < 32; offset *= 2) added += __shfl_xor_sync(~0u, added, offset);
    maximum = largest;
    sum = sum * factor + added;
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      float const row_factor = __shfl_sync(~0u, factor, row);
      for (float& channel : weighted[row]) channel *= row_factor;
#pragma unroll
      for (int i = 0; i < dense_chunk; ++i) {
        float const row_power = __shfl_sync(~0u, power, i * rows + row);
        for (int k = 0; k < dense_parts; ++k) weighted[row][k] += row_power * values[i][k];
      }
    }
  }
  int const own = gpu::unknown(warp);  // no address waits in a register for the end of the segment
  float* const out = dense_left_by(shared, own);
#pragma unroll
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < dense_parts; ++k) out[row * head_dim + lane + 32 * k] = weighted[row][k];
  if (lane < rows) shared.sums[own][lane] = {maximum, sum};
}

}  // namespace couplet::cuda::attend::lookup
