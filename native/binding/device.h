// Memory of devices as JavaScript holds it, and calls that work on a device.
#pragma once

#include <napi.h>

#include <memory>
#include <vector>

#include "../call/memory.h"
#include "shared_options.h"
#include "values.h"
#include "worker.h"

namespace couplet::binding {

struct DeviceBufferHandle {
  static constexpr napi_type_tag tag{0x8e4b62d10fa7493c, 0xa5d3170be96c28f4};
  static constexpr const char* noun = "a DeviceBuffer";
  std::shared_ptr<const DeviceMemory> memory;  // NULL after dispose

  DeviceBufferHandle(Napi::Env env, DeviceMemory allocated);
  ~DeviceBufferHandle() { dispose(); }
  DeviceBufferHandle(const DeviceBufferHandle&) = delete;
  DeviceBufferHandle& operator=(const DeviceBufferHandle&) = delete;
  void dispose();  // calls that use the memory keep it until they are over

 private:
  Napi::Env env_;
};

// Memory of a device that a call was given: of a DeviceBuffer, whose memory the call keeps, or `{ address, bytes }`, which somebody
// else keeps until the call is over, or its stream has got there.
struct MemoryView {
  void* address = nullptr;
  size_t bytes = 0;
  std::shared_ptr<const DeviceMemory> owner;  // NULL for an address
};

inline bool is_memory(Napi::Value value) { return value.IsObject() && !value.IsTypedArray(); }

// Refused: fewer bytes than that, and an address that is no multiple of `alignment`.
MemoryView read_memory(Napi::Value value, const char* name, size_t least_bytes, size_t alignment);

// A cudaStream_t as a bigint.
void* read_stream(Napi::Value value, const char* name);

// Elements in the memory of the host or of the call's device.
template <class T>
struct Place {
  T* data = nullptr;
  bool on_host = true;
};

// A call on the device that its options name, found when the call runs.
class DeviceWorker : public Worker {
 protected:
  explicit DeviceWorker(const Options& options);

  // The device is selected.
  virtual couplet_status run(const Device& device, couplet_report* report) = 0;

  // A typed array, or memory of the device; the one that a `stream` asks for is the latter.
  template <class T>
  Place<T> place(const Options& options, const char* name, size_t least_length) {
    Napi::Value const value = options.get(name);
    if (is_memory(value)) {
      bool const fits = least_length <= std::numeric_limits<size_t>::max() / sizeof(T);
      size_t const bytes = fits ? least_length * sizeof(T) : std::numeric_limits<size_t>::max();
      return {static_cast<T*>(keep_memory(value, name, bytes, alignof(T))), false};
    }
    if (only_enqueues_) throw_expected(env(), "memory of the device, as the call has a `stream`,", name, value);
    return {pin(read_array<T>(value, name, least_length)), true};
  }
  template <class T>
  Place<T> place_or_none(const Options& options, const char* name, size_t least_length) {
    return options.has(name) ? place<T>(options, name, least_length) : Place<T>{};
  }

  // The call fails unless it runs on this device.
  void expect_device(const char* name, const Device& device) { expected_.push_back({name, device}); }
  void only_enqueue() { only_enqueues_ = has_stream_; }  // what this call does where it has a stream
  bool has_stream() const { return has_stream_; }
  void* stream() const { return stream_; }

 private:
  struct Expected {
    const char* name;
    Device device;
  };

  couplet_status execute(couplet_report* report) final;
  void* keep_memory(Napi::Value value, const char* name, size_t least_bytes, size_t alignment);

  DeviceRequest const request_;
  std::vector<std::shared_ptr<const DeviceMemory>> kept_;
  std::vector<Expected> expected_;
  void* stream_ = nullptr;
  bool has_stream_ = false;
  bool only_enqueues_ = false;
};

}  // namespace couplet::binding
