// Memory of a device, for as long as its owner lives.
#pragma once

#include <cstring>
#include <utility>

#include "../common/device.h"
#include "../common/report.h"

namespace couplet {

class DeviceMemory {
 public:
  DeviceMemory() = default;
  ~DeviceMemory() { release(); }
  DeviceMemory(DeviceMemory&& other) noexcept
      : device_(other.device_), bytes_(other.bytes_), memory_(std::exchange(other.memory_, nullptr)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(bytes_, other.bytes_);
    std::swap(memory_, other.memory_);
    return *this;
  }

  // In place of what it held before; not cleared. The calling thread has selected the device. No bytes are no memory.
  couplet_status allocate(const Device& device, size_t bytes, couplet_report* report) {
    release();
    device_ = device;
    bytes_ = bytes;
    if (bytes == 0) return COUPLET_OK;
    memory_ = device.backend->memory.allocate(bytes);
    if (memory_) return COUPLET_OK;
    return fail(report, COUPLET_OUT_OF_MEMORY, {}, "There is no memory for %zu bytes on device %d of %s", bytes,
                device.index, device.backend->name);
  }

  template <class T = void>
  T* get() const {
    return static_cast<T*>(memory_);
  }
  const Device& device() const { return device_; }
  size_t bytes() const { return bytes_; }

 private:
  // From any thread, whatever device it has selected; waits for what the device does with it.
  void release() {
    if (memory_) device_.backend->memory.release(memory_, bytes_);
    memory_ = nullptr;
  }

  Device device_;
  size_t bytes_ = 0;
  void* memory_ = nullptr;
};

}  // namespace couplet
