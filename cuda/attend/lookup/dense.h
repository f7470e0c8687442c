// Tokens in full precision, by the value warps.
#pragma once

#include "shared.h"

namespace couplet::cuda::attend::lookup {

// A warp takes 4 of each 32 tokens; a lane holds channels lane + 32 k, of which k and k + 2 are a pair. Keys are rotated to
// the query, which is the plain one.
template <bool Softcap, class Shared>
__device__ __forceinline__ void take_dense(const Step& step, Shared& shared) {
  constexpr int chunk = 4;  // tokens whose loads are under way together
  constexpr int parts = head_dim / 32;
  int const warp = warp_of_role();
  int const lane = gpu::lane_id();
  const float* const queries = plain_queries(shared);
  const Segment& segment = shared.segment;
  const couplet_attend_sequence& sequence = step.params.sequences[segment.sequence];
  int const below = size_of(segment.seen.below);
  int const count = below + size_of(segment.seen.above);
  float2 away[2] = {{1, 0}, {1, 0}};  // the query's angle, backwards
  if (step.angles.pairs)
    for (int k = 0; k < 2; ++k) {
      float2 const angle = position_angle(step.angles, segment.position, lane + 32 * k);
      away[k] = {angle.x, -angle.y};
    }
  float maxima[rows];
  float sums[rows];
  float weighted[rows][parts];
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    maxima[row] = nothing;
    sums[row] = 0;
    for (int k = 0; k < parts; ++k) weighted[row][k] = 0;
  }
  for (int first = warp * chunk; first < count; first += pages * chunk) {
    int const index = first + lane;
    int const own = index < below ? segment.seen.below.begin + index : segment.seen.above.begin + index - below;
    DenseToken mine{nullptr, nullptr};
    if (lane < chunk && index < count) mine = dense_token(sequence, own, segment.kv_head);
    float keys[chunk][parts];
    float values[chunk][parts];
    bool there[chunk];
#pragma unroll
    for (int i = 0; i < chunk; ++i) {
      auto const from = [&](const float* row) {
        return reinterpret_cast<const float*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(row), i));
      };
      const float* const key = from(mine.key);
      const float* const value = from(mine.value);
      int const position = __shfl_sync(~0u, own, i);
      there[i] = key != nullptr;
#pragma unroll
      for (int k = 0; k < parts; ++k) {
        keys[i][k] = there[i] ? key[lane + 32 * k] : 0;
        values[i][k] = there[i] ? value[lane + 32 * k] : 0;
      }
      if (step.angles.pairs && there[i])
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float2 const angle = add_angles(position_angle(step.angles, position, lane + 32 * k), away[k]);
          float2 const turned = add_angles({keys[i][k], keys[i][k + 2]}, angle);
          keys[i][k] = turned.x;
          keys[i][k + 2] = turned.y;
        }
    }
#pragma unroll
    for (int i = 0; i < chunk; ++i)
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        float product = 0;
        for (int k = 0; k < parts; ++k) product += queries[row * head_dim + lane + 32 * k] * keys[i][k];
        for (int offset = 16; offset > 0; offset /= 2) product += __shfl_xor_sync(~0u, product, offset);
        float const logit = !there[i] ? unseen : Softcap ? capped(step, product) : product;
        float const maximum = max(maxima[row], logit);
        float const factor = gpu::ex2_approx(maxima[row] - maximum);
        float const power = gpu::ex2_approx(logit - maximum);
        maxima[row] = maximum;
        sums[row] = sums[row] * factor + power;
        for (int k = 0; k < parts; ++k) weighted[row][k] = weighted[row][k] * factor + power * values[i][k];
      }
  }
  int const own = gpu::unknown(warp);  // no address waits in a register for the end of the segment
  float* const out = left_by(shared, own);
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < parts; ++k) out[row * head_dim + lane + 32 * k] = weighted[row][k];
    if (lane == 0) shared.sums[own][row] = {maxima[row], sums[row]};
  }
}

}  // namespace couplet::cuda::attend::lookup
