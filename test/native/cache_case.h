// A cache beside a model of plain arrays: random steps, forks, truncates and aborts on any backend, with rows in host memory or on the
// device, in any element type.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "../../native/cache/cache.h"
#include "../../native/cpu/half.h"
#include "fake_backend.h"

namespace couplet::test {

struct CacheShape {
  int32_t layers, query_heads, kv_heads, head_dim;
};

inline constexpr CacheShape shape = {2, 4, 2, 32};

// A layer whose heads share their codecs, and one whose heads have their own.
inline const std::vector<std::vector<HeadCodecs>> layer_codecs = {
    {{shape.kv_heads, {.group_channels = 4, .code_bits = 3}, {.group_channels = 8, .code_bits = 5}}},
    {{1, {.group_channels = 8, .code_bits = 4}, {.group_channels = 16, .code_bits = 3}},
     {1, {.group_channels = 2, .code_bits = 2}, {.group_channels = 4, .code_bits = 5}}}};

inline couplet_codec codec_of(int32_t layer, int side, int32_t head) {
  size_t part = 0;
  for (const std::vector<HeadCodecs>& parts = layer_codecs[static_cast<size_t>(layer)]; head >= parts[part].heads;)
    head -= parts[part++].heads;
  const HeadCodecs& codecs = layer_codecs[static_cast<size_t>(layer)][part];
  return side == 0 ? codecs.key : codecs.value;
}

inline constexpr int64_t row_gap = 5;  // floats: strides are not the shapes
inline constexpr size_t side_floats = static_cast<size_t>(shape.kv_heads) *
                                      static_cast<size_t>(shape.head_dim);  // keys or values of a token in one layer

// Multiples of 1/8 of small size: distances to centroids are exact in float32, so every tie is a tie in every arithmetic.
inline std::vector<float> eighths(Random* random, size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(random->below(33) - 16) / 8;
  return values;
}

struct Token {  // [layer][side][kv head][channel]
  std::vector<float> raw, coded;
  float* side(std::vector<float>& rows, int32_t layer, int side_index) const {
    return rows.data() + (2 * static_cast<size_t>(layer) + static_cast<size_t>(side_index)) * side_floats;
  }
};

// Values of the last layer are mixed: channel c of a head becomes channel `place[c]`, some of them negated, which is exact.
struct Mixing {
  std::vector<int32_t> places;  // [kv head][channel]
  std::vector<float> signs;     // [kv head][channel]
  std::vector<float> mix, unmix;

  explicit Mixing(Random* random) : mix(side_floats * shape.head_dim), unmix(mix.size()) {
    for (int32_t head = 0; head < shape.kv_heads; ++head) {
      std::vector<int32_t> left(static_cast<size_t>(shape.head_dim));
      for (int32_t channel = 0; channel < shape.head_dim; ++channel) left[static_cast<size_t>(channel)] = channel;
      for (int32_t channel = 0; channel < shape.head_dim; ++channel) {
        auto const pick = left.begin() + random->below(static_cast<int64_t>(left.size()));
        places.push_back(*pick);
        signs.push_back(random->below(2) ? 1.0f : -1.0f);
        mix[static_cast<size_t>((head * shape.head_dim + channel) * shape.head_dim + *pick)] = signs.back();
        unmix[static_cast<size_t>((head * shape.head_dim + *pick) * shape.head_dim + channel)] = signs.back();
        left.erase(pick);
      }
    }
  }
  std::vector<float> mixed(const float* rows) const {
    std::vector<float> out(side_floats);
    for (size_t i = 0; i < side_floats; ++i) out[place(i)] = signs[i] * rows[i];
    return out;
  }
  void unmixed(const std::vector<float>& from, float* rows) const {
    for (size_t i = 0; i < side_floats; ++i) rows[i] = signs[i] * from[place(i)];
  }

 private:
  size_t place(size_t i) const { return i / shape.head_dim * shape.head_dim + static_cast<size_t>(places[i]); }
};

// Keys of the first layer stand in another order, the same in all heads.
struct Order {
  std::vector<int32_t> channels;

  explicit Order(Random* random) {
    for (int32_t channel = 0; channel < shape.head_dim; ++channel)
      channels.insert(channels.begin() + random->below(channel + 1), channel);
  }
  std::vector<float> ordered(const float* rows) const {
    std::vector<float> out(side_floats);
    for (size_t i = 0; i < side_floats; ++i) out[i] = rows[place(i)];
    return out;
  }
  void restored(const std::vector<float>& from, float* rows) const {
    for (size_t i = 0; i < side_floats; ++i) rows[place(i)] = from[i];
  }

