// Options that calls of several files take. JS thread only.
#pragma once

#include "../dispatch/dispatch.h"
#include "error.h"
#include "values.h"

namespace couplet::binding {

inline constexpr int32_t most_threads = 256;  // of one call; what native/cpu/pool.h makes at most

// `device`, default "cpu"; never another backend than the one asked for.
inline const couplet_backend* read_backend(const Options& options) {
  couplet_report report{};
  const couplet_backend* const backend = find_backend(options.string_or("device", "cpu"), &report);
  if (!backend) throw error_of(options.env(), report);
  return backend;
}

// `groupChannels` and `codeBits`.
inline couplet_codec read_codec(const Options& options) {
  return {.group_channels = options.integer("groupChannels", 1, COUPLET_MAX_HEAD_DIM),
          .code_bits = options.integer("codeBits", 1, COUPLET_MAX_CODE_BITS)};
}

// `threads`, default 0: all cores.
inline int32_t read_threads(const Options& options) { return options.integer_or("threads", 0, 0, most_threads); }

}  // namespace couplet::binding
