// The devices of this machine: which there are, which one a thread works on, and which one is lost.
#include <algorithm>
#include <atomic>
#include <cstdio>

#include "../native/common/report.h"
#include "backend.h"

namespace couplet::cuda {
namespace {

constexpr int most_devices = 64;
std::atomic<cudaError_t> lost[most_devices] = {};  // the error after which the device answers nothing else

int32_t count() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) return std::min(devices, most_devices);
  cudaGetLastError();
  return 0;
}

couplet_status select(int32_t index, couplet_report* report) {
  int const devices = count();
  if (index < 0 || index >= devices)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected 0 to %d for `deviceIndex` but received %d", devices - 1,
                index);
  if (cudaError_t const error = lost[index].load(std::memory_order_relaxed))
    return fail(report, COUPLET_DEVICE_ERROR, {.native_code = static_cast<int32_t>(error)},
                "Device %d is lost since it reported %s; start another process to use it again", index,
                cudaGetErrorName(error));
  return status_of(cudaSetDevice(index), report, "selecting a device");
}

couplet_status describe(int32_t index, couplet_device_info* info, couplet_report* report) {
  int before = 0;
  cudaGetDevice(&before);
  if (couplet_status const status = select(index, report)) return status;
  *info = {};
  cudaDeviceProp properties{};
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  cudaError_t error = cudaGetDeviceProperties(&properties, index);
  if (error == cudaSuccess) error = cudaMemGetInfo(&free_bytes, &total_bytes);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&info->driver_version);
  if (error == cudaSuccess) error = cudaRuntimeGetVersion(&info->runtime_version);
  cudaSetDevice(before);
  if (error != cudaSuccess) return status_of(error, report, "describing a device");
  info->memory_bytes = static_cast<int64_t>(total_bytes);
  info->free_bytes = static_cast<int64_t>(free_bytes);
  info->multiprocessors = properties.multiProcessorCount;
  std::snprintf(info->name, sizeof info->name, "%.95s", properties.name);
  std::snprintf(info->architecture, sizeof info->architecture, "sm_%d%d", properties.major, properties.minor);
  return COUPLET_OK;
}

// Errors that end the context of a device: CUDA answers every later call with them.
bool is_sticky(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorLaunchFailure:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorUnknown: return true;
    default: return false;
  }
}

}  // namespace

couplet_status status_of(cudaError_t error, couplet_report* report, const char* what) {
  if (error == cudaSuccess) return COUPLET_OK;
  auto const code = static_cast<int32_t>(error);
  // An error of a call, such as this one, is also kept for the next cudaGetLastError: taken, so that nobody meets it again.
  cudaGetLastError();
  if (is_sticky(error)) {
    int device = 0;
    cudaGetDevice(&device);
    if (device < most_devices) lost[device].store(error, std::memory_order_relaxed);
    return fail(
        report, COUPLET_DEVICE_ERROR, {.native_code = code},
        "%s failed with %s: %s. Device %d is lost to this process: what it held is gone, and every later call to "
        "it is refused",
        what, cudaGetErrorName(error), cudaGetErrorString(error), device);
  }
  couplet_status const status = error == cudaErrorMemoryAllocation ? COUPLET_OUT_OF_MEMORY : COUPLET_DEVICE_ERROR;
  return fail(report, status, {.native_code = code}, "%s failed with %s: %s", what, cudaGetErrorName(error),
              cudaGetErrorString(error));
}

const couplet_device_entries device_entries = {.count = count, .select = select, .describe = describe};

}  // namespace couplet::cuda