 private:
  size_t place(size_t i) const {
    return i / shape.head_dim * shape.head_dim + static_cast<size_t>(channels[i % shape.head_dim]);
  }
};

struct Tables {
  std::vector<FakeTable> heads;  // [layer][side][kv head]
  Mixing mixing;
  Order order;
  std::shared_ptr<const Codebook> codebook;

  Tables(Device device, Random* random) : mixing(random), order(random) {
    std::vector<std::vector<float>> sides;  // [layer][side]
    for (int32_t layer = 0; layer < shape.layers; ++layer) {
      for (int side = 0; side < 2; ++side) {
        std::vector<float>& table = sides.emplace_back();
        for (int32_t head = 0; head < shape.kv_heads; ++head) {
          couplet_codec const codec = codec_of(layer, side, head);
          heads.push_back(
              {codec, 1, shape.head_dim, eighths(random, static_cast<size_t>(shape.head_dim) << codec.code_bits)});
          table.insert(table.end(), heads.back().centroids.begin(), heads.back().centroids.end());
        }
      }
    }
    std::vector<Codebook::Source> sources(static_cast<size_t>(shape.layers));
    for (size_t i = 0; i < sides.size(); ++i) sources[i / 2].tables[i % 2] = sides[i].data();
    sources.back().value_mix = mixing.mix.data();
    sources.back().value_unmix = mixing.unmix.data();
    sources.front().key_order = order.channels.data();
    couplet_report report{};
    Codebook::Shape const given = {shape.layers, shape.kv_heads, shape.head_dim, layer_codecs};
    CHECK(Codebook::create(device, given, sources, &codebook, &report) == COUPLET_OK, "%s", report.detail);
  }

  const FakeTable& head(int32_t layer, int side, int32_t head) const {
    return heads[static_cast<size_t>((2 * layer + side) * shape.kv_heads + head)];
  }

