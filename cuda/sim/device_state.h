// Where a simulated thread is: what threadIdx, blockIdx, blockDim and gridDim read.
#pragma once

#include <vector_types.h>

namespace sim {

struct Place {
  uint3 thread{};
  uint3 block{};
  unsigned linear = 0;  // in its block; 32 of them are a warp
};

extern const Place* place;  // of the running thread; NULL outside kernels
extern dim3 grid_dim;
extern dim3 block_dim;

}  // namespace sim
