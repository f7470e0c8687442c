// What encode and decode share: their parameters name pages in the same way, and are refused for the same reasons.
#pragma once

#include "../abi/operations.h"
#include "../common/report.h"
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
  if (!params) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected parameters but received NULL");
  auto const& p = *params;
  if (p.kv_heads < 1)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected 1 or more for `kvHeads` but received %d", p.kv_heads);
  if (p.head_dim < COUPLET_MIN_HEAD_DIM || p.head_dim > COUPLET_MAX_HEAD_DIM ||
      !couplet_codec_valid(p.codec, p.head_dim))
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected headDim %d to %d, groups that divide it and codes of 1 to %d bits but received headDim %d "
                "and codec %dc%db",
                COUPLET_MIN_HEAD_DIM, COUPLET_MAX_HEAD_DIM, COUPLET_MAX_CODE_BITS, p.head_dim, p.codec.group_channels,
                p.codec.code_bits);
  if (couplet_status const status = check_table(p.table, "table", p.codec, p.kv_heads, p.head_dim, report))
    return status;
  if (p.dtype != COUPLET_FLOAT32 && p.dtype != COUPLET_FLOAT16)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected float32 or float16 for `dtype` but received %d",
                p.dtype);
  if (p.page_tokens < 8 || p.page_tokens % 8 != 0)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a multiple of 8 for `pageTokens` but received %d",
                p.page_tokens);
  if (p.tokens < 0)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected 0 or more for `tokens` but received %d", p.tokens);
  int64_t const first_token = p.first_token;
  if (first_token < 0 || first_token > INT64_MAX - p.tokens)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected 0 or more for `firstToken` but received %lld",
                static_cast<long long>(first_token));
  if (p.tokens == 0) return COUPLET_OK;

  if (!p.rows) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected an array for `rows` but received NULL");
  if (!p.pages) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected an array for `pages` but received NULL");
  int64_t const codes_bytes = couplet_codec_groups(p.codec, p.head_dim) * couplet_row_bytes(p.codec, p.page_tokens);
  if (p.kv_heads > 1 && p.page_stride < codes_bytes)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected %lld or more bytes for `pageStride` but received %lld",
                static_cast<long long>(codes_bytes), static_cast<long long>(p.page_stride));
  PageRange const range = page_range(p.first_token, p.tokens, p.page_tokens);
  for (int64_t page = range.first; page < range.first + range.count; ++page)
    if (!p.pages[page])
      return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected memory for page %lld but received NULL",
                  static_cast<long long>(page));
  return COUPLET_OK;
}

}  // namespace couplet::cpu
