// How a kernel tells of a NaN or an infinity in rows: who loads it notes it; the first one, by token, kv head and channel, ends up in
// the report at the start of the workspace.
#pragma once

#include "../../native/abi/status.h"
#include "../gpu.h"

namespace couplet::cuda {

// The workspace. Zero before the launch.
struct NotFinite {
  couplet_report report;
  unsigned long long first;  // 2^64 - 1 - the index of the first value that is not finite, or 0
  uint32_t blocks_done;
};
static_assert(offsetof(NotFinite, report) == 0);

inline constexpr size_t not_finite_bytes = (sizeof(NotFinite) + 63) / 64 * 64;

__device__ __forceinline__ bool is_finite(float value) { return (__float_as_uint(value) & 0x7fffffffu) < 0x7f800000u; }

__device__ __forceinline__ void note_not_finite(NotFinite* found, int64_t token, int32_t kv_head, int32_t channel,
                                                int32_t kv_heads) {
  unsigned long long const index =
      (static_cast<unsigned long long>(token) * static_cast<unsigned>(kv_heads) + static_cast<unsigned>(kv_head)) *
          256 +
      static_cast<unsigned>(channel);
  atomicMax(&found->first, ~index);
}

// By all threads of the block when all their notes are taken. The last block of the launch turns the first note into the report.
__device__ __forceinline__ void report_not_finite(NotFinite* found, int32_t kv_heads) {
  __syncthreads();
  uint32_t const blocks = gridDim.x * gridDim.y;
  if (threadIdx.x != 0 || gpu::fetch_add_acq_rel(&found->blocks_done, 1) != blocks - 1) return;
  unsigned long long const index = ~atomicMax(&found->first, 0ull);
  couplet_report& report = found->report;
  report.layer = -1;
  report.native_code = -1;
  bool const is_found = index != ~0ull;
  report.status = is_found ? COUPLET_NOT_FINITE : COUPLET_OK;
  report.token = is_found ? static_cast<int64_t>(index / 256 / static_cast<unsigned>(kv_heads)) : -1;
  report.kv_head = is_found ? static_cast<int32_t>(index / 256 % static_cast<unsigned>(kv_heads)) : -1;
  report.channel = is_found ? static_cast<int32_t>(index % 256) : -1;
}

}  // namespace couplet::cuda
