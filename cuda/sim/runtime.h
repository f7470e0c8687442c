// The simulated device's queue. The CUDA runtime functions that launchers call (cudaMalloc, streams, events, graphs) are defined
// in runtime.cc and streams.cc under their own names: host code is compiled against CUDA's headers and linked against these.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <type_traits>

#include "scheduler.h"

namespace sim {

cudaError_t enqueue_launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                           std::function<void()> kernel);

// What launch() in gpu.h does. The arguments are copied now and used when the stream gets there.
template <class... Parameters>
cudaError_t enqueue(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                    std::type_identity_t<Parameters>... arguments) {
  return enqueue_launch(grid, block, shared_bytes, stream, [=] { kernel(arguments...); });
}

// ---- between runtime.cc and streams.cc ---------------------------------------------------------------------------------
// Puts work at the end of a stream, or into the graph that the stream is captured in.
cudaError_t enqueue_work(cudaStream_t stream, std::function<cudaError_t()> work);
cudaError_t finish_stream(cudaStream_t stream);
cudaError_t finish_device();
// An allocation, say, or a wait: not allowed while a stream of this process is captured, and it spoils the capture.
cudaError_t refuse_in_capture();

cudaError_t remember(cudaError_t error);  // for cudaGetLastError; returns its argument
int current_device();

// After a kernel broke a rule every call fails, as with a GPU, until the failure is taken (take_failure).
cudaError_t sticky_error();

}  // namespace sim
