// Whole calls (native/call) on a GPU, or on the simulator: arrays of the host in slices give what they give in one piece, and on the CPU;
// strides, gaps and what lies beside the codes; what is no finite number; cancel; calls that only enqueue.
#include <cstring>

#include "../../native/call/codes.h"
#include "../../native/call/kmeans.h"
#include "../native/codes_reference.h"
#include "device_array.h"

extern "C" const couplet_backend* couplet_backend_entry(couplet_report* report);

namespace {

using namespace couplet;
using test::DeviceArray;
using test::Random;
using test::Shape;

Device const& gpu_device() {
  static Device const device(couplet_backend_entry(nullptr));
  return device;
}
Device const cpu_device(cpu::backend());

// ---- encode and decode ----------------------------------------------------------------------------------------------

struct CodesCase {
  Shape shape;
  int64_t head_stride, token_stride;
  std::vector<float> centroids, rows;
  std::vector<uint8_t> codes;

  CodesCase(const Shape& given, Random& random) : shape(given) {
    shape.half = false;
    head_stride = shape.head_dim + random.below(2) * random.below(5);
    token_stride = head_stride * shape.kv_heads + random.below(2) * random.below(5);
    if (random.below(3) == 0) {  // head by head
      token_stride = shape.head_dim;
      head_stride = token_stride * shape.tokens + random.below(5);
    }
    centroids = random.normals(test::table_floats(shape));
    rows = random.normals(static_cast<size_t>(token_stride * shape.tokens + head_stride * shape.kv_heads));
    codes.resize(static_cast<size_t>(shape.pages() * shape.kv_heads * page_stride()));
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random.next());
  }

  int64_t page_stride() const { return couplet_page_bytes(shape.codec, shape.head_dim, shape.page_tokens); }
  couplet_table_params table_params() const {
    return {centroids.data(), shape.kv_heads, shape.head_dim, shape.codec, nullptr};
  }

  template <class Params>
  CodesCall<Params> call(const PreparedTables& tables, void* data, uint8_t* pages) const {
    CodesCall<Params> call;
    Params& p = call.params;
    p.rows = data;
    p.table = tables.table();
    p.token_stride = token_stride;
    p.head_stride = head_stride;
    p.page_stride = page_stride();
    p.first_token = shape.first_token;
    p.tokens = shape.tokens;
    p.kv_heads = shape.kv_heads;
    p.head_dim = shape.head_dim;
    p.page_tokens = shape.page_tokens;
    p.dtype = COUPLET_FLOAT32;
    p.codec = shape.codec;
    call.codes = pages;
    return call;
  }
};

template <class Params>
void small_slices(CodesCall<Params>& call, Random& random) {
  call.staged_row_bytes = 1 + random.below(1 << 14);
  call.staged_page_bytes = 1 + random.below(1 << 13);
}

// Each side on the host or on the device; everything of both, gaps and other tokens too, is the CPU's.
void test_codes(const CodesCase& c, Random& random) {
  PreparedTables cpu_tables, gpu_tables;
  couplet_report report{};
  CHECK(cpu_tables.create(cpu_device, c.table_params(), &report) == COUPLET_OK, "%s", report.detail);
  CHECK(gpu_tables.create(gpu_device(), c.table_params(), &report) == COUPLET_OK, "%s", report.detail);
  std::vector<uint8_t> expected_codes = c.codes;
  std::vector<float> cpu_rows = c.rows, expected_rows(c.rows.size(), 77);
  CHECK(run_codes(cpu_device, c.call<couplet_encode_params>(cpu_tables, cpu_rows.data(), expected_codes.data()),
                  &report) == COUPLET_OK,
        "%s", report.detail);
  CHECK(run_codes(cpu_device, c.call<couplet_decode_params>(cpu_tables, expected_rows.data(), expected_codes.data()),
                  &report) == COUPLET_OK,
        "%s", report.detail);
  for (int sides = 0; sides < 4; ++sides) {
    bool const rows_on_host = sides & 1, codes_on_host = sides & 2;
    std::vector<float> rows = c.rows;
    std::vector<uint8_t> codes = c.codes;
    DeviceArray<float> device_rows(rows);
    DeviceArray<uint8_t> device_codes(codes);
    auto const run = [&](auto call) {
      call.rows_on_host = rows_on_host;
      call.codes_on_host = codes_on_host;
      small_slices(call, random);
      couplet_status const status = run_codes(gpu_device(), call, &report);
      CHECK(status == COUPLET_OK, "%s: %s", c.shape.text().c_str(), report.detail);
    };
    float* const rows_at = rows_on_host ? rows.data() : device_rows.data();
    uint8_t* const codes_at = codes_on_host ? codes.data() : device_codes.data();
    run(c.call<couplet_encode_params>(gpu_tables, rows_at, codes_at));
    CHECK((codes_on_host ? codes : device_codes.read()) == expected_codes, "encode, sides %d: %s", sides,
          c.shape.text().c_str());
    std::vector<float> const blank(c.rows.size(), 77);
    rows = blank;
    device_rows.write(blank);
    run(c.call<couplet_decode_params>(gpu_tables, rows_at, codes_at));
    std::vector<float> const found = rows_on_host ? rows : device_rows.read();
    CHECK(std::memcmp(found.data(), expected_rows.data(), found.size() * sizeof(float)) == 0, "decode, sides %d: %s",
          sides, c.shape.text().c_str());
  }
}

