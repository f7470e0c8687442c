// The backend table, and device memory. Compiled by nvcc into libcouplet_cuda.so and by g++ into libcouplet_sim.so.
#include "backend.h"

#include <cstdio>

#include "../native/common/report.h"

namespace couplet::cuda {

namespace {

void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (cudaMalloc(&memory, bytes) == cudaSuccess) return memory;
  cudaGetLastError();
  return nullptr;
}

void release(void* memory, size_t) { cudaFree(memory); }

void* allocate_staging(size_t bytes) {
  void* memory = nullptr;
  if (cudaMallocHost(&memory, bytes) == cudaSuccess) return memory;
  cudaGetLastError();
  return nullptr;
}

void release_staging(void* memory, size_t) { cudaFreeHost(memory); }

bool is_on_device(const void* memory) {
  cudaPointerAttributes attributes{};
  bool const known = cudaPointerGetAttributes(&attributes, memory) == cudaSuccess;
  return known && (attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged);
}

// From device to device it is only enqueued; where the host is one side, it is done on return.
couplet_status copy(void* to, const void* from, size_t bytes, void* stream, couplet_report* report) {
  auto const handle = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, handle);
  if (error == cudaSuccess && !(is_on_device(to) && is_on_device(from))) error = cudaStreamSynchronize(handle);
  return status_of(error, report, "copying memory");
}

couplet_status upload(void* to, const void* from, size_t bytes, void* stream, couplet_report* report) {
  auto const handle = static_cast<cudaStream_t>(stream);
  return status_of(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, handle), report, "copying to the device");
}

couplet_status synchronize(void* stream, couplet_report* report) {
  return status_of(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), report, "waiting for the device");
}

const char* variant() {
#ifdef GPU_SIM
  return "simulator";
#else
  static char name[16] = "";
  if (!name[0]) {
    int device = 0;
    int major = 0;
    int minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    std::snprintf(name, sizeof name, "sm_%d%d", major, minor);
  }
  return name;
#endif
}

}  // namespace
}  // namespace couplet::cuda

extern "C" __attribute__((visibility("default"))) const couplet_backend* couplet_backend_entry(couplet_report* report) {
  using namespace couplet;
  using namespace couplet::cuda;
  static couplet_backend const backend = {
      .abi_version = COUPLET_ABI_VERSION,
      .layout_version = COUPLET_LAYOUT_VERSION,
      .struct_bytes = sizeof(couplet_backend),
#ifdef GPU_SIM
      .name = "sim",
#else
      .name = "cuda",
#endif
      .variant = variant,
      .device = device_entries,
      .memory = {.is_host = 0,
                 .allocate = allocate,
                 .release = cuda::release,
                 .allocate_staging = allocate_staging,
                 .release_staging = release_staging,
                 .copy = copy,
                 .upload = upload,
                 .synchronize = synchronize},
      .table = table_entries,
      .rotary = rotary_entries,
      .kmeans = kmeans_entries,
      .encode = encode_entries,
      .decode = decode_entries,
      .attend = attend_entries,
      .attention_weights = attention_weights_entries,
      .store = store_entries,
      .mix = mix_entries,
      .reorder = reorder_entries,
  };
  int devices = 0;
  cudaError_t const error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices > 0) return &backend;
  cudaGetLastError();
  int driver = 0;
  int runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  // Without a driver, too, CUDA says that it is insufficient: its version is 0 then.
  if (error == cudaErrorInsufficientDriver && driver == 0)
    fail(report, COUPLET_BACKEND_UNAVAILABLE, {.native_code = static_cast<int32_t>(error)},
         "This machine has no NVIDIA driver");
  else if (error == cudaErrorInsufficientDriver)
    fail(report, COUPLET_BACKEND_UNAVAILABLE, {.native_code = static_cast<int32_t>(error)},
         "The NVIDIA driver is too old: it knows CUDA %d.%d, and this build of couplet needs %d.%d", driver / 1000,
         driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  else
    fail(report, COUPLET_BACKEND_UNAVAILABLE, {.native_code = static_cast<int32_t>(error)}, "CUDA finds no device: %s",
         cudaGetErrorName(error == cudaSuccess ? cudaErrorNoDevice : error));
  return nullptr;
}
