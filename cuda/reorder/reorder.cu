// reorder: rows with their channels in another order. A warp moves rows, a channel a lane: reads are scattered over the 64 to 512 bytes
// of one row, which are one to four lines of the cache. One decode step of 32 query heads and 8 kv heads is 10 KB a layer and sequence: the
// launch is what it costs.
#include <algorithm>
#include <cstdio>

#include "../../native/common/check.h"
#include "../backend.h"
#include "../device/elements.h"

namespace couplet::cuda {
namespace {

constexpr int threads = 256;
constexpr int warps = threads / 32;
constexpr int most_run_blocks = 65535;  // gridDim.y

// ---- device helpers ----------------------------------------------------------------------------------------------------------
template <class Element>
__device__ __forceinline__ void reorder_row(const Element* from, Element* to, const int32_t* order, int head_dim) {
  for (int channel = threadIdx.x % 32; channel < head_dim; channel += 32)
    to[channel] = __ldg(from + __ldg(order + channel));
}

// ---- kernel ------------------------------------------------------------------------------------------------------------------
// Blocks along x share the rows (tokens x heads) of a run, blocks along y the runs.
__global__ void __launch_bounds__(threads) reorder(couplet_reorder_params const params) {
  int const warp = blockIdx.x * warps + threadIdx.x / 32;
  for (int index = blockIdx.y; index < params.run_count; index += gridDim.y) {
    const couplet_reorder_run& run = params.runs[index];
    int64_t const rows = static_cast<int64_t>(run.tokens) * run.heads;
    for (int64_t row = warp; row < rows; row += static_cast<int64_t>(gridDim.x) * warps) {
      int64_t const token = row / run.heads, head = row % run.heads;
      int64_t const from = token * run.token_stride + head * run.head_stride;
      int64_t const to = token * run.reordered_token_stride + head * run.reordered_head_stride;
      if (params.dtype == COUPLET_FLOAT32)
        reorder_row(static_cast<const unsigned*>(run.rows) + from, static_cast<unsigned*>(run.reordered) + to,
                    params.order, params.head_dim);
      else
        reorder_row(static_cast<const unsigned short*>(run.rows) + from,
                    static_cast<unsigned short*>(run.reordered) + to, params.order, params.head_dim);
    }
  }
}

// ---- launcher ----------------------------------------------------------------------------------------------------------------
size_t workspace_bytes(const couplet_reorder_params*) { return 0; }

couplet_status run(const couplet_reorder_params* params, void*, void* stream, couplet_report* report) {
  if (couplet_status const status = check_reorder_params(params, report)) return status;
  if (params->run_count == 0 || params->most_rows == 0) return COUPLET_OK;
  dim3 const grid(static_cast<unsigned>(std::min((params->most_rows - 1) / warps + 1, 1024)),
                  static_cast<unsigned>(std::min(params->run_count, most_run_blocks)));
  return status_of(gpu::launch(reorder, grid, threads, 0, static_cast<cudaStream_t>(stream), *params), report,
                   "reorder");
}

void describe(const couplet_reorder_params* params, char* text, size_t text_bytes) {
  if (!text || text_bytes == 0) return;
  std::snprintf(text, text_bytes, "reorder gpu %s", dtype_name(params->dtype));
}

}  // namespace

const couplet_reorder_entries reorder_entries = {
    .check = check_reorder_params, .workspace = workspace_bytes, .run = run, .describe = describe};

}  // namespace couplet::cuda
