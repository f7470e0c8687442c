// A call of attend on random codes and rows, with everything that its parameters point to. Used by attend_test and attend_bench.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../native/cpu/attend.h"
#include "../../native/cpu/attend_check.h"
#include "../../native/cpu/backend.h"
#include "../../native/cpu/reference/attend.h"
#include "check.h"
#include "levels.h"

namespace couplet::test {

struct SequenceShape {
  int32_t before = 0;  // tokens before the first query
  int32_t queries = 1;
  int32_t sinks = 0;
  int32_t window = 0;
  bool coded_prefill = false;  // new tokens also exist as codes, and are read so once they leave the window
  bool uncoded = false;        // everything in dense runs
};

struct CaseShape {
  int32_t kv_heads = 1;
  int32_t group_heads = 1;
  int32_t head_dim = 64;
  int32_t page_tokens = COUPLET_PAGE_TOKENS;
  couplet_codec key_codec{8, 8};
  couplet_codec value_codec{8, 8};
  int32_t rotary_kind = 0;  // 0: none
  int32_t rotary_dim = 0;
  enum class Tables {
    theta,
    scaled,
    crooked
  } tables = Tables::theta;   // scaled: linear, amplitude 1.2; crooked: not linear
  bool value_levels = false;  // values on levels
  int32_t local_window = 0;
  float softcap = 0;
  bool head_sinks = false;
  double query_scale = 1;  // standard deviation of the queries: sets how sharp the softmax is
  int32_t threads = 1;
  std::vector<SequenceShape> sequences;
};

// Any options, codecs and up to 3 sequences of at most these lengths.
inline CaseShape random_shape(Random& random, int32_t head_dim, int32_t most_before, int32_t most_queries) {
  using Tables = CaseShape::Tables;
  auto const pick = [&](auto... values) {
    std::common_type_t<decltype(values)...> const all[] = {values...};
    return all[random.below(static_cast<int64_t>(sizeof...(values)))];
  };
  CaseShape shape{.kv_heads = pick(1, 2, 3),
                  .group_heads = pick(1, 2, 4, 5, 8),
                  .head_dim = head_dim,
                  .page_tokens = pick(8, 24, 64, 64, 128),
                  .tables = pick(Tables::theta, Tables::scaled, Tables::crooked),
                  .local_window = pick(0, 0, 1, 50, 128),
                  .softcap = pick(0.0f, 0.0f, 5.0f, 50.0f),
                  .head_sinks = pick(false, true),
                  .query_scale = pick(0.1, 1.0, 3.0),
                  .sequences = {}};
  auto const codec = [&] {
    int32_t const channels = pick(1, 2, 4, 8);
    return couplet_codec{channels, 1 + static_cast<int32_t>(random.below(12))};
  };
  shape.key_codec = codec();
  shape.value_codec = codec();
  shape.rotary_kind = pick(0, 1, 2);
  if (shape.rotary_kind) shape.rotary_dim = 2 + 2 * static_cast<int32_t>(random.below(head_dim / 2));
  for (int64_t n = 1 + random.below(3); n > 0; --n)
    shape.sequences.push_back({.before = pick(0, 1, 7, 64, 130, most_before),
                               .queries = pick(0, 1, 1, 1, 2, 5, most_queries),
                               .sinks = pick(0, 4, 70),
                               .window = pick(0, 1, 32, 128),
                               .coded_prefill = pick(false, true),
                               .uncoded = random.below(6) == 0});
  return shape;
}

class AttendCase {
 public:
  AttendCase(const CaseShape& shape, uint64_t seed) : shape_(shape), random_(seed) {
    make_tables();
    make_rotary();
    sequences_.resize(shape.sequences.size());
    data_.resize(shape.sequences.size());
    if (shape.head_sinks) head_sinks_ = random_.normals(static_cast<size_t>(query_heads()), 2);
    for (size_t i = 0; i < sequences_.size(); ++i) make_sequence(shape.sequences[i], &data_[i], &sequences_[i]);
    params_ = couplet_attend_params{
        .sequences = sequences_.data(),
        .key_table = key_table_.get(),
        .value_table = value_table_.get(),
        .rotary = rotary_.get(),
        .head_sinks = shape.head_sinks ? head_sinks_.data() : nullptr,
        .key_page_offset = 0,
        .key_page_stride = couplet_page_bytes(shape.key_codec, shape.head_dim, shape.page_tokens),
        .value_page_offset = value_offset(),
        .value_page_stride = couplet_page_bytes(shape.value_codec, shape.head_dim, shape.page_tokens),
        .sequence_count = static_cast<int32_t>(sequences_.size()),
        .query_heads = query_heads(),
        .kv_heads = shape.kv_heads,
        .head_dim = shape.head_dim,
        .page_tokens = shape.page_tokens,
        .local_window = shape.local_window,
        .scale = 1 / std::sqrt(static_cast<float>(shape.head_dim)),
        .softcap = shape.softcap,
        .key_codec = shape.key_codec,
        .value_codec = shape.value_codec,
        .threads = shape.threads,
        .most_query_tokens = 0,
        .query_dtype = COUPLET_FLOAT32,
        .output_dtype = COUPLET_FLOAT32,
    };
  }
  AttendCase(const AttendCase&) = delete;
  AttendCase& operator=(const AttendCase&) = delete;

