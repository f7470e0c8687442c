// store: rows -> float32 in the memory of a cache.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "../common/check.h"
#include "../common/not_finite.h"
#include "backend.h"
#include "half.h"

namespace couplet::cpu {
namespace {

float bfloat16_to_float(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

float element(const couplet_store_params& p, const void* rows, int64_t at) {
  if (p.dtype == COUPLET_FLOAT32) return static_cast<const float*>(rows)[at];
  uint16_t const bits = static_cast<const uint16_t*>(rows)[at];
  return p.dtype == COUPLET_FLOAT16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

// Calls visit(run, token, kv head, first element of the row) in the order in which values are reported.
template <class Visit>
couplet_status for_each_row(const couplet_store_params& p, const Visit& visit) {
  for (int32_t index = 0; index < p.run_count; ++index) {
    const couplet_store_run& run = p.runs[index];
    for (int32_t token = 0; token < run.tokens; ++token)
      for (int32_t head = 0; head < p.kv_heads; ++head)
        if (couplet_status const status = visit(run, token, head, token * run.token_stride + head * run.head_stride))
          return status;
  }
  return COUPLET_OK;
}

bool is_finite(const float* row, int32_t channels) {  // without a branch for each channel
  uint32_t largest = 0;
  for (int32_t channel = 0; channel < channels; ++channel)
    largest = std::max(largest, __builtin_bit_cast(uint32_t, row[channel]) & 0x7fffffffu);
  return largest < 0x7f800000u;
}

couplet_status check(const couplet_store_params* params, couplet_report* report) {
  if (couplet_status const status = check_store_params(params, report)) return status;
  const couplet_store_params& p = *params;
  for (int32_t index = 0; index < p.run_count; ++index) {
    const couplet_store_run& run = p.runs[index];
    if (run.tokens < 0 || (run.tokens > 0 && (!run.rows || !run.stored)))
      return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected rows and a place for them in run %d of %d tokens",
                  index, run.tokens);
  }
  return COUPLET_OK;
}

size_t workspace(const couplet_store_params*) { return 0; }

couplet_status run(const couplet_store_params* params, void*, void*, couplet_report* report) {
  const couplet_store_params& p = *params;
  couplet_status const status =
      for_each_row(p, [&](const couplet_store_run& run, int32_t token, int32_t head, int64_t at) {
        if (p.dtype == COUPLET_FLOAT32 && is_finite(static_cast<const float*>(run.rows) + at, p.head_dim))
          return COUPLET_OK;
        for (int32_t channel = 0; channel < p.head_dim; ++channel)
          if (!std::isfinite(element(p, run.rows, at + channel)))
            return rows_not_finite(report, run.first_token + token, head, channel);
        return COUPLET_OK;
      });
  if (status != COUPLET_OK) return status;
  return for_each_row(p, [&](const couplet_store_run& run, int32_t token, int32_t head, int64_t at) {
    float* const to = run.stored + token * run.stored_token_stride + head * run.stored_head_stride;
    if (p.dtype == COUPLET_FLOAT32)
      std::memcpy(to, static_cast<const float*>(run.rows) + at, static_cast<size_t>(p.head_dim) * sizeof(float));
    else
      for (int32_t channel = 0; channel < p.head_dim; ++channel) to[channel] = element(p, run.rows, at + channel);
    return COUPLET_OK;
  });
}

void describe(const couplet_store_params*, char* text, size_t text_bytes) {
  if (text && text_bytes) std::snprintf(text, text_bytes, "store cpu");
}

}  // namespace

const couplet_store_entries store_entries = {.check = check, .workspace = workspace, .run = run, .describe = describe};

}  // namespace couplet::cpu
