// Kernel and launcher of gather, for the translation units that make them.
#pragma once

#include "codes.h"
#include "launch.h"

namespace couplet::cuda::attend::gather {

// ---- kernel ------------------------------------------------------------------------------------------------------------------
// 8 warps of up to 255 registers, one block a multiprocessor: the tables leave room for no second one.
template <int Channels, int Dim, int Quads>
__global__ void __launch_bounds__(Shape<Channels, Dim, Quads>::threads, 1) decode([[maybe_unused]] Step const step) {
  if (gpu::large_shared) run_segments<Shape<Channels, Dim, Quads>>(step);
}

// ---- launchers ---------------------------------------------------------------------------------------------------------------
// Calls visit(kernel, its shape) for the body of a shape.
template <int Channels, class Visit>
auto with_body(int head_dim, int quads, Visit visit) {
  auto const body = [&]<int Dim, int Quads>() {
    return visit(decode<Channels, Dim, Quads>, Shape<Channels, Dim, Quads>());
  };
  if (head_dim <= 64) return quads == 1 ? body.template operator()<64, 1>() : body.template operator()<64, 2>();
  return quads == 1 ? body.template operator()<128, 1>() : body.template operator()<128, 2>();
}

template <int Channels>
bool has_body(int head_dim, int quads) {
  return with_body<Channels>(head_dim, quads, [](auto kernel, auto shape) {
    int const available = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return static_cast<size_t>(available) >= sizeof(Shared<decltype(shape)>) && gpu::has_dynamic_shared_begin() &&
           gpu::has_large_shared_body(kernel);
  });
}

template <int Channels>
cudaError_t launch(const Step& step, cudaStream_t stream) {
  return with_body<Channels>(step.params.head_dim, step.block_rows / 4, [&](auto kernel, auto shape) {
    return gpu::launch_early(kernel, step.blocks, shape.threads, sizeof(Shared<decltype(shape)>), stream, step);
  });
}

}  // namespace couplet::cuda::attend::gather
