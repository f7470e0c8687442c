// The cache against a model of plain arrays: random steps, forks, truncates and aborts, on a backend in plain double
// precision and on the CPU backend; then byte budgets, failures and threads.
#include "../../native/cache/cache.h"

#include <algorithm>
#include <map>
#include <string>
#include <thread>

#include "../../native/dispatch/dispatch.h"
#include "fake_backend.h"

namespace couplet::test {
namespace {

struct Shape {
  int32_t layers, query_heads, kv_heads, head_dim;
  couplet_codec key_codec, value_codec;
};

constexpr Shape shape = {2, 4, 2, 32, {.group_channels = 4, .code_bits = 3}, {.group_channels = 8, .code_bits = 5}};
constexpr size_t side_floats = size_t{shape.kv_heads} * shape.head_dim;  // keys or values of a token in one layer

// Multiples of 1/8 of small size: distances to centroids are exact in float32, so every tie is a tie in every arithmetic.
std::vector<float> eighths(Random* random, size_t count) {
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

struct Tables {
  std::vector<std::vector<float>> keys, values;
  std::shared_ptr<const Codebook> codebook;

  Tables(const couplet_backend* backend, Random* random) {
    std::vector<const float*> key_pointers, value_pointers;
    for (int32_t layer = 0; layer < shape.layers; ++layer) {
      keys.push_back(eighths(random, side_floats << shape.key_codec.code_bits));
      values.push_back(eighths(random, side_floats << shape.value_codec.code_bits));
    }
    for (int32_t layer = 0; layer < shape.layers; ++layer) {
      key_pointers.push_back(keys[static_cast<size_t>(layer)].data());
      value_pointers.push_back(values[static_cast<size_t>(layer)].data());
    }
    couplet_report report{};
    Codebook::Shape const given = {shape.layers, shape.kv_heads, shape.head_dim, shape.key_codec, shape.value_codec};
    CHECK(Codebook::create(backend, given, key_pointers, value_pointers, &codebook, &report) == COUPLET_OK, "%s",
          report.detail);
  }

  Token token(Random* random) const {
    Token token;
    token.raw = eighths(random, shape.layers * 2 * side_floats);
    token.coded.resize(token.raw.size());
    for (int32_t layer = 0; layer < shape.layers; ++layer) {
      for (int side = 0; side < 2; ++side) {
        couplet_codec const codec = side == 0 ? shape.key_codec : shape.value_codec;
        FakeTable const table = {codec, shape.kv_heads, shape.head_dim,
                                 (side == 0 ? keys : values)[static_cast<size_t>(layer)]};
        for (int32_t head = 0; head < shape.kv_heads; ++head) {
          for (int32_t group = 0; group < couplet_codec_groups(codec, shape.head_dim); ++group) {
            int32_t const offset = head * shape.head_dim + group * codec.group_channels;
            const float* const centroid =
                table.centroid(head, group, table.nearest(head, group, token.side(token.raw, layer, side) + offset));
            std::copy(centroid, centroid + codec.group_channels, token.side(token.coded, layer, side) + offset);
          }
        }
      }
    }
    return token;
  }
};

struct ModelSequence {
  std::vector<Token> tokens;
  int64_t coded_end = 0;  // never below sinks
};

int64_t code_block_bytes(int32_t page_tokens) {
  return shape.layers * shape.kv_heads *
         (couplet_page_bytes(shape.key_codec, shape.head_dim, page_tokens) +
          couplet_page_bytes(shape.value_codec, shape.head_dim, page_tokens));
}
int64_t raw_token_bytes() { return static_cast<int64_t>(shape.layers * 2 * side_floats * sizeof(float)); }

// What a sequence that shares nothing takes.
int64_t expected_bytes(const ModelSequence& sequence, const CacheConfig& config) {
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

class Harness {
 public:
  Harness(const couplet_backend* backend, const CacheConfig& config, uint64_t seed)
      : config_(config), random_(seed), tables_(backend, &random_) {
    couplet_report report{};
    CHECK(Cache::create(backend, config, tables_.codebook, &cache_, &report) == COUPLET_OK, "%s", report.detail);
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

  CacheConfig config_;
  Random random_;
  Tables tables_;
  std::shared_ptr<Cache> cache_;
  std::map<SequenceId, ModelSequence> model_;
  double tolerance_ = 0;
};

void Harness::advance() {
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
  if (give_up) {
    if (random_.below(2)) step->abort();
    return;  // or its destructor aborts it
  }
  if (CHECK(step->commit(&report) == COUPLET_OK, "%s", report.detail)) model_ = std::move(after);
}

void Harness::attend_layer(Step* step, int32_t layer, const std::vector<StepRow>& rows,
                           const std::map<SequenceId, ModelSequence>& after, Prefill prefill, int32_t local_window) {
  couplet_report report{};
  constexpr int64_t gap = 5;  // strides are not the shapes
  int64_t const kv_stride = static_cast<int64_t>(side_floats) + gap,
                query_stride = shape.query_heads * shape.head_dim + gap;
  std::vector<StepData> data(rows.size());
  std::vector<std::vector<float>> keys, values, queries, outputs;
  for (size_t row = 0; row < rows.size(); ++row) {
    size_t const tokens = static_cast<size_t>(rows[row].tokens);
    keys.emplace_back(tokens * static_cast<size_t>(kv_stride));
    values.emplace_back(keys.back().size());
    queries.push_back(random_.normals(tokens * static_cast<size_t>(query_stride)));
    outputs.emplace_back(queries.back().size(), -1.0f);
    const ModelSequence& sequence = after.at(rows[row].sequence);
    size_t const first = sequence.tokens.size() - tokens;
    CHECK(step->first_token(row) == static_cast<int64_t>(first), "first token");
    for (size_t i = 0; i < tokens; ++i) {
      Token token = sequence.tokens[first + i];
      std::copy_n(token.side(token.raw, layer, 0), side_floats,
                  keys.back().data() + i * static_cast<size_t>(kv_stride));
      std::copy_n(token.side(token.raw, layer, 1), side_floats,
                  values.back().data() + i * static_cast<size_t>(kv_stride));
    }
    StepData& given = data[row];
    given.keys = keys.back().data();
    given.values = values.back().data();
    given.key_token_stride = given.value_token_stride = kv_stride;
    given.key_head_stride = given.value_head_stride = shape.head_dim;
    bool const append_only = random_.below(6) == 0;
    given.queries = append_only ? nullptr : queries.back().data();
    given.outputs = append_only ? nullptr : outputs.back().data();
    given.query_token_stride = given.output_token_stride = query_stride;
    given.query_head_stride = given.output_head_stride = shape.head_dim;
  }
  AttendOptions const options = {.local_window = local_window};
  if (!CHECK(step->attend(layer, data, options, &report) == COUPLET_OK, "%s", report.detail)) return;
  CHECK(step->attend(layer, data, options, &report) == COUPLET_INVALID_ARGUMENT, "a layer given twice");

  for (size_t row = 0; row < rows.size(); ++row) {
    if (!data[row].queries) continue;
    const ModelSequence& before = model_.at(rows[row].sequence);
    const ModelSequence& sequence = after.at(rows[row].sequence);
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
        int64_t const offset = (query - first) * query_stride + query_head * shape.head_dim;
        std::vector<double> sum(shape.head_dim);
        double total = 0;
        for (int64_t t = local_window ? std::max<int64_t>(0, query - local_window + 1) : 0; t <= query; ++t) {
          Token token = sequence.tokens[static_cast<size_t>(t)];
          std::vector<float>& read = t >= config_.sinks && t < coded_end ? token.coded : token.raw;
          const float* const key = token.side(read, layer, 0) + head * shape.head_dim;
          const float* const value = token.side(read, layer, 1) + head * shape.head_dim;
          double dot = 0;
          for (int32_t c = 0; c < shape.head_dim; ++c) dot += double{key[c]} * data[row].queries[offset + c];
          double const weight = std::exp(dot / std::sqrt(double{shape.head_dim}));
          total += weight;
          for (int32_t c = 0; c < shape.head_dim; ++c) sum[static_cast<size_t>(c)] += weight * value[c];
        }
        for (int32_t c = 0; c < shape.head_dim; ++c) {
          worst = std::max(worst, std::abs(sum[static_cast<size_t>(c)] / total - data[row].outputs[offset + c]));
        }
      }
    }
    CHECK(worst <= tolerance_, "row %zu from token %lld: error %g", row, static_cast<long long>(first), worst);
  }
}

// ---- single properties, on the fake backend -----------------------------------------------------------------------

CacheConfig small_config(int32_t sinks, int32_t window) {
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

couplet_status append(Cache* cache, SequenceId sequence, int32_t tokens, Random* random, couplet_report* report) {
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

void test_budget() {
  Random random(7);
  Tables const tables(fake_backend(), &random);
  CacheConfig config = small_config(4, 8);
  config.budget_bytes = 3 * code_block_bytes(config.page_tokens) + 40 * raw_token_bytes();
  std::shared_ptr<Cache> cache;
  couplet_report report{};
  CHECK(Cache::create(fake_backend(), config, tables.codebook, &cache, &report) == COUPLET_OK, "%s", report.detail);
  SequenceId sequence = 0, other = 0;
  CHECK(cache->create_sequence(&sequence, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(cache->create_sequence(&other, &report) == COUPLET_OK, "%s", report.detail);
  int64_t held = 0;
  couplet_status status = COUPLET_OK;
  while (status == COUPLET_OK && held < 1000) {
    status = append(cache.get(), sequence, 1, &random, &report);
    held += status == COUPLET_OK;
  }
  CHECK(status == COUPLET_CACHE_FULL, "status %d after %lld tokens", status, static_cast<long long>(held));
  CacheStatistics const full = cache->statistics();
  CHECK(full.tokens == held && full.page_bytes + full.raw_bytes <= config.budget_bytes, "%lld tokens",
        static_cast<long long>(full.tokens));
  CHECK(full.peak_bytes <= config.budget_bytes, "peak %lld", static_cast<long long>(full.peak_bytes));
  CHECK(append(cache.get(), sequence, 500, &random, &report) == COUPLET_CACHE_FULL, "500 tokens fit");
  CHECK(cache->memory_bytes() == full.page_bytes + full.raw_bytes, "a refused step took memory");
  CHECK(cache->truncate(sequence, 10, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(append(cache.get(), sequence, 1, &random, &report) == COUPLET_OK, "room again: %s", report.detail);
}

void test_out_of_memory() {
  Random random(8);
  Tables const tables(fake_backend(), &random);
  std::shared_ptr<Cache> cache;
  couplet_report report{};
  CHECK(Cache::create(fake_backend(), small_config(4, 8), tables.codebook, &cache, &report) == COUPLET_OK, "%s",
        report.detail);
  SequenceId sequence = 0;
  CHECK(cache->create_sequence(&sequence, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(append(cache.get(), sequence, 21, &random, &report) == COUPLET_OK, "%s", report.detail);
  int64_t const before = cache->memory_bytes();
  for (int64_t allowed = 0; allowed < 30; ++allowed) {
    allocations_left = allowed;
    couplet_status const status = append(cache.get(), sequence, 40, &random, &report);
    allocations_left = INT64_MAX;
    if (status == COUPLET_OK) {
      CHECK(allowed > 3, "%lld allocations were enough", static_cast<long long>(allowed));
      break;
    }
    CHECK(status == COUPLET_OUT_OF_MEMORY, "status %d", status);
    CHECK(cache->memory_bytes() == before, "%lld bytes kept", static_cast<long long>(cache->memory_bytes() - before));
  }
  int64_t length = 0;
  CHECK(cache->length(sequence, &length, &report) == COUPLET_OK && length == 61, "length %lld",
        static_cast<long long>(length));
}

void test_not_finite() {
  Random random(9);
  Tables const tables(fake_backend(), &random);
  for (int32_t bad_token : {1, 12, 39}) {  // a sink, one that is coded at once, one in the window
    for (bool in_keys : {true, false}) {
      std::shared_ptr<Cache> cache;
      couplet_report report{};
      CHECK(Cache::create(fake_backend(), small_config(4, 8), tables.codebook, &cache, &report) == COUPLET_OK, "%s",
            report.detail);
      SequenceId sequence = 0;
      CHECK(cache->create_sequence(&sequence, &report) == COUPLET_OK, "%s", report.detail);
      Rows rows(40, &random);
      (in_keys ? rows.keys : rows.values)[static_cast<size_t>(bad_token) * side_floats + shape.head_dim + 3] = NAN;
      StepData const data = rows.data();
      StepRow const row = {sequence, 40};
      std::shared_ptr<Step> step;
      CHECK(cache->begin({&row, 1}, Prefill::exact, &step, &report) == COUPLET_OK, "%s", report.detail);
      CHECK(step->attend(1, {&data, 1}, {}, &report) == COUPLET_NOT_FINITE, "a NaN was taken");
      CHECK(report.layer == 1 && report.kv_head == 1 && report.token == bad_token && report.channel == 3,
            "layer %d, head %d, token %lld, channel %d", report.layer, report.kv_head,
            static_cast<long long>(report.token), report.channel);
      CHECK(step->attend(0, {&data, 1}, {}, &report) == COUPLET_INVALID_ARGUMENT, "a failed step goes on");
      CHECK(step->commit(&report) == COUPLET_INVALID_ARGUMENT, "a failed step was committed");
      step->abort();
      CHECK(cache->memory_bytes() == 0, "memory left");
      CHECK(append(cache.get(), sequence, 3, &random, &report) == COUPLET_OK, "the sequence goes on: %s",
            report.detail);
    }
  }
}

void test_states() {
  Random random(10);
  Tables const tables(fake_backend(), &random);
  std::shared_ptr<Cache> cache;
  couplet_report report{};
  CacheConfig config = small_config(4, 8);
  config.head_dim = 64;
  CHECK(Cache::create(fake_backend(), config, tables.codebook, &cache, &report) == COUPLET_MISMATCH,
        "codebook of another shape");
  CHECK(Cache::create(fake_backend(), small_config(4, 8), nullptr, &cache, &report) == COUPLET_INVALID_ARGUMENT,
        "no codebook");
  CHECK(Cache::create(fake_backend(), small_config(4, 8), tables.codebook, &cache, &report) == COUPLET_OK, "%s",
        report.detail);

  SequenceId a = 0, b = 0;
  CHECK(cache->create_sequence(&a, &report) == COUPLET_OK && cache->create_sequence(&b, &report) == COUPLET_OK, "%s",
        report.detail);
  CHECK(append(cache.get(), a, 30, &random, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(cache->truncate(a, 31, &report) == COUPLET_INVALID_ARGUMENT, "longer than it is");
  CHECK(cache->truncate(a, -1, &report) == COUPLET_INVALID_ARGUMENT, "negative");
  std::shared_ptr<Step> step, second;
  StepRow const twice[] = {{a, 1}, {a, 1}};
  CHECK(cache->begin(twice, Prefill::exact, &step, &report) == COUPLET_INVALID_ARGUMENT, "a sequence twice");
  CHECK(cache->begin({}, Prefill::exact, &step, &report) == COUPLET_INVALID_ARGUMENT, "no rows");
  StepRow const too_long[] = {{a, INT32_MAX}};
  CHECK(cache->begin(too_long, Prefill::exact, &step, &report) == COUPLET_INVALID_ARGUMENT, "2^31 tokens");

  StepRow const both[] = {{a, 2}, {b, 0}};
  CHECK(cache->begin(both, Prefill::exact, &step, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(cache->begin({both, 1}, Prefill::exact, &second, &report) == COUPLET_BUSY, "two steps");
  SequenceId copy = 0;
  CHECK(cache->fork(a, &copy, &report) == COUPLET_BUSY && cache->drop(b, &report) == COUPLET_BUSY,
        "used inside a step");
  Rows const rows(2, &random);
  StepData const data[] = {rows.data(), {}};
  CHECK(step->attend(2, data, {}, &report) == COUPLET_INVALID_ARGUMENT, "no such layer");
  CHECK(step->attend(0, {data, 1}, {}, &report) == COUPLET_INVALID_ARGUMENT, "a row is missing");
  int32_t const stop = 1;
  CHECK(step->attend(0, data, {.cancel = &stop}, &report) == COUPLET_CANCELLED, "cancelled before it starts");
  CHECK(step->attend(0, data, {}, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(step->commit(&report) == COUPLET_INVALID_ARGUMENT && report.layer == 1, "layer 1 is missing");
  CHECK(step->attend(1, data, {}, &report) == COUPLET_OK, "%s", report.detail);
  cache->abandon(b);
  int64_t length = 0;
  CHECK(cache->length(b, &length, &report) == COUPLET_DISPOSED, "abandoned");
  CHECK(step->commit(&report) == COUPLET_OK, "%s", report.detail);
  CHECK(step->commit(&report) == COUPLET_DISPOSED, "committed twice");
  CHECK(cache->statistics().sequences == 1, "the abandoned sequence is gone");

  CHECK(cache->begin({both, 1}, Prefill::exact, &step, &report) == COUPLET_OK, "%s", report.detail);
  cache->dispose();
  cache->dispose();
  CHECK(cache->memory_bytes() == 0 && cache->disposed(), "memory left after dispose");
  CHECK(step->attend(0, {data, 1}, {}, &report) == COUPLET_DISPOSED, "step of a disposed cache");
  CHECK(cache->create_sequence(&a, &report) == COUPLET_DISPOSED, "disposed");
  CHECK(cache->begin({both, 1}, Prefill::exact, &second, &report) == COUPLET_DISPOSED, "disposed");
}

// A token that leaves the window is encoded once for each layer and side, whatever the steps' sizes.
void test_encodes_once() {
  Random random(11);
  Tables const tables(fake_backend(), &random);
  std::shared_ptr<Cache> cache;
  couplet_report report{};
  CHECK(Cache::create(fake_backend(), small_config(4, 8), tables.codebook, &cache, &report) == COUPLET_OK, "%s",
        report.detail);
  SequenceId sequence = 0;
  CHECK(cache->create_sequence(&sequence, &report) == COUPLET_OK, "%s", report.detail);
  encoded_tokens = 0;
  int64_t length = 0;
  for (int32_t tokens : {1, 3, 1, 5, 20, 1, 1, 1, 17, 64, 1, 2}) {
    CHECK(append(cache.get(), sequence, tokens, &random, &report) == COUPLET_OK, "%s", report.detail);
    length += tokens;
  }
  CHECK(encoded_tokens == (length - 4 - 8) * shape.layers * 2, "%lld tokens encoded",
        static_cast<long long>(encoded_tokens));
}

// A fork shares everything: two forks that write take their own copy of the last blocks only.
void test_fork_shares() {
  Random random(12);
  Tables const tables(fake_backend(), &random);
  std::shared_ptr<Cache> cache;
  couplet_report report{};
  CHECK(Cache::create(fake_backend(), small_config(4, 8), tables.codebook, &cache, &report) == COUPLET_OK, "%s",
        report.detail);
  SequenceId sequence = 0, fork = 0;
  CHECK(cache->create_sequence(&sequence, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(append(cache.get(), sequence, 200, &random, &report) == COUPLET_OK, "%s", report.detail);
  int64_t const before = cache->memory_bytes();
  CHECK(cache->fork(sequence, &fork, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(cache->memory_bytes() == before, "a fork took memory");
  CHECK(append(cache.get(), fork, 1, &random, &report) == COUPLET_OK, "%s", report.detail);
  int64_t const copied = cache->memory_bytes() - before;
  CHECK(copied > 0 && copied <= code_block_bytes(16) + 16 * raw_token_bytes(), "%lld bytes",
        static_cast<long long>(copied));
  CHECK(cache->drop(sequence, &report) == COUPLET_OK, "%s", report.detail);
  ModelSequence const alone = {.tokens = std::vector<Token>(201), .coded_end = 193};
  CHECK(cache->memory_bytes() == expected_bytes(alone, cache->config()), "%lld bytes",
        static_cast<long long>(cache->memory_bytes()));
}

void test_threads(const couplet_backend* backend) {
  Random random(13);
  Tables const tables(backend, &random);
  CacheConfig config = small_config(4, 8);
  config.threads = 2;
  std::shared_ptr<Cache> cache;
  couplet_report report{};
  CHECK(Cache::create(backend, config, tables.codebook, &cache, &report) == COUPLET_OK, "%s", report.detail);
  SequenceId root = 0;
  CHECK(cache->create_sequence(&root, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(append(cache.get(), root, 50, &random, &report) == COUPLET_OK, "%s", report.detail);
  std::atomic<int> running{3};
  std::vector<std::thread> threads;
  for (uint64_t thread = 0; thread < 3; ++thread) {
    threads.emplace_back([&, thread] {
      Random own(100 + thread);
      couplet_report said{};
      for (int round = 0; round < 20; ++round) {
        SequenceId fork = 0;
        couplet_status status = cache->fork(root, &fork, &said);
        CHECK(status == COUPLET_OK, "%s", said.detail);
        for (int i = 0; i < 5; ++i) {
          status = append(cache.get(), fork, static_cast<int32_t>(1 + own.below(9)), &own, &said);
          CHECK(status == COUPLET_OK, "%s", said.detail);
        }
        CHECK(cache->truncate(fork, 40, &said) == COUPLET_OK, "%s", said.detail);
        CHECK(cache->drop(fork, &said) == COUPLET_OK, "%s", said.detail);
      }
      --running;
    });
  }
  while (running > 0) {
    CacheStatistics const statistics = cache->statistics();
    CHECK(statistics.tokens >= 50, "tokens %lld", static_cast<long long>(statistics.tokens));
    std::this_thread::yield();
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(cache->drop(root, &report) == COUPLET_OK && cache->memory_bytes() == 0, "memory left");
}

// Abort and dispose from another thread while a layer is computed.
void test_abort_while_running() {
  Random random(14);
  Tables const tables(fake_backend(), &random);
  for (bool dispose : {false, true}) {
    std::shared_ptr<Cache> cache;
    couplet_report report{};
    CHECK(Cache::create(fake_backend(), small_config(4, 8), tables.codebook, &cache, &report) == COUPLET_OK, "%s",
          report.detail);
    SequenceId sequence = 0;
    CHECK(cache->create_sequence(&sequence, &report) == COUPLET_OK, "%s", report.detail);
    Rows const rows(400, &random);
    StepData data = rows.data();
    std::vector<float> const queries = random.normals(400 * shape.query_heads * shape.head_dim);
    std::vector<float> outputs(queries.size());
    data.queries = queries.data();
    data.outputs = outputs.data();
    data.query_token_stride = data.output_token_stride = shape.query_heads * shape.head_dim;
    data.query_head_stride = data.output_head_stride = shape.head_dim;
    StepRow const row = {sequence, 400};
    std::shared_ptr<Step> step;
    CHECK(cache->begin({&row, 1}, Prefill::exact, &step, &report) == COUPLET_OK, "%s", report.detail);
    std::atomic<couplet_status> status{COUPLET_OK};
    std::thread worker([&, copy = step] {
      couplet_report said{};
      status = copy->attend(0, {&data, 1}, {}, &said);
    });
    couplet_report busy{};
    while (step->commit(&busy) != COUPLET_BUSY && status == COUPLET_OK) std::this_thread::yield();
    if (dispose) {
      cache->dispose();
    } else {
      step->abort();
    }
    worker.join();
    CHECK(status == COUPLET_CANCELLED, "status %d", status.load());
    CHECK(cache->memory_bytes() == 0, "memory left");
    CHECK(step->commit(&report) == COUPLET_DISPOSED, "closed");
  }
}

}  // namespace
}  // namespace couplet::test

int main() {
  using namespace couplet;
  using namespace couplet::test;
  struct Case {
    int32_t sinks, window, page_tokens;
  };
  uint64_t seed = 1;
  for (Case const c :
       {Case{4, 8, 16}, {0, 0, 16}, {4, 0, 8}, {0, 5, 8}, {20, 32, 16}, {33, 1, 32}, {4, -1, 64}, {70, 3, 64}}) {
    CacheConfig config = small_config(c.sinks, c.window);
    config.page_tokens = c.page_tokens;
    Harness(fake_backend(), config, seed).run(60, 1e-6);
    Harness(find_backend("cpu", nullptr), config, seed).run(60, 1e-5);
    ++seed;
  }
  test_budget();
  test_out_of_memory();
  test_not_finite();
  test_states();
  test_encodes_once();
  test_fork_shares();
  test_threads(fake_backend());
  test_threads(find_backend("cpu", nullptr));
  test_abort_while_running();
  CHECK(allocated_bytes == 0, "%lld bytes were never released", static_cast<long long>(allocated_bytes));
  return finish();
}
