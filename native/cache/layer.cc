// One layer of a step: bring rows to the device, copy what is shared, store what stays raw, encode what leaves the window, attend.
// All of it is enqueued in a row; what its launches read of the host's is uploaded in one copy before the first of them.
#include <bit>
#include <cmath>
#include <cstring>

#include "state.h"

namespace couplet {
namespace {

// Queries given to a CPU in one call, for each sequence: bounds its scratch and the time until a cancel is seen.
constexpr int64_t host_query_slice = 256;

size_t element_bytes(int32_t dtype) { return dtype == COUPLET_FLOAT32 ? 4 : 2; }

const void* advance(const void* rows, int64_t elements, int32_t dtype) {
  return static_cast<const uint8_t*>(rows) + elements * static_cast<int64_t>(element_bytes(dtype));
}

struct Strides {  // elements
  int64_t token, head;
};

// Rows of `heads` heads from the given strides to no gaps between them, or back.
struct Packed {
  uint8_t* packed;
  const void* given;
  Strides strides;
  int32_t tokens, heads, head_dim, dtype;

  void pack() const {
    for_each_run(
        [](uint8_t* packed_run, uint8_t* given_run, size_t bytes) { std::memcpy(packed_run, given_run, bytes); });
  }
  void unpack() const {
    for_each_run(
        [](uint8_t* packed_run, uint8_t* given_run, size_t bytes) { std::memcpy(given_run, packed_run, bytes); });
  }

 private:
  template <class Visit>
  void for_each_run(const Visit& visit) const {
    size_t const bytes = element_bytes(dtype);
    int64_t const width = int64_t{heads} * head_dim;
    bool const heads_touch = strides.head == head_dim || heads == 1;
    bool const tokens_touch = heads_touch && (strides.token == width || tokens == 1);
    int64_t const run = tokens_touch ? tokens * width : heads_touch ? width : head_dim;
    auto* const rows = const_cast<uint8_t*>(static_cast<const uint8_t*>(given));
    for (int64_t at = 0; at < tokens * width; at += run) {
      int64_t const from = at / width * strides.token + at % width / head_dim * strides.head;
      visit(packed + static_cast<size_t>(at) * bytes, rows + from * static_cast<int64_t>(bytes),
            static_cast<size_t>(run) * bytes);
    }
  }
};

}  // namespace

class Step::State::Layer {
 public:
  Layer(Step::State* step, int32_t layer, std::span<const StepData> data, const AttendOptions& options,
        couplet_report* report)
      : step_(*step),
        owner_(step->owner()),
        backend_(*owner_.device.backend),
        layer_(layer),
        data_(data),
        options_(options),
        report_(report ? report : &own_report_),
        is_host_(owner_.device.is_host()),
        uploads_(!is_host_ && options.inputs.place == Place::host),
        downloads_(!is_host_ && options.outputs.place == Place::host),
        placed_(data.begin(), data.end()) {
    if (const Codebook* const codebook = step->codebook.get()) {
      parts_ = codebook->layer(layer);
      mixing_ = codebook->mixing(layer);
      key_order_ = codebook->key_order(layer).channels;
    }
    part_arrays_.resize(std::max<size_t>(1, parts_.size()));
  }

  couplet_status run();

 private:
  couplet_status bring_tables();
  couplet_status bring_rows();
  couplet_status bring_arrays();
  couplet_status copy_shared();
  couplet_status store_rows();
  couplet_status encode_leaving();
  couplet_status attend();
  couplet_status unmix_outputs() { return mix(true); }
  couplet_status take_outputs();

  void place(Bump* bump);
  void place_reordered(Bump* bump);
  void gather_stored();
  void gather_leaving();
  void gather_dense(const StepRowState& row, const StepData& data);
  void gather_queries(const StepRowState& row, const StepData& data, int64_t begin, int64_t end, size_t dense_begin,
                      size_t dense_end);
  void gather_attended();
  couplet_status store(const couplet_store_run* runs, size_t count, int32_t dtype, ReportSlot slot);
  void gather_mixed();
  couplet_status reorder();
  couplet_status mix(bool is_output);
  template <class Entries, class Params>
  couplet_status call(const Entries& entries, const Params& params, ReportSlot slot, size_t part = 0);
  couplet_status encode(size_t part, int side, bool is_held);
  couplet_attend_params attend_params(size_t part) const;

