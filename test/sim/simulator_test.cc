// The simulator as a device: its limits, its reports, streams, events and graphs. (That it finds bugs in kernels is planted_test's.)
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../../cuda/gpu.h"
#include "../gpu/device_array.h"
#include "../native/check.h"

namespace {

using couplet::test::DeviceArray;

void expect(cudaError_t error, cudaError_t wanted, const char* what) {
  CHECK(error == wanted, "%s: %s and not %s", what, cudaGetErrorName(error), cudaGetErrorName(wanted));
}

void expect_failure(cudaError_t error, std::initializer_list<const char*> words) {
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  expect(error, cudaErrorLaunchFailure, "a kernel that breaks a rule");
  expect(cudaDeviceSynchronize(), cudaErrorLaunchFailure, "the call after it");
  std::string const text = sim::take_failure();
  for (const char* word : words)
    CHECK(text.find(word) != std::string::npos, "\"%s\" says nothing of \"%s\"", text.c_str(), word);
  expect(cudaDeviceSynchronize(), cudaSuccess, "the call after the failure was taken");
  cudaGetLastError();
}

__global__ void fill(int* out, int value) { out[blockIdx.x * blockDim.x + threadIdx.x] = value; }
__global__ void add(int* out, int value) { out[blockIdx.x * blockDim.x + threadIdx.x] += value; }

// ---- reports ---------------------------------------------------------------------------------------------------------
__global__ void deadlock() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    gpu::barrier_sync(1, 64);
}
__global__ void livelock(uint32_t* flag) {
  while (gpu::load_acquire(flag) != 1) continue;
}
__global__ void misaligned_copy(const char* from) {
  GPU_SHARED(to, char[32]);
  gpu::cp_async<16>(to, from + 8);
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
}
__global__ void unfinished_copy(const char* from) {
  GPU_SHARED(to, char[32]);
  gpu::cp_async<16>(to, from);
}
__global__ void copy_to_global(char* memory) { gpu::cp_async<16>(memory, memory + 16); }
__global__ void other_barrier_sizes() { gpu::barrier_sync(1, threadIdx.x < 32 ? 64 : 32); }
__global__ void without_dynamic_memory(int* out) {
  GPU_DYNAMIC_SHARED(int, words);
  *out = words[0];
}
__global__ void too_much_static_memory(int* out) {
  GPU_SHARED(words, int[13000]);
  *out = words[0];
}

void test_reports() {
  DeviceArray<int> const ints(64);
  DeviceArray<uint32_t> const flag(std::vector<uint32_t>(1));
  DeviceArray<char> const bytes(64);
  expect_failure(gpu::launch(deadlock, 1, 64, 0, nullptr),
                 {"deadlock", "threads 0 to 31 wait at barrier 0, ", "threads 32 to 63 wait at barrier 1, ",
                  "simulator_test.cc:"});
  expect_failure(gpu::launch(livelock, 1, 32, 0, nullptr, flag.data()),
                 {"livelock", "in a loop, ", "simulator_test.cc"});
  expect_failure(gpu::launch(misaligned_copy, 1, 1, 0, nullptr, bytes.data()), {"cp.async", "not aligned to 16"});
  expect_failure(gpu::launch(copy_to_global, 1, 1, 0, nullptr, bytes.data()), {"cp.async", "shared memory"});
  expect_failure(gpu::launch(other_barrier_sizes, 1, 64, 0, nullptr), {"barrier 1", "simulator_test.cc"});
  expect_failure(gpu::launch(without_dynamic_memory, 1, 1, 0, nullptr, ints.data()), {"no dynamic shared memory"});
  expect_failure(gpu::launch(too_much_static_memory, 1, 1, 0, nullptr, ints.data()),
                 {"52000 bytes of static shared memory"});
  if (sim::options().schedule == sim::Schedule::forward)  // in others it has landed by then
    expect_failure(gpu::launch(unfinished_copy, 1, 1, 0, nullptr, bytes.data()), {"never waited for"});
  // Threads that were dropped in the middle leave nothing behind.
  expect(gpu::launch(fill, 1, 64, 0, nullptr, ints.data(), 4), cudaSuccess, "the launch after failures");
  CHECK(ints.read() == std::vector<int>(64, 4), "a wrong result after failures");
}

// ---- limits ----------------------------------------------------------------------------------------------------------
__global__ void touch_dynamic(int bytes, int* sum) {
  GPU_DYNAMIC_SHARED(unsigned char, memory);
  *sum = memory[0] + memory[bytes - 1];
}

