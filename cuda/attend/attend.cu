// The entries of attend: what is refused, which body runs, and its chain of launches
//   plan -> general or lookup decode -> merge     sequences with one query
//        -> general prefill                       all others
#include <cmath>
#include <cstdio>

#include "../../native/common/report.h"
#include "../backend.h"
#include "../table.h"
#include "step.h"

namespace couplet::cuda {
namespace attend {
namespace {

// ---- refusals --------------------------------------------------------------------------------------------------------------
#define EXPECT(condition, ...) \
  if (!(condition)) return fail(report, COUPLET_INVALID_ARGUMENT, {}, __VA_ARGS__)

couplet_status check_pages(const couplet_attend_params& params, couplet_report* report) {
  if (!params.key_table && !params.value_table) return COUPLET_OK;
  if (couplet_status const status =
          check_table(params.key_table, "keyTable", params.key_codec, params.kv_heads, params.head_dim, report))
    return status;
  if (couplet_status const status =
          check_table(params.value_table, "valueTable", params.value_codec, params.kv_heads, params.head_dim, report))
    return status;
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

couplet_status check(const couplet_attend_params* given, couplet_report* report) {
  EXPECT(given, "Expected parameters but received NULL");
  const couplet_attend_params& params = *given;
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
  EXPECT(params.sequence_count >= 0 && params.sequence_count <= 65536,
         "Expected 0 to 65536 for the number of sequences but received %d", params.sequence_count);
  EXPECT(params.most_query_tokens >= 0, "Expected 0 or more for the most query tokens but received %d",
         params.most_query_tokens);
  for (int32_t const dtype : {params.query_dtype, params.output_dtype})
    EXPECT(dtype == COUPLET_FLOAT32 || dtype == COUPLET_FLOAT16 || dtype == COUPLET_BFLOAT16,
           "Expected float32, float16 or bfloat16 for `queryDtype` and `outputDtype` but received %d", dtype);
  EXPECT(params.sequences || params.sequence_count == 0, "Expected an array for `sequences` but received NULL");
  if (params.rotary)
    EXPECT(rotary_of(params.rotary)->head_dim == params.head_dim,
           "Expected a rotary embedding of headDim %d but received one of %d", params.head_dim,
           rotary_of(params.rotary)->head_dim);
  return check_pages(params, report);
}

#undef EXPECT

// ---- selection -------------------------------------------------------------------------------------------------------------
int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

enum class Body { general, lookup };

// The lookup body needs both codebooks of a kv head in shared memory (sm_90, sm_100: 227 KB; sm_80 has 163), pages of 64 tokens
// with rows on 16 bytes, and keys that it may rotate by their offset in a block alone, channel i with i + 64.
Body select(const couplet_attend_params& params) {
  auto const is_8c8b = [](couplet_codec codec) { return codec.group_channels == 8 && codec.code_bits == 8; };
  bool const shape =
      params.head_dim == 128 && is_8c8b(params.key_codec) && is_8c8b(params.value_codec) && params.page_tokens == 64 &&
      (params.key_page_offset | params.key_page_stride | params.value_page_offset | params.value_page_stride) % 16 == 0;
  bool const tables = params.key_table && params.value_table && table_of(params.key_table)->banked &&
                      table_of(params.value_table)->banked;
  Angles const angles = angles_of(params.rotary);
  bool const rotary =
      angles.pairs == 0 || (angles.offsets && angles.kind == COUPLET_ROTARY_HALF && angles.pairs == 64 &&
                            rotary_of(params.rotary)->positions <= rotary_block * rotary_blocks);
  return shape && tables && rotary && has_lookup() ? Body::lookup : Body::general;
}

// A step of which only the pointers into the workspace are missing, and what they need. Counts of the host alone go into it.
struct Layout {
  Step step;
  size_t row_begin, weighted, sums, bytes;  // offsets
};

Layout layout_of(const couplet_attend_params& params) {
  bool const lookup = select(params) == Body::lookup;
  int const multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  int32_t const group_heads = params.query_heads / params.kv_heads;
  int32_t const most_rows = lookup ? lookup_rows : general_rows;
  int32_t const block_rows = lookup || group_heads > most_rows ? most_rows : group_heads;
  Layout layout{};
  layout.step.params = params;
  layout.step.angles = angles_of(params.rotary);
  if (params.key_table) {
    layout.step.key_rows = table_of(params.key_table)->rows;
    layout.step.value_rows = table_of(params.value_table)->rows;
    layout.step.key_banked = table_of(params.key_table)->banked;
    layout.step.value_banked = table_of(params.value_table)->banked;
  }
  layout.step.group_heads = group_heads;
  layout.step.block_rows = block_rows;
  layout.step.head_blocks = params.kv_heads * blocks_of(group_heads, block_rows);
  layout.step.blocks = lookup ? multiprocessors : 2 * multiprocessors;
  layout.step.prefill_blocks = 2 * multiprocessors;
  layout.step.coded_unit = lookup ? rotary_block : general_unit;
  layout.step.dense_unit = lookup ? lookup_dense_unit : general_unit;

  size_t const slots = static_cast<size_t>(layout.step.blocks) +
                       static_cast<size_t>(layout.step.head_blocks) * static_cast<size_t>(params.sequence_count);
  size_t const rows = slots * static_cast<size_t>(block_rows);
  auto const append = [&](size_t bytes) {
    size_t const offset = layout.bytes;
    layout.bytes = offset + (bytes + 63) / 64 * 64;
    return offset;
  };
  append((static_cast<size_t>(params.sequence_count) + 1) * sizeof(int32_t));
  layout.row_begin = append((static_cast<size_t>(params.sequence_count) + 1) * sizeof(int32_t));
  layout.sums = append(rows * sizeof(float2));
  layout.weighted = append(rows * static_cast<size_t>(params.head_dim) * sizeof(float));
  return layout;
}

size_t workspace(const couplet_attend_params* params) { return params->sequence_count ? layout_of(*params).bytes : 0; }

// ---- launches --------------------------------------------------------------------------------------------------------------
couplet_status run(const couplet_attend_params* params, void* memory, void* stream, couplet_report* report) {
  if (params->sequence_count == 0) return COUPLET_OK;
  Layout const layout = layout_of(*params);
  auto* const bytes = static_cast<unsigned char*>(memory);
  Step step = layout.step;
  step.unit_begin = reinterpret_cast<int32_t*>(bytes);
  step.row_begin = reinterpret_cast<int32_t*>(bytes + layout.row_begin);
  step.sums = reinterpret_cast<float2*>(bytes + layout.sums);
  step.weighted = reinterpret_cast<float*>(bytes + layout.weighted);
  auto const queue = static_cast<cudaStream_t>(stream);
  cudaError_t error = launch_plan(step, queue);
  if (error == cudaSuccess)
    error = select(*params) == Body::lookup ? launch_lookup(step, queue) : launch_general_decode(step, queue);
  if (error == cudaSuccess) error = launch_merge(step, queue);
  if (error == cudaSuccess && params->most_query_tokens != 1) error = launch_general_prefill(step, queue);
  return status_of(error, report, "attend");
}

void describe(const couplet_attend_params* params, char* text, size_t text_bytes) {
  std::snprintf(text, text_bytes, "attend cuda %dc%db %s", params->key_codec.group_channels,
                params->key_codec.code_bits, select(*params) == Body::lookup ? "lookup" : "general");
}

}  // namespace
}  // namespace attend

const couplet_attend_entries attend_entries = {
    .check = attend::check, .workspace = attend::workspace, .run = attend::run, .describe = attend::describe};

}  // namespace couplet::cuda