  bool cancelled() const { return options_.cancel && *options_.cancel; }
  couplet_status upload(void* to, const void* from, size_t bytes) const {
    return backend_.memory.upload(to, from, bytes, step_.stream, report_);
  }
  const float* block_rows(const Piece& piece, bool is_key) const {
    const RawLayout& layout = owner_.raw_layout;
    return (is_key ? layout.keys(*piece.block, layer_) : layout.values(*piece.block, layer_)) +
           piece.slot * layout.head_dim;
  }
  // Keys or values of the new tokens from `position` on; float32 once they are placed.
  static const void* given_rows(const StepData& data, bool is_key, int64_t token, int32_t dtype) {
    return is_key ? advance(data.keys, token * data.key_token_stride, dtype)
                  : advance(data.values, token * data.value_token_stride, dtype);
  }
  static Strides given_strides(const StepData& data, bool is_key) {
    return is_key ? Strides{data.key_token_stride, data.key_head_stride}
                  : Strides{data.value_token_stride, data.value_head_stride};
  }

  Step::State& step_;
  Cache::State& owner_;
  const couplet_backend& backend_;
  int32_t const layer_;
  std::span<const StepData> const data_;
  const AttendOptions& options_;
  couplet_report own_report_{};
  couplet_report* const report_;
  bool const is_host_, uploads_, downloads_;

  std::vector<StepData> placed_;  // `data_` as the device reaches it, keys and values in float32
  size_t uploaded_bytes_ = 0;     // of memory.rows, from its start
  float* gathered_[2] = {};       // keys and values of tokens that leave the window, from several blocks

  // On the host, of all heads; what launches are given lies in memory.arrays, there for each part from its first head on.
  std::vector<couplet_reorder_run> reorder_;  // keys and queries as they came
  std::vector<couplet_store_run> convert_, keep_;
  std::vector<couplet_mix_run> mixed_[2];               // values that came, outputs
  std::vector<couplet_encode_run> held_[2], fresh_[2];  // keys, values
  std::vector<couplet_dense_rows> dense_;
  std::vector<couplet_attend_sequence> sequences_;
  std::vector<size_t> dense_begins_;  // of each sequence
  struct Slice {
    size_t begin, end;  // in sequences_
    int32_t most_queries;
  };
  std::vector<Slice> slices_;
  struct PartArrays {
    couplet_encode_run *held[2], *fresh[2];
    couplet_dense_rows* dense;
    couplet_attend_sequence* sequences;
  };
  couplet_reorder_run* reorder_array_ = nullptr;
  couplet_store_run *convert_array_ = nullptr, *keep_array_ = nullptr;
  couplet_mix_run* mixed_arrays_[2] = {};
  std::vector<PartArrays> part_arrays_;

