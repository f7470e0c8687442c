// What attend refuses, and why.
#include <cmath>

#include "../common/report.h"
#include "attend_check.h"
#include "attend_task.h"
#include "rotary.h"

namespace couplet::cpu {
namespace {

#define EXPECT(condition, ...) \
  if (!(condition)) return fail(report, COUPLET_INVALID_ARGUMENT, {}, __VA_ARGS__)

couplet_status check_shapes(const couplet_attend_params& params, couplet_report* report) {
  EXPECT(params.head_dim >= 32 && params.head_dim <= COUPLET_MAX_HEAD_DIM && params.head_dim % 8 == 0,
         "Expected 32 to %d in steps of 8 for `headDim` but received %d", COUPLET_MAX_HEAD_DIM, params.head_dim);
  EXPECT(params.kv_heads >= 1, "Expected 1 or more for `kvHeads` but received %d", params.kv_heads);
  EXPECT(params.query_heads >= 1 && params.query_heads % params.kv_heads == 0,
         "Expected a multiple of kvHeads %d for `queryHeads` but received %d", params.kv_heads, params.query_heads);
  EXPECT(params.query_heads <= 65536, "Expected at most 65536 for `queryHeads` but received %d", params.query_heads);
  EXPECT(params.page_tokens >= 8 && params.page_tokens % 8 == 0 && params.page_tokens <= 65536,
         "Expected a multiple of 8 up to 65536 for `pageTokens` but received %d", params.page_tokens);
  EXPECT(params.local_window >= 0, "Expected 0 or more for `localWindow` but received %d", params.local_window);
  EXPECT(std::isfinite(params.scale), "Expected a finite number for `scale` but received %g",
         static_cast<double>(params.scale));
  EXPECT(std::isfinite(params.softcap) && params.softcap >= 0,
         "Expected a finite number of 0 or more for `softcap` but received %g", static_cast<double>(params.softcap));
  EXPECT(params.sequence_count >= 0, "Expected 0 or more for the number of sequences but received %d",
         params.sequence_count);
  if (params.query_dtype != COUPLET_FLOAT32 || params.output_dtype != COUPLET_FLOAT32)
    return fail(report, COUPLET_UNSUPPORTED, {}, "The CPU backend attends with float32 queries and outputs alone");
  EXPECT(params.sequences || params.sequence_count == 0, "Expected an array for `sequences` but received NULL");
  return COUPLET_OK;
}

// Positions [begin, end) that some query reads in full precision, and that the dense runs therefore cover.
couplet_status check_covered(const couplet_attend_sequence& sequence, int32_t index, int32_t begin, int32_t end,
                             couplet_report* report) {
  for (int32_t run = 0; run < sequence.dense_count && begin < end; ++run) {
    const couplet_dense_rows& rows = sequence.dense[run];
    if (rows.first_token <= begin) begin = attend_larger(begin, rows.first_token + rows.tokens);
  }
  if (begin >= end) return COUPLET_OK;
  return fail(report, COUPLET_INVALID_ARGUMENT, {.token = begin},
              "Expected dense rows for token %d of sequence %d but no run covers it", begin, index);
}

couplet_status check_dense(const couplet_attend_params& params, int32_t index, couplet_report* report) {
  const couplet_attend_sequence& sequence = params.sequences[index];
  EXPECT(sequence.dense_count >= 0, "Expected 0 or more for the number of dense runs but received %d",
         sequence.dense_count);
  EXPECT(sequence.dense || sequence.dense_count == 0, "Expected an array for `dense` of sequence %d but received NULL",
         index);
  int64_t end = 0;
  for (int32_t run = 0; run < sequence.dense_count; ++run) {
    const couplet_dense_rows& rows = sequence.dense[run];
    EXPECT(rows.tokens >= 0 && rows.first_token >= end && int64_t{rows.first_token} + rows.tokens <= INT32_MAX,
           "Expected ascending dense runs but run %d of sequence %d has %d tokens from %d on after %lld", run, index,
           rows.tokens, rows.first_token, static_cast<long long>(end));
    EXPECT(rows.tokens == 0 || (rows.keys && rows.values),
           "Expected keys and values in dense run %d of sequence %d but received NULL", run, index);
    end = int64_t{rows.first_token} + rows.tokens;
  }
  int32_t const first = sequence.first_query, last = first + sequence.query_tokens - 1;
  Interval const below = attend_visible(params, sequence, KeySource::below, first);
  int32_t const below_end = attend_visible(params, sequence, KeySource::below, last).end;
  if (couplet_status const status = check_covered(sequence, index, below.begin, below_end, report)) return status;
  // The first query that reads anything above: with window 0 it must lie beyond the codes.
  int32_t above = attend_larger(first, sequence.coded_begin);
  if (sequence.window == 0) above = attend_larger(above, sequence.coded_end);
  if (above > last) return COUPLET_OK;
  return check_covered(sequence, index, attend_visible(params, sequence, KeySource::above, above).begin, last + 1,
                       report);
}

// Positions that some query reads from codes; empty when begin >= end.
Interval coded_positions(const couplet_attend_params& params, const couplet_attend_sequence& sequence) {
  int32_t const last = sequence.first_query + sequence.query_tokens - 1;
  return {attend_visible(params, sequence, KeySource::codes, sequence.first_query).begin,
          attend_visible(params, sequence, KeySource::codes, last).end};
}

couplet_status check_codes(const couplet_attend_params& params, int32_t index, couplet_report* report) {
  const couplet_attend_sequence& sequence = params.sequences[index];
  Interval const coded = coded_positions(params, sequence);
  if (coded.begin >= coded.end) return COUPLET_OK;
  if (couplet_status const status =
          check_table(params.key_table, "keyTable", params.key_codec, params.kv_heads, params.head_dim, report))
    return status;
  if (couplet_status const status =
          check_table(params.value_table, "valueTable", params.value_codec, params.kv_heads, params.head_dim, report))
    return status;
  EXPECT(sequence.pages, "Expected an array for `pages` of sequence %d but received NULL", index);
  for (int32_t page = coded.begin / params.page_tokens; page <= (coded.end - 1) / params.page_tokens; ++page)
    EXPECT(sequence.pages[page], "Expected a page for `pages[%d]` of sequence %d but received NULL", page, index);
  int64_t const heads = params.kv_heads > 1;
  EXPECT(
      params.key_page_offset >= 0 &&
          params.key_page_stride >= heads * couplet_page_bytes(params.key_codec, params.head_dim, params.page_tokens),
      "Expected `keyPageStride` to hold a page of keys but received %lld",
      static_cast<long long>(params.key_page_stride));
  EXPECT(params.value_page_offset >= 0 &&
             params.value_page_stride >=
                 heads * couplet_page_bytes(params.value_codec, params.head_dim, params.page_tokens),
         "Expected `valuePageStride` to hold a page of values but received %lld",
         static_cast<long long>(params.value_page_stride));
  return COUPLET_OK;
}

couplet_status check_sequence(const couplet_attend_params& params, int32_t index, couplet_report* report) {
  const couplet_attend_sequence& sequence = params.sequences[index];
  EXPECT(sequence.query_tokens >= 0, "Expected 0 or more query tokens in sequence %d but received %d", index,
         sequence.query_tokens);
  if (sequence.query_tokens == 0) return COUPLET_OK;
  EXPECT(sequence.queries, "Expected an array for `queries` of sequence %d but received NULL", index);
  EXPECT(sequence.outputs, "Expected an array for `outputs` of sequence %d but received NULL", index);
  EXPECT(sequence.first_query >= 0 && int64_t{sequence.first_query} + sequence.query_tokens <= INT32_MAX,
         "Expected positions of 0 to %d in sequence %d but received %d queries from %d on", INT32_MAX, index,
         sequence.query_tokens, sequence.first_query);
  EXPECT(sequence.window >= 0, "Expected 0 or more for `window` of sequence %d but received %d", index,
         sequence.window);
  EXPECT(sequence.coded_begin >= 0 && sequence.coded_end >= 0,
         "Expected coded tokens from 0 on in sequence %d but received %d to %d", index, sequence.coded_begin,
         sequence.coded_end);
  if (params.rotary)
    if (couplet_status const status = check_rotary(*params.rotary, params.head_dim,
                                                   int64_t{sequence.first_query} + sequence.query_tokens - 1, report))
      return status;
  if (couplet_status const status = check_dense(params, index, report)) return status;
  return check_codes(params, index, report);
}

#undef EXPECT

}  // namespace

couplet_status attend_check(const couplet_attend_params* params, couplet_report* report) {
  if (!params) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected parameters but received NULL");
  if (couplet_status const status = check_shapes(*params, report)) return status;
  for (int32_t index = 0; index < params->sequence_count; ++index)
    if (couplet_status const status = check_sequence(*params, index, report)) return status;
  return COUPLET_OK;
}

}  // namespace couplet::cpu
