// encode and decode of the GPU backend against the CPU backend: the same bytes and the same rows, bit for bit, for random codecs,
// shapes, strides and element types; what is no finite number; capture in a graph. For the simulator and for a GPU.
#include <cmath>
#include <cstring>

#include "../../cuda/backend.h"
#include "../native/codes_reference.h"
#include "device_array.h"

namespace {

using namespace couplet;
using couplet::test::DeviceArray;
using couplet::test::Random;
using couplet::test::Shape;

void expect(cudaError_t error, const char* what) {
  CHECK(error == cudaSuccess, "%s: %s", what, cudaGetErrorName(error));
}

uint16_t narrow(float value, int32_t dtype) {
  return dtype == COUPLET_FLOAT16 ? cpu::float_to_half(value) : __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
float widen(uint16_t bits, int32_t dtype) {
  return dtype == COUPLET_FLOAT16 ? cpu::half_to_float(bits) : __bfloat162float(__ushort_as_bfloat16(bits));
}
int bytes_of(int32_t dtype) { return dtype == COUPLET_FLOAT32 ? 4 : 2; }

struct GpuTable {
  GpuTable(const Shape& shape, const std::vector<float>& centroids, const std::vector<float>& metric) {
    couplet_table_params const params = {centroids.data(), shape.kv_heads, shape.head_dim, shape.codec,
                                         metric.empty() ? nullptr : metric.data()};
    couplet_report report{};
    CHECK(cuda::table_entries.create(&params, &table, &report) == COUPLET_OK, "%s", report.detail);
  }
  GpuTable(const GpuTable&) = delete;
  GpuTable& operator=(const GpuTable&) = delete;
  ~GpuTable() { cuda::table_entries.destroy(table); }
  couplet_table* table = nullptr;
};

// One case: float32 rows for the CPU and the same numbers in some element type for the GPU, pages of both filled alike.
struct Case {
  Case(Shape s, int32_t element, Random& random, bool centroid_rows)
      : shape(s),
        dtype(element),
        head_stride(shape.head_dim + random.below(2) * random.below(17)),
        token_stride(head_stride * shape.kv_heads + random.below(2) * 8),
        row_bytes(couplet_row_bytes(shape.codec, shape.page_tokens)),
        page_stride(row_bytes * shape.groups() + random.below(3) * 3),
        page_bytes(static_cast<size_t>(random.below(8) + shape.kv_heads * page_stride)),
        page_offset(static_cast<int64_t>(page_bytes) - shape.kv_heads * page_stride),
        centroids(random.normals(test::table_floats(shape))),
        metric(random.below(2) ? test::random_metric(shape, random) : std::vector<float>{}),
        pages(page_bytes * static_cast<size_t>(shape.pages())),
        rows(static_cast<size_t>(token_stride * shape.tokens)) {
    shape.half = false;
    for (float& value : centroids) value = std::round(value * 64) / 64;  // ties, and exact in every element type
    for (uint8_t& byte : pages) byte = static_cast<uint8_t>(random.next());
    for (float& value : rows) value = static_cast<float>(random.normal());
    if (centroid_rows)
      for (size_t i = 0; i < rows.size(); ++i) rows[i] = centroids[i % centroids.size()];
    if (dtype != COUPLET_FLOAT32)
      for (float& value : rows) value = widen(narrow(value, dtype), dtype);
  }

  template <class Params>
  Params params(const couplet_table* table, void* data, uint8_t* const* page_table, int32_t element) const {
    Params p{};
    p.rows = data;
    p.table = table;
    p.pages = page_table;
    p.token_stride = token_stride;
    p.head_stride = head_stride;
    p.page_offset = page_offset;
    p.page_stride = page_stride;
    p.first_token = shape.first_token;
    p.tokens = shape.tokens;
    p.kv_heads = shape.kv_heads;
    p.head_dim = shape.head_dim;
    p.page_tokens = shape.page_tokens;
    p.dtype = element;
    p.threads = 1;
    p.codec = shape.codec;
    return p;
  }

  // rows as the GPU reads or writes them
  std::vector<uint8_t> elements() const {
    std::vector<uint8_t> bytes(rows.size() * static_cast<size_t>(bytes_of(dtype)));
    for (size_t i = 0; i < rows.size(); ++i) {
      uint16_t const narrowed = dtype == COUPLET_FLOAT32 ? uint16_t{0} : narrow(rows[i], dtype);
      if (dtype == COUPLET_FLOAT32)
        std::memcpy(&bytes[4 * i], &rows[i], 4);
      else
        std::memcpy(&bytes[2 * i], &narrowed, 2);
    }
    return bytes;
  }

  std::vector<uint8_t*> page_table(uint8_t* memory) const {
    std::vector<uint8_t*> table;
    for (int64_t page = 0; page < shape.pages(); ++page)
      table.push_back(memory + static_cast<size_t>(page) * page_bytes);
    return table;
  }

  Shape shape;
  int32_t dtype;
  int64_t head_stride, token_stride, row_bytes, page_stride;
  size_t page_bytes;
  int64_t page_offset;
  std::vector<float> centroids;
  std::vector<float> metric;  // of half the cases
  std::vector<uint8_t> pages;
  std::vector<float> rows;
};

const char* name_of(int32_t dtype) {
  return dtype == COUPLET_FLOAT32 ? "float32" : dtype == COUPLET_FLOAT16 ? "float16" : "bfloat16";
}

// What is on the device for a case.
struct Device {
  explicit Device(const Case& c)
      : table(c.shape, c.centroids, c.metric),
        rows(c.elements()),
        pages(c.pages),
        page_table(c.page_table(pages.data())),
        workspace(std::vector<uint8_t>(1024, 0xa5)) {}

  couplet_report report() const {
    couplet_report result;
    std::vector<uint8_t> const bytes = workspace.read();
    std::memcpy(&result, bytes.data(), sizeof result);
    return result;
  }

  GpuTable table;
  DeviceArray<uint8_t> rows;
  DeviceArray<uint8_t> pages;
  DeviceArray<uint8_t*> page_table;
  DeviceArray<uint8_t> workspace;
};

void test_case(const Shape& shape, int32_t dtype, Random& random, bool centroid_rows = false) {
  Case c(shape, dtype, random, centroid_rows);
  Device const device(c);
  couplet_report report{};
  std::string const text = c.shape.text() + " of " + name_of(dtype);

  auto const encode =
      c.params<couplet_encode_params>(device.table.table, device.rows.data(), device.page_table.data(), dtype);
  CHECK(cuda::encode_entries.workspace(&encode) <= device.workspace.size(), "workspace of %s", text.c_str());
  char description[128] = "";
  cuda::encode_entries.describe(&encode, description, sizeof description);
  CHECK(cuda::encode_entries.run(&encode, device.workspace.data(), nullptr, &report) == COUPLET_OK, "%s: %s",
        text.c_str(), report.detail);
  std::vector<uint8_t> const codes = device.pages.read();
  CHECK(device.report().status == COUPLET_OK, "%s: status %d", text.c_str(), device.report().status);

  auto const cpu_table = test::make_table(c.shape, c.centroids, c.metric);
  auto const cpu_pages = c.page_table(c.pages.data());
  auto const cpu_encode =
      c.params<couplet_encode_params>(cpu_table.get(), c.rows.data(), cpu_pages.data(), COUPLET_FLOAT32);
  CHECK(cpu::encode_entries.run(&cpu_encode, nullptr, nullptr, &report) == COUPLET_OK, "%s: %s", text.c_str(),
        report.detail);
  size_t wrong = 0;
  for (size_t i = 0; i < codes.size(); ++i) wrong += codes[i] != c.pages[i];
  CHECK(wrong == 0, "%s: %zu of %zu bytes differ (%s)", text.c_str(), wrong, codes.size(), description);

  auto const decode =
      c.params<couplet_decode_params>(device.table.table, device.rows.data(), device.page_table.data(), dtype);
  cuda::decode_entries.describe(&decode, description, sizeof description);
  CHECK(cuda::decode_entries.run(&decode, nullptr, nullptr, &report) == COUPLET_OK, "%s: %s", text.c_str(),
        report.detail);
  auto const cpu_decode =
      c.params<couplet_decode_params>(cpu_table.get(), c.rows.data(), cpu_pages.data(), COUPLET_FLOAT32);
  CHECK(cpu::decode_entries.run(&cpu_decode, nullptr, nullptr, &report) == COUPLET_OK, "%s: %s", text.c_str(),
        report.detail);
  CHECK(device.rows.read() == c.elements(), "%s: decoded rows differ (%s)", text.c_str(), description);
}

// The first value that is not finite, by token, then kv head, then channel; other rows' codes are as they are without it.
void test_not_finite(int32_t tokens, int32_t channels, int32_t dtype, Random& random) {
  Shape shape;
  shape.codec = {channels, 4};
  shape.kv_heads = 3;
  shape.head_dim = 48;
  shape.tokens = tokens;
  shape.first_token = 5;
  Case c(shape, dtype, random, false);
  int64_t const token = random.below(tokens);
  int32_t const head = static_cast<int32_t>(random.below(3));
  int32_t const channel = static_cast<int32_t>(random.below(48));
  auto const spoil = [&](int64_t t, int32_t h, int32_t at, float value) {
    c.rows[static_cast<size_t>(t * c.token_stride + h * c.head_stride + at)] = value;
  };
  spoil(tokens - 1, 2, 47, NAN);
  spoil(token, 2, 46, -INFINITY);
  spoil(token, head, channel, INFINITY);
  Device const device(c);
  auto const encode =
      c.params<couplet_encode_params>(device.table.table, device.rows.data(), device.page_table.data(), dtype);
  couplet_report report{};
  CHECK(cuda::encode_entries.run(&encode, device.workspace.data(), nullptr, &report) == COUPLET_OK, "%s",
        report.detail);
  couplet_report const found = device.report();
  bool const first = head < 2 || channel < 46;
  CHECK(found.status == COUPLET_NOT_FINITE && found.token == token && found.kv_head == (first ? head : 2) &&
            found.channel == (first ? channel : 46),
        "status %d at token %lld, kv head %d, channel %d and not at %lld, %d, %d", found.status,
        static_cast<long long>(found.token), found.kv_head, found.channel, static_cast<long long>(token), head,
        channel);
}

// The tokens of a case, cut where an octet of slots ends into runs, the last one first: the bytes are those of one call, and a NaN is counted
// over the runs in their order.
void test_runs(int32_t most_tokens, int32_t dtype, Random& random) {
  Shape shape;
  shape.codec = {4, 5};
  shape.kv_heads = 2;
  shape.head_dim = 16;
  shape.tokens = 5 * most_tokens / 2;
  shape.first_token = random.below(70);
  Case c(shape, dtype, random, false);
  std::vector<int32_t> cuts{0};
  while (cuts.back() < shape.tokens) {
    int64_t const slot = (shape.first_token + cuts.back()) % 8;
    int64_t const octets = 1 + random.below(most_tokens / 8 - 1);
    cuts.push_back(static_cast<int32_t>(std::min<int64_t>(shape.tokens, cuts.back() + 8 * octets - slot)));
  }
  Device device(c);
  std::vector<std::vector<couplet_encode_run>> runs(2);  // the CPU's, the device's
  std::vector<uint8_t> cpu_bytes = c.pages;
  auto const cpu_pages = c.page_table(cpu_bytes.data());
  int64_t tokens_before = 0;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    size_t const cut = cuts.size() - 2 - i;
    int64_t const offset = cuts[cut] * c.token_stride;
    couplet_encode_run run = {.rows = c.rows.data() + offset,
                              .pages = cpu_pages.data(),
                              .token_stride = c.token_stride,
                              .head_stride = c.head_stride,
                              .first_token = shape.first_token + cuts[cut],
                              .tokens_before = tokens_before,
                              .tokens = cuts[cut + 1] - cuts[cut],
                              .reserved = 0};
    runs[0].push_back(run);
    run.rows = device.rows.data() + offset * bytes_of(dtype);
    run.pages = device.page_table.data();
    runs[1].push_back(run);
    tokens_before += run.tokens;
  }
  auto const in_runs = [&](const couplet_table* table, const couplet_encode_run* given, int32_t element) {
    auto p = c.params<couplet_encode_params>(table, nullptr, nullptr, element);
    p.runs = given;
    p.run_count = static_cast<int32_t>(runs[0].size());
    p.tokens = most_tokens;
    return p;
  };
  auto const cpu_table = test::make_table(c.shape, c.centroids, c.metric);
  DeviceArray<couplet_encode_run> const device_runs(runs[1]);
  auto const on_cpu = in_runs(cpu_table.get(), runs[0].data(), COUPLET_FLOAT32);
  auto const on_device = in_runs(device.table.table, device_runs.data(), dtype);

  auto const once_pages = c.page_table(c.pages.data());
  auto const once = c.params<couplet_encode_params>(cpu_table.get(), c.rows.data(), once_pages.data(), COUPLET_FLOAT32);
  couplet_report report{};
  CHECK(cpu::encode_entries.run(&once, nullptr, nullptr, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(cpu::encode_entries.run(&on_cpu, nullptr, nullptr, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(cpu_bytes == c.pages, "%zu runs on the CPU give other bytes than one", runs[0].size());
  CHECK(cuda::encode_entries.run(&on_device, device.workspace.data(), nullptr, &report) == COUPLET_OK, "%s",
        report.detail);
  CHECK(device.report().status == COUPLET_OK, "status %d", device.report().status);
  CHECK(device.pages.read() == c.pages, "%zu runs of %s give other bytes than one", runs[0].size(), name_of(dtype));

  size_t const last = runs[0].size() - 1;
  auto const offset = static_cast<size_t>(static_cast<const float*>(runs[0][last].rows) - c.rows.data());
  c.rows[offset + static_cast<size_t>(c.head_stride) + 9] = NAN;
  device.rows.write(c.elements());
  couplet_report reports[2]{};
  CHECK(cpu::encode_entries.run(&on_cpu, nullptr, nullptr, &reports[0]) == COUPLET_NOT_FINITE, "%s", "a NaN is taken");
  CHECK(cuda::encode_entries.run(&on_device, device.workspace.data(), nullptr, &report) == COUPLET_OK, "%s",
        report.detail);
  reports[1] = device.report();
  for (const couplet_report& found : reports)
    CHECK(found.status == COUPLET_NOT_FINITE && found.token == runs[0][last].tokens_before && found.kv_head == 1 &&
              found.channel == 9,
          "status %d at token %lld, kv head %d, channel %d", found.status, static_cast<long long>(found.token),
          found.kv_head, found.channel);
}

// Distances that overflow float32, and those that underflow, are decided in double.
void test_extreme(float scale, int32_t tokens, Random& random) {
  Shape shape;
  shape.codec = {4, 5};
  shape.head_dim = 16;
  shape.tokens = tokens;
  Case c(shape, COUPLET_FLOAT32, random, false);
  for (float& value : c.centroids) value = scale * static_cast<float>(random.normal());
  for (float& value : c.rows) value = scale * static_cast<float>(random.normal());
  Device const device(c);
  auto const encode = c.params<couplet_encode_params>(device.table.table, device.rows.data(), device.page_table.data(),
                                                      COUPLET_FLOAT32);
  couplet_report report{};
  CHECK(cuda::encode_entries.run(&encode, device.workspace.data(), nullptr, &report) == COUPLET_OK, "%s",
        report.detail);
  auto const cpu_table = test::make_table(c.shape, c.centroids, c.metric);
  auto const cpu_pages = c.page_table(c.pages.data());
  auto const cpu_encode =
      c.params<couplet_encode_params>(cpu_table.get(), c.rows.data(), cpu_pages.data(), COUPLET_FLOAT32);
  CHECK(cpu::encode_entries.run(&cpu_encode, nullptr, nullptr, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(device.pages.read() == c.pages, "codes differ at scale %g", static_cast<double>(scale));
}

// Both are captured in a graph of a stream and run twice.
void test_capture(Random& random) {
  Shape shape;
  shape.codec = {8, 8};
  shape.head_dim = 16;
  shape.tokens = 3;
  Case c(shape, COUPLET_FLOAT16, random, false);
  Device const device(c);
  DeviceArray<uint8_t> const decoded(c.elements().size());
  auto const encode = c.params<couplet_encode_params>(device.table.table, device.rows.data(), device.page_table.data(),
                                                      COUPLET_FLOAT16);
  auto const decode =
      c.params<couplet_decode_params>(device.table.table, decoded.data(), device.page_table.data(), COUPLET_FLOAT16);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  couplet_report report{};
  expect(cudaStreamCreate(&stream), "stream");
  expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin of capture");
  CHECK(cuda::encode_entries.run(&encode, device.workspace.data(), stream, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(cuda::decode_entries.run(&decode, nullptr, stream, &report) == COUPLET_OK, "%s", report.detail);
  expect(cudaStreamEndCapture(stream, &graph), "end of capture");
  expect(cudaGraphInstantiate(&executable, graph, 0), "graph");
  CHECK(device.pages.read() == c.pages, "%s", "a captured call has run");
  for (int i = 0; i < 2; ++i) expect(cudaGraphLaunch(executable, stream), "launch");
  expect(cudaStreamSynchronize(stream), "stream");
  CHECK(device.pages.read() != c.pages, "%s", "the graph has not run");
  CHECK(device.report().status == COUPLET_OK, "status %d", device.report().status);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

void test_refusals(Random& random) {
  Shape shape;
  shape.codec = {8, 8};
  shape.head_dim = 16;
  shape.tokens = 3;
  Case c(shape, COUPLET_FLOAT16, random, false);
  Device const device(c);
  auto const good = c.params<couplet_encode_params>(device.table.table, device.rows.data(), device.page_table.data(),
                                                    COUPLET_FLOAT16);
  auto const refused = [&](auto change, const char* what) {
    couplet_encode_params params = good;
    change(params);
    couplet_report report{};
    CHECK(cuda::encode_entries.check(&params, &report) == COUPLET_INVALID_ARGUMENT && report.detail[0],
          "%s is accepted", what);
  };
  CHECK(cuda::encode_entries.check(&good, nullptr) == COUPLET_OK, "%s", "the sound case is refused");
  refused([](auto& p) { p.dtype = 3; }, "dtype 3");
  refused([](auto& p) { p.rows = nullptr; }, "no rows");
  refused([](auto& p) { p.pages = nullptr; }, "no pages");
  refused([](auto& p) { p.table = nullptr; }, "no table");
  refused([](auto& p) { p.page_tokens = 12; }, "pages of 12 tokens");
  refused([](auto& p) { p.tokens = -1; }, "-1 tokens");
  refused([](auto& p) { p.first_token = -1; }, "first token -1");
  refused([](auto& p) { p.codec.code_bits = 13; }, "13 bits");
  couplet_report report{};
  CHECK(cuda::encode_entries.run(&good, nullptr, nullptr, &report) == COUPLET_INVALID_ARGUMENT, "%s",
        "no workspace is accepted");
  auto overlapping = c.params<couplet_decode_params>(device.table.table, device.rows.data(), device.page_table.data(),
                                                     COUPLET_FLOAT16);
  overlapping.token_stride = 8;
  CHECK(cuda::decode_entries.check(&overlapping, &report) == COUPLET_INVALID_ARGUMENT, "%s",
        "rows that overlap are accepted");
}

}  // namespace

int main() {
  Random random(11);
  static constexpr int32_t dtypes[] = {COUPLET_FLOAT32, COUPLET_FLOAT16, COUPLET_BFLOAT16};
  struct Sample {
    couplet_codec codec;
    int32_t head_dim, kv_heads, tokens;
  };
  static constexpr Sample samples[] = {
      {{8, 8}, 64, 2, 150},  {{8, 10}, 16, 1, 97}, {{4, 8}, 32, 1, 130}, {{2, 8}, 8, 1, 129}, {{1, 3}, 8, 3, 131},
      {{16, 9}, 32, 1, 100}, {{16, 12}, 16, 1, 3}, {{8, 8}, 24, 3, 1},   {{3, 5}, 24, 2, 70}, {{256, 2}, 256, 1, 9}};
  for (auto const& sample : samples)
    for (int32_t dtype : dtypes) {
      Shape shape;
      shape.codec = sample.codec;
      shape.head_dim = sample.head_dim;
      shape.kv_heads = sample.kv_heads;
      shape.tokens = sample.tokens;
      shape.first_token = random.below(70);
      test_case(shape, dtype, random);
    }
  for (int i = 0; i < 40; ++i) {
    Shape shape = test::random_shape(random);
    int64_t const pairs = int64_t{shape.kv_heads} * shape.head_dim << shape.codec.code_bits;
    shape.tokens = static_cast<int32_t>(std::min<int64_t>(shape.tokens, 300'000 / pairs));
    test_case(shape, dtypes[i % 3], random, i % 4 == 0);
  }
  for (int32_t tokens : {7, 120})
    for (int32_t dtype : dtypes) test_not_finite(tokens, tokens == 7 ? 6 : 8, dtype, random);
  for (int32_t most_tokens : {24, 128})
    for (int32_t dtype : dtypes) test_runs(most_tokens, dtype, random);
  for (float scale : {1e25f, 1e-25f, 1e37f})
    for (int32_t tokens : {5, 100}) test_extreme(scale, tokens, random);
  test_capture(random);
  test_refusals(random);
  return couplet::test::finish();
}
