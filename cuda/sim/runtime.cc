#include "runtime.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "memory.h"

namespace sim {
namespace {

thread_local int device_of_thread = 0;
thread_local cudaError_t last_error = cudaSuccess;

std::mutex pinned_mutex;
std::map<const void*, size_t>& pinned = *new std::map<const void*, size_t>;

bool is_pinned(const void* address) {
  std::lock_guard const lock(pinned_mutex);
  auto const after = pinned.upper_bound(address);
  if (after == pinned.begin()) return false;
  auto const& [begin, bytes] = *std::prev(after);
  return static_cast<const char*>(address) < static_cast<const char*>(begin) + bytes;
}

int device_count() {
  static int const count = [] {
    const char* const text = std::getenv("COUPLET_SIM_DEVICES");
    return text ? std::atoi(text) : 1;
  }();
  return count;
}

cudaMemcpyKind kind_of(const void* to, const void* from) {
  if (is_device(to)) return is_device(from) ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice;
  return is_device(from) ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost;
}

cudaError_t move(void* to, const void* from, size_t bytes) {
  DeviceMemoryOpen const open;
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

// Pageable memory is read at the call and written before it returns; pinned memory and the device's when the stream gets there.
cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind != cudaMemcpyDefault && kind != kind_of(to, from)) return cudaErrorInvalidValue;
  if (bytes == 0) return cudaSuccess;
  bool const later = (is_device(to) || is_pinned(to)) && (is_device(from) || is_pinned(from));
  if (later) return enqueue_work(stream, [=] { return move(to, from, bytes); });
  if (is_device(to)) {
    auto const staged =
        std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
    return enqueue_work(stream, [=] { return move(to, staged->data(), bytes); });
  }
  if (cudaError_t const refused = refuse_in_capture()) return refused;
  if (cudaError_t const error = finish_stream(stream)) return error;
  return move(to, from, bytes);
}

struct NamedError {
  cudaError_t error;
  const char* name;
  const char* text;
};

constexpr NamedError named_errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
};

const NamedError* find(cudaError_t error) {
  auto const* const found = std::find_if(std::begin(named_errors), std::end(named_errors),
                                         [&](const NamedError& one) { return one.error == error; });
  return found == std::end(named_errors) ? nullptr : found;
}

}  // namespace

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

int current_device() { return device_of_thread; }

}  // namespace sim

using sim::remember;

// CUDA declares these in extern "C" and names their parameters in its own way.
extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(sim::last_error, sim::sticky_error()); }
cudaError_t cudaPeekAtLastError() { return sim::last_error; }
const char* cudaGetErrorName(cudaError_t error) {
  const auto* const named = sim::find(error);
  return named ? named->name : "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  const auto* const named = sim::find(error);
  return named ? named->text : "unrecognized error code";
}

// ---- devices -----------------------------------------------------------------------------------------------------------
cudaError_t cudaGetDeviceCount(int* count) {
  *count = sim::device_count();
  return remember(*count > 0 ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* device) {
  *device = sim::current_device();
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= sim::device_count()) return remember(cudaErrorInvalidDevice);
  sim::device_of_thread = device;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= sim::device_count()) return remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(sim::options().shared_limit); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(sim::options().shared_limit) + 1024;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    case cudaDevAttrL2CacheSize: *value = 32 << 20; break;
    case cudaDevAttrMemoryPoolsSupported: *value = 0; break;
    default: return remember(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= sim::device_count()) return remember(cudaErrorInvalidDevice);
  *properties = cudaDeviceProp{};
  std::strcpy(properties->name, "couplet simulator");
  properties->totalGlobalMem = sim::device_bytes_total();
  properties->major = 8;
  properties->multiProcessorCount = 4;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->regsPerBlock = 65536;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = sim::options().shared_limit;
  properties->sharedMemPerMultiprocessor = sim::options().shared_limit + 1024;
  properties->l2CacheSize = 32 << 20;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  if (cudaError_t const refused = sim::refuse_in_capture()) return remember(refused);
  return remember(sim::finish_device());
}

// ---- memory ------------------------------------------------------------------------------------------------------------
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = nullptr;
  if (cudaError_t const refused = sim::refuse_in_capture()) return remember(refused);
  if (cudaError_t const sticky = sim::sticky_error()) return remember(sticky);
  if (bytes == 0) return cudaSuccess;
  *memory = sim::allocate_device(bytes);
  return remember(*memory ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* memory) {
  if (!memory) return cudaSuccess;
  if (cudaError_t const refused = sim::refuse_in_capture()) return remember(refused);
  cudaError_t const error = sim::finish_device();  // work under way may use it
  sim::Released const released = sim::release_device(memory);
  if (released == sim::Released::unknown) return remember(cudaErrorInvalidValue);
  if (released == sim::Released::overrun)
    sim::fail(sim::Location::current(), "somebody wrote behind the end of the device memory at %p", memory);
  return remember(error);
}
cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  if (cudaError_t const refused = sim::refuse_in_capture()) return remember(refused);
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!*memory) return remember(cudaErrorMemoryAllocation);
  std::lock_guard const lock(sim::pinned_mutex);
  sim::pinned[*memory] = bytes;
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) { return cudaMallocHost(memory, bytes); }
cudaError_t cudaFreeHost(void* memory) {
  if (!memory) return cudaSuccess;
  if (cudaError_t const refused = sim::refuse_in_capture()) return remember(refused);
  cudaError_t const error = sim::finish_device();
  {
    std::lock_guard const lock(sim::pinned_mutex);
    if (sim::pinned.erase(memory) == 0) return remember(cudaErrorInvalidValue);
  }
  std::free(memory);
  return remember(error);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = sim::device_bytes_free();
  *total = sim::device_bytes_total();
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  *attributes = cudaPointerAttributes{};
  attributes->type = sim::is_device(address)   ? cudaMemoryTypeDevice
                     : sim::is_pinned(address) ? cudaMemoryTypeHost
                                               : cudaMemoryTypeUnregistered;
  attributes->device = attributes->type == cudaMemoryTypeUnregistered ? -2 : 0;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return remember(sim::copy(to, from, bytes, kind, stream));
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (cudaError_t const refused = sim::refuse_in_capture()) return remember(refused);
  if (cudaError_t const error = sim::copy(to, from, bytes, kind, nullptr)) return remember(error);
  return remember(sim::finish_stream(nullptr));
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  if (!sim::is_device(memory) && bytes > 0) return remember(cudaErrorInvalidValue);
  return remember(sim::enqueue_work(stream, [=] {
    sim::DeviceMemoryOpen const open;
    std::memset(memory, value, bytes);
    return cudaSuccess;
  }));
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  if (cudaError_t const refused = sim::refuse_in_capture()) return remember(refused);
  return cudaMemsetAsync(memory, value, bytes, nullptr);
}

}  // extern "C"