void test_limits() {
  DeviceArray<int> const out(1024);
  expect(gpu::launch(fill, 1, 1025, 0, nullptr, out.data(), 1), cudaErrorInvalidConfiguration, "1025 threads");
  expect(gpu::launch(fill, 0, 32, 0, nullptr, out.data(), 1), cudaErrorInvalidConfiguration, "no block");
  expect(gpu::launch(fill, dim3(1, 65536), 32, 0, nullptr, out.data(), 1), cudaErrorInvalidConfiguration,
         "65536 blocks in y");
  int limit = 0;
  expect(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), cudaSuccess,
         "the limit of shared memory");
  expect(gpu::launch(touch_dynamic, 1, 1, limit, nullptr, limit, out.data()), cudaSuccess, "all shared memory");
  CHECK(out.read()[0] == 510, "shared memory is not poisoned");
  expect(gpu::launch(touch_dynamic, 1, 1, limit + 1, nullptr, limit, out.data()), cudaErrorInvalidValue, "a byte more");
  cudaGetLastError();

  void* memory = nullptr;
  expect(cudaMalloc(&memory, size_t{1} << 40), cudaErrorMemoryAllocation, "a terabyte");
  CHECK(!memory, "memory that there is not");
  expect(cudaGetLastError(), cudaErrorMemoryAllocation, "the last error");
  expect(cudaGetLastError(), cudaSuccess, "the last error, taken");
  size_t before = 0;
  size_t after = 0;
  size_t total = 0;
  cudaMemGetInfo(&before, &total);
  expect(cudaMalloc(&memory, 1 << 20), cudaSuccess, "a megabyte");
  expect(cudaFree(memory), cudaSuccess, "giving it back");
  expect(cudaFree(memory), cudaErrorInvalidValue, "giving it back twice");
  cudaGetLastError();
  cudaMemGetInfo(&after, &total);
  CHECK(before == after && after <= total, "%zu bytes free before, %zu after", before, after);
  int const host = 0;
  expect(cudaMemcpy(out.data(), &host, sizeof host, cudaMemcpyDeviceToHost), cudaErrorInvalidValue,
         "the wrong direction");
  expect(cudaSetDevice(99), cudaErrorInvalidDevice, "device 99");
  cudaGetLastError();
}

// ---- streams and events ----------------------------------------------------------------------------------------------
void test_streams() {
  cudaStream_t first = nullptr;
  cudaStream_t second = nullptr;
  cudaEvent_t event = nullptr;
  expect(cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking), cudaSuccess, "a stream");
  expect(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking), cudaSuccess, "a second stream");
  expect(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess, "an event");
  DeviceArray<int> const values(64);
  expect(gpu::launch(fill, 2, 32, 0, first, values.data(), 1), cudaSuccess, "launch");
  expect(cudaEventRecord(event, first), cudaSuccess, "record");
  expect(cudaStreamWaitEvent(second, event), cudaSuccess, "wait for an event");
  expect(gpu::launch(add, 2, 32, 0, second, values.data(), 2), cudaSuccess, "launch");
  expect(cudaStreamSynchronize(second), cudaSuccess, "wait for a stream");
  expect(cudaEventQuery(event), cudaSuccess, "an event that has come");
  CHECK(values.read() == std::vector<int>(64, 3), "the second stream did not wait for the first");

  // Who asks again and again gets there.
  expect(gpu::launch(fill, 2, 32, 0, first, values.data(), 7), cudaSuccess, "launch");
  expect(cudaEventRecord(event, first), cudaSuccess, "record");
  int asked = 0;
  while (cudaEventQuery(event) == cudaErrorNotReady && asked < 1000) ++asked;
  CHECK(asked < 1000 && values.read()[63] == 7, "an event never came");

  // The default stream comes after blocking streams, and before what they get later.
  cudaStream_t blocking = nullptr;
  expect(cudaStreamCreate(&blocking), cudaSuccess, "a blocking stream");
  expect(gpu::launch(fill, 2, 32, 0, blocking, values.data(), 1), cudaSuccess, "launch");
  expect(gpu::launch(add, 2, 32, 0, nullptr, values.data(), 10), cudaSuccess, "launch");
  expect(gpu::launch(add, 2, 32, 0, blocking, values.data(), 100), cudaSuccess, "launch");
  expect(cudaStreamSynchronize(blocking), cudaSuccess, "wait for a stream");
  CHECK(values.read() == std::vector<int>(64, 111), "wrong order");

  // Pageable memory is read at the call: what becomes of it later does not matter.
  std::vector<int> host(64, 5);
  expect(cudaMemcpyAsync(values.data(), host.data(), 256, cudaMemcpyDefault, first), cudaSuccess, "copy");
  host.assign(64, 6);
  expect(cudaStreamSynchronize(first), cudaSuccess, "wait for a stream");
  CHECK(values.read() == std::vector<int>(64, 5), "pageable memory was read late");
  expect(cudaMemsetAsync(values.data(), 0, 128, first), cudaSuccess, "fill");
  std::atomic<int> called{0};
  auto const call = [](void* user) { ++*static_cast<std::atomic<int>*>(user); };
  expect(cudaLaunchHostFunc(first, call, &called), cudaSuccess, "a function of the host");
  expect(cudaStreamSynchronize(first), cudaSuccess, "wait for a stream");
  CHECK(called == 1 && values.read()[31] == 0 && values.read()[32] == 5, "filling half");

  expect(cudaStreamDestroy(blocking), cudaSuccess, "destroy");
  expect(gpu::launch(fill, 2, 32, 0, blocking, values.data(), 1), cudaErrorInvalidResourceHandle,
         "a stream that is gone");
  cudaGetLastError();
  cudaEventDestroy(event);
  cudaStreamDestroy(first);
  cudaStreamDestroy(second);
}

