// Rows and page tables on their way to the device, and outputs on their way back.
#include <bit>
#include <cstring>

#include "layer.h"

namespace couplet {

namespace {

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
