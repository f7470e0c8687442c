// reorder: rows with their channels in another order.
#include <cstdio>

#include "../common/check.h"
#include "backend.h"

namespace couplet::cpu {
namespace {

couplet_status check(const couplet_reorder_params* params, couplet_report* report) {
  if (couplet_status const status = check_reorder_params(params, report)) return status;
  const couplet_reorder_params& p = *params;
  for (int32_t channel = 0; channel < p.head_dim; ++channel)
    if (p.order[channel] < 0 || p.order[channel] >= p.head_dim)
      return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected channels below %d for `order` but received %d",
                  p.head_dim, p.order[channel]);
  for (int32_t index = 0; index < p.run_count; ++index) {
    const couplet_reorder_run& run = p.runs[index];
    if (run.tokens < 0 || run.heads < 1 || (run.tokens > 0 && (!run.rows || !run.reordered)))
      return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected rows and a place for them in run %d of %d tokens",
                  index, run.tokens);
  }
  return COUPLET_OK;
}

size_t workspace(const couplet_reorder_params*) { return 0; }

// On one thread: a row is moved in less time than its product with one column of the projection that made it takes.
template <class Element>
void reorder(const couplet_reorder_params& p) {
  for (int32_t index = 0; index < p.run_count; ++index) {
    const couplet_reorder_run& run = p.runs[index];
    for (int64_t token = 0; token < run.tokens; ++token)
      for (int64_t head = 0; head < run.heads; ++head) {
        const Element* const from =
            static_cast<const Element*>(run.rows) + token * run.token_stride + head * run.head_stride;
        Element* const to = static_cast<Element*>(run.reordered) + token * run.reordered_token_stride +
                            head * run.reordered_head_stride;
        for (int32_t channel = 0; channel < p.head_dim; ++channel) to[channel] = from[p.order[channel]];
      }
  }
}

couplet_status run(const couplet_reorder_params* params, void*, void*, couplet_report* report) {
  if (couplet_status const status = check(params, report)) return status;
  if (params->dtype == COUPLET_FLOAT32)
    reorder<uint32_t>(*params);
  else
    reorder<uint16_t>(*params);
  return COUPLET_OK;
}

void describe(const couplet_reorder_params*, char* text, size_t text_bytes) {
  if (text && text_bytes) std::snprintf(text, text_bytes, "reorder cpu");
}

}  // namespace

const couplet_reorder_entries reorder_entries = {
    .check = check, .workspace = workspace, .run = run, .describe = describe};

}  // namespace couplet::cpu
