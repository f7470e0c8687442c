// decode: codes in pages -> centroids -> rows.
#include "decode.h"

#include <algorithm>

#include "backend.h"
#include "isa.h"
#include "pages.h"
#include "pool.h"
#include "table.h"
#include "unpack.h"

namespace couplet::cpu {
namespace {

constexpr int64_t bytes_of_a_thread = int64_t{1}
                                      << 19;  // 20 us of writing; waking another thread (10 us) pays from here on

int threads_of(const couplet_decode_params& p) {
  int64_t const bytes = int64_t{p.tokens} * p.kv_heads * p.head_dim * static_cast<int64_t>(sizeof(float));
  return static_cast<int>(std::min<int64_t>(resolve_threads(p.threads), bytes / bytes_of_a_thread + 1));
}

// Whether |big| steps over all `count` rows that are |small| apart.
bool steps_over(int64_t big, int64_t small, int64_t count, int32_t head_dim) {
  __int128 const span =
      static_cast<__int128>(small < 0 ? -static_cast<__int128>(small) : small) * (count - 1) + head_dim;
  return (big < 0 ? -static_cast<__int128>(big) : big) >= span;
}

// Rows that overlap would be written in an order that depends on the threads.
couplet_status check_disjoint(const couplet_decode_params& p, couplet_report* report) {
  bool const token_major = (p.tokens <= 1 || steps_over(p.token_stride, p.head_stride, p.kv_heads, p.head_dim)) &&
                           (p.kv_heads <= 1 || steps_over(p.head_stride, 0, 1, p.head_dim));
  bool const head_major = (p.kv_heads <= 1 || steps_over(p.head_stride, p.token_stride, p.tokens, p.head_dim)) &&
                          (p.tokens <= 1 || steps_over(p.token_stride, 0, 1, p.head_dim));
  if (token_major || head_major) return COUPLET_OK;
  return fail(report, COUPLET_INVALID_ARGUMENT, {},
              "Expected rows that do not overlap but received `tokenStride` %lld and `headStride` %lld for headDim %d",
              static_cast<long long>(p.token_stride), static_cast<long long>(p.head_stride), p.head_dim);
}

// One kv head of one page.
void decode_task(const DecodeBody& body, const couplet_decode_params& p, int64_t page, int32_t kv_head) {
  const couplet_table& table = *p.table;
  int64_t const begin = std::max(p.first_token, page * p.page_tokens);
  int64_t const end = std::min(p.first_token + p.tokens, (page + 1) * p.page_tokens);
  int64_t const row_bytes = couplet_row_bytes(p.codec, p.page_tokens);
  const uint8_t* const packed = p.pages[page] + p.page_offset + kv_head * p.page_stride;
  uint16_t codes[COUPLET_MAX_HEAD_DIM * decode_tokens];  // 32 KB: a quarter of the smallest default stack (musl)

  for (int64_t token = begin; token < end; token += decode_tokens) {
    int32_t const tokens = static_cast<int32_t>(std::min<int64_t>(decode_tokens, end - token));
    for (int32_t group = 0; group < table.groups; ++group)
      unpack_codes(packed + group * row_bytes, p.codec.code_bits, token - page * p.page_tokens, tokens,
                   codes + group * decode_tokens);
    int64_t const element = (token - p.first_token) * p.token_stride + kv_head * p.head_stride;
    body.rows({
        .rows = static_cast<uint8_t*>(p.rows) + element * (p.dtype == COUPLET_FLOAT16 ? 2 : 4),
        .token_stride = p.token_stride,
        .table = table.rows + group_offset(table, kv_head, 0),
        .codes = codes,
        .tokens = tokens,
        .groups = table.groups,
        .channels = p.codec.group_channels,
        .centroids = table.centroids,
        .half = p.dtype == COUPLET_FLOAT16,
    });
  }
}

const DecodeBody& chosen_body() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512: return decode_avx512;
    case Isa::avx2: return decode_avx2;
    default: break;
  }
#endif
  return decode_portable;
}

couplet_status check(const couplet_decode_params* params, couplet_report* report) {
  if (couplet_status const status = check_pages(params, report)) return status;
  return check_disjoint(*params, report);
}

size_t workspace_bytes(const couplet_decode_params*) { return 0; }

couplet_status run(const couplet_decode_params* params, void*, void*, couplet_report* report) {
  if (couplet_status const status = check(params, report)) return status;
  return decode(chosen_body(), *params, report);
}

void describe(const couplet_decode_params* params, char* text, size_t text_bytes) {
  if (!text || text_bytes == 0) return;
  text[0] = 0;
  if (check(params, nullptr) != COUPLET_OK) return;
  std::snprintf(text, text_bytes, "decode %s %dc%db to %s", chosen_body().name, params->codec.group_channels,
                params->codec.code_bits, params->dtype == COUPLET_FLOAT16 ? "float16" : "float32");
}

}  // namespace

// All kv heads of a page, then the next page: with token-major rows that writes memory from front to back (8c8b, 8 kv heads:
// 34 ns instead of 43 a token and kv head, what a memcpy of the rows takes).
couplet_status decode(const DecodeBody& body, const couplet_decode_params& p, couplet_report*) {
  PageRange const pages = page_range(p.first_token, p.tokens, p.page_tokens);
  parallel_for(threads_of(p), pages.count * p.kv_heads, [&](int64_t task, int) {
    decode_task(body, p, pages.first + task / p.kv_heads, static_cast<int32_t>(task % p.kv_heads));
  });
  return COUPLET_OK;
}

const couplet_decode_entries decode_entries = {
    .check = check,
    .workspace = workspace_bytes,
    .run = run,
    .describe = describe,
};

}  // namespace couplet::cpu
