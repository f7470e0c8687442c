// mix: rows in place, each through the matrix of its head.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "../common/check.h"
#include "backend.h"
#include "pool.h"

namespace couplet::cpu {
namespace {

constexpr int64_t products_of_a_thread = int64_t{1}
                                         << 18;  // 60 us of one core: waking another (10 us) pays from here on
constexpr int64_t task_tokens = 16;

couplet_status check(const couplet_mix_params* params, couplet_report* report) {
  if (couplet_status const status = check_mix_params(params, report)) return status;
  const couplet_mix_params& p = *params;
  if (p.dtype != COUPLET_FLOAT32)
    return fail(report, COUPLET_UNSUPPORTED, {}, "The CPU mixes rows of float32 alone, not of dtype %d", p.dtype);
  for (int32_t index = 0; index < p.run_count; ++index)
    if (p.runs[index].tokens < 0 || (p.runs[index].tokens > 0 && !p.runs[index].rows))
      return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected rows in run %d of %d tokens", index,
                  p.runs[index].tokens);
  return COUPLET_OK;
}

size_t workspace(const couplet_mix_params*) { return 0; }

void mix_row(const float* matrix, int32_t head_dim, float* row) {
  float sums[COUPLET_MAX_HEAD_DIM] = {};
  for (int32_t from = 0; from < head_dim; ++from) {
    float const value = row[from];
    const float* const entries = matrix + int64_t{from} * head_dim;
    for (int32_t to = 0; to < head_dim; ++to) sums[to] += value * entries[to];
  }
  std::memcpy(row, sums, static_cast<size_t>(head_dim) * sizeof(float));
}

couplet_status run(const couplet_mix_params* params, void*, void*, couplet_report* report) {
  if (couplet_status const status = check(params, report)) return status;
  const couplet_mix_params& p = *params;
  int32_t const sharing = p.heads / p.matrix_heads;
  for (int32_t index = 0; index < p.run_count; ++index) {
    const couplet_mix_run& run = p.runs[index];
    int64_t const products = int64_t{run.tokens} * p.heads * p.head_dim * p.head_dim;
    int const threads =
        static_cast<int>(std::min<int64_t>(resolve_threads(p.threads), products / products_of_a_thread + 1));
    int64_t const parts = (run.tokens + task_tokens - 1) / task_tokens;
    parallel_for(threads, parts * p.heads, [&](int64_t task, int) {  // tasks that follow each other share their matrix
      int64_t const head = task / parts, first = task % parts * task_tokens;
      const float* const matrix = p.matrices + head / sharing * p.head_dim * p.head_dim;
      for (int64_t token = first; token < std::min<int64_t>(run.tokens, first + task_tokens); ++token)
        mix_row(matrix, p.head_dim, static_cast<float*>(run.rows) + token * run.token_stride + head * run.head_stride);
    });
  }
  return COUPLET_OK;
}

void describe(const couplet_mix_params*, char* text, size_t text_bytes) {
  if (text && text_bytes) std::snprintf(text, text_bytes, "mix cpu");
}

}  // namespace

const couplet_mix_entries mix_entries = {.check = check, .workspace = workspace, .run = run, .describe = describe};

}  // namespace couplet::cpu
