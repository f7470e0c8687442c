// store on a GPU, or on the simulator, beside the CPU's: the same floats, the same report, nothing written between rows. Also what the
// backend says of its devices.
#include <cstring>

#include "../../cuda/backend.h"
#include "../../cuda/device/elements.h"
#include "../../native/cpu/backend.h"
#include "device_array.h"

namespace {

using namespace couplet;
using test::DeviceArray;
using test::Random;

struct Shape {
  std::vector<int32_t> tokens;  // of each run
  int32_t kv_heads, head_dim, dtype;
};

// Rows and places of all runs in one array each, with gaps that store must neither read nor write.
struct Case {
  Case(const Shape& given, Random& random) : shape(given) {
    params = {.runs = nullptr,
              .run_count = static_cast<int32_t>(shape.tokens.size()),
              .most_tokens = 0,
              .kv_heads = shape.kv_heads,
              .head_dim = shape.head_dim,
              .dtype = shape.dtype,
              .reserved = 0};
    int64_t first = 0;
    for (int32_t const tokens : shape.tokens) {
      int64_t const head_stride = shape.head_dim + random.below(3);
      int64_t const token_stride = head_stride * shape.kv_heads + random.below(3);
      int64_t const stored_token_stride = shape.head_dim + random.below(2);
      int64_t const stored_head_stride = stored_token_stride * tokens + random.below(5);
      offsets.push_back({elements, places});
      runs.push_back({.rows = nullptr,
                      .stored = nullptr,
                      .token_stride = token_stride,
                      .head_stride = head_stride,
                      .stored_token_stride = stored_token_stride,
                      .stored_head_stride = stored_head_stride,
                      .first_token = first,
                      .tokens = tokens,
                      .reserved = 0});
      first += tokens;
      params.most_tokens = std::max(params.most_tokens, tokens);
      elements += static_cast<size_t>(token_stride * tokens);
      places += static_cast<size_t>(stored_head_stride * shape.kv_heads);
    }
    rows.resize(elements * element_bytes());
    for (size_t i = 0; i < elements; ++i) set(i, static_cast<float>(random.normal()));
  }

  size_t element_bytes() const { return static_cast<size_t>(cuda::element_bytes(shape.dtype)); }
  void set(size_t at, float value) {
    if (shape.dtype == COUPLET_FLOAT32) std::memcpy(rows.data() + 4 * at, &value, 4);
    __half const half = __float2half_rn(value);
    __nv_bfloat16 const bfloat = __float2bfloat16_rn(value);
    if (shape.dtype == COUPLET_FLOAT16) std::memcpy(rows.data() + 2 * at, &half, 2);
    if (shape.dtype == COUPLET_BFLOAT16) std::memcpy(rows.data() + 2 * at, &bfloat, 2);
  }
  size_t at(size_t run, int64_t token, int64_t head, int64_t channel) const {
    return offsets[run].first +
           static_cast<size_t>(token * runs[run].token_stride + head * runs[run].head_stride + channel);
  }
  std::vector<couplet_store_run> placed(const uint8_t* from, float* to) const {
    std::vector<couplet_store_run> placed = runs;
    for (size_t run = 0; run < runs.size(); ++run) {
      placed[run].rows = from + offsets[run].first * element_bytes();
      placed[run].stored = to + offsets[run].second;
    }
    return placed;
  }

  struct Result {
    std::vector<float> stored;
    couplet_report report{};
  };
  Result on_cpu() const {
    Result result{.stored = std::vector<float>(places, -7)};
    auto const all = placed(rows.data(), result.stored.data());
    couplet_store_params p = params;
    p.runs = all.data();
    CHECK(cpu::store_entries.check(&p, &result.report) == COUPLET_OK, "%s", result.report.detail);
    cpu::store_entries.run(&p, nullptr, nullptr, &result.report);
    return result;
  }
  Result on_device() const {
    Result result;
    DeviceArray<uint8_t> const from(rows);
    DeviceArray<float> const to(std::vector<float>(places, -7));
    DeviceArray<couplet_store_run> const all(placed(from.data(), to.data()));
    couplet_store_params p = params;
    p.runs = all.data();
    CHECK(cuda::store_entries.check(&p, &result.report) == COUPLET_OK, "%s", result.report.detail);
    DeviceArray<uint8_t> const workspace(std::vector<uint8_t>(cuda::store_entries.workspace(&p), 0xff));
    CHECK(cuda::store_entries.run(&p, workspace.data(), nullptr, &result.report) == COUPLET_OK, "%s",
          result.report.detail);
    result.stored = to.read();
    std::vector<uint8_t> const bytes = workspace.read();
    std::memcpy(&result.report, bytes.data(), sizeof result.report);
    return result;
  }

