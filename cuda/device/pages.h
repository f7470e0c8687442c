// What encode and decode share on the host: their parameters name pages in the same way, and are refused for the same reasons.
#pragma once

#include "../../native/abi/operations.h"
#include "../../native/common/check.h"
#include "../table.h"
#include "octet.h"

namespace couplet::cuda {

inline constexpr int64_t most_blocks = INT32_MAX;  // of a launch, in x

// Params is couplet_encode_params or couplet_decode_params; check_pages has found it sound, and tokens is positive.
template <class Params>
Octets octets_of(const Params& p) {
  Octets octets{};
  octets.page_offset = p.page_offset;
  octets.page_stride = p.page_stride;
  octets.row_bytes = static_cast<int32_t>(couplet_row_bytes(p.codec, p.page_tokens));
  octets.page_octets = static_cast<uint32_t>(p.page_tokens / 8);
  octets.hold(const_cast<uint8_t* const*>(p.pages), p.first_token, p.tokens);
  return octets;
}

// Whether the 16 bytes at each 16th byte of each row are aligned.
template <class Params>
bool rows_are_aligned(const Params& p, int bytes) {
  return reinterpret_cast<uintptr_t>(p.rows) % 16 == 0 && p.token_stride * bytes % 16 == 0 &&
         p.head_stride * bytes % 16 == 0 && p.head_dim * bytes % 16 == 0;
}

// Pointers are the device's: that they are there is all that is known of them here, the page table's entries too. Of runs, which lie
// in its memory, nothing is.
template <class Params>
couplet_status check_pages(const Params* params, couplet_report* report, bool in_runs = false) {
  if (couplet_status const status = check_codes_params(params, report, in_runs)) return status;
  if (!in_runs && params->first_token >= int64_t{1} << 35)  // see Octets::hold
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected less than 2^35 for `firstToken` but received %lld",
                static_cast<long long>(params->first_token));
  return check_table(params->table, "table", params->codec, params->kv_heads, params->head_dim, report);
}

}  // namespace couplet::cuda
