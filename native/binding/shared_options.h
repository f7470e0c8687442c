// Options that calls of several files take. JS thread only.
#pragma once

#include "../common/device.h"
#include "../dispatch/dispatch.h"
#include "error.h"
#include "values.h"

namespace couplet::binding {

inline constexpr int32_t most_threads = 256;  // of one call; what native/cpu/pool.h makes at most

// `device`, default "cpu", and `deviceIndex`, default 0. "auto" is "cuda" where that can be had, else "cpu"; no other name ever means
// another backend. The calling thread has selected the device when it returns.
inline Device read_device(const Options& options) {
  couplet_report report{};
  std::string const name = options.string_or("device", "cpu");
  const couplet_backend* backend = find_backend(name == "auto" ? "cuda" : name, &report);
  if (!backend && name == "auto") backend = find_backend("cpu", &report);
  if (!backend) throw error_of(options.env(), report);
  Device const device(backend, options.integer_or("deviceIndex", 0, 0));
  throw_unless_ok(options.env(), device.select(&report), report);
  return device;
}

// `device` alone, for operations that work on its first device.
inline const couplet_backend* read_backend(const Options& options) { return read_device(options).backend; }

// `groupChannels` and `codeBits`.
inline couplet_codec read_codec(const Options& options) {
  return {.group_channels = options.integer("groupChannels", 1, COUPLET_MAX_HEAD_DIM),
          .code_bits = options.integer("codeBits", 1, COUPLET_MAX_CODE_BITS)};
}

// `threads`, default 0: all cores.
inline int32_t read_threads(const Options& options) { return options.integer_or("threads", 0, 0, most_threads); }

}  // namespace couplet::binding
