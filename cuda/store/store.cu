// store: rows -> float32 in the memory of a cache. A warp copies rows, a channel a lane: 8 KB of keys and values are what a token
// of a layer has, so that the launch costs more than the copy.
#include <algorithm>
#include <cstdio>

#include "../../native/common/check.h"
#include "../backend.h"
#include "../device/elements.h"
#include "../device/not_finite.h"

namespace couplet::cuda {
namespace {

constexpr int threads = 256;
constexpr int warps = threads / 32;
constexpr int most_run_blocks = 65535;  // gridDim.y

// ---- kernel ------------------------------------------------------------------------------------------------------------------
// Blocks along x share the rows (tokens x kv heads) of a run, blocks along y the runs.
__global__ void __launch_bounds__(threads) store(couplet_store_params const params, NotFinite* const not_finite) {
  int const lane = threadIdx.x % 32;
  int const warp = blockIdx.x * warps + threadIdx.x / 32;
  for (int index = blockIdx.y; index < params.run_count; index += gridDim.y) {
    const couplet_store_run& run = params.runs[index];
    int64_t const rows = static_cast<int64_t>(run.tokens) * params.kv_heads;
    for (int64_t row = warp; row < rows; row += static_cast<int64_t>(gridDim.x) * warps) {
      int64_t const token = row / params.kv_heads;
      int const head = static_cast<int>(row % params.kv_heads);
      int64_t const from = token * run.token_stride + head * run.head_stride;
      float* const to = run.stored + token * run.stored_token_stride + head * run.stored_head_stride;
      for (int channel = lane; channel < params.head_dim; channel += 32) {
        float const value = load_element(run.rows, params.dtype, from + channel);
        if (!is_finite(value)) note_not_finite(not_finite, run.first_token + token, head, channel, params.kv_heads);
        to[channel] = value;
      }
    }
  }
  report_not_finite(not_finite, params.kv_heads);
}

// ---- launcher ----------------------------------------------------------------------------------------------------------------
size_t workspace_bytes(const couplet_store_params*) { return not_finite_bytes; }

couplet_status run(const couplet_store_params* params, void* workspace, void* stream, couplet_report* report) {
  if (couplet_status const status = check_store_params(params, report)) return status;
  if (!workspace) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected workspace but received NULL");
  auto const handle = static_cast<cudaStream_t>(stream);
  auto* const not_finite = static_cast<NotFinite*>(workspace);
  cudaError_t const cleared = cudaMemsetAsync(not_finite, 0, sizeof(NotFinite), handle);
  if (couplet_status const status = status_of(cleared, report, "store")) return status;
  int64_t const rows = int64_t{params->most_tokens} * params->kv_heads;
  if (params->run_count == 0 || rows == 0) return COUPLET_OK;
  dim3 const grid(static_cast<unsigned>(std::min<int64_t>((rows + warps - 1) / warps, 1024)),
                  static_cast<unsigned>(std::min(params->run_count, most_run_blocks)));
  return status_of(gpu::launch(store, grid, threads, 0, handle, *params, not_finite), report, "store");
}

void describe(const couplet_store_params* params, char* text, size_t text_bytes) {
  if (!text || text_bytes == 0) return;
  std::snprintf(text, text_bytes, "store gpu %s", dtype_name(params->dtype));
}

}  // namespace

const couplet_store_entries store_entries = {
    .check = check_store_params, .workspace = workspace_bytes, .run = run, .describe = describe};

}  // namespace couplet::cuda
