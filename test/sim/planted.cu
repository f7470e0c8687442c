// Kernels and launchers with one bug each, and their sound twins. planted_test runs this program, compiled without a sanitizer and
// with each, and demands that every bug is found in some way and no twin accused of anything.
//
//   planted_<sanitizer> list '' | <case> bug | <case> sound | all sound        (COUPLET_SIM_SCHEDULE says how)
//
// Exit status: 0 all is well, 1 a wrong result, 2 the simulator reported, 66 and 67 ThreadSanitizer and AddressSanitizer did.
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../cuda/gpu.h"
#include "../gpu/device_array.h"

namespace {

using couplet::test::DeviceArray;

bool wrong = false;

void expect(bool held) { wrong |= !held; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  static_cast<void>(
      gpu::launch(kernel, grid, block, shared_bytes, nullptr, arguments...));  // the simulator keeps the failure
}

std::vector<int> numbers(size_t count) {
  std::vector<int> values(count);
  for (size_t index = 0; index < count; ++index) values[index] = static_cast<int>(index * 7 % 31);
  return values;
}

__device__ int warp_sum(int value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// ---- barriers ----------------------------------------------------------------------------------------------------------------
template <bool Bug>
__global__ void read_before_written(const int* values /*[64]*/, int* sum) {
  GPU_SHARED(partial, int[2]);
  int const own = warp_sum(values[threadIdx.x]);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = own;
  if constexpr (!Bug) __syncthreads();
  if (threadIdx.x < 32) {
    int const total = warp_sum(threadIdx.x < 2 ? partial[threadIdx.x] : 0);
    if (threadIdx.x == 0) *sum = total;
  }
}
template <bool Bug>
void run_read_before_written() {
  std::vector<int> const values = numbers(64);
  DeviceArray<int> const input(values);
  DeviceArray<int> const sum(1);
  launch(read_before_written<Bug>, 1, 64, 0, input.data(), sum.data());
  int total = 0;
  for (int value : values) total += value;
  expect(sum.read()[0] == total);
}

template <bool Bug>
__global__ void overwritten_before_read(const int* in /*[4][64]*/, int* out /*[4][64], rows reversed*/) {
  GPU_SHARED(row, int[64]);
  for (int index = 0; index < 4; ++index) {
    row[threadIdx.x] = in[index * 64 + threadIdx.x];
    __syncthreads();
    out[index * 64 + threadIdx.x] = row[63 - threadIdx.x];
    if constexpr (!Bug) __syncthreads();
  }
}
template <bool Bug>
void run_overwritten_before_read() {
  std::vector<int> const values = numbers(256);
  DeviceArray<int> const in(values);
  DeviceArray<int> const out(256);
  launch(overwritten_before_read<Bug>, 1, 64, 0, in.data(), out.data());
  std::vector<int> const result = out.read();
  for (int index = 0; index < 256; ++index) expect(result[index] == values[index / 64 * 64 + 63 - index % 64]);
}

// Barrier 1 opens when a warp of producers has arrived and one of consumers has come: 64 threads.
template <bool Bug>
__global__ void named_barrier(const int* in /*[32]*/, int* out /*[32]*/) {
  GPU_SHARED(box, int[32]);
  unsigned const lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    if constexpr (Bug) gpu::barrier_arrive(1, 64);
    box[lane] = in[lane];
    if constexpr (!Bug) gpu::barrier_arrive(1, 64);
  } else {
    gpu::barrier_sync(1, 64);
    out[lane] = box[31 - lane];
  }
}
template <bool Bug>
void run_named_barrier() {
  std::vector<int> const values = numbers(32);
  DeviceArray<int> const in(values);
  DeviceArray<int> const out(32);
  launch(named_barrier<Bug>, 1, 64, 0, in.data(), out.data());
  std::vector<int> const result = out.read();
  for (int index = 0; index < 32; ++index) expect(result[index] == values[31 - index]);
}

template <bool Bug>
__global__ void divergent_barrier(int* out) {
  if (!Bug || threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
  __syncthreads();
}
template <bool Bug>
void run_divergent_barrier() {
  DeviceArray<int> const out(64);
  launch(divergent_barrier<Bug>, 1, 64, 0, out.data());
  for (int value : out.read()) expect(value == 1);
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------------------
// Two stages of 64 values; each thread reads what another one has copied.
constexpr int stages = 2;
template <bool MissesBarrier, bool MissesWait>
__global__ void ring(const int* in /*[rounds][64]*/, int* out /*[rounds][64], reversed*/, int rounds) {
  GPU_SHARED(buffer, int[stages][64]);
  auto const fetch = [&](int round) {
    if (round < rounds) gpu::cp_async<4>(&buffer[round % stages][threadIdx.x], &in[round * 64 + threadIdx.x]);
    gpu::cp_async_commit();
  };
  fetch(0);
  for (int round = 0; round < rounds; ++round) {
    fetch(round + 1);
    if constexpr (!MissesWait) gpu::cp_async_wait<1>();
    __syncthreads();
    out[round * 64 + threadIdx.x] = buffer[round % stages][63 - threadIdx.x];
    if constexpr (!MissesBarrier) __syncthreads();
  }
  gpu::cp_async_wait<0>();
}
template <bool MissesBarrier, bool MissesWait>
void run_ring() {
  constexpr int rounds = 6;
  std::vector<int> const values = numbers(rounds * 64);
  DeviceArray<int> const in(values);
  DeviceArray<int> const out(rounds * 64);
  launch(ring<MissesBarrier, MissesWait>, 1, 64, 0, in.data(), out.data(), rounds);
  std::vector<int> const result = out.read();
  for (int index = 0; index < rounds * 64; ++index) expect(result[index] == values[index / 64 * 64 + 63 - index % 64]);
}

// ---- warps -------------------------------------------------------------------------------------------------------------------
// A shuffle makes lanes meet, and orders no memory.
template <bool Bug>
__global__ void missing_syncwarp(const int* in /*[32]*/, int* out /*[32]*/) {
  GPU_SHARED(box, int[32]);
  box[threadIdx.x] = in[threadIdx.x];
  int const first = __shfl_sync(~0u, in[threadIdx.x], 0);
  if constexpr (!Bug) __syncwarp();
  out[threadIdx.x] = box[(threadIdx.x + 1) % 32] + first;
}
template <bool Bug>
void run_missing_syncwarp() {
  std::vector<int> const values = numbers(32);
  DeviceArray<int> const in(values);
  DeviceArray<int> const out(32);
  launch(missing_syncwarp<Bug>, 1, 32, 0, in.data(), out.data());
  std::vector<int> const result = out.read();
  for (int index = 0; index < 32; ++index) expect(result[index] == values[(index + 1) % 32] + values[0]);
}

template <bool Bug>
__global__ void wrong_mask(const int* in /*[32]*/, int* out /*[32]*/) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(Bug ? 0xffu : 0xffffu, in[threadIdx.x], 1, 16);
}
template <bool Bug>
void run_wrong_mask() {
  std::vector<int> const values = numbers(32);
  DeviceArray<int> const in(values);
  DeviceArray<int> const out(32);
  launch(wrong_mask<Bug>, 1, 32, 0, in.data(), out.data());
  std::vector<int> const result = out.read();
  for (int index = 0; index < 15; ++index) expect(result[index] == values[index + 1]);
}

template <bool Bug>
__global__ void exited_lane(const int* in /*[count]*/, int* sum, int count) {
  if (Bug && static_cast<int>(threadIdx.x) >= count) return;
  int const total = warp_sum(static_cast<int>(threadIdx.x) < count ? in[threadIdx.x] : 0);
  if (threadIdx.x == 0) *sum = total;
}
template <bool Bug>
void run_exited_lane() {
  std::vector<int> const values = numbers(20);
  DeviceArray<int> const in(values);
  DeviceArray<int> const sum(1);
  launch(exited_lane<Bug>, 1, 32, 0, in.data(), sum.data(), 20);
  int total = 0;
  for (int value : values) total += value;
  expect(sum.read()[0] == total);
}

template <bool Bug>
__global__ void divergent_collective(const int* in /*[32]*/, int* out /*[32]*/) {
  int const own = in[threadIdx.x];
  int other;
  if (Bug && own % 2 == 0)
    other = __shfl_xor_sync(~0u, own, 1);
  else
    other = __shfl_xor_sync(~0u, own, 1);
  out[threadIdx.x] = other;
}
template <bool Bug>
void run_divergent_collective() {
  std::vector<int> const values = numbers(32);
  DeviceArray<int> const in(values);
  DeviceArray<int> const out(32);
  launch(divergent_collective<Bug>, 1, 32, 0, in.data(), out.data());
  std::vector<int> const result = out.read();
  for (int index = 0; index < 32; ++index) expect(result[index] == values[index ^ 1]);
}

// ---- atomics and order between blocks --------------------------------------------------------------------------------------------
template <bool Bug>
__global__ void plain_increment(const int* values /*[64]*/, unsigned* counts /*[8]*/) {
  unsigned* const count = &counts[values[threadIdx.x] % 8];
  if constexpr (Bug)
    ++*count;
  else
    atomicAdd(count, 1u);
}
template <bool Bug>
void run_plain_increment() {
  std::vector<int> const values = numbers(64);
  DeviceArray<int> const input(values);
  DeviceArray<unsigned> const counts(std::vector<unsigned>(8));
  launch(plain_increment<Bug>, 1, 64, 0, input.data(), counts.data());
  std::vector<unsigned> expected(8);
  for (int value : values) ++expected[value % 8];
  expect(counts.read() == expected);
}

// The last block to finish adds up what all have written.
template <bool Bug>
__global__ void last_block_merges(const int* in /*[blocks][64]*/, int* partial /*[blocks]*/, uint32_t* finished,
                                  int* sum) {
  GPU_SHARED(warps, int[2]);
  GPU_SHARED(is_last, bool);
  int const own = warp_sum(in[blockIdx.x * 64 + threadIdx.x]);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = warps[0] + warps[1];
    uint32_t const before = Bug ? atomicAdd(finished, 1u) : gpu::fetch_add_acq_rel(finished, 1);
    is_last = before + 1 == gridDim.x;
  }
  __syncthreads();
  if (is_last && threadIdx.x < 32) {
    int const total = warp_sum(threadIdx.x < gridDim.x ? partial[threadIdx.x] : 0);
    if (threadIdx.x == 0) *sum = total;
  }
}
template <bool Bug>
void run_last_block_merges() {
  std::vector<int> const values = numbers(8 * 64);
  DeviceArray<int> const in(values);
  DeviceArray<int> const partial(8);
  DeviceArray<uint32_t> const finished(std::vector<uint32_t>(1));
  DeviceArray<int> const sum(1);
  launch(last_block_merges<Bug>, 8, 64, 0, in.data(), partial.data(), finished.data(), sum.data());
  int total = 0;
  for (int value : values) total += value;
  expect(sum.read()[0] == total);
}

// ---- bounds --------------------------------------------------------------------------------------------------------------------
__global__ void transpose_tile(const int* in /*[8][8]*/, int* out /*[8][8]*/) {
  GPU_DYNAMIC_SHARED(int, tile);  // [8][9]
  int const row = threadIdx.x / 8;
  int const column = threadIdx.x % 8;
  tile[row * 9 + column] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[column * 9 + row];
}
template <bool Bug>
void run_shared_too_short() {
  std::vector<int> const values = numbers(64);
  DeviceArray<int> const in(values);
  DeviceArray<int> const out(64);
  launch(transpose_tile, 1, 64, (Bug ? 8 * 8 : 8 * 9) * sizeof(int), in.data(), out.data());
  std::vector<int> const result = out.read();
  for (int index = 0; index < 64; ++index) expect(result[index] == values[index % 8 * 8 + index / 8]);
}

template <bool Bug>
__global__ void read_past_shared(const int* in /*[32]*/, int* out /*[32]*/) {
  GPU_SHARED(box, int[32]);
  box[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  unsigned const next = threadIdx.x + 1;
  int const value = box[Bug ? next : next % 32];
  out[threadIdx.x] = next < 32 ? value : 0;  // what was read there does not even matter
}
template <bool Bug>
void run_read_past_shared() {
  std::vector<int> const values = numbers(32);
  DeviceArray<int> const in(values);
  DeviceArray<int> const out(32);
  launch(read_past_shared<Bug>, 1, 32, 0, in.data(), out.data());
  std::vector<int> const result = out.read();
  for (int index = 0; index < 31; ++index) expect(result[index] == values[index + 1]);
}

template <bool Bug>
__global__ void write_past_global(int* out /*[100]*/) {
  int const index = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
  if (index < 100 + Bug) out[index] = index;
}
template <bool Bug>
void run_write_past_global() {
  DeviceArray<int> const out(100);
  launch(write_past_global<Bug>, 4, 32, 0, out.data());
  std::vector<int> const result = out.read();
  for (int index = 0; index < 100; ++index) expect(result[index] == index);
}

template <bool Bug>
__global__ void not_initialized(const float* in /*[32]*/, float* out /*[32]*/, int count) {
  GPU_SHARED(box, float[32]);
  int const lane = static_cast<int>(threadIdx.x);
  if (lane < count)
    box[lane] = in[lane];
  else if (!Bug)
    box[lane] = 0;
  __syncwarp();
  out[lane] = box[31 - lane];
}
template <bool Bug>
void run_not_initialized() {
  DeviceArray<float> const in(std::vector<float>(30, 2));
  DeviceArray<float> const out(32);
  launch(not_initialized<Bug>, 1, 32, 0, in.data(), out.data(), 30);
  std::vector<float> const result = out.read();
  for (int index = 0; index < 32; ++index) expect(result[index] == (index < 2 ? 0.0f : 2.0f));
}

// ---- launchers -----------------------------------------------------------------------------------------------------------------
template <bool Bug>
void run_host_follows_device_pointer() {
  DeviceArray<int> const values(std::vector<int>(4, 3));
  expect((Bug ? *values.data() : values.read()[0]) == 3);
}

__global__ void fill(int* out, int value) { out[threadIdx.x] = value; }

template <bool Bug>
void run_result_not_waited_for() {
  int* pinned = nullptr;
  cudaStream_t stream = nullptr;
  expect(cudaMallocHost(&pinned, 32 * sizeof(int)) == cudaSuccess &&
         cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
  std::memset(pinned, 0, 32 * sizeof(int));
  DeviceArray<int> const out(32);
  expect(gpu::launch(fill, 1, 32, 0, stream, out.data(), 5) == cudaSuccess);
  expect(cudaMemcpyAsync(pinned, out.data(), 32 * sizeof(int), cudaMemcpyDeviceToHost, stream) == cudaSuccess);
  if (!Bug) expect(cudaStreamSynchronize(stream) == cudaSuccess);
  expect(pinned[31] == 5);
  cudaStreamDestroy(stream);
  cudaFreeHost(pinned);
}

template <bool Bug>
void run_allocation_in_capture() {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  expect(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
  DeviceArray<int> const out(32);
  expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  void* scratch = nullptr;
  if (Bug) cudaMalloc(&scratch, 64);
  expect(gpu::launch(fill, 1, 32, 0, stream, out.data(), 6) == cudaSuccess);
  bool const captured =
      cudaStreamEndCapture(stream, &graph) == cudaSuccess && cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess;
  expect(captured);
  if (captured) {
    expect(cudaGraphLaunch(executable, stream) == cudaSuccess && cudaStreamSynchronize(stream) == cudaSuccess);
    expect(out.read()[31] == 6);
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  }
  cudaStreamDestroy(stream);
}

struct Case {
  const char* name;
  void (*bug)();
  void (*sound)();
};

#define CASE(name) \
  { #name, run_##name < true>, run_##name < false> }
constexpr Case cases[] = {
    CASE(read_before_written),
    CASE(overwritten_before_read),
    CASE(named_barrier),
    CASE(divergent_barrier),
    {"ring_without_barrier", run_ring<true, false>, run_ring<false, false>},
    {"ring_without_wait", run_ring<false, true>, run_ring<false, false>},
    CASE(missing_syncwarp),
    CASE(wrong_mask),
    CASE(exited_lane),
    CASE(divergent_collective),
    CASE(plain_increment),
    CASE(last_block_merges),
    CASE(shared_too_short),
    CASE(read_past_shared),
    CASE(write_past_global),
    CASE(not_initialized),
    CASE(host_follows_device_pointer),
    CASE(result_not_waited_for),
    CASE(allocation_in_capture),
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 3;
  if (std::strcmp(argv[1], "list") == 0) {
    for (const Case& one : cases) std::puts(one.name);
    return 0;
  }
  bool const bug = std::strcmp(argv[2], "bug") == 0;
  int ran = 0;
  for (const Case& one : cases) {
    if (std::strcmp(argv[1], "all") != 0 && std::strcmp(argv[1], one.name) != 0) continue;
    (bug ? one.bug : one.sound)();
    ++ran;
  }
  if (ran == 0) return 3;
  if (!sim::take_failure().empty()) return 2;
  return wrong || couplet::test::failed > 0 ? 1 : 0;
}
