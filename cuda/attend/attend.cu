// The entries of attend: what is refused, which body runs, and its chain of launches
//   plan -> a decode body -> merge                       sequences with one query
//        -> prefill on tiles of float16 -> wide prefill   all others
#include <algorithm>
#include <cstdio>
#include <iterator>

#include "../../native/common/check.h"
#include "../backend.h"
#include "../table.h"
#include "body.h"
#include "step.h"

namespace couplet::cuda {
namespace attend {
int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

namespace {

// ---- refusals --------------------------------------------------------------------------------------------------------------
couplet_status check(const couplet_attend_params* params, couplet_report* report) {
  if (couplet_status const status = check_attend_params(params, report)) return status;
  const couplet_attend_params& p = *params;
  if (p.rotary && rotary_of(p.rotary)->head_dim != p.head_dim)
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected a rotary embedding of headDim %d but received one of %d", p.head_dim,
                rotary_of(p.rotary)->head_dim);
  if (!p.key_table && !p.value_table) return COUPLET_OK;
  couplet_status status = check_table(p.key_table, "keyTable", p.key_codec, p.kv_heads, p.head_dim, report);
  if (status == COUPLET_OK)
    status = check_table(p.value_table, "valueTable", p.value_codec, p.kv_heads, p.head_dim, report);
  return status == COUPLET_OK ? check_attend_pages(p, report) : status;
}

// ---- selection -------------------------------------------------------------------------------------------------------------
// The lookup body needs both codebooks of a kv head in shared memory (sm_90, sm_100: 227 KB; sm_80 has 163), pages of 64 tokens
// with rows on 16 bytes, and keys that it may rotate by their offset in a block alone, channel i with i + 64. Of more than 4 query heads of
// a kv head it makes several passes, which is faster than `gather`'s one (decision 3).
bool lookup_takes(const couplet_attend_params& params) {
  int const channels = params.key_codec.group_channels;
  bool const shape =
      params.head_dim == 128 && params.key_codec.code_bits == 8 && params.value_codec.code_bits == 8 &&
      params.value_codec.group_channels == channels && params.page_tokens == 64 &&
      (params.key_page_offset | params.key_page_stride | params.value_page_offset | params.value_page_stride) % 16 == 0;
  bool const tables = params.key_table && params.value_table && table_of(params.key_table)->by_code &&
                      table_of(params.value_table)->by_code;
  Angles const angles = angles_of(params.rotary);
  bool const rotary =
      angles.pairs == 0 || (angles.offsets && angles.kind == COUPLET_ROTARY_HALF && angles.pairs == 64 &&
                            rotary_of(params.rotary)->positions <= rotary_block * rotary_blocks);
  return shape && tables && rotary && has_lookup(channels);
}

Body select(const couplet_attend_params& params) {
  return *std::find_if(std::begin(bodies), std::end(bodies), [&](Body body) { return can_take(body, params); });
}

// A step of which only the pointers into the workspace are missing, and what they need. Counts of the host alone go into it.
struct Layout {
  Step step;
  size_t row_begin, wide, weighted, sums, bytes;  // offsets; wide 0: none
};

Layout layout_of(Body body, const couplet_attend_params& params) {
  bool const tables_in_shared = body != Body::general;  // a block a multiprocessor
  int const multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  int32_t const group_heads = params.query_heads / params.kv_heads;
  int32_t const block_rows = body == Body::lookup   ? lookup_rows
                             : body == Body::gather ? gather_rows(params)
                             : body == Body::staged ? staged_rows(params)
                                                    : std::min(group_heads, general_rows);
  Layout layout{};
  layout.step.params = params;
  layout.step.angles = angles_of(params.rotary);
  if (params.key_table) {
    layout.step.key_rows = table_of(params.key_table)->rows;
    layout.step.value_rows = table_of(params.value_table)->rows;
    layout.step.key_by_code = table_of(params.key_table)->by_code;
    layout.step.value_by_code = table_of(params.value_table)->by_code;
    layout.step.value_levels = table_of(params.value_table)->levels;
    layout.step.value_scales = table_of(params.value_table)->level_scales;
  }
  layout.step.group_heads = group_heads;
  layout.step.block_rows = block_rows;
  layout.step.head_blocks = params.kv_heads * blocks_of(group_heads, block_rows);
  layout.step.blocks = tables_in_shared ? multiprocessors : 2 * multiprocessors;
  bool const half_prefill = params.most_query_tokens != 1 && has_half_prefill(params);
  layout.step.prefill_blocks = half_prefill ? multiprocessors : 2 * multiprocessors;
  layout.step.prefill_rows = prefill_rows(params);
  layout.step.coded_unit = tables_in_shared ? rotary_block : general_unit;
  layout.step.dense_unit = tables_in_shared ? lookup_dense_unit : general_unit;

  size_t const slots = static_cast<size_t>(layout.step.blocks) +
                       static_cast<size_t>(layout.step.head_blocks) * static_cast<size_t>(params.sequence_count);
  size_t const rows = slots * static_cast<size_t>(block_rows);
  auto const append = [&](size_t bytes) {
    size_t const offset = layout.bytes;
    layout.bytes = offset + (bytes + 63) / 64 * 64;
    return offset;
  };
  append((static_cast<size_t>(params.sequence_count) + 2) * sizeof(int32_t));
  layout.row_begin = append((static_cast<size_t>(params.sequence_count) + 1) * sizeof(int32_t));
  if (half_prefill)
    layout.wide =
        append(static_cast<size_t>(params.sequence_count) * static_cast<size_t>(params.kv_heads) * sizeof(int32_t));
  layout.sums = append(rows * sizeof(float2));
  layout.weighted = append(rows * static_cast<size_t>(params.head_dim) * sizeof(float));
  return layout;
}

}  // namespace

// ---- launches --------------------------------------------------------------------------------------------------------------
const char* name_of(Body body, const couplet_attend_params& params) {
  switch (body) {
    case Body::lookup: return table_of(params.value_table)->levels ? "lookup by levels" : "lookup";
    case Body::gather: return "gather";
    case Body::staged: return "staged";
    case Body::general: break;
  }
  return "general";
}

bool can_take(Body body, const couplet_attend_params& params) {
  switch (body) {
    case Body::lookup: return lookup_takes(params);
    case Body::gather: return has_gather(params);
    case Body::staged: return has_staged(params);
    case Body::general: break;
  }
  return true;
}

size_t workspace(Body body, const couplet_attend_params& params) {
  return params.sequence_count ? layout_of(body, params).bytes : 0;
}

couplet_status run(Body body, const couplet_attend_params& params, void* memory, void* stream, couplet_report* report) {
  if (params.sequence_count == 0) return COUPLET_OK;
  Layout const layout = layout_of(body, params);
  auto* const bytes = static_cast<unsigned char*>(memory);
  Step step = layout.step;
  step.unit_begin = reinterpret_cast<int32_t*>(bytes);
  step.row_begin = reinterpret_cast<int32_t*>(bytes + layout.row_begin);
  step.wide = layout.wide ? reinterpret_cast<int32_t*>(bytes + layout.wide) : nullptr;
  step.sums = reinterpret_cast<float2*>(bytes + layout.sums);
  step.weighted = reinterpret_cast<float*>(bytes + layout.weighted);
  auto const queue = static_cast<cudaStream_t>(stream);
  // On an H200 a segment of lookup takes 12 us and its units 1.7 us each; staged's units take longer.
  int const segment_cost = body == Body::lookup || body == Body::gather ? 7 : 1;
  cudaError_t error = launch_plan(step, segment_cost, queue);
  if (error == cudaSuccess) switch (body) {
      case Body::lookup: error = launch_lookup(step, queue); break;
      case Body::gather: error = launch_gather(step, queue); break;
      case Body::staged: error = launch_staged(step, queue); break;
      case Body::general: error = launch_general_decode(step, queue); break;
    }
  if (error == cudaSuccess) error = launch_merge(step, queue);
  if (error == cudaSuccess && params.most_query_tokens != 1) error = launch_prefill(step, queue);
  return status_of(error, report, "attend");
}

// ---- entries ---------------------------------------------------------------------------------------------------------------
namespace {

size_t workspace_of(const couplet_attend_params* params) { return workspace(select(*params), *params); }

couplet_status run_selected(const couplet_attend_params* params, void* memory, void* stream, couplet_report* report) {
  return run(select(*params), *params, memory, stream, report);
}

void describe(const couplet_attend_params* params, char* text, size_t text_bytes) {
  std::snprintf(text, text_bytes, "attend cuda %dc%db %s", params->key_codec.group_channels,
                params->key_codec.code_bits, name_of(select(*params), *params));
}

}  // namespace
}  // namespace attend

const couplet_attend_entries attend_entries = {.check = attend::check,
                                               .workspace = attend::workspace_of,
                                               .run = attend::run_selected,
                                               .describe = attend::describe};

}  // namespace couplet::cuda