  couplet_attend_params& params() { return params_; }
  const couplet_rotary_params* rotary_params() const { return shape_.rotary_kind ? &rotary_params_ : nullptr; }
  const couplet_rotary* rotary() const { return rotary_.get(); }
  couplet_attend_sequence& sequence(size_t index) { return sequences_[index]; }
  std::vector<float>& outputs(size_t index) { return data_[index].outputs; }
  int32_t query_heads() const { return shape_.kv_heads * shape_.group_heads; }
  int64_t output_token_stride() const { return int64_t{query_heads()} * output_head_stride(); }
  int64_t output_head_stride() const { return shape_.head_dim + 3; }

  // Runs one body and returns the outputs of all sequences, NaN where nothing was written.
  std::vector<std::vector<float>> run(cpu::Isa isa, int32_t threads) {
    params_.threads = threads;
    for (Data& data : data_) std::fill(data.outputs.begin(), data.outputs.end(), NAN);
    std::vector<uint8_t> workspace(cpu::attend_workspace(params_, isa), 0xff);  // NaN to whoever reads before writing
    cpu::attend_run(params_, isa, workspace.data());
    return take_outputs();
  }

  std::vector<std::vector<float>> run_reference() {
    for (Data& data : data_) std::fill(data.outputs.begin(), data.outputs.end(), NAN);
    cpu::reference_attend(params_, rotary_params());
    return take_outputs();
  }

 private:
  struct Data {
    std::vector<uint8_t> pages;
    std::vector<const uint8_t*> page_pointers;
    std::vector<std::vector<float>> dense;  // one keys and one values array per run
    std::vector<couplet_dense_rows> runs;
    std::vector<float> queries, outputs;
  };
  struct Free {
    void operator()(couplet_table* table) const { cpu::table_entries.destroy(table); }
    void operator()(couplet_rotary* rotary) const { cpu::rotary_entries.destroy(rotary); }
  };

  int64_t value_offset() const {
    return shape_.kv_heads * couplet_page_bytes(shape_.key_codec, shape_.head_dim, shape_.page_tokens);
  }

  couplet_table* make_table(couplet_codec codec, bool on_levels) {
    size_t const count = static_cast<size_t>(shape_.kv_heads) * static_cast<size_t>(shape_.head_dim) *
                         static_cast<size_t>(couplet_codec_centroids(codec));
    std::vector<float> centroids(count);
    for (float& channel : centroids) channel = static_cast<float>(random_.uniform(-1.73, 1.73));  // variance 1
    if (on_levels) put_on_levels(codec, centroids);
    couplet_table_params const params{centroids.data(), shape_.kv_heads, shape_.head_dim, codec, nullptr};
    couplet_table* table = nullptr;
    couplet_report report{};
    CHECK(cpu::table_entries.create(&params, &table, &report) == COUPLET_OK, "%s", report.detail);
    return table;
  }

  void make_tables() {
    bool coded = false;
    for (const SequenceShape& sequence : shape_.sequences) coded = coded || !sequence.uncoded;
    if (!coded) return;
    key_table_.reset(make_table(shape_.key_codec, false));
    value_table_.reset(make_table(shape_.value_codec, shape_.value_levels));
  }

  void make_rotary() {
    if (!shape_.rotary_kind) return;
    int32_t longest = 1;
    for (const SequenceShape& sequence : shape_.sequences)
      longest = std::max(longest, sequence.before + sequence.queries);
    rotary_params_ = {nullptr, nullptr, 10000, shape_.rotary_kind, shape_.rotary_dim, longest, shape_.head_dim};
    if (shape_.tables != CaseShape::Tables::theta) {
      for (int32_t t = 0; t < longest; ++t)
        for (int32_t i = 0; i < shape_.rotary_dim / 2; ++i) {
          bool const scaled = shape_.tables == CaseShape::Tables::scaled;
          double const frequency = std::pow(10000, -2.0 * i / shape_.rotary_dim) / (scaled && i % 3 == 0 ? 4 : 1);
          double const angle = (scaled ? t : t + 0.3 * std::sin(0.1 * t)) * frequency;
          cos_.push_back(static_cast<float>(1.2 * std::cos(angle)));
          sin_.push_back(static_cast<float>(1.2 * std::sin(angle)));
        }
      rotary_params_.cos = cos_.data();
      rotary_params_.sin = sin_.data();
    }
    couplet_rotary* rotary = nullptr;
    couplet_report report{};
    CHECK(cpu::rotary_entries.create(&rotary_params_, &rotary, &report) == COUPLET_OK, "%s", report.detail);
    rotary_.reset(rotary);
  }

