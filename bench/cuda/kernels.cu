#include "kernels.h"

namespace couplet::bench {
namespace {

// ---- device helpers ----------------------------------------------------------------------------------------------------------
constexpr int block_threads = 256;
constexpr int most_blocks = 8192;

__device__ __forceinline__ uint64_t mixed(uint64_t seed, uint64_t index) {  // SplitMix64
  uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

__device__ __forceinline__ float normal_of(uint64_t bits) {
  float sum = 0;
  for (int part = 0; part < 4; ++part) sum += static_cast<float>(bits >> (16 * part) & 0xffff);
  return (sum * 0x1p-16f - 2) * 1.7320508f;
}

__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(__half* to, float value) { *to = __float2half_rn(value); }

__device__ __forceinline__ size_t first_index() { return size_t{blockIdx.x} * block_threads + threadIdx.x; }
__device__ __forceinline__ size_t index_step() { return size_t{gridDim.x} * block_threads; }

// ---- kernels -----------------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(block_threads) words(uint32_t* to, size_t count, uint64_t seed) {
  for (size_t i = first_index(); i < count; i += index_step()) to[i] = static_cast<uint32_t>(mixed(seed, i));
}

template <class Element>
__global__ void __launch_bounds__(block_threads) normals(Element* to, size_t count, uint64_t seed) {
  for (size_t i = first_index(); i < count; i += index_step()) store(to + i, normal_of(mixed(seed, i)));
}

__global__ void __launch_bounds__(block_threads) sum_all(const uint4* from, size_t count, uint32_t* sink) {
  uint32_t sum = 0;
  for (size_t i = first_index(); i < count; i += index_step()) {
    uint4 const four = __ldcg(from + i);
    sum += four.x ^ four.y ^ four.z ^ four.w;
  }
  if (sum == 0x5eed) *sink = sum;  // or the reads would be for nothing
}

constexpr uint32_t lookup_row_bytes = 16;
constexpr uint32_t lookup_table_rows = 4096;
constexpr uint32_t bank_groups = 8;

template <Rows Kind>
__global__ void __launch_bounds__(lookup_threads) lookups(int steps, uint32_t* sink) {
  GPU_DYNAMIC_SHARED(uint4, table);
  for (uint32_t row = threadIdx.x; row < lookup_table_rows; row += lookup_threads) {
    uint64_t const bits = mixed(blockIdx.x, row);
    table[row] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), row, row * row};
  }
  __syncthreads();
  uint32_t state = static_cast<uint32_t>(mixed(7, first_index()));
  uint4 sum{};
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int one = 0; one < lookups_of_a_step; ++one) {
      state = state * 1664525u + 1013904223u;
      uint32_t const row =
          Kind == Rows::any ? state >> 20 : (state >> 20 & ~(bank_groups - 1)) | threadIdx.x % bank_groups;
      uint4 const found = table[row];
      sum.x ^= found.x;
      sum.y ^= found.y;
      sum.z ^= found.z;
      sum.w ^= found.w;
    }
  }
  uint32_t const all = sum.x ^ sum.y ^ sum.z ^ sum.w;
  if (all == 0x5eed) *sink = all;
}

// ---- launchers ---------------------------------------------------------------------------------------------------------------
unsigned blocks_for(size_t count) {
  size_t const blocks = (count + block_threads - 1) / block_threads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > most_blocks ? most_blocks : blocks);
}

}  // namespace

cudaError_t fill_bytes(uint8_t* bytes, size_t count, uint64_t seed, cudaStream_t stream) {
  return gpu::launch(words, blocks_for(count / 4), block_threads, 0, stream, reinterpret_cast<uint32_t*>(bytes),
                     count / 4, seed);
}

cudaError_t fill_normals(float* values, size_t count, uint64_t seed, cudaStream_t stream) {
  return gpu::launch(normals<float>, blocks_for(count), block_threads, 0, stream, values, count, seed);
}

cudaError_t fill_normals(__half* values, size_t count, uint64_t seed, cudaStream_t stream) {
  return gpu::launch(normals<__half>, blocks_for(count), block_threads, 0, stream, values, count, seed);
}

cudaError_t read_through(const void* memory, size_t bytes, uint32_t* sink, cudaStream_t stream) {
  return gpu::launch(sum_all, blocks_for(bytes / 16), block_threads, 0, stream, static_cast<const uint4*>(memory),
                     bytes / 16, sink);
}

// Two blocks of 1024 threads fill a multiprocessor: the number of `blocks` is to be twice theirs.
cudaError_t look_up(Rows rows, int blocks, int steps, uint32_t* sink, cudaStream_t stream) {
  return gpu::launch(rows == Rows::any ? lookups<Rows::any> : lookups<Rows::own_banks>, static_cast<unsigned>(blocks),
                     lookup_threads, lookup_table_rows * lookup_row_bytes, stream, steps, sink);
}

}  // namespace couplet::bench
