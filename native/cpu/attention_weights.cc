// attention_weights: checks, plan, and the sums over the query heads that share a kv head.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "../common/check.h"
#include "attention_weights_task.h"
#include "backend.h"
#include "isa.h"
#include "pool.h"
#include "rotary.h"

namespace couplet::cpu {
namespace {

AttentionWeightsBody body() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return attention_weights_avx512;
  if (isa() == Isa::avx2) return attention_weights_avx2;
#endif
  return attention_weights_portable;
}

// The workspace: sums of every query head, float64 [query_heads][2][tokens], then scratch of each worker, about
// tokens * (12 head_dim + 104) bytes: 3.4 MB for 2048 tokens of headDim 128.
struct Plan {
  int workers;
  int64_t sums;     // elements, float64
  int64_t scratch;  // elements of one worker, float32; a whole number of cache lines

  explicit Plan(const couplet_attention_weights_params& params)
      : workers(std::min(resolve_threads(params.threads), params.query_heads)),
        sums((int64_t{params.query_heads} * 2 * params.rows.tokens + 7) / 8 * 8),
        scratch((attention_weights_scratch(params.rows.tokens, params.head_dim) + 15) / 16 * 16) {}

  size_t bytes() const {
    return static_cast<size_t>(sums) * sizeof(double) + static_cast<size_t>(workers * scratch) * sizeof(float);
  }
};

couplet_status check(const couplet_attention_weights_params* params, couplet_report* report) {
  COUPLET_EXPECT(params, "Expected parameters but received NULL");
  couplet_attention_weights_params const& p = *params;
  COUPLET_EXPECT(p.rows.tokens >= 0, "Expected 0 or more for `tokens` but received %d", p.rows.tokens);
  COUPLET_EXPECT(p.rows.first_token == 0, "Expected a fresh sequence but received tokens from position %d on",
                 p.rows.first_token);
  COUPLET_EXPECT(p.head_dim >= 1 && p.head_dim <= COUPLET_MAX_HEAD_DIM,
                 "Expected 1 to %d for `headDim` but received %d", COUPLET_MAX_HEAD_DIM, p.head_dim);
  if (couplet_status const status = check_heads(p, report)) return status;
  if (p.rows.tokens == 0) return COUPLET_OK;
  COUPLET_EXPECT(p.queries, "Expected an array for `queries` but received NULL");
  COUPLET_EXPECT(p.rows.keys, "Expected an array for `keys` but received NULL");
  COUPLET_EXPECT(p.rows.values, "Expected an array for `values` but received NULL");
  COUPLET_EXPECT(p.key_weights, "Expected an array for `keyWeights` but received NULL");
  COUPLET_EXPECT(p.value_weights, "Expected an array for `valueWeights` but received NULL");
  return p.rotary ? check_rotary(*p.rotary, p.head_dim, p.rows.tokens - 1, report) : COUPLET_OK;
}

struct Rows {
  const float* first;
  const char* name;
  int64_t token_stride, head_stride;
  int32_t heads;
};

couplet_status check_finite(const couplet_attention_weights_params& params, Rows const& rows, couplet_report* report) {
  for (int32_t token = 0; token < params.rows.tokens; ++token)
    for (int32_t head = 0; head < rows.heads; ++head) {
      const float* const row = rows.first + token * rows.token_stride + head * rows.head_stride;
      for (int32_t c = 0; c < params.head_dim; ++c)
        if (!std::isfinite(row[c]))
          return fail(report, COUPLET_NOT_FINITE,
                      {.kv_head = head / (rows.heads / params.kv_heads), .token = token, .channel = c},
                      "Expected finite numbers for `%s` but received %f in token %d, head %d, channel %d", rows.name,
                      static_cast<double>(row[c]), token, head, c);
    }
  return COUPLET_OK;
}

couplet_status check_numbers(const couplet_attention_weights_params& p, couplet_report* report) {
  for (Rows const& rows :
       {Rows{p.queries, "queries", p.query_token_stride, p.query_head_stride, p.query_heads},
        Rows{p.rows.keys, "keys", p.rows.key_token_stride, p.rows.key_head_stride, p.kv_heads},
        Rows{p.rows.values, "values", p.rows.value_token_stride, p.rows.value_head_stride, p.kv_heads}})
    if (couplet_status const status = check_finite(p, rows, report); status != COUPLET_OK) return status;
  for (int32_t head = 0; p.head_sinks && head < p.query_heads; ++head)
    if (!(p.head_sinks[head] <= FLT_MAX))  // -infinity is no sink
      return fail(report, COUPLET_NOT_FINITE, {.kv_head = head / (p.query_heads / p.kv_heads)},
                  "Expected finite numbers for `headSinks` but received %f for query head %d",
                  static_cast<double>(p.head_sinks[head]), head);
  return COUPLET_OK;
}

// Sums of the query heads of a kv head, in their order; false where one is no finite float.
bool add_heads(const couplet_attention_weights_params& params, const double* sums, int32_t kv_head, int64_t token,
               int side, float* out) {
  int32_t const group_heads = params.query_heads / params.kv_heads;
  int64_t const tokens = params.rows.tokens;
  double sum = 0;
  for (int64_t head = int64_t{kv_head} * group_heads; head < int64_t{kv_head + 1} * group_heads; ++head)
    sum += sums[(head * 2 + side) * tokens + token];
  out[token * params.kv_heads + kv_head] = static_cast<float>(sum);
  return std::isfinite(static_cast<float>(sum));
}

couplet_status run(const couplet_attention_weights_params* params, void* workspace, void*, couplet_report* report) {
  if (couplet_status const status = check(params, report); status != COUPLET_OK) return status;
  couplet_attention_weights_params const& p = *params;
  int64_t const tokens = p.rows.tokens;
  if (tokens == 0) return COUPLET_OK;
  COUPLET_EXPECT(workspace, "Expected workspace but received NULL");
  if (couplet_status const status = check_numbers(p, report); status != COUPLET_OK) return status;
  Plan const plan(p);
  double* const sums = static_cast<double*>(workspace);
  float* const scratch = reinterpret_cast<float*>(sums + plan.sums);
  parallel_for(plan.workers, p.query_heads, [&](int64_t head, int worker) {
    body()({.params = &p,
            .query_head = static_cast<int32_t>(head),
            .scratch = scratch + worker * plan.scratch,
            .key_sums = sums + head * 2 * tokens,
            .value_sums = sums + (head * 2 + 1) * tokens});
  });
  for (int64_t token = 0; token < tokens; ++token)
    for (int32_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
      bool const key_finite = add_heads(p, sums, kv_head, token, 0, p.key_weights);
      bool const value_finite = add_heads(p, sums, kv_head, token, 1, p.value_weights);
      if (key_finite && value_finite) continue;
      return fail(
          report, COUPLET_NOT_FINITE, {.kv_head = kv_head, .token = token},
          "Expected queries, keys and values of moderate size but the weight of token %lld, kv head %d overflows",
          static_cast<long long>(token), kv_head);
    }
  return COUPLET_OK;
}

size_t workspace_bytes(const couplet_attention_weights_params* params) { return Plan(*params).bytes(); }

void describe(const couplet_attention_weights_params*, char* text, size_t text_bytes) {
  std::snprintf(text, text_bytes, "attention_weights %s", isa_name(isa()));
}

}  // namespace

const couplet_attention_weights_entries attention_weights_entries = {
    .check = check, .workspace = workspace_bytes, .run = run, .describe = describe};

}  // namespace couplet::cpu