  // Dense runs that cover [first, end), cut where the dice say, each with strides of its own.
  void add_dense(int32_t first, int32_t end, Data* data) {
    while (first < end) {
      int32_t const tokens = random_.below(3) ? end - first : 1 + static_cast<int32_t>(random_.below(end - first));
      int64_t const head_stride = shape_.head_dim + random_.below(3),
                    token_stride = shape_.kv_heads * head_stride + random_.below(3);
      data->dense.push_back(random_.normals(static_cast<size_t>(tokens * token_stride)));
      data->dense.push_back(random_.normals(static_cast<size_t>(tokens * token_stride)));
      data->runs.push_back({data->dense.end()[-2].data(), data->dense.end()[-1].data(), token_stride, head_stride,
                            token_stride, head_stride, first, tokens});
      first += tokens;
    }
  }

  // Pages as the cache has them: on cache lines, one after the other in one piece of memory.
  void make_pages(int32_t begin, int32_t end, Data* data) {
    size_t const bytes = static_cast<size_t>(value_offset()) +
                         static_cast<size_t>(shape_.kv_heads * couplet_page_bytes(shape_.value_codec, shape_.head_dim,
                                                                                  shape_.page_tokens));
    int32_t const first = begin / shape_.page_tokens, last = (end + shape_.page_tokens - 1) / shape_.page_tokens;
    if (begin >= end) return;
    data->pages.resize(static_cast<size_t>(last - first) * bytes + COUPLET_PAGE_ALIGNMENT);
    for (uint8_t& byte : data->pages) byte = static_cast<uint8_t>(random_.next());
    size_t const address = reinterpret_cast<size_t>(data->pages.data());
    size_t const aligned = (COUPLET_PAGE_ALIGNMENT - address % COUPLET_PAGE_ALIGNMENT) % COUPLET_PAGE_ALIGNMENT;
    for (int32_t page = 0; page < last; ++page)
      data->page_pointers.push_back(
          page < first ? nullptr : data->pages.data() + aligned + static_cast<size_t>(page - first) * bytes);
  }

  void make_sequence(const SequenceShape& shape, Data* data, couplet_attend_sequence* sequence) {
    int32_t const total = shape.before + shape.queries;
    int32_t const newest_coded = (shape.coded_prefill ? total : shape.before) - shape.window;
    int32_t const coded_end = shape.uncoded ? 0 : std::max(shape.sinks, newest_coded);
    int32_t const coded_begin = shape.uncoded ? 0 : std::min(shape.sinks, coded_end);
    int32_t const dense_from = std::min(coded_end, std::max(0, shape.before - shape.window + 1));
    make_pages(coded_begin, coded_end, data);
    add_dense(0, std::min(coded_begin, total), data);
    add_dense(std::max(coded_begin, dense_from), total, data);

    int64_t const query_head_stride = shape_.head_dim + 1, query_token_stride = query_heads() * query_head_stride;
    data->queries = random_.normals(static_cast<size_t>(shape.queries * query_token_stride), shape_.query_scale);
    data->outputs.resize(static_cast<size_t>(shape.queries * output_token_stride()));
    *sequence = couplet_attend_sequence{
        .queries = data->queries.data(),
        .outputs = data->outputs.data(),
        .pages = data->page_pointers.data(),
        .dense = data->runs.data(),
        .query_token_stride = query_token_stride,
        .query_head_stride = query_head_stride,
        .output_token_stride = output_token_stride(),
        .output_head_stride = output_head_stride(),
        .dense_count = static_cast<int32_t>(data->runs.size()),
        .first_query = shape.before,
        .query_tokens = shape.queries,
        .coded_begin = coded_begin,
        .coded_end = coded_end,
        .window = shape.window,
    };
  }

  std::vector<std::vector<float>> take_outputs() {
    std::vector<std::vector<float>> all;
    for (const Data& data : data_) all.push_back(data.outputs);
    return all;
  }

  CaseShape shape_;
  Random random_;
  std::unique_ptr<couplet_table, Free> key_table_, value_table_;
  std::unique_ptr<couplet_rotary, Free> rotary_;
  couplet_rotary_params rotary_params_{};
  std::vector<float> cos_, sin_, head_sinks_;
  std::vector<couplet_attend_sequence> sequences_;
  std::vector<Data> data_;
  couplet_attend_params params_{};
};

}  // namespace couplet::test