// ---- graphs ----------------------------------------------------------------------------------------------------------
void test_graphs() {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  expect(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess, "a stream");
  DeviceArray<int> const values(std::vector<int>(64));
  expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess, "capture");
  expect(gpu::launch(add, 2, 32, 0, stream, values.data(), 3), cudaSuccess, "launch");
  expect(gpu::launch(add, 2, 32, 0, stream, values.data(), 4), cudaSuccess, "launch");
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  expect(cudaStreamIsCapturing(stream, &status), cudaSuccess, "is it captured?");
  CHECK(status == cudaStreamCaptureStatusActive, "status %d", status);
  expect(cudaStreamEndCapture(stream, &graph), cudaSuccess, "end of the capture");
  CHECK(values.read() == std::vector<int>(64), "a captured launch ran");
  expect(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess, "instantiate");
  for (int run = 0; run < 3; ++run) expect(cudaGraphLaunch(executable, stream), cudaSuccess, "launch the graph");
  expect(cudaStreamSynchronize(stream), cudaSuccess, "wait for a stream");
  CHECK(values.read() == std::vector<int>(64, 21), "a graph of two launches, three times: %d", values.read()[0]);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);

  // What may not be captured is refused, and spoils the capture.
  int host = 0;
  void* memory = nullptr;
  std::vector<cudaError_t (*)(cudaStream_t, int*, void**)> const forbidden = {
      [](cudaStream_t, int*, void** memory) { return cudaMalloc(memory, 64); },
      [](cudaStream_t, int*, void**) { return cudaDeviceSynchronize(); },
      [](cudaStream_t stream, int*, void**) { return cudaStreamSynchronize(stream); },
  };
  for (auto* const call : forbidden) {
    expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess, "capture");
    expect(call(stream, &host, &memory), cudaErrorStreamCaptureUnsupported, "a forbidden call");
    expect(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated, "end of a spoiled capture");
    CHECK(!graph, "a graph from a spoiled capture");
  }
  cudaGetLastError();
  cudaStreamDestroy(stream);
}

// Any thread may launch, and the result does not depend on which.
void test_threads() {
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (int number = 0; number < 4; ++number)
    threads.emplace_back([number, &right] {
      DeviceArray<int> const values(256);
      for (int round = 0; round < 5; ++round) {
        bool const launched = gpu::launch(fill, 4, 64, 0, nullptr, values.data(), number * 10 + round) == cudaSuccess;
        right += launched && values.read() == std::vector<int>(256, number * 10 + round);
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(right == 20, "%d of 20 launches", right.load());
}

}  // namespace

int main() {
  sim::options().quiet = true;
  uint64_t const seed = sim::options().seed;
  for (sim::Schedule schedule : {sim::Schedule::forward, sim::Schedule::reversed, sim::Schedule::shuffled}) {
    sim::options().schedule = schedule;
    for (sim::options().seed = seed; sim::options().seed < seed + 3; ++sim::options().seed) {
      test_reports();
      test_limits();
      test_streams();
      test_graphs();
      test_threads();
      if (schedule != sim::Schedule::shuffled) break;
    }
  }
  return couplet::test::finish();
}
