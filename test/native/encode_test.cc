// encode against a double-precision search and a bit-at-a-time writer: every body the machine runs, on random codecs, strides,
// page sizes, partial pages and thread counts; ties, NaN, huge and tiny numbers; refusals.
#include "../../native/cpu/encode.h"

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <optional>

#include "../../native/cpu/table.h"
#define COUPLET_ISA encode_test
#include "../../native/cpu/nearest_lanes.h"
#include "codes_reference.h"

namespace {

using namespace couplet::test;
using couplet::cpu::NearestBody;

std::vector<const NearestBody*> bodies() {
#if defined(__x86_64__)
  return runnable(couplet::cpu::nearest_portable, &couplet::cpu::nearest_avx2, &couplet::cpu::nearest_avx512);
#else
  return {&couplet::cpu::nearest_portable};
#endif
}

// Centroids, and the metric of each group: none where it is empty.
struct Tables {
  std::vector<float> centroids, metric;
};

// What encode compares is rounded to float32 under a metric, and so it is here.
double distance_of(const Rows& rows, const Shape& shape, const Tables& tables, int64_t token, int32_t head,
                   int32_t group, int code) {
  int32_t const channels = shape.codec.group_channels;
  int64_t const number = int64_t{head} * shape.groups() + group;
  const float* const centroid = tables.centroids.data() + (number * shape.centroids() + code) * channels;
  const float* const matrix = tables.metric.empty() ? nullptr : tables.metric.data() + number * channels * channels;
  auto const measured = [&](int32_t row, auto&& point) {
    if (!matrix) return double{point(row)};
    double product = 0;
    for (int32_t c = 0; c < channels; ++c) product += double{matrix[row * channels + c]} * double{point(c)};
    return double{static_cast<float>(product)};
  };
  double sum = 0;
  for (int32_t c = 0; c < channels; ++c) {
    double const d = measured(c, [&](int32_t i) { return rows.get(token, head, group * channels + i); }) -
                     measured(c, [&](int32_t i) { return centroid[i]; });
    sum += d * d;
  }
  return sum;
}

int64_t codes_checked = 0;
int64_t codes_in_margin = 0;

// The code must be the reference's wherever float32 rounding cannot decide: each of the channels' terms and their sum carry
// at most channels + 2 roundings of 2^-24. Inside that margin any code at a distance within it passes and is counted.
int reference_code(const Rows& rows, const Shape& shape, const Tables& tables, int64_t token, int32_t head,
                   int32_t group, int got) {
  int best = 0;
  double smallest = INFINITY;
  for (int k = 0; k < shape.centroids(); ++k) {
    double const distance = distance_of(rows, shape, tables, token, head, group, k);
    if (distance < smallest) {
      smallest = distance;
      best = k;
    }
  }
  ++codes_checked;
  if (got == best) return best;
  double const bound = 2 * (shape.codec.group_channels + 2) * 0x1p-24;
  double const received = distance_of(rows, shape, tables, token, head, group, got);
  if (received > smallest * (1 + bound)) return best;
  ++codes_in_margin;
  return got;
}

// Encodes with every body and thread count into copies of the same memory; returns the memory that all agree on.
Pages encode_everywhere(const Shape& shape, const couplet_table* table, Rows& rows, const Pages& before) {
  std::optional<Pages> first;
  for (const NearestBody* body : bodies())
    for (int threads : {1, 3}) {
      Pages pages = before;
      couplet_report report{};
      auto const params = params_of<couplet_encode_params>(shape, table, rows, pages, threads);
      CHECK(couplet::cpu::encode_entries.check(&params, &report) == COUPLET_OK, "%s: %s", shape.text().c_str(),
            report.detail);
      CHECK(couplet::cpu::encode(*body, params, &report) == COUPLET_OK, "%s: %s", shape.text().c_str(), report.detail);
      if (!first) first.emplace(pages);
      CHECK(pages == *first, "%s with %d threads differs from %s: %s", body->name, threads, bodies()[0]->name,
            shape.text().c_str());
    }
  return *first;
}

void check_against_reference(const Shape& shape, const Tables& tables, Rows& rows, const Pages& before) {
  Table const table = make_table(shape, tables.centroids, tables.metric);
  if (!table) return;
  Pages const got = encode_everywhere(shape, table.get(), rows, before);
  Pages expected = before;
  for (int32_t token = 0; token < shape.tokens; ++token)
    for (int32_t head = 0; head < shape.kv_heads; ++head)
      for (int32_t group = 0; group < shape.groups(); ++group) {
        int const code = got.read(shape.first_token + token, head, group);
        expected.write(shape.first_token + token, head, group,
                       reference_code(rows, shape, tables, token, head, group, code));
      }
  CHECK(got == expected, "%s", shape.text().c_str());  // codes, and every bit that is none of this call's
}

void fill(Rows& rows, const Shape& shape, Random& random, double scale) {
  for (int32_t token = 0; token < shape.tokens; ++token)
    for (int32_t head = 0; head < shape.kv_heads; ++head)
      for (int32_t c = 0; c < shape.head_dim; ++c)
        rows.set(token, head, c, static_cast<float>(scale * random.normal()));
}

void test_random(Random& random, int trials) {
  for (int trial = 0; trial < trials; ++trial) {
    Shape const shape = random_shape(random);
    Rows rows(shape, random);
    fill(rows, shape, random, 1);
    Tables tables = {random.normals(table_floats(shape)), {}};
    if (trial % 3 == 0) tables.metric = random_metric(shape, random);
    check_against_reference(shape, tables, rows, Pages(shape, random));
  }
}

// Enough work for several threads, which share bytes of pages with nobody: 1-bit codes, 8 tokens to a byte.
void test_threads(Random& random) {
  for (couplet_codec codec : {couplet_codec{8, 8}, couplet_codec{64, 1}, couplet_codec{16, 9}}) {
    Shape const shape = {.codec = codec,
                         .kv_heads = 3,
                         .head_dim = 64,
                         .tokens = 12'800 >> codec.code_bits / 2,
                         .page_tokens = 16,
                         .first_token = 5};
    Rows rows(shape, random);
    fill(rows, shape, random, 1);
    check_against_reference(shape, {random.normals(table_floats(shape)), {}}, rows, Pages(shape, random));
  }
}

// Both sides of the choice between lanes = tokens and lanes = centroids, and every remainder of a register.
void test_token_counts(Random& random) {
  for (couplet_codec codec : {couplet_codec{8, 8}, couplet_codec{3, 5}, couplet_codec{1, 4}, couplet_codec{12, 1}})
    for (int32_t tokens = 0; tokens <= 70; ++tokens) {
      Shape const shape = {.codec = codec, .kv_heads = 2, .head_dim = 24, .tokens = tokens, .first_token = tokens % 11};
      Rows rows(shape, random);
      fill(rows, shape, random, 1);
      check_against_reference(shape, {random.normals(table_floats(shape)), {}}, rows, Pages(shape, random));
    }
}

// Few different small integers: distances are exact in every precision, ties are many, the lowest index must win.
void test_ties(Random& random) {
  for (int trial = 0; trial < 60; ++trial) {
    Shape shape = random_shape(random);
    shape.codec.group_channels = std::min(shape.codec.group_channels, 8);
    shape.head_dim = shape.codec.group_channels * 8;
    shape.kv_heads = 1;
    std::vector<float> centroids(table_floats(shape));
    for (float& value : centroids) value = static_cast<float>(random.below(3)) - 1;
    Rows rows(shape, random);
    for (int32_t token = 0; token < shape.tokens; ++token)
      for (int32_t c = 0; c < shape.head_dim; ++c) rows.set(token, 0, c, static_cast<float>(random.below(5)) / 2 - 1);
    int64_t const before = codes_in_margin;
    check_against_reference(shape, {centroids, {}}, rows, Pages(shape, random));
    CHECK(codes_in_margin == before, "ties are exact: %s", shape.text().c_str());
  }
}

// Numbers whose squares overflow or vanish in float32: the search in double decides, on every body alike.
void test_extremes(Random& random) {
  for (double scale : {1e-45, 1e-38, 1e-30, 1e-22, 1e-14, 1e-12, 1e17, 1e19, 1e25, 5e37})
    for (int32_t tokens : {1, 5, 40}) {
      Shape const shape = {.codec = {8, 6}, .kv_heads = 2, .head_dim = 16, .tokens = tokens};
      Rows rows(shape, random);
      fill(rows, shape, random, scale);
      std::vector<float> centroids = random.normals(table_floats(shape), scale);
      check_against_reference(shape, {centroids, {}}, rows, Pages(shape, random));
    }
  // Everything at the ends of the range: the difference of two of them is an infinity in float32.
  for (int trial = 0; trial < 20; ++trial) {
    static constexpr float ends[] = {FLT_MAX, -FLT_MAX, FLT_MIN, -FLT_MIN, FLT_TRUE_MIN,
                                     0,       -0.0f,    1,       0x1p64f,  -0x1p-100f};
    Shape const shape = {.codec = {4, 5}, .kv_heads = 1, .head_dim = 16, .tokens = 30};
    Rows rows(shape, random);
    for (int32_t token = 0; token < shape.tokens; ++token)
      for (int32_t c = 0; c < shape.head_dim; ++c) rows.set(token, 0, c, ends[random.below(std::size(ends))]);
    std::vector<float> centroids(table_floats(shape));
    for (float& value : centroids) value = ends[random.below(std::size(ends))];
    check_against_reference(shape, {centroids, {}}, rows, Pages(shape, random));
  }
}

// The bytes themselves, from data that needs no rounding to make: other processors and later versions must pack these.
void test_golden() {
  struct {
    couplet_codec codec;
    uint64_t hash;
  } const cases[] = {{{8, 8}, 0x940c249e1fc4592b}, {{8, 10}, 0xaddf734d23bccfe5}, {{4, 8}, 0x01d9152297627239},
                     {{2, 3}, 0x6489c680845878f0}, {{1, 1}, 0x01b9f718ce5cd9df},  {{16, 12}, 0x54763764184b9aba}};
  for (auto const& golden : cases)
    for (int32_t step : {1, 7, 100}) {  // tokens of a call
      Random random(20);
      auto const number = [&] {
        return static_cast<float>(static_cast<int64_t>(random.next() >> 44) - (1 << 19)) * 0x1p-18f;
      };
      Shape shape = {.codec = golden.codec, .kv_heads = 2, .head_dim = 32, .tokens = 100};
      std::vector<float> centroids(table_floats(shape));
      for (float& value : centroids) value = number();
      Table const table = make_table(shape, centroids);
      std::vector<float> rows(100 * 2 * 32);
      for (float& value : rows) value = number();
      int64_t const page_bytes = couplet_page_bytes(shape.codec, shape.head_dim, shape.page_tokens);
      std::vector<uint8_t> memory(static_cast<size_t>(2 * 2 * page_bytes));
      uint8_t* const pages[] = {memory.data(), memory.data() + 2 * page_bytes};
      for (int32_t token = 0; token < 100; token += step) {
        couplet_encode_params const params = {
            .rows = rows.data() + token * 64,
            .table = table.get(),
            .pages = pages,
            .token_stride = 64,
            .head_stride = 32,
            .page_offset = 0,
            .page_stride = page_bytes,
            .first_token = token,
            .tokens = std::min(step, 100 - token),
            .kv_heads = 2,
            .head_dim = 32,
            .page_tokens = shape.page_tokens,
            .dtype = COUPLET_FLOAT32,
            .threads = 1,
            .codec = shape.codec,
            .runs = nullptr,
            .run_count = 0,
            .reserved = 0,
        };
        couplet_report report{};
        CHECK(couplet::cpu::encode_entries.run(&params, nullptr, nullptr, &report) == COUPLET_OK, "%s", report.detail);
      }
      uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
      for (uint8_t byte : memory) hash = (hash ^ byte) * 0x100000001b3u;
      CHECK(hash == golden.hash, "%dc%db, %d tokens a call: 0x%016llx", shape.codec.group_channels,
            shape.codec.code_bits, step, static_cast<unsigned long long>(hash));
    }
}

void test_not_finite(Random& random) {
  for (int trial = 0; trial < 200; ++trial) {
    Shape shape = random_shape(random);
    shape.tokens = std::max(1, shape.tokens);
    Table const table = make_table(shape, random.normals(table_floats(shape)));
    Rows rows(shape, random);
    fill(rows, shape, random, 1);
    static constexpr float bads[] = {NAN, -NAN, INFINITY, -INFINITY};
    float const bad = bads[random.below(4)];
    int32_t const token = static_cast<int32_t>(random.below(shape.tokens));
    int32_t const head = static_cast<int32_t>(random.below(shape.kv_heads));
    int32_t const channel = static_cast<int32_t>(random.below(shape.head_dim));
    // A later one, in the order token, kv head, channel, must not be the one that is reported.
    rows.set(shape.tokens - 1, shape.kv_heads - 1, shape.head_dim - 1, bad);
    rows.set(token, head, channel, bad);
    Pages const before(shape, random);
    for (const NearestBody* body : bodies()) {
      Pages pages = before;
      couplet_report report{};
      auto const params = params_of<couplet_encode_params>(shape, table.get(), rows, pages, 2);
      CHECK(couplet::cpu::encode(*body, params, &report) == COUPLET_NOT_FINITE, "%s", shape.text().c_str());
      CHECK(report.token == token && report.kv_head == head && report.channel == channel, "%s: %s",
            shape.text().c_str(), report.detail);
      CHECK(pages == before, "a refused call changed a page: %s", shape.text().c_str());
    }
  }
}

void test_refusals(Random& random) {
  Shape const shape = {.codec = {8, 8}, .kv_heads = 2, .head_dim = 32, .tokens = 10};
  Table const table = make_table(shape, random.normals(table_floats(shape)));
  Rows rows(shape, random);
  fill(rows, shape, random, 1);
  Pages const pages(shape, random);
  auto const good = params_of<couplet_encode_params>(shape, table.get(), rows, pages, 1);
  auto const refused = [&](const char* what, auto change, couplet_status status = COUPLET_INVALID_ARGUMENT) {
    couplet_encode_params params = good;
    change(params);
    couplet_report report{};
    CHECK(couplet::cpu::encode_entries.check(&params, &report) == status, "%s", what);
    CHECK(report.status == status && std::strlen(report.detail) > 10, "%s: %s", what, report.detail);
    CHECK(couplet::cpu::encode_entries.run(&params, nullptr, nullptr, nullptr) == status, "%s, run", what);
    char text[64] = "x";
    couplet::cpu::encode_entries.describe(&params, text, sizeof text);
    CHECK(text[0] == 0, "%s: described as %s", what, text);
  };
  refused("no rows", [](auto& p) { p.rows = nullptr; });
  refused("no table", [](auto& p) { p.table = nullptr; });
  refused("no pages", [](auto& p) { p.pages = nullptr; });
  refused("kv heads", [](auto& p) { p.kv_heads = 3; });
  refused("no kv heads", [](auto& p) { p.kv_heads = 0; });
  refused("headDim", [](auto& p) { p.head_dim = 40; });
  refused("huge headDim", [](auto& p) { p.head_dim = 1 << 30; });
  refused("codec", [](auto& p) { p.codec.code_bits = 7; });
  refused("no codec", [](auto& p) { p.codec = {0, 0}; });
  refused("dtype", [](auto& p) { p.dtype = 3; });
  refused(
      "bfloat16", [](auto& p) { p.dtype = COUPLET_BFLOAT16; }, COUPLET_UNSUPPORTED);
  refused("page tokens", [](auto& p) { p.page_tokens = 12; });
  refused("no page tokens", [](auto& p) { p.page_tokens = 0; });
  refused("tokens", [](auto& p) { p.tokens = -1; });
  refused("first token", [](auto& p) { p.first_token = -1; });
  refused("page stride", [](auto& p) { p.page_stride = 4 * 64 - 1; });
  uint8_t* const missing[] = {nullptr};
  refused("a missing page", [&](auto& p) { p.pages = missing; });
  CHECK(couplet::cpu::encode_entries.check(nullptr, nullptr) == COUPLET_INVALID_ARGUMENT, "no parameters");

  couplet_encode_params nothing = good;
  nothing.tokens = 0;
  nothing.rows = nullptr;
  nothing.pages = nullptr;
  CHECK(couplet::cpu::encode_entries.run(&nothing, nullptr, nullptr, nullptr) == COUPLET_OK, "no tokens");
  CHECK(couplet::cpu::encode_entries.workspace(&good) == 0, "no workspace");
  char text[64];
  couplet::cpu::encode_entries.describe(&good, text, sizeof text);
  std::printf("%s\n", text);
  CHECK(std::strstr(text, "8c8b") != nullptr, "%s", text);
}

// The portable body's own fma where the compiler has none: the sums that double would round to a tie of float are sought out,
// from above and from below.
void test_add_square(Random& random) {
  namespace portable = couplet::cpu::encode_test;
  int64_t wrong = 0;
  int64_t hard = 0;
  auto const compare = [&](float sum, float a) {
    float got[portable::lanes];
    portable::store(got, portable::add_square(portable::broadcast(sum), portable::broadcast(a)));
    float const expected = std::fma(a, a, sum);
    hard += static_cast<float>(static_cast<double>(a) * static_cast<double>(a) + static_cast<double>(sum)) != expected;
    for (float value : got) wrong += value != expected;
  };
  for (int trial = 0; trial < 2'000'000; ++trial) {
    int64_t const a = (int64_t{1} << 23) + random.below(int64_t{1} << 23);
    int64_t const past =
        a * a - (int64_t{1} << 47) >= 0 ? int64_t{1} << 23 : int64_t{1} << 22;  // half a unit of the result
    int64_t const missing = (past - a * a) & (2 * past - 1);
    if (missing >= 1 << 17) continue;
    for (float sum : {static_cast<float>(missing), std::nextafter(static_cast<float>(missing), 0.0f),
                      std::nextafter(static_cast<float>(missing), INFINITY)})
      compare(sum, static_cast<float>(a));
  }
  for (int trial = 0; trial < 200'000; ++trial)
    compare(static_cast<float>(std::exp2(random.uniform(-149, 127))),
            static_cast<float>(std::exp2(random.uniform(-80, 66))));
  compare(0x1p-100f, 4097);
  compare(FLT_MAX, FLT_MAX);
  compare(INFINITY, 1);
  compare(1, INFINITY);
  compare(0, 0);
  CHECK(wrong == 0, "%lld lanes differ from fma", static_cast<long long>(wrong));
  CHECK(hard > 100, "only %lld sums that double rounding gets wrong", static_cast<long long>(hard));
}

void test_tables(Random& random) {
  Shape const shape = {.codec = {4, 5}, .kv_heads = 3, .head_dim = 16};
  std::vector<float> const good = random.normals(table_floats(shape));
  couplet_report report{};
  couplet_table* table = nullptr;
  auto const create = [&](const couplet_table_params& params) {
    couplet_status const status = couplet::cpu::table_entries.create(&params, &table, &report);
    couplet::cpu::table_entries.destroy(table);
    bool const made = table != nullptr;
    table = nullptr;
    CHECK(made == (status == COUPLET_OK), "a table exactly when it is OK");
    return status;
  };
  CHECK(create({good.data(), 3, 16, {4, 5}, nullptr}) == COUPLET_OK, "%s", report.detail);
  CHECK(create({nullptr, 3, 16, {4, 5}, nullptr}) == COUPLET_INVALID_ARGUMENT, "NULL");
  CHECK(create({good.data(), 0, 16, {4, 5}, nullptr}) == COUPLET_INVALID_ARGUMENT, "kv heads");
  CHECK(create({good.data(), 3, 4, {4, 5}, nullptr}) == COUPLET_INVALID_ARGUMENT, "headDim");
  CHECK(create({good.data(), 3, 264, {4, 5}, nullptr}) == COUPLET_INVALID_ARGUMENT, "headDim");
  CHECK(create({good.data(), 3, 16, {5, 5}, nullptr}) == COUPLET_INVALID_ARGUMENT, "codec");
  CHECK(create({good.data(), 3, 16, {4, 13}, nullptr}) == COUPLET_INVALID_ARGUMENT, "codec");
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // whose allocators end the process instead
  CHECK(create({good.data(), INT32_MAX, 256, {1, 12}, nullptr}) == COUPLET_OUT_OF_MEMORY, "8 PiB");
#endif
  CHECK(couplet::cpu::table_entries.bytes(nullptr) == 0, "bytes of no table");

  for (float bad : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> centroids = good;
    centroids[((2 * 4 + 3) * 32 + 30) * 4 + 1] = bad;  // kv head 2, group 3, centroid 30, channel 1 of the group
    CHECK(create({centroids.data(), 3, 16, {4, 5}, nullptr}) == COUPLET_NOT_FINITE, "%g", static_cast<double>(bad));
    CHECK(report.kv_head == 2 && report.channel == 13 && std::strstr(report.detail, "centroid 30"), "%s",
          report.detail);
  }

  Table const made = make_table(shape, good);
  CHECK(couplet::cpu::table_entries.bytes(made.get()) >= 2 * good.size() * sizeof(float), "rows and columns");
  CHECK(std::memcmp(made->rows, good.data(), good.size() * sizeof(float)) == 0, "rows are as given");
}

}  // namespace

int main() {
  Random random(2);
  test_add_square(random);
  test_tables(random);
  test_refusals(random);
  test_random(random, 150);
  test_threads(random);
  test_token_counts(random);
  test_ties(random);
  test_extremes(random);
  test_golden();
  test_not_finite(random);
  std::printf("%lld codes, %lld of them inside the rounding margin\n", static_cast<long long>(codes_checked),
              static_cast<long long>(codes_in_margin));
  return finish();
}
