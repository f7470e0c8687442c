// decode against a bit-at-a-time reader, exactly: every body the machine runs, on random codecs, strides, page sizes and
// thread counts; the round trip through encode; refusals.
#include "../../native/cpu/decode.h"

#include <cstring>

#include "codes_reference.h"

namespace {

using namespace couplet::test;
using couplet::cpu::DecodeBody;

std::vector<const DecodeBody*> bodies() {
#if defined(__x86_64__)
  return runnable(couplet::cpu::decode_portable, &couplet::cpu::decode_avx2, &couplet::cpu::decode_avx512);
#else
  return {&couplet::cpu::decode_portable};
#endif
}

float centroid_channel(const Shape& shape, const std::vector<float>& centroids, int32_t head, int32_t channel,
                       int code) {
  int32_t const group = channel / shape.codec.group_channels;
  int64_t const row = (int64_t{head} * shape.groups() + group) * shape.centroids() + code;
  return centroids[static_cast<size_t>(row * shape.codec.group_channels + channel % shape.codec.group_channels)];
}

void check_against_reference(const Shape& shape, const std::vector<float>& centroids, Random& random) {
  Table const table = make_table(shape, centroids);
  if (!table) return;
  Pages const pages(shape, random);
  Rows const untouched(shape, random);
  for (const DecodeBody* body : bodies())
    for (int threads : {1, 3}) {
      Rows rows = untouched;
      couplet_report report{};
      auto const params = params_of<couplet_decode_params>(shape, table.get(), rows, pages, threads);
      CHECK(couplet::cpu::decode_entries.check(&params, &report) == COUPLET_OK, "%s: %s", shape.text().c_str(),
            report.detail);
      CHECK(couplet::cpu::decode(*body, params, &report) == COUPLET_OK, "%s", shape.text().c_str());
      int64_t wrong = 0;
      for (int32_t token = 0; token < shape.tokens; ++token)
        for (int32_t head = 0; head < shape.kv_heads; ++head)
          for (int32_t c = 0; c < shape.head_dim; ++c) {
            int const code = pages.read(shape.first_token + token, head, c / shape.codec.group_channels);
            float expected = centroid_channel(shape, centroids, head, c, code);
            if (shape.half) expected = couplet::cpu::half_to_float(couplet::cpu::float_to_half(expected));
            float const got = rows.get(token, head, c);
            wrong += std::memcmp(&got, &expected, sizeof got) != 0;
          }
      CHECK(wrong == 0, "%lld values by %s: %s", static_cast<long long>(wrong), body->name, shape.text().c_str());
      CHECK(rows.touched_gaps() == 0, "wrote between rows, by %s: %s", body->name, shape.text().c_str());
    }
}

void test_random(Random& random, int trials) {
  for (int trial = 0; trial < trials; ++trial) {
    Shape const shape = random_shape(random);
    std::vector<float> centroids = random.normals(table_floats(shape));
    // Every kind of number, so that float16 rounding, overflow and subnormals of all bodies are compared.
    if (trial % 4 == 0)
      for (float& value : centroids) value *= static_cast<float>(std::exp2(random.uniform(-30, 20)));
    check_against_reference(shape, centroids, random);
  }
}

void test_threads(Random& random) {
  Shape const shape = {
      .codec = {4, 5}, .kv_heads = 3, .head_dim = 128, .tokens = 2000, .page_tokens = 16, .first_token = 5};
  check_against_reference(shape, random.normals(table_floats(shape)), random);
}

void test_token_counts(Random& random) {
  for (int bits = 1; bits <= COUPLET_MAX_CODE_BITS; ++bits)
    for (int32_t tokens : {0, 1, 7, 8, 9, 63, 64, 65, 130}) {
      Shape const shape = {.codec = {8, bits}, .kv_heads = 2, .head_dim = 16, .tokens = tokens, .first_token = bits};
      check_against_reference(shape, random.normals(table_floats(shape)), random);
    }
}

// codes -> decode -> encode -> the same codes, whatever bits the pages hold, when centroids differ.
void test_round_trip(Random& random, int trials) {
  for (int trial = 0; trial < trials; ++trial) {
    Shape shape = random_shape(random);
    if (shape.half && shape.codec.code_bits > 6)
      shape.half = false;  // centroids that differ in float32 may meet in float16
    std::vector<float> centroids(table_floats(shape));
    int32_t const channels = shape.codec.group_channels;
    // The first channel alone tells centroids apart, by a float16 number.
    for (size_t i = 0; i < centroids.size(); ++i)
      centroids[i] =
          i % static_cast<size_t>(channels) == 0
              ? static_cast<float>(i / static_cast<size_t>(channels) % static_cast<size_t>(shape.centroids()))
              : static_cast<float>(random.below(64)) / 8;
    Table const table = make_table(shape, centroids);
    Pages const pages(shape, random);
    Rows rows(shape, random);
    auto const decoding = params_of<couplet_decode_params>(shape, table.get(), rows, pages, 2);
    couplet_report report{};
    CHECK(couplet::cpu::decode_entries.run(&decoding, nullptr, nullptr, &report) == COUPLET_OK, "%s", report.detail);
    Pages again = pages;
    for (int64_t token = 0; token < shape.tokens; ++token)
      for (int32_t head = 0; head < shape.kv_heads; ++head)
        for (int32_t group = 0; group < shape.groups(); ++group) again.write(shape.first_token + token, head, group, 0);
    auto const encoding = params_of<couplet_encode_params>(shape, table.get(), rows, again, 2);
    CHECK(couplet::cpu::encode_entries.run(&encoding, nullptr, nullptr, &report) == COUPLET_OK, "%s", report.detail);
    CHECK(again == pages, "%s", shape.text().c_str());
  }
}

void test_refusals(Random& random) {
  Shape const shape = {.codec = {8, 8}, .kv_heads = 2, .head_dim = 32, .tokens = 10};
  Table const table = make_table(shape, random.normals(table_floats(shape)));
  std::vector<float> memory(10 * 2 * 32);
  Rows rows(shape, random);
  Pages const pages(shape, random);
  couplet_decode_params good = params_of<couplet_decode_params>(shape, table.get(), rows, pages, 1);
  good.rows = memory.data();
  good.token_stride = 64;
  good.head_stride = 32;
  auto const refused = [&](const char* what, auto change) {
    couplet_decode_params params = good;
    change(params);
    couplet_report report{};
    CHECK(couplet::cpu::decode_entries.check(&params, &report) == COUPLET_INVALID_ARGUMENT, "%s", what);
    CHECK(report.status == COUPLET_INVALID_ARGUMENT && std::strlen(report.detail) > 10, "%s: %s", what, report.detail);
    CHECK(couplet::cpu::decode_entries.run(&params, nullptr, nullptr, nullptr) == COUPLET_INVALID_ARGUMENT, "%s, run",
          what);
  };
  refused("no rows", [](auto& p) { p.rows = nullptr; });
  refused("no table", [](auto& p) { p.table = nullptr; });
  refused("no pages", [](auto& p) { p.pages = nullptr; });
  refused("kv heads", [](auto& p) { p.kv_heads = 1; });
  refused("headDim", [](auto& p) { p.head_dim = 24; });
  refused("codec", [](auto& p) { p.codec.group_channels = 4; });
  refused("dtype", [](auto& p) { p.dtype = 7; });
  refused("page tokens", [](auto& p) { p.page_tokens = 63; });
  refused("tokens", [](auto& p) { p.tokens = -1; });
  refused("first token", [](auto& p) { p.first_token = -64; });
  refused("page stride", [](auto& p) { p.page_stride = 0; });
  refused("all tokens at one place", [](auto& p) { p.token_stride = 0; });
  refused("all heads at one place", [](auto& p) { p.head_stride = 0; });
  refused("heads that reach into each other", [](auto& p) { p.head_stride = 31; });
  refused("tokens that reach into each other", [](auto& p) { p.token_stride = -63; });
  refused("strides at the end of their range", [](auto& p) { p.token_stride = p.head_stride = INT64_MIN; });

  couplet_report report{};
  couplet_decode_params head_major = good;
  head_major.token_stride = 32;
  head_major.head_stride = 320;
  CHECK(couplet::cpu::decode_entries.run(&head_major, nullptr, nullptr, &report) == COUPLET_OK, "%s", report.detail);
  couplet_decode_params nothing = good;
  nothing.tokens = 0;
  nothing.rows = nullptr;
  nothing.pages = nullptr;
  CHECK(couplet::cpu::decode_entries.run(&nothing, nullptr, nullptr, &report) == COUPLET_OK, "%s", report.detail);
  char text[64];
  couplet::cpu::decode_entries.describe(&good, text, sizeof text);
  std::printf("%s\n", text);
  CHECK(std::strstr(text, "8c8b to float32") != nullptr, "%s", text);
}

}  // namespace

int main() {
  Random random(3);
  test_refusals(random);
  test_random(random, 200);
  test_threads(random);
  test_token_counts(random);
  test_round_trip(random, 100);
  return finish();
}
