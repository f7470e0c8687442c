// Memory of the simulated device: poisoned, of exact size, and out of the host's reach.
#pragma once

#include <cstddef>

namespace sim {

// One shared variable of one block. Every byte starts as 0xff, which is a NaN in each floating-point type.
class SharedRegion {
 public:
  SharedRegion(const void* key, size_t bytes, size_t alignment);  // key: NULL for the dynamic one
  SharedRegion(const SharedRegion&) = delete;
  SharedRegion& operator=(const SharedRegion&) = delete;
  ~SharedRegion();

  const void* key() const { return key_; }
  size_t bytes() const { return bytes_; }
  bool holds(const void* address, size_t bytes) const;
  bool intact() const;  // nobody wrote just before or after it (AddressSanitizer sees reads as well, at their line)

  void publish();  // by the scheduler that made it; ordered before claim() for ThreadSanitizer
  void* claim();

 private:
  const void* key_;
  size_t bytes_;
  std::byte* memory_;
  std::byte* mapping_;
  size_t mapping_bytes_;
  char tag_ = 0;
};

// Device memory (cudaMalloc), COUPLET_SIM_MEMORY bytes of it, or 4 GB. NULL when `bytes` is 0 or the device is full.
void* allocate_device(size_t bytes);
enum class Released {
  sound,
  overrun /* somebody wrote behind its end */,
  unknown /* never allocated, or released before */
};
Released release_device(void* memory);
size_t
device_overrun();  // bytes of an allocation behind whose end somebody wrote; 0 when there is none. Device memory is open
bool is_device(const void* address);
size_t device_bytes_free();
size_t device_bytes_total();

// Device memory can be touched only while one of these is alive: a host that follows a device pointer crashes here as it would
// with a GPU.
class DeviceMemoryOpen {
 public:
  DeviceMemoryOpen();
  DeviceMemoryOpen(const DeviceMemoryOpen&) = delete;
  DeviceMemoryOpen& operator=(const DeviceMemoryOpen&) = delete;
  ~DeviceMemoryOpen();
};

}  // namespace sim
