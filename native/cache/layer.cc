// One layer of a step: bring rows to the device, copy what is shared, store what stays raw, encode what leaves the window, attend.
// All of it is enqueued in a row; what its launches read of the host's is uploaded in one copy before the first of them.
#include "layer.h"

#include <cmath>

namespace couplet {

couplet_status Step::State::run_layer(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                                      couplet_report* report) {
  return Layer(this, layer, data, options, report).run();
}

couplet_status Step::State::Layer::run() {
  couplet_status status = owner_.device.select(report_);
  if (status == COUPLET_OK && step_.stream != options_.stream) status = step_.synchronize(report_);
  if (status != COUPLET_OK) return status;
  step_.stream = options_.stream;
  if (is_host_) step_.memory.staged = 0;
  for (auto const part :
       {&Layer::bring_tables, &Layer::bring_rows, &Layer::bring_arrays, &Layer::copy_shared, &Layer::store_rows,
        &Layer::encode_leaving, &Layer::attend, &Layer::unmix_outputs, &Layer::take_outputs}) {
    if (cancelled())
      return fail(report_, COUPLET_CANCELLED, {.layer = layer_}, "The attention of layer %d was cancelled", layer_);
    status = (this->*part)();
    step_.enqueued = !is_host_;  // whatever a part waited for before it enqueued its own
    if (status != COUPLET_OK) return status;
  }
  bool const has_outputs = std::any_of(data_.begin(), data_.end(), [](const StepData& row) { return row.outputs; });
  bool const only_enqueued = !is_host_ && options_.stream && !(downloads_ && has_outputs);
  return only_enqueued ? COUPLET_OK : step_.finish(report_);
}

// ---- what goes into blocks -------------------------------------------------------------------------------------------

// A block that another sequence holds too is copied layer by layer, just before its copy is written.
couplet_status Step::State::Layer::copy_shared() {
  auto const copy = backend_.memory.copy;
  for (const StepRowState& row : step_.rows) {
    if (row.codes.original) {
      const CodeLayout::Layer& layout = owner_.code_layout.layers[static_cast<size_t>(layer_)];
      couplet_status const status =
          copy(row.codes.blocks.front()->memory() + layout.begin, row.codes.original->memory() + layout.begin,
               static_cast<size_t>(layout.end - layout.begin), step_.stream, report_);
      if (status != COUPLET_OK) return status;
    }
    for (const Tail* tail : {&row.sinks, &row.window}) {
      if (!tail->original) continue;
      const RawLayout& layout = owner_.raw_layout;
      int64_t const bytes = layout.block_bytes(tail->original->tokens()) / layout.layers;
      couplet_status const status =
          copy(layout.keys(*tail->blocks.front(), layer_), layout.keys(*tail->original, layer_),
               static_cast<size_t>(bytes), step_.stream, report_);
      if (status != COUPLET_OK) return status;
    }
  }
  return COUPLET_OK;
}

template <class Entries, class Params>
couplet_status Step::State::Layer::call(const Entries& entries, const Params& params, ReportSlot slot, size_t part) {
  couplet_status status = entries.check(&params, report_);
  if (status != COUPLET_OK) return status;
  if (size_t const workspace = entries.workspace(&params); workspace > report_bytes)
    return fail(report_, COUPLET_INTERNAL, {.layer = layer_}, "A backend asks for %zu bytes beside a report",
                workspace);
  size_t const place = step_.report_offset(is_host_ ? 0 : layer_, part, slot);
  status = entries.run(&params, step_.memory.tables.memory() + place, step_.stream, report_);
  Unread const made = {layer_, part, first_head(part), slot};
  if (status == COUPLET_NOT_FINITE) return step_.not_finite(made, couplet_report(*report_), report_);
  if (status == COUPLET_OK && !is_host_) step_.unread.push_back(made);
  return status;
}

couplet_status Step::State::Layer::store(const couplet_store_run* runs, size_t count, int32_t dtype, ReportSlot slot) {
  if (count == 0) return COUPLET_OK;
  const std::vector<couplet_store_run>& given = slot == ReportSlot::convert ? convert_ : keep_;
  int32_t most_tokens = 0;
  for (const couplet_store_run& run : given) most_tokens = std::max(most_tokens, run.tokens);
  couplet_store_params const params = {.runs = runs,
                                       .run_count = static_cast<int32_t>(count),
                                       .most_tokens = most_tokens,
                                       .kv_heads = owner_.config.kv_heads,
                                       .head_dim = owner_.config.head_dim,
                                       .dtype = dtype,
                                       .reserved = 0};
  return call(backend_.store, params, slot);
}

couplet_status Step::State::Layer::reorder() {
  if (reorder_.empty()) return COUPLET_OK;
  couplet_reorder_params params = {.runs = reorder_array_,
                                   .order = key_order_,
                                   .run_count = static_cast<int32_t>(reorder_.size()),
                                   .most_rows = 0,
                                   .head_dim = owner_.config.head_dim,
                                   .dtype = options_.inputs.dtype};
  for (const couplet_reorder_run& run : reorder_) params.most_rows = std::max(params.most_rows, run.tokens * run.heads);
  couplet_status const status = backend_.reorder.check(&params, report_);
  return status == COUPLET_OK ? backend_.reorder.run(&params, nullptr, step_.stream, report_) : status;
}

couplet_status Step::State::Layer::mix(bool is_output) {
  const std::vector<couplet_mix_run>& runs = mixed_[is_output];
  if (runs.empty()) return COUPLET_OK;
  const CacheConfig& config = owner_.config;
  couplet_mix_params params = {.runs = mixed_arrays_[is_output],
                               .matrices = is_output ? mixing_.unmix : mixing_.mix,
                               .run_count = static_cast<int32_t>(runs.size()),
                               .most_tokens = 0,
                               .heads = is_output ? config.query_heads : config.kv_heads,
                               .matrix_heads = config.kv_heads,
                               .head_dim = config.head_dim,
                               .dtype = is_output ? options_.outputs.dtype : COUPLET_FLOAT32,
                               .threads = config.threads,
                               .reserved = 0};
  for (const couplet_mix_run& run : runs) params.most_tokens = std::max(params.most_tokens, run.tokens);
  couplet_status const status = backend_.mix.check(&params, report_);
  return status == COUPLET_OK ? backend_.mix.run(&params, nullptr, step_.stream, report_) : status;
}

couplet_status Step::State::Layer::store_rows() {
  couplet_status status = reorder();
  if (status == COUPLET_OK) status = store(convert_array_, convert_.size(), options_.inputs.dtype, ReportSlot::convert);
  if (status == COUPLET_OK) status = mix(false);
  return status == COUPLET_OK ? store(keep_array_, keep_.size(), COUPLET_FLOAT32, ReportSlot::keep) : status;
}

couplet_status Step::State::Layer::encode_leaving() {
  for (bool const is_held : {true, false})
    for (size_t part = 0; part < parts_.size(); ++part)
      for (int const side : {0, 1})
        if (couplet_status const status = encode(part, side, is_held)) return status;
  return COUPLET_OK;
}

couplet_status Step::State::Layer::encode(size_t part, int side, bool is_held) {
  const std::vector<couplet_encode_run>& runs = is_held ? held_[side] : fresh_[side];
  if (runs.empty()) return COUPLET_OK;
  const CodeLayout::Part& layout = owner_.code_layout.layers[static_cast<size_t>(layer_)].parts[part];
  const Codebook::Part& tables = parts_[part];
  const PartArrays& arrays = part_arrays_[part];
  couplet_encode_params params = {};
  params.table = side == 0 ? tables.key : tables.value;
  params.page_offset = side == 0 ? layout.key_offset : layout.value_offset;
  params.page_stride = side == 0 ? layout.key_page_stride : layout.value_page_stride;
  params.kv_heads = tables.codecs.heads;
  params.head_dim = owner_.config.head_dim;
  params.page_tokens = owner_.config.page_tokens;
  params.dtype = COUPLET_FLOAT32;
  params.threads = owner_.config.threads;
  params.codec = side == 0 ? tables.codecs.key : tables.codecs.value;
  params.runs = is_held ? arrays.held[side] : arrays.fresh[side];
  params.run_count = static_cast<int32_t>(runs.size());
  for (const couplet_encode_run& run : runs) params.tokens = std::max(params.tokens, run.tokens);
  ReportSlot const slot = is_held ? (side == 0 ? ReportSlot::held_keys : ReportSlot::held_values)
                                  : (side == 0 ? ReportSlot::fresh_keys : ReportSlot::fresh_values);
  return call(backend_.encode, params, slot, part);
}

// ---- attention -------------------------------------------------------------------------------------------------------

couplet_attend_params Step::State::Layer::attend_params(size_t part) const {
  const CacheConfig& config = owner_.config;
  int32_t const repeats = config.query_heads / config.kv_heads;
  couplet_attend_params params = {};
  params.rotary = key_order_ ? options_.ordered_rotary : options_.rotary;
  params.head_sinks = options_.head_sinks ? options_.head_sinks + first_head(part) * repeats : nullptr;
  params.query_heads = heads(part) * repeats;
  params.kv_heads = heads(part);
  params.head_dim = config.head_dim;
  params.page_tokens = config.page_tokens;
  params.local_window = options_.local_window;
  params.scale = options_.scale != 0 ? options_.scale : 1 / std::sqrt(static_cast<float>(config.head_dim));
  params.softcap = options_.softcap;
  params.threads = config.threads;
  params.query_dtype = options_.inputs.dtype;
  params.output_dtype = options_.outputs.dtype;
  if (parts_.empty()) return params;
  const CodeLayout::Part& layout = owner_.code_layout.layers[static_cast<size_t>(layer_)].parts[part];
  params.key_table = parts_[part].key;
  params.value_table = parts_[part].value;
  params.key_page_offset = layout.key_offset;
  params.key_page_stride = layout.key_page_stride;
  params.value_page_offset = layout.value_offset;
  params.value_page_stride = layout.value_page_stride;
  params.key_codec = parts_[part].codecs.key;
  params.value_codec = parts_[part].codecs.value;
  return params;
}

couplet_status Step::State::Layer::attend() {
  for (const Slice& slice : slices_)
    for (size_t part = 0; part < part_arrays_.size(); ++part) {
      if (cancelled())
        return fail(report_, COUPLET_CANCELLED, {.layer = layer_}, "The attention of layer %d was cancelled", layer_);
      couplet_attend_params params = attend_params(part);
      params.sequences = part_arrays_[part].sequences + slice.begin;
      params.sequence_count = static_cast<int32_t>(slice.end - slice.begin);
      params.most_query_tokens = slice.most_queries;
      couplet_status status = backend_.attend.check(&params, report_);
      if (status == COUPLET_OK)
        status = step_.reserve(&step_.memory.workspace, backend_.attend.workspace(&params), report_);
      if (status == COUPLET_OK)
        status = backend_.attend.run(&params, step_.memory.workspace.memory(), step_.stream, report_);
      if (status != COUPLET_OK) return status;
    }
  return COUPLET_OK;
}

}  // namespace couplet
