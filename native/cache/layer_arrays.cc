// What the launches of a layer read of the host's: runs of rows, of codes and of queries, uploaded in one copy before the first of them.
#include <cstring>

#include "layer.h"

namespace couplet {

// Queries given to a CPU in one call, for each sequence: bounds its scratch and the time until a cancel is seen.
constexpr int64_t host_query_slice = 256;

couplet_status Step::State::Layer::bring_arrays() {
  gather_mixed();
  gather_stored();
  gather_leaving();
  gather_attended();
  auto const lay_out = [this](Bump* bump) {
    reorder_array_ = bump->take<couplet_reorder_run>(reorder_.size());
    convert_array_ = bump->take<couplet_store_run>(convert_.size());
    keep_array_ = bump->take<couplet_store_run>(keep_.size());
    for (int side : {0, 1}) mixed_arrays_[side] = bump->take<couplet_mix_run>(mixed_[side].size());
    for (PartArrays& part : part_arrays_) {
      for (int side : {0, 1}) {
        part.held[side] = bump->take<couplet_encode_run>(held_[side].size());
        part.fresh[side] = bump->take<couplet_encode_run>(fresh_[side].size());
      }
      part.dense = bump->take<couplet_dense_rows>(dense_.size());
      part.sequences = bump->take<couplet_attend_sequence>(sequences_.size());
    }
  };
  Bump measure(nullptr);
  lay_out(&measure);
  size_t const bytes = measure.bytes();
  if (bytes == 0) return COUPLET_OK;
  if (couplet_status const status = is_host_ ? COUPLET_OK : step_.reserve(&step_.memory.arrays, bytes, report_))
    return status;
  uint8_t* staged = nullptr;
  if (couplet_status const status = step_.stage(bytes, &staged, report_)) return status;
  uint8_t* const base = is_host_ ? staged : step_.memory.arrays.memory();
  Bump bump(base);
  lay_out(&bump);
  auto const put = [&](const auto& values, const auto* place, const auto& moved) {
    uint8_t* to = staged + (reinterpret_cast<const uint8_t*>(place) - base);
    for (size_t index = 0; index < values.size(); ++index, to += sizeof values[0]) {
      auto const value = moved(values[index], index);
      std::memcpy(to, &value, sizeof value);
    }
  };
  auto const as_it_is = [](const auto& run, size_t) { return run; };
  put(reorder_, reorder_array_, as_it_is);
  put(convert_, convert_array_, as_it_is);
  put(keep_, keep_array_, as_it_is);
  for (int side : {0, 1}) put(mixed_[side], mixed_arrays_[side], as_it_is);
  for (size_t index = 0; index < part_arrays_.size(); ++index) {
    const PartArrays& part = part_arrays_[index];
    int64_t const head = first_head(index);
    auto const run_of_part = [&](couplet_encode_run run, size_t) {
      run.rows = advance(run.rows, head * run.head_stride, COUPLET_FLOAT32);
      return run;
    };
    for (int side : {0, 1}) {
      put(held_[side], part.held[side], run_of_part);
      put(fresh_[side], part.fresh[side], run_of_part);
    }
    put(dense_, part.dense, [&](couplet_dense_rows rows, size_t) {
      rows.keys += head * rows.key_head_stride;
      rows.values += head * rows.value_head_stride;
      return rows;
    });
    int64_t const query_head = head * (owner_.config.query_heads / owner_.config.kv_heads);
    put(sequences_, part.sequences, [&](couplet_attend_sequence sequence, size_t at) {
      sequence.queries = advance(sequence.queries, query_head * sequence.query_head_stride, options_.inputs.dtype);
      sequence.outputs = const_cast<void*>(
          advance(sequence.outputs, query_head * sequence.output_head_stride, options_.outputs.dtype));
      sequence.dense = part.dense + dense_begins_[at];
      return sequence;
    });
  }
  return is_host_ ? COUPLET_OK : upload(base, staged, bytes);
}

// Values as they came, and outputs as they will leave; placed_ has both where they may be written.
void Step::State::Layer::gather_mixed() {
  if (!mixing_.mix) return;
  for (const Piece& piece : step_.plan.given) {
    const StepData& row = placed_[piece.row];
    mixed_[0].push_back({.rows = const_cast<void*>(row.values),
                         .token_stride = row.value_token_stride,
                         .head_stride = row.value_head_stride,
                         .tokens = piece.tokens(),
                         .reserved = 0});
    if (!row.outputs) continue;
    mixed_[1].push_back({.rows = row.outputs,
                         .token_stride = row.output_token_stride,
                         .head_stride = row.output_head_stride,
                         .tokens = piece.tokens(),
                         .reserved = 0});
  }
}

// New tokens that are sinks or still in the window after the step go into their raw blocks.
void Step::State::Layer::gather_stored() {
  const RawLayout& layout = owner_.raw_layout;
  int64_t first_token = 0;
  for (const Piece& piece : step_.plan.kept) {
    const StepData& data = placed_[piece.row];
    for (bool const is_key : {true, false}) {
      Strides const from = given_strides(data, is_key);
      int64_t const token = piece.begin - step_.rows[piece.row].old_length;
      keep_.push_back({.rows = given_rows(data, is_key, token, COUPLET_FLOAT32),
                       .stored = const_cast<float*>(block_rows(piece, is_key)),
                       .token_stride = from.token,
                       .head_stride = from.head,
                       .stored_token_stride = layout.head_dim,
                       .stored_head_stride = layout.head_stride(*piece.block),
                       .first_token = first_token,
                       .tokens = piece.tokens(),
                       .reserved = 0});
      first_token += piece.tokens();
    }
  }
}

// Tokens [old_coded_end, new_coded_end): first those that the row holds raw, then the others, straight from the input. A row has one
// run of each, so that no two runs of a call write into the same octet of a page; where raw ones lie in several blocks, `keep_`
// gathers them.
void Step::State::Layer::gather_leaving() {
  const RawLayout& layout = owner_.raw_layout;
  int64_t const kv_width = int64_t{layout.kv_heads} * layout.head_dim;
  int64_t gathered = 0, tokens_before = 0;
  const std::vector<Piece>& held = step_.plan.held;
  for (size_t first = 0, end = 0; first < held.size(); first = end) {
    while (end < held.size() && held[end].row == held[first].row) ++end;
    int64_t const tokens = held[end - 1].end - held[first].begin;
    bool const is_gathered = end > first + 1;
    for (int const side : {0, 1}) {
      bool const is_key = side == 0;
      for (size_t index = first; index < end && is_gathered; ++index) {
        const Piece& piece = held[index];
        keep_.push_back({.rows = block_rows(piece, is_key),
                         .stored = gathered_[side] + (gathered + piece.begin - held[first].begin) * kv_width,
                         .token_stride = layout.head_dim,
                         .head_stride = layout.head_stride(*piece.block),
                         .stored_token_stride = kv_width,
                         .stored_head_stride = layout.head_dim,
                         .first_token = keep_.empty() ? 0 : keep_.back().first_token + keep_.back().tokens,
                         .tokens = piece.tokens(),
                         .reserved = 0});
      }
      held_[side].push_back(
          {.rows = is_gathered ? gathered_[side] + gathered * kv_width : block_rows(held[first], is_key),
           .pages = step_.rows[held[first].row].page_table,
           .token_stride = is_gathered ? kv_width : layout.head_dim,
           .head_stride = is_gathered ? layout.head_dim : layout.head_stride(*held[first].block),
           .first_token = held[first].begin,
           .tokens_before = tokens_before,
           .tokens = static_cast<int32_t>(tokens),
           .reserved = 0});
    }
    if (is_gathered) gathered += tokens;
    tokens_before += tokens;
  }
  tokens_before = 0;
  for (const Piece& piece : step_.plan.fresh) {
    const StepData& data = placed_[piece.row];
    for (int const side : {0, 1}) {
      Strides const from = given_strides(data, side == 0);
      int64_t const token = piece.begin - step_.rows[piece.row].old_length;
      fresh_[side].push_back({.rows = given_rows(data, side == 0, token, COUPLET_FLOAT32),
                              .pages = step_.rows[piece.row].page_table,
                              .token_stride = from.token,
                              .head_stride = from.head,
                              .first_token = piece.begin,
                              .tokens_before = tokens_before,
                              .tokens = piece.tokens(),
                              .reserved = 0});
    }
    tokens_before += piece.tokens();
  }
}

// All that the row holds in full precision, ascending: sinks, window, and the new tokens where they were placed.
void Step::State::Layer::gather_dense(const StepRowState& row, const StepData& data) {
  const RawLayout& layout = owner_.raw_layout;
  auto const append = [&](const BlockList& list, const Region& region, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end;) {
      int64_t const index = region.index(token);
      const Block& block = *list.at(index);
      int64_t const next = std::min(end, region.first_token(index + 1));
      int64_t const slot_offset = (token - region.first_token(index)) * layout.head_dim;
      dense_.push_back({.keys = layout.keys(block, layer_) + slot_offset,
                        .values = layout.values(block, layer_) + slot_offset,
                        .key_token_stride = layout.head_dim,
                        .key_head_stride = layout.head_stride(block),
                        .value_token_stride = layout.head_dim,
                        .value_head_stride = layout.head_stride(block),
                        .first_token = static_cast<int32_t>(token),
                        .tokens = static_cast<int32_t>(next - token)});
      token = next;
    }
  };
  append(row.sequence->sinks, owner_.sinks, 0, std::min(row.old_length, owner_.sinks.end));
  append(row.sequence->window, owner_.window, row.old_coded_end, row.old_length);
  dense_.push_back({.keys = static_cast<const float*>(data.keys),
                    .values = static_cast<const float*>(data.values),
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
void Step::State::Layer::gather_queries(const StepRowState& row, const StepData& data, int64_t begin, int64_t end,
                                        size_t dense_begin, size_t dense_end) {
  const CacheConfig& config = owner_.config;
  auto const append = [&](int64_t first, int64_t last, int64_t coded_end, int32_t window) {
    if (first >= last) return;
    int64_t const offset = first - row.old_length;
    bool const has_codes = coded_end > config.sinks;
    dense_begins_.push_back(dense_begin);
    sequences_.push_back(
        {.queries = advance(data.queries, offset * data.query_token_stride, options_.inputs.dtype),
         .outputs = const_cast<void*>(advance(data.outputs, offset * data.output_token_stride, options_.outputs.dtype)),
         .pages = has_codes ? row.page_table : nullptr,
         .dense = nullptr,
         .query_token_stride = data.query_token_stride,
         .query_head_stride = data.query_head_stride,
         .output_token_stride = data.output_token_stride,
         .output_head_stride = data.output_head_stride,
         .dense_count = static_cast<int32_t>(dense_end - dense_begin),
         .first_query = static_cast<int32_t>(first),
         .query_tokens = static_cast<int32_t>(last - first),
         .coded_begin = has_codes ? config.sinks : 0,
         .coded_end = has_codes ? static_cast<int32_t>(coded_end) : 0,
         .window = has_codes ? window : 0});
    slices_.back().most_queries = std::max(slices_.back().most_queries, static_cast<int32_t>(last - first));
  };
  int64_t const last_coded =
      step_.prefill == Prefill::exact ? std::min(row.new_coded_end, row.old_length) : row.new_coded_end;
  int64_t const own_window = std::clamp(row.old_coded_end + config.window - 1, begin, end);
  append(begin, own_window, row.old_coded_end, 0);
  append(own_window, end, std::max(row.old_coded_end, last_coded), config.window);
}

void Step::State::Layer::gather_attended() {
  int64_t most_queries = 0;
  std::vector<size_t> dense_begins;
  for (size_t index = 0; index < step_.rows.size(); ++index) {
    dense_begins.push_back(dense_.size());
    if (step_.rows[index].row.tokens == 0 || !placed_[index].queries) continue;
    most_queries = std::max<int64_t>(most_queries, step_.rows[index].row.tokens);
    gather_dense(step_.rows[index], placed_[index]);
  }
  dense_begins.push_back(dense_.size());
  int64_t const slice_queries = is_host_ ? host_query_slice : most_queries;
  for (int64_t slice = 0; slice < most_queries; slice += slice_queries) {
    slices_.push_back({sequences_.size(), 0, 0});
    for (size_t index = 0; index < step_.rows.size(); ++index) {
      const StepRowState& row = step_.rows[index];
      if (!placed_[index].queries || slice >= row.row.tokens) continue;
      gather_queries(row, placed_[index], row.old_length + slice,
                     std::min(row.new_length, row.old_length + slice + slice_queries), dense_begins[index],
                     dense_begins[index + 1]);
    }
    slices_.back().end = sequences_.size();
  }
}

}  // namespace couplet