  Token token(Random* random) const {
    Token token;
    token.raw = eighths(random, shape.layers * 2 * side_floats);
    token.coded.resize(token.raw.size());
    for (int32_t layer = 0; layer < shape.layers; ++layer) {
      for (int side = 0; side < 2; ++side) {
        bool const is_mixed = side == 1 && layer == shape.layers - 1, is_ordered = side == 0 && layer == 0;
        const float* const raw = token.side(token.raw, layer, side);
        std::vector<float> const rows = is_mixed     ? mixing.mixed(raw)
                                        : is_ordered ? order.ordered(raw)
                                                     : std::vector<float>(raw, raw + side_floats);
        std::vector<float> coded(side_floats);
        for (int32_t head = 0; head < shape.kv_heads; ++head) {
          const FakeTable& table = this->head(layer, side, head);
          int32_t const channels = table.codec.group_channels;
          for (int32_t group = 0; group < shape.head_dim / channels; ++group) {
            int32_t const offset = head * shape.head_dim + group * channels;
            const float* const centroid = table.centroid(0, group, table.nearest(0, group, rows.data() + offset));
            std::copy(centroid, centroid + channels, coded.begin() + offset);
          }
        }
        float* const place = token.side(token.coded, layer, side);
        if (is_mixed)
          mixing.unmixed(coded, place);
        else if (is_ordered)
          order.restored(coded, place);
        else
          std::copy(coded.begin(), coded.end(), place);
      }
    }
    return token;
  }
};

struct ModelSequence {
  std::vector<Token> tokens;
  int64_t coded_end = 0;  // never below sinks
};

inline int64_t code_block_bytes(int32_t page_tokens) {
  int64_t bytes = 0;
  for (int32_t layer = 0; layer < shape.layers; ++layer)
    for (int side = 0; side < 2; ++side)
      for (int32_t head = 0; head < shape.kv_heads; ++head)
        bytes += couplet_page_bytes(codec_of(layer, side, head), shape.head_dim, page_tokens);
  return bytes;
}
inline int64_t raw_token_bytes() { return static_cast<int64_t>(shape.layers * 2 * side_floats * sizeof(float)); }

// What a sequence that shares nothing takes.
inline int64_t expected_bytes(const ModelSequence& sequence, const CacheConfig& config) {
  auto const length = static_cast<int64_t>(sequence.tokens.size());
  int64_t const pages = sequence.coded_end > config.sinks
                            ? (sequence.coded_end - 1) / config.page_tokens - config.sinks / config.page_tokens + 1
                            : 0;
  int64_t const sinks = std::min<int64_t>(length, config.sinks);
  int64_t const sink_capacity = std::min<int64_t>((sinks + 15) / 16 * 16, config.sinks);
  int64_t const window_blocks =
      length > sequence.coded_end ? (length - config.sinks + 15) / 16 - (sequence.coded_end - config.sinks) / 16 : 0;
  return pages * code_block_bytes(config.page_tokens) + (sink_capacity + window_blocks * 16) * raw_token_bytes();
}

// How the rows of a call reach the cache.
struct RowsCase {
  RowFormat inputs, outputs;
  void* stream = nullptr;
};

inline size_t element_bytes(int32_t dtype) { return dtype == COUPLET_FLOAT32 ? 4 : 2; }

inline std::vector<uint8_t> to_elements(const std::vector<float>& values, int32_t dtype) {
  std::vector<uint8_t> bytes(values.size() * element_bytes(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    auto const bits = __builtin_bit_cast(uint32_t, values[i]);
    auto const narrow = dtype == COUPLET_FLOAT16 ? cpu::float_to_half(values[i]) : static_cast<uint16_t>(bits >> 16);
    if (dtype == COUPLET_FLOAT32)
      std::memcpy(&bytes[4 * i], &bits, 4);
    else
      std::memcpy(&bytes[2 * i], &narrow, 2);
  }
  return bytes;
}

inline std::vector<float> to_floats(const std::vector<uint8_t>& bytes, int32_t dtype) {
  std::vector<float> values(bytes.size() / element_bytes(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t narrow = 0;
    std::memcpy(&narrow, &bytes[element_bytes(dtype) * i], 2);
    if (dtype == COUPLET_FLOAT32)
      std::memcpy(&values[i], &bytes[4 * i], 4);
    else
      values[i] = dtype == COUPLET_FLOAT16 ? cpu::half_to_float(narrow)
                                           : __builtin_bit_cast(float, static_cast<uint32_t>(narrow) << 16);
  }
  return values;
}

// Elements in the memory of a device, or of the host.
class TestRows {
 public:
  TestRows(Device device, RowFormat format, const std::vector<float>& values)
      : device_(device), format_(format), host_(to_elements(values, format.dtype)) {
    if (format.place == Place::host) return;
    couplet_report report{};
    CHECK(device.select(&report) == COUPLET_OK, "%s", report.detail);
    memory_ = device.backend->memory.allocate(std::max<size_t>(host_.size(), 1));
    if (host_.empty()) return;
    CHECK(device.backend->memory.copy(memory_, host_.data(), host_.size(), nullptr, &report) == COUPLET_OK, "%s",
          report.detail);
  }
  TestRows(TestRows&& other) noexcept
      : device_(other.device_), format_(other.format_), host_(std::move(other.host_)), memory_(other.memory_) {
    other.memory_ = nullptr;
  }
  ~TestRows() {
    if (memory_) device_.backend->memory.release(memory_, std::max<size_t>(host_.size(), 1));
  }

  void* data() { return memory_ ? memory_ : host_.data(); }
  std::vector<float> read() {
    couplet_report report{};
    if (memory_ && !host_.empty())
      CHECK(device_.backend->memory.copy(host_.data(), memory_, host_.size(), nullptr, &report) == COUPLET_OK, "%s",
            report.detail);
    return to_floats(host_, format_.dtype);
  }

 private:
  Device device_;
  RowFormat format_;
  std::vector<uint8_t> host_;
  void* memory_ = nullptr;
};

class Harness {
 public:
  Harness(Device device, const CacheConfig& config, uint64_t seed, const RowsCase& rows = {})
      : device_(device), config_(config), rows_(rows), random_(seed), tables_(device, &random_) {
    couplet_report report{};
    CHECK(Cache::create(device, config, tables_.codebook, &cache_, &report) == COUPLET_OK, "%s", report.detail);
  }

  void run(int steps, double tolerance) {
    tolerance_ = tolerance;
    for (int step = 0; step < steps; ++step) {
      switch (random_.below(8)) {
        case 0: create(); break;
        case 1: fork(); break;
        case 2: truncate(); break;
        case 3:
          if (random_.below(3) == 0) drop();
          break;
        default: advance(); break;
      }
      compare_statistics();
    }
    while (!model_.empty()) drop();
    CHECK(cache_->memory_bytes() == 0, "%lld bytes left", static_cast<long long>(cache_->memory_bytes()));
  }

 private:
  SequenceId pick() { return std::next(model_.begin(), random_.below(static_cast<int64_t>(model_.size())))->first; }

  void create() {
    couplet_report report{};
    SequenceId id = 0;
    CHECK(cache_->create_sequence(&id, &report) == COUPLET_OK, "%s", report.detail);
    model_[id] = {.tokens = {}, .coded_end = config_.sinks};
  }

  void fork() {
    if (model_.empty()) return;
    couplet_report report{};
    SequenceId const from = pick();
    SequenceId id = 0;
    CHECK(cache_->fork(from, &id, &report) == COUPLET_OK, "%s", report.detail);
    model_[id] = model_[from];
  }

  void truncate() {
    if (model_.empty()) return;
    couplet_report report{};
    SequenceId const id = pick();
    ModelSequence& sequence = model_[id];
    int64_t const tokens = random_.below(2)
                               ? random_.below(static_cast<int64_t>(sequence.tokens.size()) + 1)
                               : std::max<int64_t>(0, static_cast<int64_t>(sequence.tokens.size()) - random_.below(6));
    CHECK(cache_->truncate(id, tokens, &report) == COUPLET_OK, "%s", report.detail);
    sequence.tokens.resize(static_cast<size_t>(tokens));
    sequence.coded_end = std::max<int64_t>(config_.sinks, std::min(sequence.coded_end, tokens));
  }

  void drop() {
    if (model_.empty()) return;
    couplet_report report{};
    SequenceId const id = pick();
    CHECK(cache_->drop(id, &report) == COUPLET_OK, "%s", report.detail);
    CHECK(cache_->drop(id, &report) == COUPLET_DISPOSED, "dropped twice");
    model_.erase(id);
  }

  void advance();
  void attend_layer(Step* step, int32_t layer, const std::vector<StepRow>& rows,
                    const std::map<SequenceId, ModelSequence>& after, Prefill prefill, int32_t local_window);
  void compare(const ModelSequence& before, const ModelSequence& sequence, int32_t layer, Prefill prefill,
               int32_t local_window, const std::vector<float>& queries, const std::vector<float>& outputs);

  void compare_statistics() {
    CacheStatistics const statistics = cache_->statistics();
    int64_t tokens = 0, coded = 0;
    for (const auto& [id, sequence] : model_) {
      int64_t length = -1;
      CHECK(cache_->length(id, &length, nullptr) == COUPLET_OK, "length");
      CHECK(length == static_cast<int64_t>(sequence.tokens.size()), "length %lld, model %zu",
            static_cast<long long>(length), sequence.tokens.size());
      tokens += length;
      coded += sequence.coded_end - config_.sinks;
    }
    CHECK(statistics.tokens == tokens && statistics.coded_tokens == coded && statistics.raw_tokens == tokens - coded,
          "%lld tokens, %lld coded", static_cast<long long>(statistics.tokens),
          static_cast<long long>(statistics.coded_tokens));
    int64_t const used = statistics.page_bytes + statistics.raw_bytes;
    CHECK(cache_->memory_bytes() == used && statistics.peak_bytes >= used, "peak below use");
    if (model_.size() == 1 && tokens > 0) {
      int64_t const expected = expected_bytes(model_.begin()->second, config_);
      CHECK(used == expected, "%lld bytes, expected %lld", static_cast<long long>(used),
            static_cast<long long>(expected));
      double const channels = 2.0 * shape.layers * shape.kv_heads * shape.head_dim * static_cast<double>(tokens);
      CHECK(std::abs(statistics.bits_per_channel -
                     8.0 * static_cast<double>(used + statistics.codebook_bytes) / channels) < 1e-9,
            "%g bits per channel", statistics.bits_per_channel);
    }
  }

  Device device_;
  CacheConfig config_;
  RowsCase rows_;
  Random random_;
  Tables tables_;
  std::vector<std::function<void()>> comparisons_;  // of what a stream may not have done yet
  std::shared_ptr<Cache> cache_;
  std::map<SequenceId, ModelSequence> model_;
  double tolerance_ = 0;
};

inline void Harness::advance() {
  if (model_.empty()) return;
  couplet_report report{};
  std::vector<StepRow> rows;
  std::map<SequenceId, ModelSequence> after = model_;
  int64_t const wanted = 1 + random_.below(3);
  for (const auto& [id, sequence] : model_) {
    if (static_cast<int64_t>(rows.size()) == wanted || random_.below(3) == 0) continue;
    int64_t const few = random_.below(4), many = random_.below(90);
    rows.push_back({id, static_cast<int32_t>(random_.below(3) == 0 ? many : few)});
    ModelSequence& next = after[id];
    for (int32_t i = 0; i < rows.back().tokens; ++i) next.tokens.push_back(tables_.token(&random_));
    if (config_.window >= 0) {
      next.coded_end = std::max(next.coded_end, static_cast<int64_t>(next.tokens.size()) - config_.window);
    }
  }
  if (rows.empty()) return;
  Prefill const prefill = random_.below(2) ? Prefill::exact : Prefill::coded;
  int32_t const local_window = random_.below(3) == 0 ? static_cast<int32_t>(1 + random_.below(40)) : 0;
  std::shared_ptr<Step> step;
  if (!CHECK(cache_->begin(rows, prefill, &step, &report) == COUPLET_OK, "%s", report.detail)) return;
  CHECK(cache_->truncate(rows[0].sequence, 0, &report) == COUPLET_BUSY, "truncate inside a step");
  bool const give_up = random_.below(5) == 0;
  int32_t const layers = give_up ? static_cast<int32_t>(random_.below(shape.layers + 1)) : shape.layers;
  for (int32_t i = 0; i < layers; ++i)
    attend_layer(step.get(), shape.layers - 1 - i, rows, after, prefill, local_window);
  bool const waits = random_.below(3) == 0;
  if (waits) CHECK(step->synchronize(&report) == COUPLET_OK, "%s", report.detail);
  if (give_up) {
    if (random_.below(2))
      step->abort();
    else
      step.reset();  // its destructor aborts it
  } else {
    CHECK(step->commit(&report) == COUPLET_OK, "%s", report.detail);
  }
  for (const std::function<void()>& comparison : comparisons_) comparison();
  comparisons_.clear();
  if (!give_up) model_ = std::move(after);
}

inline void Harness::attend_layer(Step* step, int32_t layer, const std::vector<StepRow>& rows,
                                  const std::map<SequenceId, ModelSequence>& after, Prefill prefill,
                                  int32_t local_window) {
  couplet_report report{};
  int64_t const kv_stride = static_cast<int64_t>(side_floats) + row_gap,
                query_stride = shape.query_heads * shape.head_dim + row_gap;
  std::vector<StepData> data(rows.size());
  struct Given {
    TestRows keys, values, queries, outputs;
    std::vector<float> query_floats;
  };
  auto const given = std::make_shared<std::vector<Given>>();
  for (size_t row = 0; row < rows.size(); ++row) {
    size_t const tokens = static_cast<size_t>(rows[row].tokens);
    std::vector<float> keys(tokens * static_cast<size_t>(kv_stride)), values(keys.size());
    std::vector<float> queries = random_.normals(tokens * static_cast<size_t>(query_stride));
    queries = to_floats(to_elements(queries, rows_.inputs.dtype), rows_.inputs.dtype);
    const ModelSequence& sequence = after.at(rows[row].sequence);
    size_t const first = sequence.tokens.size() - tokens;
    CHECK(step->first_token(row) == static_cast<int64_t>(first), "first token");
    for (size_t i = 0; i < tokens; ++i) {
      Token token = sequence.tokens[first + i];
      std::copy_n(token.side(token.raw, layer, 0), side_floats, keys.data() + i * static_cast<size_t>(kv_stride));
      std::copy_n(token.side(token.raw, layer, 1), side_floats, values.data() + i * static_cast<size_t>(kv_stride));
    }
    std::vector<float> const nothing(queries.size(), -1.0f);
    given->push_back({{device_, rows_.inputs, keys},
                      {device_, rows_.inputs, values},
                      {device_, rows_.inputs, queries},
                      {device_, rows_.outputs, nothing},
                      queries});
  }
  for (size_t row = 0; row < rows.size(); ++row) {
    StepData& to = data[row];
    Given& from = (*given)[row];
    bool const append_only = random_.below(6) == 0;
    to.keys = from.keys.data();
    to.values = from.values.data();
    to.queries = append_only ? nullptr : from.queries.data();
    to.outputs = append_only ? nullptr : from.outputs.data();
    to.key_token_stride = to.value_token_stride = kv_stride;
    to.query_token_stride = to.output_token_stride = query_stride;
    to.key_head_stride = to.value_head_stride = to.query_head_stride = to.output_head_stride = shape.head_dim;
  }
  AttendOptions const options = {
      .local_window = local_window, .inputs = rows_.inputs, .outputs = rows_.outputs, .stream = rows_.stream};
  if (!CHECK(step->attend(layer, data, options, &report) == COUPLET_OK, "%s", report.detail)) return;
  CHECK(step->attend(layer, data, options, &report) == COUPLET_INVALID_ARGUMENT, "a layer given twice");
  for (size_t row = 0; row < rows.size(); ++row) {
    if (!data[row].queries) continue;
    comparisons_.push_back([this, given, row, layer, prefill, local_window, before = model_.at(rows[row].sequence),
                            sequence = after.at(rows[row].sequence)] {
      Given& taken = (*given)[row];
      compare(before, sequence, layer, prefill, local_window, taken.query_floats, taken.outputs.read());
    });
  }
  if (rows_.stream && rows_.outputs.place == Place::device) return;  // else it is done
  for (const std::function<void()>& comparison : comparisons_) comparison();
  comparisons_.clear();
}

inline void Harness::compare(const ModelSequence& before, const ModelSequence& sequence, int32_t layer, Prefill prefill,
                             int32_t local_window, const std::vector<float>& queries,
                             const std::vector<float>& outputs) {
  int64_t const query_stride = shape.query_heads * shape.head_dim + row_gap;
  auto const channels = static_cast<size_t>(shape.head_dim);
  auto const first = static_cast<int64_t>(before.tokens.size());
  double worst = 0;
  for (int64_t query = first; query < static_cast<int64_t>(sequence.tokens.size()); ++query) {
    int64_t coded_end = before.coded_end;
    if (config_.window >= 0) {
      int64_t const most = prefill == Prefill::coded ? sequence.coded_end : std::min(sequence.coded_end, first);
      coded_end = std::max(coded_end, std::min(most, query - config_.window + 1));
    }
    for (int32_t query_head = 0; query_head < shape.query_heads; ++query_head) {
      int32_t const head = query_head / (shape.query_heads / shape.kv_heads);
      auto const offset = static_cast<size_t>((query - first) * query_stride + query_head * shape.head_dim);
      std::vector<double> sum(shape.head_dim);
      double total = 0;
      for (int64_t t = local_window ? std::max<int64_t>(0, query - local_window + 1) : 0; t <= query; ++t) {
        Token token = sequence.tokens[static_cast<size_t>(t)];
        std::vector<float>& read = t >= config_.sinks && t < coded_end ? token.coded : token.raw;
        const float* const key = token.side(read, layer, 0) + head * shape.head_dim;
        const float* const value = token.side(read, layer, 1) + head * shape.head_dim;
        double dot = 0;
        for (size_t c = 0; c < channels; ++c) dot += double{key[c]} * queries[offset + c];
        double const weight = std::exp(dot / std::sqrt(static_cast<double>(shape.head_dim)));
        total += weight;
        for (size_t c = 0; c < channels; ++c) sum[c] += weight * value[c];
      }
      for (size_t c = 0; c < channels; ++c) worst = std::max(worst, std::abs(sum[c] / total - outputs[offset + c]));
    }
  }
  CHECK(worst <= tolerance_, "layer %d from token %lld: error %g", layer, static_cast<long long>(first), worst);
}

inline CacheConfig small_config(int32_t sinks, int32_t window) {
  return {.layers = shape.layers,
          .query_heads = shape.query_heads,
          .kv_heads = shape.kv_heads,
          .head_dim = shape.head_dim,
          .sinks = sinks,
          .window = window,
          .page_tokens = 16,
          .threads = 1};
}

struct Rows {  // the same random rows for every layer
  std::vector<float> keys, values;
  Rows(int32_t tokens, Random* random)
      : keys(random->normals(static_cast<size_t>(tokens) * side_floats)), values(random->normals(keys.size())) {}
  StepData data() const {
    StepData data;
    data.keys = keys.data();
    data.values = values.data();
    data.key_token_stride = data.value_token_stride = side_floats;
    data.key_head_stride = data.value_head_stride = shape.head_dim;
    return data;
  }
};

inline couplet_status append(Cache* cache, SequenceId sequence, int32_t tokens, Random* random,
                             couplet_report* report) {
  Rows const rows(tokens, random);
  StepData const data = rows.data();
  StepRow const row = {sequence, tokens};
  std::shared_ptr<Step> step;
  couplet_status status = cache->begin({&row, 1}, Prefill::exact, &step, report);
  for (int32_t layer = 0; status == COUPLET_OK && layer < shape.layers; ++layer) {
    status = step->attend(layer, {&data, 1}, {}, report);
  }
  return status == COUPLET_OK ? step->commit(report) : status;
}

}  // namespace couplet::test
