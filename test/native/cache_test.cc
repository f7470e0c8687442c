// The cache against a model of plain arrays: random steps, forks, truncates and aborts, on a backend in plain double
// precision and on the CPU backend; then byte budgets, failures and threads.
#include <thread>

#include "../../native/dispatch/dispatch.h"
#include "cache_case.h"

namespace couplet::test {
namespace {

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

void test_out_of_memory(const couplet_backend* backend) {
  Random random(8);
  Tables const tables(backend, &random);
  std::shared_ptr<Cache> cache;
  couplet_report report{};
  CHECK(Cache::create(backend, small_config(4, 8), tables.codebook, &cache, &report) == COUPLET_OK, "%s",
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

void test_not_finite(const couplet_backend* backend) {
  Random random(9);
  Tables const tables(backend, &random);
  for (int32_t bad_token : {1, 12, 39}) {  // a sink, one that is coded at once, one in the window
    for (bool in_keys : {true, false}) {
      std::shared_ptr<Cache> cache;
      couplet_report report{};
      CHECK(Cache::create(backend, small_config(4, 8), tables.codebook, &cache, &report) == COUPLET_OK, "%s",
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

// Heads that the parts of a layer leave out, name twice or do not have.
void test_refused_parts() {
  couplet_codec const codec = {8, 2};
  std::vector<float> const table(size_t{shape.kv_heads} * shape.head_dim * 4);
  Codebook::Source source;
  source.tables[0] = source.tables[1] = table.data();
  auto const status_of = [&](std::vector<std::vector<HeadCodecs>> codecs) {
    std::shared_ptr<const Codebook> codebook;
    couplet_report report{};
    Codebook::Shape const given = {1, shape.kv_heads, shape.head_dim, std::move(codecs)};
    return Codebook::create(fake_backend(), given, {&source, 1}, &codebook, &report);
  };
  CHECK(status_of({{{2, codec, codec}}}) == COUPLET_OK, "one part");
  CHECK(status_of({{{1, codec, codec}, {1, codec, codec}}}) == COUPLET_OK, "two parts");
  CHECK(status_of({}) == COUPLET_INVALID_ARGUMENT, "no layer");
  CHECK(status_of({{}}) == COUPLET_INVALID_ARGUMENT, "no part");
  CHECK(status_of({{{1, codec, codec}}}) == COUPLET_INVALID_ARGUMENT, "a head is missing");
  CHECK(status_of({{{2, codec, codec}, {1, codec, codec}}}) == COUPLET_INVALID_ARGUMENT, "a head too many");
  CHECK(status_of({{{2, codec, codec}, {0, codec, codec}}}) == COUPLET_INVALID_ARGUMENT, "a part without heads");
  CHECK(status_of({{{3, codec, codec}, {-1, codec, codec}}}) == COUPLET_INVALID_ARGUMENT, "less than no head");
  CHECK(status_of({{{2, codec, {5, 2}}}}) == COUPLET_INVALID_ARGUMENT, "groups that do not divide headDim");

  std::vector<float> matrices(side_floats * shape.head_dim);
  source.value_mix = source.value_unmix = matrices.data();
  CHECK(status_of({{{2, codec, codec}}}) == COUPLET_OK, "matrices");
  matrices.back() = NAN;
  CHECK(status_of({{{2, codec, codec}}}) == COUPLET_NOT_FINITE, "a matrix with a NaN");
  source.value_mix = source.value_unmix = nullptr;

  std::vector<int32_t> order(static_cast<size_t>(shape.head_dim));
  for (size_t channel = 0; channel < order.size(); ++channel)
    order[order.size() - 1 - channel] = static_cast<int32_t>(channel);
  source.key_order = order.data();
  CHECK(status_of({{{2, codec, codec}}}) == COUPLET_OK, "an order");
  for (int32_t const wrong : {-1, shape.head_dim, order[1]}) {
    order[0] = wrong;
    CHECK(status_of({{{2, codec, codec}}}) == COUPLET_INVALID_ARGUMENT, "an order with channel %d", wrong);
  }
}

// A token that leaves the window is encoded once for each part of a layer and side, whatever the steps' sizes.
void test_encodes_once() {
  int64_t parts = 0;
  for (const std::vector<HeadCodecs>& layer : layer_codecs) parts += static_cast<int64_t>(layer.size());
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
  CHECK(encoded_tokens == (length - 4 - 8) * parts * 2, "%lld tokens encoded", static_cast<long long>(encoded_tokens));
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
    RowFormat const there{Place::device, COUPLET_FLOAT32};
    int stream = 0;
    Harness(fake_device_backend(), config, seed).run(30, 1e-6);
    Harness(fake_device_backend(), config, seed, {there, there, &stream}).run(30, 1e-6);
    Harness(find_backend("cpu", nullptr), config, seed).run(60, 1e-5);
    ++seed;
  }
  test_budget();
  test_out_of_memory(fake_backend());
  test_out_of_memory(fake_device_backend());
  test_not_finite(fake_backend());
  test_not_finite(fake_device_backend());
  test_states();
  test_refused_parts();
  test_encodes_once();
  test_fork_shares();
  test_threads(fake_backend());
  test_threads(fake_device_backend());
  test_threads(find_backend("cpu", nullptr));
  test_abort_while_running();
  CHECK(allocated_bytes == 0, "%lld bytes were never released", static_cast<long long>(allocated_bytes));
  return finish();
}
