// One layer of a step: copy what is shared, store what stays raw, encode what leaves the window, attend.
#include <cmath>
#include <cstring>
#include <new>

#include "state.h"

namespace couplet {
namespace {

// Queries given to the backend in one call, for each sequence: bounds its scratch and the time until a cancel is seen.
constexpr int64_t query_slice = 256;

bool is_finite(const float* row, int32_t channels) {
  uint32_t largest = 0;
  for (int32_t channel = 0; channel < channels; ++channel) {
    uint32_t bits;
    std::memcpy(&bits, row + channel, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  return largest < 0x7f800000u;
}

int32_t first_not_finite(const float* row, int32_t channels) {
  int32_t channel = 0;
  while (channel < channels && std::isfinite(row[channel])) ++channel;
  return channel;
}

struct SideRows {  // keys or values of the new tokens
  const float* rows;
  int64_t token_stride;
  int64_t head_stride;
  bool is_key;
};
SideRows key_rows(const StepData& data) { return {data.keys, data.key_token_stride, data.key_head_stride, true}; }
SideRows value_rows(const StepData& data) {
  return {data.values, data.value_token_stride, data.value_head_stride, false};
}

bool cancelled(const AttendOptions& options) { return options.cancel && *options.cancel; }

couplet_status fail_cancelled(int32_t layer, couplet_report* report) {
  return fail(report, COUPLET_CANCELLED, {.layer = layer}, "The attention of layer %d was cancelled", layer);
}

couplet_status fail_not_finite(int32_t layer, int32_t kv_head, int64_t token, int32_t channel, bool in_keys,
                               couplet_report* report) {
  return fail(report, COUPLET_NOT_FINITE, {.layer = layer, .kv_head = kv_head, .token = token, .channel = channel},
              "Expected finite %s but received a NaN or an infinity in layer %d, kv head %d, token %lld, channel %d",
              in_keys ? "keys" : "values", layer, kv_head, static_cast<long long>(token), channel);
}

couplet_status with_layer(couplet_status status, int32_t layer, couplet_report* report) {
  if (status != COUPLET_OK && report) report->layer = layer;
  return status;
}

}  // namespace

couplet_status Step::State::check_layer(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                                        couplet_report* report) const {
  Where const where = {.layer = layer};
  if (layer < 0 || layer >= static_cast<int32_t>(layer_done.size())) {
    return fail(report, COUPLET_INVALID_ARGUMENT, where, "Expected 0 to %zu for `layer` but received %d",
                layer_done.size() - 1, layer);
  }
  if (layer_done[static_cast<size_t>(layer)]) {
    return fail(report, COUPLET_INVALID_ARGUMENT, where,
                "Expected each layer once in a step but received layer %d again", layer);
  }
  if (data.size() != rows.size()) {
    return fail(report, COUPLET_INVALID_ARGUMENT, where,
                "Expected one entry for each of the step's %zu sequences but received %zu", rows.size(), data.size());
  }
  for (size_t row = 0; row < rows.size(); ++row) {
    if (rows[row].row.tokens == 0) continue;
    if (!data[row].keys || !data[row].values) {
      return fail(report, COUPLET_INVALID_ARGUMENT, where,
                  "Expected keys and values for row %zu of the step but received none", row);
    }
    if (!data[row].queries != !data[row].outputs) {
      return fail(report, COUPLET_INVALID_ARGUMENT, where,
                  "Expected queries and outputs together for row %zu of the step but received one of them", row);
    }
  }
  return cancelled(options) ? fail_cancelled(layer, report) : COUPLET_OK;
}

couplet_status Step::attend(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                            couplet_report* report) {
  Cache::State& cache = *state_->cache->state_;
  {
    std::lock_guard const lock(cache.mutex);
    switch (state_->phase) {
      case StepPhase::closed:
        return fail(report, COUPLET_DISPOSED, {.layer = layer},
                    "The step has been committed or aborted; begin another one");
      case StepPhase::running:
        return fail(report, COUPLET_BUSY, {.layer = layer}, "The step is computing another layer; await that first");
      case StepPhase::failed:
        return fail(report, COUPLET_INVALID_ARGUMENT, {.layer = layer},
                    "A layer of the step has failed; abort the step");
      case StepPhase::open: break;
    }
    couplet_status const status = state_->check_layer(layer, data, options, report);
    if (status != COUPLET_OK) return status;
    state_->phase = StepPhase::running;
  }
  couplet_status status = COUPLET_INTERNAL;
  try {
    status = with_layer(state_->run_layer(layer, data, options, report), layer, report);
  } catch (const std::bad_alloc&) {
    status = fail(report, COUPLET_OUT_OF_MEMORY, {.layer = layer}, "No memory for the attention of layer %d", layer);
  }
  std::lock_guard const lock(cache.mutex);
  state_->phase = status == COUPLET_OK ? StepPhase::open : StepPhase::failed;
  if (status == COUPLET_OK) state_->layer_done[static_cast<size_t>(layer)] = true;
  if (state_->abort_wanted) {
    cache.end_step(state_.get());
    return fail(report, COUPLET_CANCELLED, {.layer = layer}, "The step was aborted while layer %d was computed", layer);
  }
  return status;
}

couplet_status Step::State::run_layer(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                                      couplet_report* report) {
  for (size_t index = 0; index < rows.size(); ++index) {
    const StepRowState& row = rows[index];
    if (row.row.tokens == 0) continue;
    if (cancelled(options)) return fail_cancelled(layer, report);
    couplet_status status = copy_shared(row, layer, report);
    if (status == COUPLET_OK) status = store_raw(row, layer, data[index], report);
    if (status == COUPLET_OK) status = encode_leaving(row, layer, data[index], report);
    if (status != COUPLET_OK) return status;
  }
  return attend_rows(layer, data, options, report);
}

// A block that another sequence holds too is copied layer by layer, just before its copy is written.
couplet_status Step::State::copy_shared(const StepRowState& row, int32_t layer, couplet_report* report) {
  const Cache::State& owner = *cache->state_;
  auto const copy = owner.device.backend->memory.copy;
  if (row.codes.original) {
    const CodeLayout& layout = owner.code_layout;
    int64_t const begin = layout.key_offsets[static_cast<size_t>(layer)];
    int64_t const end =
        layout.value_offsets[static_cast<size_t>(layer)] + owner.config.kv_heads * layout.value_page_stride;
    couplet_status const status = copy(row.codes.blocks.front()->memory() + begin, row.codes.original->memory() + begin,
                                       static_cast<size_t>(end - begin), nullptr, report);
    if (status != COUPLET_OK) return status;
  }
  for (const Tail* tail : {&row.sinks, &row.window}) {
    if (!tail->original) continue;
    const RawLayout& layout = owner.raw_layout;
    int64_t const bytes = layout.block_bytes(tail->original->tokens()) / layout.layers;
    couplet_status const status = copy(layout.keys(*tail->blocks.front(), layer), layout.keys(*tail->original, layer),
                                       static_cast<size_t>(bytes), nullptr, report);
    if (status != COUPLET_OK) return status;
  }
  return COUPLET_OK;
}

// New tokens that are sinks or still in the window after the step go into their raw blocks. This loop and first_not_finite
// are the only places of the cache that touch floats; raw blocks outside of host memory need an entry of the backend here.
couplet_status Step::State::store_raw(const StepRowState& row, int32_t layer, const StepData& data,
                                      couplet_report* report) {
  const Cache::State& owner = *cache->state_;
  const RawLayout& layout = owner.raw_layout;
  int32_t const head_dim = layout.head_dim;
  for (int64_t token = row.old_length; token < row.new_length; ++token) {
    bool const is_sink = token < owner.sinks.end;
    if (!is_sink && token < row.new_coded_end) {
      token = row.new_coded_end - 1;
      continue;
    }
    const Region& region = is_sink ? owner.sinks : owner.window;
    int64_t const index = region.index(token);
    const Block& block = (is_sink ? row.sinks : row.window).at(index);
    int64_t const slot = token - region.first_token(index);
    for (const SideRows& side : {key_rows(data), value_rows(data)}) {
      float* const stored = side.is_key ? layout.keys(block, layer) : layout.values(block, layer);
      for (int32_t head = 0; head < layout.kv_heads; ++head) {
        const float* const given = side.rows + (token - row.old_length) * side.token_stride + head * side.head_stride;
        if (!is_finite(given, head_dim)) {
          return fail_not_finite(layer, head, token, first_not_finite(given, head_dim), side.is_key, report);
        }
        std::memcpy(stored + head * layout.head_stride(block) + slot * head_dim, given,
                    static_cast<size_t>(head_dim) * sizeof(float));
      }
    }
  }
  return COUPLET_OK;
}

// Tokens [old_coded_end, new_coded_end): those the sequence holds raw come from their blocks, the others straight from the input.
couplet_status Step::State::encode_leaving(const StepRowState& row, int32_t layer, const StepData& data,
                                           couplet_report* report) {
  const Cache::State& owner = *cache->state_;
  const RawLayout& layout = owner.raw_layout;
  int64_t token = row.old_coded_end;
  while (token < std::min(row.new_coded_end, row.old_length)) {
    int64_t const index = owner.window.index(token);
    const Block& block = *row.sequence->window.at(index);
    int64_t const end = std::min({row.new_coded_end, row.old_length, owner.window.first_token(index + 1)});
    int64_t const slot_offset = (token - owner.window.first_token(index)) * layout.head_dim;
    StepData held;
    held.keys = layout.keys(block, layer) + slot_offset;
    held.values = layout.values(block, layer) + slot_offset;
    held.key_token_stride = held.value_token_stride = layout.head_dim;
    held.key_head_stride = held.value_head_stride = layout.head_stride(block);
    couplet_status const status = encode_run(row, layer, held, token, end - token, report);
    if (status != COUPLET_OK) return status;
    token = end;
  }
  if (token >= row.new_coded_end) return COUPLET_OK;
  StepData rest = data;
  rest.keys += (token - row.old_length) * data.key_token_stride;
  rest.values += (token - row.old_length) * data.value_token_stride;
  return encode_run(row, layer, rest, token, row.new_coded_end - token, report);
}

couplet_status Step::State::encode_run(const StepRowState& row, int32_t layer, const StepData& data,
                                       int64_t first_token, int64_t tokens, couplet_report* report) {
  const Cache::State& owner = *cache->state_;
  const couplet_encode_entries& encode = owner.device.backend->encode;
  const CodeLayout& layout = owner.code_layout;
  for (const SideRows& side : {key_rows(data), value_rows(data)}) {
    couplet_encode_params const params = {
        .rows = side.rows,
        .table = side.is_key ? codebook->layer(layer).key : codebook->layer(layer).value,
        .pages = row.pages.data(),
        .token_stride = side.token_stride,
        .head_stride = side.head_stride,
        .page_offset = (side.is_key ? layout.key_offsets : layout.value_offsets)[static_cast<size_t>(layer)],
        .page_stride = side.is_key ? layout.key_page_stride : layout.value_page_stride,
        .first_token = first_token,
        .tokens = static_cast<int32_t>(tokens),
        .kv_heads = owner.config.kv_heads,
        .head_dim = owner.config.head_dim,
        .page_tokens = owner.config.page_tokens,
        .dtype = COUPLET_FLOAT32,
        .threads = owner.config.threads,
        .codec = side.is_key ? codebook->shape().key_codec : codebook->shape().value_codec,
        .runs = nullptr,
        .run_count = 0,
        .reserved = 0,
    };
    couplet_status status = encode.check(&params, report);
    if (status != COUPLET_OK) return status;
    size_t const workspace = encode.workspace(&params);
    if (!scratch.grow(workspace)) {
      return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for %zu bytes of scratch of encode", workspace);
    }
    status = encode.run(&params, scratch.memory(), nullptr, report);
    if (status == COUPLET_NOT_FINITE && report) {  // its token counts from the first of the call
      return fail_not_finite(layer, report->kv_head, first_token + report->token, report->channel, side.is_key, report);
    }
    if (status != COUPLET_OK) return status;
  }
  return COUPLET_OK;
}

// All that the row holds in full precision, ascending: sinks, window, and the new tokens where the caller keeps them.
void Step::State::gather_dense(const StepRowState& row, const StepData& data, int32_t layer) {
  const Cache::State& owner = *cache->state_;
  const RawLayout& layout = owner.raw_layout;
  auto const append = [&](const BlockList& list, const Region& region, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end;) {
      int64_t const index = region.index(token);
      const Block& block = *list.at(index);
      int64_t const next = std::min(end, region.first_token(index + 1));
      int64_t const slot_offset = (token - region.first_token(index)) * layout.head_dim;
      dense.push_back({.keys = layout.keys(block, layer) + slot_offset,
                       .values = layout.values(block, layer) + slot_offset,
                       .key_token_stride = layout.head_dim,
                       .key_head_stride = layout.head_stride(block),
                       .value_token_stride = layout.head_dim,
                       .value_head_stride = layout.head_stride(block),
                       .first_token = static_cast<int32_t>(token),
                       .tokens = static_cast<int32_t>(next - token)});
      token = next;
    }
  };
  append(row.sequence->sinks, owner.sinks, 0, std::min(row.old_length, owner.sinks.end));
  append(row.sequence->window, owner.window, row.old_coded_end, row.old_length);
  dense.push_back({.keys = data.keys,
                   .values = data.values,
                   .key_token_stride = data.key_token_stride,
                   .key_head_stride = data.key_head_stride,
                   .value_token_stride = data.value_token_stride,
                   .value_head_stride = data.value_head_stride,
                   .first_token = static_cast<int32_t>(row.old_length),
                   .tokens = row.row.tokens});
}

// Queries [begin, end) of positions. A query reads codes up to where its own window begins (with Prefill::exact of the
// tokens before the step alone, so that one token after another sees the same in both modes), but never fewer than the
// sequence had before: after a truncate tokens are coded that its window would want raw. The backend's rule
// min(coded_end, t - window + 1) has no such floor, so the first queries go as a sequence of their own.
void Step::State::gather_queries(const StepRowState& row, const StepData& data, int64_t begin, int64_t end,
                                 size_t dense_offset, size_t dense_count) {
  const CacheConfig& config = cache->config();
  auto const append = [&](int64_t first, int64_t last, int64_t coded_end, int32_t window) {
    if (first >= last) return;
    int64_t const offset = first - row.old_length;
    bool const has_codes = coded_end > config.sinks;
    sequences.push_back({.queries = data.queries + offset * data.query_token_stride,
                         .outputs = data.outputs + offset * data.output_token_stride,
                         .pages = has_codes ? row.pages.data() : nullptr,
                         .dense = dense.data() + dense_offset,
                         .query_token_stride = data.query_token_stride,
                         .query_head_stride = data.query_head_stride,
                         .output_token_stride = data.output_token_stride,
                         .output_head_stride = data.output_head_stride,
                         .dense_count = static_cast<int32_t>(dense_count),
                         .first_query = static_cast<int32_t>(first),
                         .query_tokens = static_cast<int32_t>(last - first),
                         .coded_begin = has_codes ? config.sinks : 0,
                         .coded_end = has_codes ? static_cast<int32_t>(coded_end) : 0,
                         .window = has_codes ? window : 0});
  };
  int64_t const last_coded =
      prefill == Prefill::exact ? std::min(row.new_coded_end, row.old_length) : row.new_coded_end;
  int64_t const own_window = std::clamp(row.old_coded_end + config.window - 1, begin, end);
  append(begin, own_window, row.old_coded_end, 0);
  append(own_window, end, std::max(row.old_coded_end, last_coded), config.window);
}

couplet_attend_params Step::State::attend_params(int32_t layer, const AttendOptions& options) const {
  const Cache::State& owner = *cache->state_;
  const CacheConfig& config = owner.config;
  couplet_attend_params params = {};
  params.rotary = options.rotary;
  params.head_sinks = options.head_sinks;
  params.query_heads = config.query_heads;
  params.kv_heads = config.kv_heads;
  params.head_dim = config.head_dim;
  params.page_tokens = config.page_tokens;
  params.local_window = options.local_window;
  params.scale = options.scale != 0 ? options.scale : 1 / std::sqrt(static_cast<float>(config.head_dim));
  params.softcap = options.softcap;
  params.threads = config.threads;
  if (!codebook) return params;
  const CodeLayout& layout = owner.code_layout;
  params.key_table = codebook->layer(layer).key;
  params.value_table = codebook->layer(layer).value;
  params.key_page_offset = layout.key_offsets[static_cast<size_t>(layer)];
  params.key_page_stride = layout.key_page_stride;
  params.value_page_offset = layout.value_offsets[static_cast<size_t>(layer)];
  params.value_page_stride = layout.value_page_stride;
  params.key_codec = codebook->shape().key_codec;
  params.value_codec = codebook->shape().value_codec;
  return params;
}

couplet_status Step::State::attend_rows(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                                        couplet_report* report) {
  const couplet_attend_entries& attend = cache->device().backend->attend;
  int64_t most_queries = 0;
  std::vector<size_t> dense_offsets;
  dense.clear();
  for (size_t index = 0; index < rows.size(); ++index) {
    dense_offsets.push_back(dense.size());
    if (rows[index].row.tokens == 0 || !data[index].queries) continue;
    most_queries = std::max<int64_t>(most_queries, rows[index].row.tokens);
    gather_dense(rows[index], data[index], layer);
  }
  dense_offsets.push_back(dense.size());

  couplet_attend_params params = attend_params(layer, options);
  for (int64_t slice = 0; slice < most_queries; slice += query_slice) {
    if (cancelled(options)) return fail_cancelled(layer, report);
    sequences.clear();
    for (size_t index = 0; index < rows.size(); ++index) {
      const StepRowState& row = rows[index];
      if (!data[index].queries || slice >= row.row.tokens) continue;
      gather_queries(row, data[index], row.old_length + slice,
                     std::min(row.new_length, row.old_length + slice + query_slice), dense_offsets[index],
                     dense_offsets[index + 1] - dense_offsets[index]);
    }
    params.sequences = sequences.data();
    params.sequence_count = static_cast<int32_t>(sequences.size());
    couplet_status status = attend.check(&params, report);
    if (status != COUPLET_OK) return status;
    size_t const workspace = attend.workspace(&params);
    if (!scratch.grow(workspace)) {
      return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for %zu bytes of scratch of attend", workspace);
    }
    status = attend.run(&params, scratch.memory(), nullptr, report);
    if (status != COUPLET_OK) return status;
  }
  return COUPLET_OK;
}

}  // namespace couplet
