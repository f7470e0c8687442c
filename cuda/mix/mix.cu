// mix: rows in place, each through the matrix of its head. A block has some tokens of a head and reads its matrix once for all of
// them, 64 KB at headDim 128, which the blocks of that head find in L2. One decode step of 32 query heads is 0.5 M products a layer and
// sequence, a prompt 2 d products an element: the launch is what decode pays.
#include <algorithm>
#include <cstdio>

#include "../../native/common/check.h"
#include "../backend.h"
#include "../device/elements.h"

namespace couplet::cuda {
namespace {

constexpr int block_tokens = 8;
constexpr int most_run_blocks = 65535;  // gridDim.y

// ---- device helpers ------------------------------------------------------------------------------------------------------------
// Not by load_element: what is read here is written by the same kernel, and the read-only cache does not see that.
__device__ __forceinline__ float element_of(const void* rows, int32_t dtype, int64_t at) {
  if (dtype == COUPLET_FLOAT32) return static_cast<const float*>(rows)[at];
  if (dtype == COUPLET_FLOAT16) return __half2float(static_cast<const __half*>(rows)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(rows)[at]);
}

// ---- kernel --------------------------------------------------------------------------------------------------------------------
// A thread has a channel of the result. Blocks along x share the tokens and heads of a run, blocks along y the runs.
__global__ void __launch_bounds__(COUPLET_MAX_HEAD_DIM) mix(couplet_mix_params const params) {
  GPU_SHARED(rows, float[block_tokens][COUPLET_MAX_HEAD_DIM]);
  int const channel = static_cast<int>(threadIdx.x);
  bool const inside = channel < params.head_dim;
  for (int index = static_cast<int>(blockIdx.y); index < params.run_count; index += static_cast<int>(gridDim.y)) {
    const couplet_mix_run& run = params.runs[index];
    int64_t const tiles = (int64_t{run.tokens} + block_tokens - 1) / block_tokens;
    for (int64_t tile = blockIdx.x; tile < tiles * params.heads; tile += gridDim.x) {
      int64_t const head = tile / tiles;
      int64_t const first = tile % tiles * block_tokens;
      int const count = min(block_tokens, static_cast<int>(run.tokens - first));
      int64_t const place = first * run.token_stride + head * run.head_stride + channel;
#pragma unroll 1
      for (int t = 0; t < block_tokens && inside; ++t)
        rows[t][channel] = t < count ? element_of(run.rows, params.dtype, place + t * run.token_stride) : 0.0f;
      __syncthreads();
      int const last = min(channel, params.head_dim - 1);  // threads beyond it compute what nobody stores
      const float* const matrix =
          params.matrices + head / (params.heads / params.matrix_heads) * params.head_dim * params.head_dim + last;
      float sums[block_tokens] = {};
#pragma unroll 4
      for (int from = 0; from < params.head_dim; ++from) {
        float const entry = __ldg(matrix + from * params.head_dim);
#pragma unroll
        for (int t = 0; t < block_tokens; ++t) sums[t] = __fmaf_rn(rows[t][from], entry, sums[t]);
      }
#pragma unroll
      for (int t = 0; t < block_tokens; ++t)
        if (t < count && inside) store_element(run.rows, params.dtype, place + t * run.token_stride, sums[t]);
      __syncthreads();  // all have read the tile before the next one comes
    }
  }
}

// ---- launcher ------------------------------------------------------------------------------------------------------------------
size_t workspace_bytes(const couplet_mix_params*) { return 0; }

couplet_status run(const couplet_mix_params* params, void*, void* stream, couplet_report* report) {
  if (couplet_status const status = check_mix_params(params, report)) return status;
  int64_t const tiles = (int64_t{params->most_tokens} + block_tokens - 1) / block_tokens * params->heads;
  if (params->run_count == 0 || tiles == 0) return COUPLET_OK;
  dim3 const grid(static_cast<unsigned>(std::min<int64_t>(tiles, 16384)),
                  static_cast<unsigned>(std::min(params->run_count, most_run_blocks)));
  int const threads = (params->head_dim + 31) / 32 * 32;
  return status_of(gpu::launch(mix, grid, threads, 0, static_cast<cudaStream_t>(stream), *params), report, "mix");
}

void describe(const couplet_mix_params* params, char* text, size_t text_bytes) {
  if (!text || text_bytes == 0) return;
  std::snprintf(text, text_bytes, "mix gpu %s", dtype_name(params->dtype));
}

}  // namespace

const couplet_mix_entries mix_entries = {
    .check = check_mix_params, .workspace = workspace_bytes, .run = run, .describe = describe};

}  // namespace couplet::cuda
