// What encode and decode share: their parameters name pages in the same way, and are refused for the same reasons.
#pragma once

#include "../abi/operations.h"
#include "../common/check.h"
#include "table.h"

namespace couplet::cpu {

// Pages that hold tokens [first_token, first_token + tokens).
struct PageRange {
  int64_t first;
  int64_t count;
};

inline PageRange page_range(int64_t first_token, int32_t tokens, int32_t page_tokens) {
  if (tokens <= 0) return {0, 0};
  int64_t const first = first_token / page_tokens;
  return {first, (first_token + tokens - 1) / page_tokens - first + 1};
}

// Params is couplet_encode_params or couplet_decode_params.
template <class Params>
couplet_status check_pages(const Params* params, couplet_report* report) {
  if (couplet_status const status = check_codes_params(params, report)) return status;
  const Params& p = *params;
  if (couplet_status const status = check_table(p.table, "table", p.codec, p.kv_heads, p.head_dim, report))
    return status;
  if (p.dtype == COUPLET_BFLOAT16)
    return fail(report, COUPLET_UNSUPPORTED, {}, "The CPU backend encodes and decodes float32 and float16 alone");
  PageRange const range = page_range(p.first_token, p.tokens, p.page_tokens);
  for (int64_t page = range.first; page < range.first + range.count; ++page)
    if (!p.pages[page])
      return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected memory for page %lld but received NULL",
                  static_cast<long long>(page));
  return COUPLET_OK;
}

}  // namespace couplet::cpu
