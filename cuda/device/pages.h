// What encode and decode share on the host: their parameters name pages in the same way, and are refused for the same reasons.
#pragma once

#include "../../native/abi/operations.h"
#include "../../native/common/report.h"
#include "../table.h"
#include "octet.h"

namespace couplet::cuda {

inline constexpr int64_t most_blocks = INT32_MAX;  // of a launch, in x

// Params is couplet_encode_params or couplet_decode_params; check_pages has found it sound, and tokens is positive.
template <class Params>
Octets octets_of(const Params& p) {
  int64_t const first_page = p.first_token / p.page_tokens;
  int32_t const slot = static_cast<int32_t>(p.first_token - first_page * p.page_tokens);
  return {
      .pages = const_cast<uint8_t* const*>(p.pages) + first_page,
      .page_offset = p.page_offset,
      .page_stride = p.page_stride,
      .row_bytes = static_cast<int32_t>(couplet_row_bytes(p.codec, p.page_tokens)),
      .page_octets = static_cast<uint32_t>(p.page_tokens / 8),
      .first = static_cast<uint32_t>(slot / 8),
      .count = static_cast<uint32_t>((slot % 8 + int64_t{p.tokens} + 7) / 8),
      .first_slot = slot % 8,
      .tokens = p.tokens,
  };
}

// Whether the 16 bytes at each 16th byte of each row are aligned.
template <class Params>
bool rows_are_aligned(const Params& p, int bytes) {
  return reinterpret_cast<uintptr_t>(p.rows) % 16 == 0 && p.token_stride * bytes % 16 == 0 &&
         p.head_stride * bytes % 16 == 0 && p.head_dim * bytes % 16 == 0;
}

// Pointers are the device's: that they are there is all that is known of them here, the page table's entries too.
template <class Params>
couplet_status check_pages(const Params* params, couplet_report* report) {
  if (!params) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected parameters but received NULL");
  const Params& p = *params;
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
  if (p.dtype != COUPLET_FLOAT32 && p.dtype != COUPLET_FLOAT16 && p.dtype != COUPLET_BFLOAT16)
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected float32, float16 or bfloat16 for `dtype` but received %d", p.dtype);
  int32_t const page_tokens = p.page_tokens;
  if (page_tokens < 8 || page_tokens % 8 != 0 || page_tokens > INT32_MAX / COUPLET_MAX_CODE_BITS)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a multiple of 8 for `pageTokens` but received %d",
                page_tokens);
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
  return COUPLET_OK;
}

}  // namespace couplet::cuda