  // Without a codebook all heads are one part, and nothing is coded.
  std::span<const Codebook::Part> parts_;
  Codebook::Mixing mixing_;
  const int32_t* key_order_ = nullptr;
  int32_t first_head(size_t part) const { return parts_.empty() ? 0 : parts_[part].first_head; }
  int32_t heads(size_t part) const { return parts_.empty() ? owner_.config.kv_heads : parts_[part].codecs.heads; }
};

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

// ---- what the device reads -------------------------------------------------------------------------------------------

// Reports, and the page tables of all rows, which are those of every layer.
couplet_status Step::State::Layer::bring_tables() {
  if (step_.tables_uploaded) return COUPLET_OK;
  size_t pages = 0;
  for (const StepRowState& row : step_.rows) pages += row.pages.size();
  size_t const table_bytes = is_host_ ? 0 : pages * sizeof(uint8_t*);
  // With room for what the next steps add: they inherit this memory.
  size_t const room = is_host_ ? 0 : std::bit_ceil(table_bytes + 512);
  couplet_status status = step_.reserve(&step_.memory.tables, step_.reports_bytes() + room, report_);
  if (status != COUPLET_OK) return status;
  auto** table = reinterpret_cast<uint8_t**>(step_.memory.tables.memory() + step_.reports_bytes());
  uint8_t** const first = table;
  for (StepRowState& row : step_.rows) {
    row.page_table = is_host_ ? row.pages.data() : table;
    table += row.pages.size();
  }
  step_.tables_uploaded = true;
  if (table_bytes == 0) return COUPLET_OK;
  uint8_t* staged = nullptr;
  status = step_.stage(table_bytes, &staged, report_);
  if (status != COUPLET_OK) return status;
  for (size_t at = 0; const StepRowState& row : step_.rows) {
    if (row.pages.empty()) continue;  // memcpy takes no NULL
    std::memcpy(staged + at, row.pages.data(), row.pages.size() * sizeof(uint8_t*));
    at += row.pages.size() * sizeof(uint8_t*);
  }
  return upload(first, staged, table_bytes);
}

// Keys and queries in the order of the codebook, of the element type in which they came.
void Step::State::Layer::place_reordered(Bump* bump) {
  reorder_.clear();
  if (!key_order_) return;
  const CacheConfig& config = owner_.config;
  int64_t const head_dim = config.head_dim;
  size_t const bytes = element_bytes(options_.inputs.dtype);
  for (const Piece& piece : step_.plan.given) {
    StepData& row = placed_[piece.row];
    auto const move = [&](const void** rows, int64_t* token_stride, int64_t* head_stride, int32_t heads) {
      void* const to = bump->take(static_cast<size_t>(piece.tokens() * heads * head_dim) * bytes);
      reorder_.push_back({.rows = *rows,
                          .reordered = to,
                          .token_stride = *token_stride,
                          .head_stride = *head_stride,
                          .reordered_token_stride = heads * head_dim,
                          .reordered_head_stride = head_dim,
                          .tokens = piece.tokens(),
                          .heads = heads});
      *rows = to;
      *token_stride = heads * head_dim;
      *head_stride = head_dim;
    };
    move(&row.keys, &row.key_token_stride, &row.key_head_stride, config.kv_heads);
    if (row.queries) move(&row.queries, &row.query_token_stride, &row.query_head_stride, config.query_heads);
  }
}

// Where rows lie that are not read or written in place. memory.rows: uploaded | reordered | converted | gathered | outputs.
void Step::State::Layer::place(Bump* bump) {
  const CacheConfig& config = owner_.config;
  int64_t const kv_width = int64_t{config.kv_heads} * config.head_dim,
                query_width = int64_t{config.query_heads} * config.head_dim;
  int32_t const dtype = options_.inputs.dtype;
  placed_.assign(data_.begin(), data_.end());
  convert_.clear();
  if (uploads_) {
    for (const Piece& piece : step_.plan.given) {
      StepData& row = placed_[piece.row];
      auto const tokens = static_cast<size_t>(piece.tokens());
      row.keys = bump->take(tokens * static_cast<size_t>(kv_width) * element_bytes(dtype));
      row.values = bump->take(tokens * static_cast<size_t>(kv_width) * element_bytes(dtype));
      row.key_token_stride = row.value_token_stride = kv_width;
      row.key_head_stride = row.value_head_stride = row.query_head_stride = config.head_dim;
      row.query_token_stride = query_width;
      if (row.queries) row.queries = bump->take(tokens * static_cast<size_t>(query_width) * element_bytes(dtype));
    }
    uploaded_bytes_ = bump->bytes();
  }
  place_reordered(bump);
  if (dtype != COUPLET_FLOAT32 || mixing_.mix) {  // the caller's values are not ours to mix in place
    int64_t first_token = 0;
    for (const Piece& piece : step_.plan.given) {
      StepData& row = placed_[piece.row];
      for (bool const is_key : {true, false}) {
        Strides const from = given_strides(row, is_key);
        convert_.push_back({.rows = is_key ? row.keys : row.values,
                            .stored = bump->take<float>(static_cast<size_t>(piece.tokens() * kv_width)),
                            .token_stride = from.token,
                            .head_stride = from.head,
                            .stored_token_stride = kv_width,
                            .stored_head_stride = config.head_dim,
                            .first_token = first_token,
                            .tokens = piece.tokens(),
                            .reserved = 0});
        first_token += piece.tokens();
        (is_key ? row.keys : row.values) = convert_.back().stored;
      }
      row.key_token_stride = row.value_token_stride = kv_width;
      row.key_head_stride = row.value_head_stride = config.head_dim;
    }
  }
  for (float*& gathered : gathered_)
    gathered = bump->take<float>(static_cast<size_t>(step_.plan.gathered_tokens * kv_width));
  if (!downloads_) return;
  for (const Piece& piece : step_.plan.given) {
    StepData& row = placed_[piece.row];
    if (!row.outputs) continue;
    row.outputs = bump->take(static_cast<size_t>(piece.tokens() * query_width) * element_bytes(options_.outputs.dtype));
    row.output_token_stride = query_width;
    row.output_head_stride = config.head_dim;
  }
}

couplet_status Step::State::Layer::bring_rows() {
  const CacheConfig& config = owner_.config;
  Bump measure(nullptr);
  place(&measure);
  if (measure.bytes() == 0) return COUPLET_OK;
  couplet_status status = step_.reserve(&step_.memory.rows, measure.bytes(), report_);
  if (status != COUPLET_OK) return status;
  uint8_t* const base = step_.memory.rows.memory();
  Bump bump(base);
  place(&bump);
  if (uploaded_bytes_ == 0) return COUPLET_OK;
  uint8_t* staged = nullptr;
  status = step_.stage(uploaded_bytes_, &staged, report_);
  if (status != COUPLET_OK) return status;
  size_t const bytes = element_bytes(options_.inputs.dtype);
  size_t at = 0;  // in the order of place()
  auto const pack = [&](const void* rows, Strides strides, int32_t tokens, int32_t heads) {
    Packed{staged + at, rows, strides, tokens, heads, config.head_dim, options_.inputs.dtype}.pack();
    at += (static_cast<size_t>(tokens) * static_cast<size_t>(heads * config.head_dim) * bytes + 255) / 256 * 256;
  };
  for (const Piece& piece : step_.plan.given) {
    const StepData& row = data_[piece.row];
    pack(row.keys, given_strides(row, true), piece.tokens(), config.kv_heads);
    pack(row.values, given_strides(row, false), piece.tokens(), config.kv_heads);
    if (row.queries)
      pack(row.queries, {row.query_token_stride, row.query_head_stride}, piece.tokens(), config.query_heads);
  }
  return upload(base, staged, uploaded_bytes_);
}

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

couplet_status Step::State::Layer::take_outputs() {
  if (!downloads_ || sequences_.empty()) return COUPLET_OK;
  const CacheConfig& config = owner_.config;
  const uint8_t *begin = nullptr, *end = nullptr;
  auto const bytes_of = [&](const Piece& piece) {
    return static_cast<size_t>(piece.tokens()) * static_cast<size_t>(config.query_heads * config.head_dim) *
           element_bytes(options_.outputs.dtype);
  };
  for (const Piece& piece : step_.plan.given) {
    auto const* const outputs = static_cast<const uint8_t*>(placed_[piece.row].outputs);
    if (!outputs) continue;
    if (!begin) begin = outputs;
    end = outputs + bytes_of(piece);
  }
  uint8_t* staged = nullptr;
  couplet_status status = step_.stage(static_cast<size_t>(end - begin), &staged, report_);
  if (status == COUPLET_OK)
    status = backend_.memory.copy(staged, begin, static_cast<size_t>(end - begin), step_.stream, report_);
  if (status != COUPLET_OK) return status;
  for (const Piece& piece : step_.plan.given) {
    const StepData& row = data_[piece.row];
    if (!row.outputs) continue;
    auto const* const outputs = static_cast<const uint8_t*>(placed_[piece.row].outputs);
    Packed{staged + (outputs - begin),
           row.outputs,
           {row.output_token_stride, row.output_head_stride},
           piece.tokens(),
           config.query_heads,
           config.head_dim,
           options_.outputs.dtype}
        .unpack();
  }
  return COUPLET_OK;
}

}  // namespace couplet
