// What attend refuses, and why.

#include "attend_check.h"
#include "../common/check.h"
#include "attend_task.h"
#include "rotary.h"

namespace couplet::cpu {
namespace {

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
  COUPLET_EXPECT(sequence.dense_count >= 0, "Expected 0 or more for the number of dense runs but received %d",
                 sequence.dense_count);
  COUPLET_EXPECT(sequence.dense || sequence.dense_count == 0,
                 "Expected an array for `dense` of sequence %d but received NULL", index);
  int64_t end = 0;
  for (int32_t run = 0; run < sequence.dense_count; ++run) {
    const couplet_dense_rows& rows = sequence.dense[run];
    COUPLET_EXPECT(rows.tokens >= 0 && rows.first_token >= end && int64_t{rows.first_token} + rows.tokens <= INT32_MAX,
                   "Expected ascending dense runs but run %d of sequence %d has %d tokens from %d on after %lld", run,
                   index, rows.tokens, rows.first_token, static_cast<long long>(end));
    COUPLET_EXPECT(rows.tokens == 0 || (rows.keys && rows.values),
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
  COUPLET_EXPECT(sequence.pages, "Expected an array for `pages` of sequence %d but received NULL", index);
  for (int32_t page = coded.begin / params.page_tokens; page <= (coded.end - 1) / params.page_tokens; ++page)
    COUPLET_EXPECT(sequence.pages[page], "Expected a page for `pages[%d]` of sequence %d but received NULL", page,
                   index);
  return check_attend_pages(params, report);
}

couplet_status check_sequence(const couplet_attend_params& params, int32_t index, couplet_report* report) {
  const couplet_attend_sequence& sequence = params.sequences[index];
  COUPLET_EXPECT(sequence.query_tokens >= 0, "Expected 0 or more query tokens in sequence %d but received %d", index,
                 sequence.query_tokens);
  if (sequence.query_tokens == 0) return COUPLET_OK;
  COUPLET_EXPECT(sequence.queries, "Expected an array for `queries` of sequence %d but received NULL", index);
  COUPLET_EXPECT(sequence.outputs, "Expected an array for `outputs` of sequence %d but received NULL", index);
  COUPLET_EXPECT(sequence.first_query >= 0 && int64_t{sequence.first_query} + sequence.query_tokens <= INT32_MAX,
                 "Expected positions of 0 to %d in sequence %d but received %d queries from %d on", INT32_MAX, index,
                 sequence.query_tokens, sequence.first_query);
  COUPLET_EXPECT(sequence.window >= 0, "Expected 0 or more for `window` of sequence %d but received %d", index,
                 sequence.window);
  COUPLET_EXPECT(sequence.coded_begin >= 0 && sequence.coded_end >= 0,
                 "Expected coded tokens from 0 on in sequence %d but received %d to %d", index, sequence.coded_begin,
                 sequence.coded_end);
  if (params.rotary)
    if (couplet_status const status = check_rotary(*params.rotary, params.head_dim,
                                                   int64_t{sequence.first_query} + sequence.query_tokens - 1, report))
      return status;
  if (couplet_status const status = check_dense(params, index, report)) return status;
  return check_codes(params, index, report);
}

}  // namespace

couplet_status attend_check(const couplet_attend_params* params, couplet_report* report) {
  if (couplet_status const status = check_attend_params(params, report)) return status;
  if (params->query_dtype != COUPLET_FLOAT32 || params->output_dtype != COUPLET_FLOAT32)
    return fail(report, COUPLET_UNSUPPORTED, {}, "The CPU backend attends with float32 queries and outputs alone");
  for (int32_t index = 0; index < params->sequence_count; ++index)
    if (couplet_status const status = check_sequence(*params, index, report)) return status;
  return COUPLET_OK;
}

}  // namespace couplet::cpu