// On a stream, twice into the same codes and once into others: the addresses that are left behind are those of the last call.
void test_enqueue(const CodesCase& c) {
  PreparedTables cpu_tables, tables;
  couplet_report report{};
  cpu_tables.create(cpu_device, c.table_params(), &report);
  tables.create(gpu_device(), c.table_params(), &report);
  std::vector<float> rows = c.rows;
  std::vector<uint8_t> expected = c.codes;
  run_codes(cpu_device, c.call<couplet_encode_params>(cpu_tables, rows.data(), expected.data()), &report);
  DeviceArray<float> const device_rows(rows);
  DeviceArray<uint8_t> first(c.codes), second(c.codes);
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "no stream");
  for (uint8_t* const codes : {first.data(), first.data(), second.data()}) {
    auto const call = c.call<couplet_encode_params>(tables, device_rows.data(), codes);
    CHECK(enqueue_codes(tables, call, stream, &report) == COUPLET_OK, "%s", report.detail);
  }
  CHECK(cudaStreamSynchronize(stream) == cudaSuccess, "the stream failed");
  CHECK(first.read() == expected && second.read() == expected, "enqueued: %s", c.shape.text().c_str());
  // The same once more only launches, so that a graph can hold it.
  auto const again = c.call<couplet_encode_params>(tables, device_rows.data(), second.data());
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "no capture");
  CHECK(enqueue_codes(tables, again, stream, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess, "the capture was spoiled");
  CHECK(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess, "no graph");
  second.write(c.codes);
  CHECK(cudaGraphLaunch(executable, stream) == cudaSuccess, "the graph was not launched");
  CHECK(cudaStreamSynchronize(stream) == cudaSuccess, "the stream failed");
  CHECK(second.read() == expected, "from a graph: %s", c.shape.text().c_str());
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);

  DeviceArray<float> decoded(std::vector<float>(c.rows.size(), 77));
  auto const call = c.call<couplet_decode_params>(tables, decoded.data(), first.data());
  CHECK(enqueue_codes(tables, call, stream, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(cudaStreamSynchronize(stream) == cudaSuccess, "the stream failed");
  std::vector<float> expected_rows(c.rows.size(), 77);
  run_codes(cpu_device, c.call<couplet_decode_params>(cpu_tables, expected_rows.data(), expected.data()), &report);
  CHECK(decoded.read() == expected_rows, "decoded on a stream: %s", c.shape.text().c_str());
  cudaStreamDestroy(stream);
}

void expect_same_report(const couplet_report& found, const couplet_report& expected) {
  CHECK(found.status == expected.status && found.token == expected.token && found.kv_head == expected.kv_head &&
            found.channel == expected.channel && std::strcmp(found.detail, expected.detail) == 0,
        "\"%s\" is not \"%s\"", found.detail, expected.detail);
}

void test_codes_refusals() {
  Random random(3);
  CodesCase c({.codec = {8, 4}, .kv_heads = 2, .head_dim = 32, .tokens = 300, .page_tokens = 16, .first_token = 5},
              random);
  for (int64_t const token : {290, 17}) c.rows[static_cast<size_t>(token * c.token_stride + c.head_stride + 9)] = NAN;
  PreparedTables cpu_tables, tables;
  couplet_report expected{}, found{};
  cpu_tables.create(cpu_device, c.table_params(), &expected);
  tables.create(gpu_device(), c.table_params(), &found);
  run_codes(cpu_device, c.call<couplet_encode_params>(cpu_tables, c.rows.data(), c.codes.data()), &expected);
  auto call = c.call<couplet_encode_params>(tables, c.rows.data(), c.codes.data());
  small_slices(call, random);
  CHECK(run_codes(gpu_device(), call, &found) == COUPLET_NOT_FINITE, "a NaN was accepted");
  expect_same_report(found, expected);

  int32_t const cancel = 1;
  couplet_control const control = {.cancel = &cancel, .progress = nullptr, .user = nullptr};
  call.control = &control;
  CHECK(run_codes(gpu_device(), call, &found) == COUPLET_CANCELLED, "%s", found.detail);
}

// ---- kmeans ---------------------------------------------------------------------------------------------------------

struct KmeansCase {
  couplet_kmeans_params params{};
  std::vector<float> points, weights;

  explicit KmeansCase(Random& random) {
    couplet_kmeans_params& p = params;
    p.problems = static_cast<int32_t>(1 + random.below(9));
    p.point_count = static_cast<int32_t>(1 + random.below(60));
    p.channels = static_cast<int32_t>(1 + random.below(9));
    p.centroid_count = static_cast<int32_t>(1 + random.below(8));
    p.max_iterations = 4;
    p.weight_sharing = static_cast<int32_t>(1 + random.below(5));
    int64_t const shares = (p.problems - 1) / p.weight_sharing + 1;
    bool const by_point = random.below(2);  // [point][problem], as calibrate has them
    int64_t const gap = random.below(2) * random.below(4);
    p.problem_stride = by_point ? p.channels : p.point_count * (p.channels + gap);
    p.point_stride = by_point ? p.problems * p.channels + gap : p.channels + gap;
    p.weight_problem_stride = by_point ? 1 : random.below(2) * (p.point_count + gap);
    p.weight_point_stride = by_point ? shares + gap : 1;
    points = random.normals(static_cast<size_t>(p.problems * p.problem_stride + p.point_count * p.point_stride));
    p.points = points.data();
    if (random.below(4) == 0) return;
    weights.resize(static_cast<size_t>(shares * p.weight_problem_stride + p.point_count * p.weight_point_stride));
    for (float& weight : weights) weight = static_cast<float>(random.uniform());
    p.weights = weights.data();
  }
};

struct Learned {
  couplet_status status = COUPLET_OK;
  couplet_report report{};
  std::vector<float> centroids;
  std::vector<double> inertia;
  std::vector<int32_t> iterations, assignments;
  int64_t done = 0, total = 0;
  bool in_order = true;

  Learned(const Device& device, const KmeansCase& c, int64_t staged_bytes, bool points_on_host = true) {
    KmeansCall call;
    call.params = c.params;
    call.staged_point_bytes = staged_bytes;
    auto const problems = static_cast<size_t>(c.params.problems);
    centroids.resize(problems * static_cast<size_t>(c.params.centroid_count * c.params.channels));
    inertia.resize(problems);
    iterations.resize(problems);
    assignments.resize(problems * static_cast<size_t>(c.params.point_count));
    couplet_control const control = {.cancel = nullptr, .progress = note, .user = this};
    call.params.control = &control;
    call.params.centroids = centroids.data();
    call.params.inertia = inertia.data();
    call.params.iterations = iterations.data();
    call.params.assignments = assignments.data();
    DeviceArray<float> const points(points_on_host ? std::vector<float>() : c.points);
    if (!points_on_host) call.params.points = points.data();
    call.points_on_host = points_on_host;
    status = run_kmeans(device, call, nullptr, &report);
  }

  static void note(void* user, int64_t done, int64_t total, int32_t, int32_t) {
    auto& self = *static_cast<Learned*>(user);
    self.in_order = self.in_order && done >= self.done && done <= total && (!self.total || self.total == total);
    self.done = done;
    self.total = total;
  }
};

void test_kmeans(Random& random) {
  KmeansCase const c(random);
  couplet_kmeans_params const& p = c.params;
  Learned const whole(gpu_device(), c, int64_t{1} << 30);
  CHECK(whole.status == COUPLET_OK, "%s", whole.report.detail);
  for (int const form : {0, 1, 2}) {
    int64_t const bytes = random.below(int64_t{p.problems} * p.point_count * p.channels * 4);
    Learned const sliced(gpu_device(), c, bytes, form < 2);
    CHECK(sliced.centroids == whole.centroids && sliced.inertia == whole.inertia &&
              sliced.iterations == whole.iterations && sliced.assignments == whole.assignments,
          "form %d, %d problems of %d points, %d sharing weights, slices of %lld bytes: %s", form, p.problems,
          p.point_count, p.weights ? p.weight_sharing : 0, static_cast<long long>(bytes), sliced.report.detail);
    CHECK(sliced.in_order && sliced.done == sliced.total && sliced.total == p.problems * (p.max_iterations + 1),
          "progress ended at %lld of %lld", static_cast<long long>(sliced.done), static_cast<long long>(sliced.total));
  }
}

// A number that is not allowed, anywhere: the CPU's sentence, although a slice counts from its own start.
void test_kmeans_refusals(Random& random) {
  KmeansCase c(random);
  couplet_kmeans_params const& p = c.params;
  int64_t const problem = random.below(p.problems), point = random.below(p.point_count);
  int64_t const share = problem / p.weight_sharing;
  if (p.weights && random.below(2))
    c.weights[static_cast<size_t>(share * p.weight_problem_stride + point * p.weight_point_stride)] =
        random.below(2) ? NAN : -1.5f;
  else
    c.points[static_cast<size_t>(problem * p.problem_stride + point * p.point_stride + random.below(p.channels))] =
        INFINITY;
  Learned const expected(cpu_device, c, 0);
  Learned const found(gpu_device(), c, random.below(int64_t{4} * p.point_count * p.channels * 4));
  CHECK(found.status == expected.status && found.status != COUPLET_OK, "status %d and not %d", found.status,
        expected.status);
  expect_same_report(found.report, expected.report);
}

}  // namespace

int main() {
  Random random(1);
  for (int i = 0; i < 14; ++i) {
    CodesCase const c(test::random_shape(random), random);
    if (c.shape.tokens == 0) continue;
    test_codes(c, random);
    test_enqueue(c);
  }
  test_codes_refusals();
  for (int i = 0; i < 16; ++i) test_kmeans(random);
  for (int i = 0; i < 12; ++i) test_kmeans_refusals(random);
  return test::finish();
}
