// What every backend refuses, and in which words: all that can be said of parameters without following a pointer to memory that may be
// a device's. Backends add what only they can see.
#pragma once

#include <cmath>
#include <initializer_list>

#include "../abi/operations.h"
#include "report.h"

namespace couplet {

#define COUPLET_EXPECT(condition, ...) \
  if (!(condition)) return fail(report, COUPLET_INVALID_ARGUMENT, {}, __VA_ARGS__)

// ---- tables --------------------------------------------------------------------------------------------------------
inline couplet_status check_table_params(const couplet_table_params* params, couplet_report* report) {
  COUPLET_EXPECT(params, "Expected parameters but received NULL");
  const couplet_table_params& p = *params;
  COUPLET_EXPECT(p.centroids, "Expected an array for `centroids` but received NULL");
  COUPLET_EXPECT(p.head_dim >= COUPLET_MIN_HEAD_DIM && p.head_dim <= COUPLET_MAX_HEAD_DIM,
                 "Expected %d to %d for `headDim` but received %d", COUPLET_MIN_HEAD_DIM, COUPLET_MAX_HEAD_DIM,
                 p.head_dim);
  COUPLET_EXPECT(p.kv_heads >= 1, "Expected 1 or more for `kvHeads` but received %d", p.kv_heads);
  COUPLET_EXPECT(couplet_codec_valid(p.codec, p.head_dim),
                 "Expected groups that divide headDim %d and codes of 1 to %d bits for `codec` but received %dc%db",
                 p.head_dim, COUPLET_MAX_CODE_BITS, p.codec.group_channels, p.codec.code_bits);
  return COUPLET_OK;
}

// Reads all centroids, which are the host's: after the memory for as many was had, since nothing else bounds kv_heads.
inline couplet_status check_centroids(const couplet_table_params& p, couplet_report* report) {
  int64_t const channels = p.codec.group_channels;
  int64_t const centroids = couplet_codec_centroids(p.codec);
  int64_t const groups = couplet_codec_groups(p.codec, p.head_dim);
  int64_t const count = p.kv_heads * groups * centroids * channels;
  for (int64_t at = 0; at < count; ++at) {
    if (std::isfinite(p.centroids[at])) continue;
    int64_t const group = at / channels / centroids % groups;
    int32_t const kv_head = static_cast<int32_t>(at / channels / centroids / groups);
    return fail(
        report, COUPLET_NOT_FINITE,
        {.kv_head = kv_head, .channel = static_cast<int32_t>(group * channels + at % channels)},
        "Expected finite numbers for `centroids` but received %f in kv head %d, group %d, centroid %d, channel %d",
        static_cast<double>(p.centroids[at]), kv_head, static_cast<int>(group),
        static_cast<int>(at / channels % centroids), static_cast<int>(at % channels));
  }
  return COUPLET_OK;
}

// Likewise all matrices of the metric, of which there are fewer.
inline couplet_status check_metric(const couplet_table_params& p, couplet_report* report) {
  if (!p.metric) return COUPLET_OK;
  int64_t const head_floats = int64_t{p.head_dim} * p.codec.group_channels;
  for (int64_t at = 0; at < p.kv_heads * head_floats; ++at) {
    if (std::isfinite(p.metric[at])) continue;
    int32_t const kv_head = static_cast<int32_t>(at / head_floats);
    return fail(report, COUPLET_NOT_FINITE, {.kv_head = kv_head},
                "Expected finite numbers for `metric` but received %f in kv head %d", static_cast<double>(p.metric[at]),
                kv_head);
  }
  return COUPLET_OK;
}

// Whether a table serves an operation that was given these shapes. Table: what a backend keeps behind couplet_table.
template <class Table>
couplet_status check_table_shape(const Table* table, const char* name, couplet_codec codec, int32_t kv_heads,
                                 int32_t head_dim, couplet_report* report) {
  COUPLET_EXPECT(table, "Expected a table for `%s` but received NULL", name);
  COUPLET_EXPECT(table->codec.group_channels == codec.group_channels && table->codec.code_bits == codec.code_bits &&
                     table->kv_heads == kv_heads && table->head_dim == head_dim,
                 "Expected a table of codec %dc%db, %d kv heads and headDim %d for `%s` but received %dc%db, %d and %d",
                 codec.group_channels, codec.code_bits, kv_heads, head_dim, name, table->codec.group_channels,
                 table->codec.code_bits, table->kv_heads, table->head_dim);
  return COUPLET_OK;
}

// ---- rotary embedding ------------------------------------------------------------------------------------------------
// cos and sin are the host's.
inline couplet_status check_rotary_params(const couplet_rotary_params* params, couplet_report* report) {
  COUPLET_EXPECT(params, "Expected parameters but received NULL");
  const couplet_rotary_params& p = *params;
  COUPLET_EXPECT(p.kind == COUPLET_ROTARY_HALF || p.kind == COUPLET_ROTARY_INTERLEAVED,
                 "Expected half or interleaved for the rotary `kind` but received %d", p.kind);
  COUPLET_EXPECT(p.head_dim >= COUPLET_MIN_HEAD_DIM && p.head_dim <= COUPLET_MAX_HEAD_DIM,
                 "Expected %d to %d for `headDim` but received %d", COUPLET_MIN_HEAD_DIM, COUPLET_MAX_HEAD_DIM,
                 p.head_dim);
  COUPLET_EXPECT(p.rotary_dim >= 2 && p.rotary_dim <= p.head_dim && p.rotary_dim % 2 == 0,
                 "Expected an even number from 2 to headDim %d for the rotary `dim` but received %d", p.head_dim,
                 p.rotary_dim);
  COUPLET_EXPECT(p.positions >= 1, "Expected 1 or more for the rotary `positions` but received %d", p.positions);
  COUPLET_EXPECT(!p.cos == !p.sin, "Expected both rotary tables, `cos` and `sin`, or none but received one");
  if (!p.cos) {
    COUPLET_EXPECT(std::isfinite(p.theta) && p.theta > 0,
                   "Expected a positive number for the rotary `theta` but received %g", p.theta);
    return COUPLET_OK;
  }
  int32_t const pairs = p.rotary_dim / 2;
  for (int64_t at = 0; at < int64_t{p.positions} * pairs; ++at)
    if (!std::isfinite(p.cos[at]) || !std::isfinite(p.sin[at]))
      return fail(report, COUPLET_NOT_FINITE, {.token = at / pairs, .channel = static_cast<int32_t>(at % pairs)},
                  "Expected finite numbers for the rotary tables but received cos %g, sin %g at position %lld, pair %d",
                  static_cast<double>(p.cos[at]), static_cast<double>(p.sin[at]), static_cast<long long>(at / pairs),
                  static_cast<int>(at % pairs));
  return COUPLET_OK;
}

// order: [pairs], the host's.
inline couplet_status check_pair_order(const int32_t* order, int32_t pairs, couplet_report* report) {
  COUPLET_EXPECT(order, "Expected an array for `order` but received NULL");
  bool seen[COUPLET_MAX_HEAD_DIM / 2] = {};
  for (int32_t i = 0; i < pairs; ++i) {
    COUPLET_EXPECT(order[i] >= 0 && order[i] < pairs && !seen[order[i]],
                   "Expected every rotary pair below %d once for `order` but received %d at %d", pairs, order[i], i);
    seen[order[i]] = true;
  }
  return COUPLET_OK;
}

// ---- kmeans ------------------------------------------------------------------------------------------------------------
inline constexpr int32_t kmeans_most_channels = 32;
inline constexpr int32_t kmeans_most_centroids = 4096;

// Whether the last element that is read can be counted in 63 bits of bytes.
inline bool is_addressable(int64_t outer_count, int64_t outer_stride, int64_t inner_count, int64_t inner_stride,
                           int64_t elements) {
  int64_t outer, inner, last, bytes;
  return outer_stride >= 0 && inner_stride >= 0 && !__builtin_mul_overflow(outer_count - 1, outer_stride, &outer) &&
         !__builtin_mul_overflow(inner_count - 1, inner_stride, &inner) &&
         !__builtin_add_overflow(outer, inner, &last) && !__builtin_add_overflow(last, elements, &last) &&
         !__builtin_mul_overflow(last, int64_t{sizeof(float)}, &bytes);
}

inline couplet_status check_kmeans_params(const couplet_kmeans_params* params, couplet_report* report) {
  COUPLET_EXPECT(params, "Expected parameters but received NULL");
  const couplet_kmeans_params& p = *params;
  COUPLET_EXPECT(p.points, "Expected an array for `points` but received NULL");
  COUPLET_EXPECT(p.centroids, "Expected an array for `centroids` but received NULL");
  COUPLET_EXPECT(p.problems >= 1, "Expected 1 or more for `problems` but received %d", p.problems);
  COUPLET_EXPECT(p.point_count >= 1, "Expected 1 or more for `points` but received %d", p.point_count);
  COUPLET_EXPECT(p.channels >= 1 && p.channels <= kmeans_most_channels,
                 "Expected 1 to %d for `channels` but received %d", kmeans_most_channels, p.channels);
  COUPLET_EXPECT(p.centroid_count >= 1 && p.centroid_count <= kmeans_most_centroids,
                 "Expected 1 to %d for `centroids` but received %d", kmeans_most_centroids, p.centroid_count);
  COUPLET_EXPECT(p.max_iterations >= 0, "Expected 0 or more for `iterations` but received %d", p.max_iterations);
  COUPLET_EXPECT(p.tolerance >= 0 && p.tolerance < 1,
                 "Expected at least 0 and less than 1 for `tolerance` but received %g", p.tolerance);
  COUPLET_EXPECT(is_addressable(p.problems, p.problem_stride, p.point_count, p.point_stride, p.channels),
                 "Expected strides of 0 or more within memory for `points` but received %lld and %lld",
                 static_cast<long long>(p.problem_stride), static_cast<long long>(p.point_stride));
  if (!p.weights) return COUPLET_OK;
  COUPLET_EXPECT(p.weight_sharing >= 1, "Expected 1 or more for `weightSharing` but received %d", p.weight_sharing);
  COUPLET_EXPECT(is_addressable((p.problems - 1) / p.weight_sharing + 1, p.weight_problem_stride, p.point_count,
                                p.weight_point_stride, 1),
                 "Expected strides of 0 or more within memory for `weights` but received %lld and %lld",
                 static_cast<long long>(p.weight_problem_stride), static_cast<long long>(p.weight_point_stride));
  return COUPLET_OK;
}

// ---- encode, decode, store ---------------------------------------------------------------------------------------------
inline bool is_dtype(int32_t dtype) {
  return dtype == COUPLET_FLOAT32 || dtype == COUPLET_FLOAT16 || dtype == COUPLET_BFLOAT16;
}

// Params is couplet_encode_params or couplet_decode_params. The table and the entries of the page table are not looked at.
// in_runs: the rows and pages of couplet_encode_params.runs, which are not looked at either.
template <class Params>
couplet_status check_codes_params(const Params* params, couplet_report* report, bool in_runs = false) {
  COUPLET_EXPECT(params, "Expected parameters but received NULL");
  const Params& p = *params;
  COUPLET_EXPECT(p.kv_heads >= 1, "Expected 1 or more for `kvHeads` but received %d", p.kv_heads);
  COUPLET_EXPECT(p.head_dim >= COUPLET_MIN_HEAD_DIM && p.head_dim <= COUPLET_MAX_HEAD_DIM &&
                     couplet_codec_valid(p.codec, p.head_dim),
                 "Expected headDim %d to %d, groups that divide it and codes of 1 to %d bits but received headDim %d "
                 "and codec %dc%db",
                 COUPLET_MIN_HEAD_DIM, COUPLET_MAX_HEAD_DIM, COUPLET_MAX_CODE_BITS, p.head_dim, p.codec.group_channels,
                 p.codec.code_bits);
  COUPLET_EXPECT(is_dtype(p.dtype), "Expected float32, float16 or bfloat16 for `dtype` but received %d", p.dtype);
  COUPLET_EXPECT(p.page_tokens >= 8 && p.page_tokens % 8 == 0 && p.page_tokens <= INT32_MAX / COUPLET_MAX_CODE_BITS,
                 "Expected a multiple of 8 for `pageTokens` but received %d", p.page_tokens);
  COUPLET_EXPECT(p.tokens >= 0, "Expected 0 or more for `tokens` but received %d", p.tokens);
  COUPLET_EXPECT(in_runs || (p.first_token >= 0 && p.first_token <= INT64_MAX - p.tokens),
                 "Expected 0 or more for `firstToken` but received %lld", static_cast<long long>(p.first_token));
  if (p.tokens == 0) return COUPLET_OK;
  COUPLET_EXPECT(in_runs || p.rows, "Expected an array for `rows` but received NULL");
  COUPLET_EXPECT(in_runs || p.pages, "Expected an array for `pages` but received NULL");
  int64_t const codes_bytes = couplet_codec_groups(p.codec, p.head_dim) * couplet_row_bytes(p.codec, p.page_tokens);
  COUPLET_EXPECT(p.kv_heads == 1 || p.page_stride >= codes_bytes,
                 "Expected %lld or more bytes for `pageStride` but received %lld", static_cast<long long>(codes_bytes),
                 static_cast<long long>(p.page_stride));
  return COUPLET_OK;
}

// The runs are not looked at.
inline couplet_status check_store_params(const couplet_store_params* params, couplet_report* report) {
  COUPLET_EXPECT(params, "Expected parameters but received NULL");
  const couplet_store_params& p = *params;
  COUPLET_EXPECT(is_dtype(p.dtype), "Expected float32, float16 or bfloat16 for `dtype` but received %d", p.dtype);
  COUPLET_EXPECT(p.kv_heads >= 1, "Expected 1 or more for `kvHeads` but received %d", p.kv_heads);
  COUPLET_EXPECT(p.head_dim >= 1 && p.head_dim <= COUPLET_MAX_HEAD_DIM,
                 "Expected 1 to %d for `headDim` but received %d", COUPLET_MAX_HEAD_DIM, p.head_dim);
  COUPLET_EXPECT(p.run_count >= 0 && p.most_tokens >= 0 && (p.runs || p.run_count == 0),
                 "Expected runs but received %d of at most %d tokens", p.run_count, p.most_tokens);
  return COUPLET_OK;
}

// The runs are not looked at.
inline couplet_status check_mix_params(const couplet_mix_params* params, couplet_report* report) {
  COUPLET_EXPECT(params, "Expected parameters but received NULL");
  const couplet_mix_params& p = *params;
  COUPLET_EXPECT(is_dtype(p.dtype), "Expected float32, float16 or bfloat16 for `dtype` but received %d", p.dtype);
  COUPLET_EXPECT(p.matrix_heads >= 1 && p.heads >= 1 && p.heads % p.matrix_heads == 0,
                 "Expected a multiple of the heads that have a matrix, %d, but received %d", p.matrix_heads, p.heads);
  COUPLET_EXPECT(p.head_dim >= 1 && p.head_dim <= COUPLET_MAX_HEAD_DIM,
                 "Expected 1 to %d for `headDim` but received %d", COUPLET_MAX_HEAD_DIM, p.head_dim);
  COUPLET_EXPECT(p.matrices, "Expected an array for `matrices` but received NULL");
  COUPLET_EXPECT(p.run_count >= 0 && p.most_tokens >= 0 && (p.runs || p.run_count == 0),
                 "Expected runs but received %d of at most %d tokens", p.run_count, p.most_tokens);
  return COUPLET_OK;
}

// The runs are not looked at, nor the order, which may be the device's.
inline couplet_status check_reorder_params(const couplet_reorder_params* params, couplet_report* report) {
  COUPLET_EXPECT(params, "Expected parameters but received NULL");
  const couplet_reorder_params& p = *params;
  COUPLET_EXPECT(is_dtype(p.dtype), "Expected float32, float16 or bfloat16 for `dtype` but received %d", p.dtype);
  COUPLET_EXPECT(p.head_dim >= 1 && p.head_dim <= COUPLET_MAX_HEAD_DIM,
                 "Expected 1 to %d for `headDim` but received %d", COUPLET_MAX_HEAD_DIM, p.head_dim);
  COUPLET_EXPECT(p.order, "Expected an array for `order` but received NULL");
  COUPLET_EXPECT(p.run_count >= 0 && p.most_rows >= 0 && (p.runs || p.run_count == 0),
                 "Expected runs but received %d of at most %d rows", p.run_count, p.most_rows);
  return COUPLET_OK;
}

// ---- attend --------------------------------------------------------------------------------------------------------------
// What attend and attention_weights have in common.
template <class Params>
couplet_status check_heads(const Params& p, couplet_report* report) {
  COUPLET_EXPECT(p.kv_heads >= 1, "Expected 1 or more for `kvHeads` but received %d", p.kv_heads);
  COUPLET_EXPECT(p.query_heads >= 1 && p.query_heads % p.kv_heads == 0,
                 "Expected a multiple of kvHeads %d for `queryHeads` but received %d", p.kv_heads, p.query_heads);
  COUPLET_EXPECT(p.query_heads <= 65536, "Expected at most 65536 for `queryHeads` but received %d", p.query_heads);
  COUPLET_EXPECT(p.local_window >= 0, "Expected 0 or more for `localWindow` but received %d", p.local_window);
  COUPLET_EXPECT(std::isfinite(p.scale), "Expected a finite number for `scale` but received %g",
                 static_cast<double>(p.scale));
  COUPLET_EXPECT(std::isfinite(p.softcap) && p.softcap >= 0,
                 "Expected a finite number of 0 or more for `softcap` but received %g", static_cast<double>(p.softcap));
  return COUPLET_OK;
}

// Neither sequences nor tables are looked at.
inline couplet_status check_attend_params(const couplet_attend_params* params, couplet_report* report) {
  COUPLET_EXPECT(params, "Expected parameters but received NULL");
  const couplet_attend_params& p = *params;
  COUPLET_EXPECT(p.head_dim >= 32 && p.head_dim <= COUPLET_MAX_HEAD_DIM && p.head_dim % 8 == 0,
                 "Expected 32 to %d in steps of 8 for `headDim` but received %d", COUPLET_MAX_HEAD_DIM, p.head_dim);
  if (couplet_status const status = check_heads(p, report)) return status;
  COUPLET_EXPECT(p.page_tokens >= 8 && p.page_tokens % 8 == 0 && p.page_tokens <= 65536,
                 "Expected a multiple of 8 up to 65536 for `pageTokens` but received %d", p.page_tokens);
  COUPLET_EXPECT(p.sequence_count >= 0 && p.sequence_count <= 65536,
                 "Expected 0 to 65536 for the number of sequences but received %d", p.sequence_count);
  COUPLET_EXPECT(p.sequences || p.sequence_count == 0, "Expected an array for `sequences` but received NULL");
  COUPLET_EXPECT(p.most_query_tokens >= 0, "Expected 0 or more for the most query tokens but received %d",
                 p.most_query_tokens);
  for (int32_t const dtype : {p.query_dtype, p.output_dtype})
    COUPLET_EXPECT(is_dtype(dtype),
                   "Expected float32, float16 or bfloat16 for `queryDtype` and `outputDtype` but received %d", dtype);
  return COUPLET_OK;
}

// Both tables are there.
inline couplet_status check_attend_pages(const couplet_attend_params& p, couplet_report* report) {
  int64_t const heads = p.kv_heads > 1;
  COUPLET_EXPECT(
      p.key_page_offset >= 0 && p.key_page_stride >= heads * couplet_page_bytes(p.key_codec, p.head_dim, p.page_tokens),
      "Expected `keyPageStride` to hold a page of keys but received %lld", static_cast<long long>(p.key_page_stride));
  COUPLET_EXPECT(p.value_page_offset >= 0 &&
                     p.value_page_stride >= heads * couplet_page_bytes(p.value_codec, p.head_dim, p.page_tokens),
                 "Expected `valuePageStride` to hold a page of values but received %lld",
                 static_cast<long long>(p.value_page_stride));
  return COUPLET_OK;
}

}  // namespace couplet
