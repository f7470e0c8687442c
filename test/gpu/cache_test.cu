// The cache on a GPU, or on the simulator: the steps of test/native/cache_case.h with rows on either side, waiting or only enqueued;
// reports of what was enqueued; copies between devices; budgets, and memory that ends.
#include <thread>

#include "../../cuda/gpu.h"
#include "../../native/dispatch/dispatch.h"
#include "../native/cache_case.h"

extern "C" const couplet_backend* couplet_backend_entry(couplet_report* report);

namespace couplet::test {
namespace {

const couplet_backend* backend() {
  couplet_report report{};
  static const couplet_backend* const found = couplet_backend_entry(&report);
  CHECK(found, "%s", report.detail);
  return found;
}

void random_steps() {
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "no stream");
  struct Case {
    int32_t sinks, window, page_tokens;
    RowsCase rows;
  };
  RowFormat const host{}, device{Place::device, COUPLET_FLOAT32}, half{Place::device, COUPLET_FLOAT16},
      bfloat{Place::device, COUPLET_BFLOAT16}, host_half{Place::host, COUPLET_FLOAT16};
  uint64_t seed = 1;
  for (const Case& c : {Case{4, 8, 16, {host, host}},
                        {0, 0, 16, {host_half, host_half}},
                        {4, 0, 8, {device, device}},
                        {0, 40, 8, {device, device, stream}},
                        {20, 32, 16, {half, half, stream}},
                        {33, 1, 32, {bfloat, bfloat, stream}},
                        {4, -1, 64, {half, host, stream}},
                        {70, 3, 64, {host, device, stream}}}) {
    CacheConfig config = small_config(c.sinks, c.window);
    config.page_tokens = c.page_tokens;
    // Of values up to 2 in size; queries of a prefill and their keys go through tf32, of 10 bits.
    double const tolerance = c.rows.outputs.dtype == COUPLET_BFLOAT16 ? 2e-2 : 4e-3;
    Harness({backend(), 0}, config, seed++, c.rows).run(24, tolerance);
  }
  CHECK(cudaStreamDestroy(stream) == cudaSuccess, "a stream was not destroyed");
}

struct Fixture {
  Random random{21};
  Tables tables;
  std::shared_ptr<Cache> cache;
  couplet_report report{};

  explicit Fixture(Device device, CacheConfig config = small_config(4, 8)) : tables(device, &random) {
    CHECK(Cache::create(device, config, tables.codebook, &cache, &report) == COUPLET_OK, "%s", report.detail);
  }
  SequenceId sequence() {
    SequenceId id = 0;
    CHECK(cache->create_sequence(&id, &report) == COUPLET_OK, "%s", report.detail);
    return id;
  }
  // What queries of `tokens` more tokens give in layer 1; the sequence stays as it is.
  std::vector<float> probe(SequenceId id, int32_t tokens) {
    Random own(5);
    Rows const rows(tokens, &own);
    StepData data = rows.data();
    std::vector<float> const queries = own.normals(static_cast<size_t>(tokens * shape.query_heads * shape.head_dim));
    std::vector<float> outputs(queries.size());
    data.queries = queries.data();
    data.outputs = outputs.data();
    data.query_token_stride = data.output_token_stride = shape.query_heads * shape.head_dim;
    data.query_head_stride = data.output_head_stride = shape.head_dim;
    StepRow const row = {id, tokens};
    std::shared_ptr<Step> step;
    CHECK(cache->begin({&row, 1}, Prefill::exact, &step, &report) == COUPLET_OK, "%s", report.detail);
    CHECK(step->attend(1, {&data, 1}, {}, &report) == COUPLET_OK, "%s", report.detail);
    return outputs;
  }
};

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) largest = std::max(largest, std::abs(double{a[i]} - b[i]));
  return largest;
}

