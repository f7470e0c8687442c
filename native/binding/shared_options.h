// Options that calls of several files take. JS thread only.
#pragma once

#include "../common/device.h"
#include "../dispatch/dispatch.h"
#include "error.h"
#include "values.h"

namespace couplet::binding {

inline constexpr int64_t most_stride = int64_t{1}
                                       << 48;  // of elements; the product with a count is checked where it is used
inline constexpr int32_t most_threads = 256;   // of one call; what native/cpu/pool.h makes at most

// `device`, default "cpu", and `deviceIndex`, default 0: what was asked for. "auto" is "cuda" where that can be had, else "cpu"; no
// other name ever means another backend.
struct DeviceRequest {
  std::string name;
  int32_t index;

  // On any thread; looking for CUDA takes a while the first time. The calling thread has selected the device when it returns.
  couplet_status find(Device* device, couplet_report* report) const {
    const couplet_backend* backend = find_backend(name == "auto" ? "cuda" : name, report);
    if (!backend && name == "auto") backend = find_backend("cpu", report);
    if (!backend) return COUPLET_BACKEND_UNAVAILABLE;
    *device = Device(backend, index);
    return device->select(report);
  }
};

inline DeviceRequest read_device_request(const Options& options) {
  std::string const name = options.string_or("device", "cpu");
  if (name != "cpu" && name != "cuda" && name != "auto" && name != "sim")  // the last one is for tests
    throw_expected(options.env(), "\"cpu\", \"cuda\" or \"auto\"", "device", options.get("device"), true);
  return {name, options.integer_or("deviceIndex", 0, 0)};
}

// Found on the JS thread.
inline Device read_device(const Options& options) {
  Device device;
  couplet_report report{};
  throw_unless_ok(options.env(), read_device_request(options).find(&device, &report), report);
  return device;
}

// `groupChannels` and `codeBits`.
inline couplet_codec read_codec(const Options& options) {
  return {.group_channels = options.integer("groupChannels", 1, COUPLET_MAX_HEAD_DIM),
          .code_bits = options.integer("codeBits", 1, COUPLET_MAX_CODE_BITS)};
}

// A couplet_dtype by its name.
inline int32_t read_dtype(const Options& options, const char* name) {
  std::string const dtype = options.string(name);
  if (dtype == "float32") return COUPLET_FLOAT32;
  if (dtype == "float16") return COUPLET_FLOAT16;
  if (dtype == "bfloat16") return COUPLET_BFLOAT16;
  throw_expected(options.env(), "\"float32\", \"float16\" or \"bfloat16\"", name, options.get(name), true);
}

// `threads`, default 0: all cores.
inline int32_t read_threads(const Options& options) { return options.integer_or("threads", 0, 0, most_threads); }

}  // namespace couplet::binding
