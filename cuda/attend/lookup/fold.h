// What the value warps came to, added to the segment's partial result.
#pragma once

#include "shared.h"

namespace couplet::cuda::attend::lookup {

// Adds what the value warps left, warp by warp, to the segment's partial result, whose slot holds the sum of what was added `before`. Comes
// with a barrier of the value warps before and behind.
template <class Shared, class Left>
__device__ __forceinline__ void fold_warps(const Step& step, Shared& shared, bool before, const Left& left) {
  constexpr int elements = rows * head_dim / role_threads;
  gpu::barrier_sync(value_barrier, role_threads);
  int const thread = warp_of_role() * 32 + gpu::fresh_lane_id();
  int64_t const slot = static_cast<int64_t>(shared.work.segment.slot) * rows;
  float2 total[elements];
#pragma unroll
  for (int i = 0; i < elements; ++i) {
    int const element = thread + i * role_threads;
    int const row = element / head_dim;
    float* const place = step.weighted + slot * head_dim + element;
    float2 const old = before ? shared.total[row] : float2{nothing, 0};
    float maximum = old.x;
    for (int warp = 0; warp < pages; ++warp) maximum = max(maximum, shared.sums[warp][row].x);
    float const own = gpu::ex2_approx(old.x - maximum);
    total[i] = {maximum, old.y * own};
    float weighted = before ? *place * own : 0;
    for (int warp = 0; warp < pages; ++warp) {
      float const factor = gpu::ex2_approx(shared.sums[warp][row].x - maximum);
      total[i].y += shared.sums[warp][row].y * factor;
      weighted += left(warp)[element] * factor;
    }
    *place = weighted;
  }
  gpu::barrier_sync(value_barrier, role_threads);
#pragma unroll
  for (int i = 0; i < elements; ++i) {
    int const element = thread + i * role_threads;
    if (element % head_dim) continue;
    shared.total[element / head_dim] = total[i];
    step.sums[slot + element / head_dim] = total[i];
  }
}

}  // namespace couplet::cuda::attend::lookup