// From the CPU to every device and back: the same bytes, so that the CPU computes the same floats from them.
void copies() {
  const couplet_backend* const cpu = find_backend("cpu", nullptr);
  Fixture host(cpu);
  SequenceId const original = host.sequence();
  for (int32_t const tokens : {150, 1, 40, 1})
    CHECK(append(host.cache.get(), original, tokens, &host.random, &host.report) == COUPLET_OK, "%s",
          host.report.detail);
  std::vector<float> const expected = host.probe(original, 3);
  CacheStatistics const held = host.cache->statistics();
  SequenceId at = original;
  Cache* from = host.cache.get();
  std::vector<std::unique_ptr<Fixture>> chain;
  couplet_report report{};
  for (int32_t index = 0; index < backend()->device.count() + 1; ++index) {
    bool const back = index == backend()->device.count();
    chain.push_back(std::make_unique<Fixture>(back ? Device(cpu) : Device(backend(), index)));
    Fixture& next = *chain.back();
    SequenceId copied = 0;
    CHECK(from->copy_to(at, next.cache.get(), &copied, &report) == COUPLET_OK, "%s", report.detail);
    CacheStatistics const statistics = next.cache->statistics();
    CHECK(statistics.page_bytes == held.page_bytes && statistics.raw_bytes == held.raw_bytes &&
              statistics.coded_tokens == held.coded_tokens && statistics.tokens == held.tokens,
          "%lld and %lld bytes", static_cast<long long>(statistics.page_bytes),
          static_cast<long long>(statistics.raw_bytes));
    double const difference = largest_difference(next.probe(copied, 3), expected);
    CHECK(difference <= (back ? 0 : 4e-3), "device %d: error %g", index, difference);
    from = next.cache.get();
    at = copied;
  }
  SequenceId copied = 0;
  CacheConfig narrow = small_config(4, 9);
  Fixture other(backend(), narrow);
  CHECK(host.cache->copy_to(original, other.cache.get(), &copied, &report) == COUPLET_MISMATCH, "another window");
  narrow = small_config(4, 8);
  narrow.budget_bytes = 10000;
  Fixture small(backend(), narrow);
  CHECK(host.cache->copy_to(original, small.cache.get(), &copied, &report) == COUPLET_CACHE_FULL, "a budget");
  CHECK(small.cache->memory_bytes() == 0 && small.cache->statistics().sequences == 0, "something was kept");
  small.cache->dispose();
  CHECK(host.cache->copy_to(original, small.cache.get(), &copied, &report) == COUPLET_DISPOSED, "to a disposed cache");
  CHECK(append(host.cache.get(), original, 1, &host.random, &report) == COUPLET_OK, "it goes on: %s", report.detail);
}