  Shape shape;
  couplet_store_params params;
  std::vector<couplet_store_run> runs;
  std::vector<std::pair<size_t, size_t>> offsets;  // of rows and of places
  std::vector<uint8_t> rows;
  size_t elements = 0, places = 0;
};

void same_floats() {
  Random random(3);
  for (int32_t const dtype : {COUPLET_FLOAT32, COUPLET_FLOAT16, COUPLET_BFLOAT16})
    for (const std::vector<int32_t>& tokens : {std::vector<int32_t>{}, {0}, {1}, {1, 1, 1}, {16, 0, 5}, {70}}) {
      Case const test(
          {tokens, static_cast<int32_t>(1 + random.below(3)), static_cast<int32_t>(8 + random.below(100)), dtype},
          random);
      auto const expected = test.on_cpu();
      auto const got = test.on_device();
      CHECK(got.report.status == COUPLET_OK, "status %d", got.report.status);
      CHECK(expected.stored == got.stored, "%zu runs, dtype %d: floats differ", tokens.size(), dtype);
    }
}

void not_finite() {
  Random random(4);
  for (int32_t const dtype : {COUPLET_FLOAT32, COUPLET_FLOAT16, COUPLET_BFLOAT16}) {
    Case test({{3, 9, 2}, 2, 40, dtype}, random);
    test.set(test.at(1, 8, 0, 3), NAN);
    test.set(test.at(1, 7, 1, 39), INFINITY);  // the first: token 10 of the call
    test.set(test.at(2, 0, 0, 0), -INFINITY);
    auto const expected = test.on_cpu();
    for (float const value : expected.stored) CHECK(value == -7, "the CPU stored something");
    auto const got = test.on_device();
    for (const couplet_report* const report : {&expected.report, &got.report})
      CHECK(
          report->status == COUPLET_NOT_FINITE && report->token == 10 && report->kv_head == 1 && report->channel == 39,
          "status %d, token %lld, kv head %d, channel %d", report->status, static_cast<long long>(report->token),
          report->kv_head, report->channel);
  }
}

void refusals() {
  Random random(5);
  Case const test({{4}, 2, 32, COUPLET_FLOAT32}, random);
  auto const refused = [&](const char* what, auto change) {
    float place = 0;
    auto all = test.placed(test.rows.data(), &place);
    couplet_store_params p = test.params;
    p.runs = all.data();
    change(p);
    couplet_report report{};
    for (auto const check : {cpu::store_entries.check, cuda::store_entries.check})
      CHECK(check(&p, &report) == COUPLET_INVALID_ARGUMENT && report.detail[0], "%s was not refused", what);
  };
  refused("dtype", [](auto& p) { p.dtype = 3; });
  refused("no kv heads", [](auto& p) { p.kv_heads = 0; });
  refused("headDim", [](auto& p) { p.head_dim = COUPLET_MAX_HEAD_DIM + 1; });
  refused("no runs", [](auto& p) { p.runs = nullptr; });
  refused("negative count", [](auto& p) { p.run_count = -1; });
}

void devices() {
  const couplet_device_entries& entries = cuda::device_entries;
  couplet_report report{};
  int32_t const count = entries.count();
  CHECK(count >= 1, "%d devices", count);
  for (int32_t const index : {-1, count})
    CHECK(entries.select(index, &report) == COUPLET_INVALID_ARGUMENT, "device %d was selected", index);
  CHECK(entries.select(0, &report) == COUPLET_OK, "%s", report.detail);
  couplet_device_info info{};
  CHECK(entries.describe(0, &info, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(info.name[0] && info.multiprocessors > 0 && info.free_bytes > 0 && info.free_bytes <= info.memory_bytes &&
            std::strncmp(info.architecture, "sm_", 3) == 0 && info.driver_version >= 12000 &&
            info.runtime_version >= 12000,
        "%s, %s, %lld of %lld bytes", info.name, info.architecture, static_cast<long long>(info.free_bytes),
        static_cast<long long>(info.memory_bytes));
}

}  // namespace

int main() {
  same_floats();
  not_finite();
  refusals();
  devices();
  return couplet::test::finish();
}
