// The benchmark's own kernels: data to measure on, a cold L2, and what shared memory can do.
#pragma once

#include "../../cuda/gpu.h"

namespace couplet::bench {

// Uniform bytes; `count` is a multiple of 4.
cudaError_t fill_bytes(uint8_t* bytes, size_t count, uint64_t seed, cudaStream_t stream);

// Normal numbers of mean 0 and variance 1 (sums of four uniform ones, so none is beyond 3.5).
cudaError_t fill_normals(float* values, size_t count, uint64_t seed, cudaStream_t stream);
cudaError_t fill_normals(__half* values, size_t count, uint64_t seed, cudaStream_t stream);

// Reads `bytes` (a multiple of 16). After more than L2 holds, L2 holds nothing else, and no line that has to be written back: a
// memset would leave its own lines to be written during what is measured next.
cudaError_t read_through(const void* memory, size_t bytes, uint32_t* sink, cudaStream_t stream);

// 16-byte rows looked up in 64 KB of shared memory at random by every lane of every multiprocessor.
enum class Rows {
  own_banks,  // eight neighbouring lanes keep to the eight groups of four banks: no conflicts, whatever the row
  any,        // any row: conflicts as they come
};
inline constexpr int lookup_threads = 1024;
inline constexpr int lookups_of_a_step = 8;
cudaError_t look_up(Rows rows, int blocks, int steps, uint32_t* sink, cudaStream_t stream);

}  // namespace couplet::bench