// A NaN in rows of the device: told by the call, or by commit where that only enqueued.
void not_finite() {
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreate(&stream) == cudaSuccess, "no stream");
  Fixture fixture(backend());
  couplet_report& report = fixture.report;
  SequenceId const sequence = fixture.sequence();
  CHECK(append(fixture.cache.get(), sequence, 3, &fixture.random, &report) == COUPLET_OK, "%s", report.detail);
  for (void* const on : {static_cast<void*>(nullptr), static_cast<void*>(stream)})
    for (int32_t const dtype : {COUPLET_FLOAT32, COUPLET_FLOAT16})
      for (int32_t const bad_token : {0, 12, 39})  // a sink, one that is coded at once, one in the window
        for (bool const in_keys : {true, false}) {
          RowFormat const format{Place::device, dtype};
          Rows rows(40, &fixture.random);
          TestRows const good[2] = {{backend(), format, rows.keys}, {backend(), format, rows.values}};
          (in_keys ? rows.keys : rows.values)[static_cast<size_t>(bad_token) * side_floats + 37] = INFINITY;
          TestRows bad[2] = {{backend(), format, rows.keys}, {backend(), format, rows.values}};
          StepRow const row = {sequence, 40};
          std::shared_ptr<Step> step;
          CHECK(fixture.cache->begin({&row, 1}, Prefill::exact, &step, &report) == COUPLET_OK, "%s", report.detail);
          couplet_status status = COUPLET_OK;
          for (int32_t const layer : {0, 1}) {
            StepData data = rows.data();
            data.keys = layer == 1 ? bad[0].data() : const_cast<TestRows&>(good[0]).data();
            data.values = layer == 1 ? bad[1].data() : const_cast<TestRows&>(good[1]).data();
            status = step->attend(layer, {&data, 1}, {.inputs = format, .stream = on}, &report);
            if (status != COUPLET_OK) break;
          }
          CHECK(status == (on ? COUPLET_OK : COUPLET_NOT_FINITE), "status %d", status);
          if (on) CHECK(step->commit(&report) == COUPLET_NOT_FINITE, "a NaN was committed");
          CHECK(report.layer == 1 && report.kv_head == 1 && report.token == 3 + bad_token && report.channel == 5,
                "layer %d, head %d, token %lld, channel %d", report.layer, report.kv_head,
                static_cast<long long>(report.token), report.channel);
          CHECK(step->commit(&report) == COUPLET_INVALID_ARGUMENT, "a failed step was committed");
          step->abort();
        }
  int64_t length = 0;
  CHECK(fixture.cache->length(sequence, &length, &report) == COUPLET_OK && length == 3, "length %lld",
        static_cast<long long>(length));
  CHECK(append(fixture.cache.get(), sequence, 9, &fixture.random, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(cudaStreamDestroy(stream) == cudaSuccess, "a stream was not destroyed");
}

int64_t allocations_allowed = INT64_MAX;

// Whatever allocation of a step fails, the cache is as it was, and goes on.
void memory_ends() {
  static couplet_backend limited = *backend();
  limited.memory.allocate = [](size_t bytes) {
    return allocations_allowed-- > 0 ? backend()->memory.allocate(bytes) : nullptr;
  };
  Fixture fixture(&limited);
  couplet_report& report = fixture.report;
  SequenceId const sequence = fixture.sequence();
  CHECK(append(fixture.cache.get(), sequence, 21, &fixture.random, &report) == COUPLET_OK, "%s", report.detail);
  int64_t const before = fixture.cache->memory_bytes();
  couplet_status status = COUPLET_OUT_OF_MEMORY;
  for (int64_t allowed = 0; allowed < 40 && status != COUPLET_OK; ++allowed) {
    allocations_allowed = allowed;
    status = append(fixture.cache.get(), sequence, 60, &fixture.random, &report);
    allocations_allowed = INT64_MAX;
    CHECK(status == COUPLET_OK || (status == COUPLET_OUT_OF_MEMORY && fixture.cache->memory_bytes() == before),
          "status %d, %lld bytes kept", status, static_cast<long long>(fixture.cache->memory_bytes() - before));
  }
  int64_t length = 0;
  CHECK(fixture.cache->length(sequence, &length, &report) == COUPLET_OK && length == 81, "length %lld",
        static_cast<long long>(length));
}

// Windows that move on ask the device for no memory: a block that leaves is the next one that comes. A budget is one all the same.
void blocks_are_used_again() {
  static int64_t allocations = 0;
  static couplet_backend counted = *backend();
  counted.memory.allocate = [](size_t bytes) {
    ++allocations;
    return backend()->memory.allocate(bytes);
  };
  for (int64_t const budget : {int64_t{0}, 8 * code_block_bytes(16) + 80 * raw_token_bytes()}) {
    CacheConfig config = small_config(4, 8);
    config.budget_bytes = budget;
    Fixture fixture(&counted, config);
    SequenceId const sequence = fixture.sequence();
    CHECK(append(fixture.cache.get(), sequence, 40, &fixture.random, &fixture.report) == COUPLET_OK, "%s",
          fixture.report.detail);
    allocations = 0;
    for (int token = 0; token < 64; ++token)
      CHECK(append(fixture.cache.get(), sequence, 1, &fixture.random, &fixture.report) == COUPLET_OK, "%s",
            fixture.report.detail);
    // 4 pages of 16 tokens, and a window of two blocks that moves on 4 times.
    CHECK(allocations <= 4 + 1, "%lld allocations", static_cast<long long>(allocations));
    CacheStatistics const statistics = fixture.cache->statistics();
    CHECK(budget == 0 || statistics.peak_bytes <= budget, "%lld bytes", static_cast<long long>(statistics.peak_bytes));
    CHECK(fixture.cache->drop(sequence, &fixture.report) == COUPLET_OK && fixture.cache->memory_bytes() == 0, "%s",
          "memory left");
    CHECK(fixture.cache->statistics().bookkeeping_bytes > statistics.bookkeeping_bytes, "spare blocks are not counted");
    fixture.cache->dispose();
    CHECK(fixture.cache->statistics().bookkeeping_bytes < statistics.bookkeeping_bytes, "spare blocks were kept");
  }
}

// Sequences of one cache, forked from one another, in threads of their own and on streams of their own.
void threads() {
  Fixture fixture(backend());
  SequenceId const root = fixture.sequence();
  CHECK(append(fixture.cache.get(), root, 50, &fixture.random, &fixture.report) == COUPLET_OK, "%s",
        fixture.report.detail);
  std::vector<std::thread> threads;
  for (uint64_t thread = 0; thread < 3; ++thread) {
    threads.emplace_back([&fixture, root, thread] {
      Random own(100 + thread);
      couplet_report said{};
      CHECK(backend()->device.select(0, &said) == COUPLET_OK, "%s", said.detail);
      cudaStream_t stream = nullptr;
      CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "no stream");
      for (int round = 0; round < 3; ++round) {
        SequenceId fork = 0;
        CHECK(fixture.cache->fork(root, &fork, &said) == COUPLET_OK, "%s", said.detail);
        for (int i = 0; i < 3; ++i) {
          Rows const rows(static_cast<int32_t>(1 + own.below(20)), &own);
          StepRow const row = {fork, static_cast<int32_t>(rows.keys.size() / side_floats)};
          StepData const data = rows.data();
          std::shared_ptr<Step> step;
          CHECK(fixture.cache->begin({&row, 1}, Prefill::exact, &step, &said) == COUPLET_OK, "%s", said.detail);
          for (int32_t const layer : {1, 0})
            CHECK(step->attend(layer, {&data, 1}, {.stream = stream}, &said) == COUPLET_OK, "%s", said.detail);
          CHECK(i == 1 || step->commit(&said) == COUPLET_OK, "%s", said.detail);  // else it is aborted, under way
        }
        CHECK(fixture.cache->drop(fork, &said) == COUPLET_OK, "%s", said.detail);
      }
      CHECK(cudaStreamDestroy(stream) == cudaSuccess, "a stream was not destroyed");
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(fixture.cache->drop(root, &fixture.report) == COUPLET_OK && fixture.cache->memory_bytes() == 0, "memory left");
}

}  // namespace
}  // namespace couplet::test

int main() {
  using namespace couplet::test;
  setenv("COUPLET_SIM_DEVICES", "2", 0);
  random_steps();
  copies();
  not_finite();
  memory_ends();
  blocks_are_used_again();
  threads();
  return finish();
}
