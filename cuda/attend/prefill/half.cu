// Which prefills run on tiles of float16, and their kernel: 4 warps that make tiles, one or two ahead of 8 that attend to them.
#include "../../table.h"
#include "consume.h"
#include "launch.h"
#include "produce.h"

namespace couplet::cuda::attend {
namespace prefill {
namespace {

// ---- kernel --------------------------------------------------------------------------------------------------------------------
// One block a multiprocessor, whose registers its 12 warps share.
template <int Dim>
__global__ void __launch_bounds__(threads, 1) half(Step const step, bool const tables_fit) {
  GPU_DYNAMIC_SHARED(Shared<Dim>, shared);
  if (threadIdx.x == 0)
    for (int stage = 0; stage < stages; ++stage) {
      gpu::initialize(shared->filled[stage], producers);
      gpu::initialize(shared->emptied[stage], consumers);
    }
  __syncthreads();
  if (threadIdx.x < consumers * 32)
    run_consumer<Dim>(step, *shared);
  else
    run_producer<Dim>(step, *shared, tables_fit);
}

// ---- launcher ------------------------------------------------------------------------------------------------------------------
size_t table_bytes(const couplet_attend_params& params) {  // of both
  auto const bytes = [&](couplet_codec codec) { return static_cast<size_t>(2 * params.head_dim) << codec.code_bits; };
  return bytes(params.key_codec) + bytes(params.value_codec);
}

size_t shared_bytes(const couplet_attend_params& params) {
  return params.head_dim <= 64 ? sizeof(Shared<64>) : sizeof(Shared<128>);
}

size_t room() { return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }

// Tables of 8 bits: 2 x 64 KB at headDim 128, beside 96 KB of tiles and queries. Others are read from L2.
bool tables_fit(const couplet_attend_params& params) {
  return params.key_codec.code_bits == 8 && params.value_codec.code_bits == 8 &&
         shared_bytes(params) + table_bytes(params) <= room();
}

}  // namespace

bool has_half(const couplet_attend_params& params) {
  bool const shape = params.head_dim % 16 == 0 && params.head_dim <= 128 && shared_bytes(params) <= room();
  bool const plain = !params.key_table && !params.value_table;  // no codes at all
  bool const tables = params.key_table && params.value_table && table_of(params.key_table)->by_code &&
                      table_of(params.value_table)->by_code;
  bool const pages =
      params.page_tokens == tile_tokens &&
      (params.key_page_offset | params.key_page_stride | params.value_page_offset | params.value_page_stride) % 16 == 0;
  Angles const angles = angles_of(params.rotary);
  bool const rotary =
      angles.pairs == 0 || (angles.offsets && (angles.kind != COUPLET_ROTARY_HALF || angles.pairs % 8 == 0));
  return shape && (plain || (tables && pages)) && rotary;
}

cudaError_t launch_half(const Step& step, cudaStream_t stream) {
  bool const fit = step.key_by_code && tables_fit(step.params);
  size_t const bytes = shared_bytes(step.params) + (fit ? table_bytes(step.params) : 0);
  return gpu::launch(step.params.head_dim <= 64 ? half<64> : half<128>, step.prefill_blocks, threads, bytes, stream,
                     step, fit);
}

}  // namespace prefill
}  // namespace couplet::cuda::attend
