// kmeans of the GPU backend: against sums in double, against the CPU backend's inertia, on data whose answer is known, twice for the
// same bits; what is refused; progress, cancelling, capture in a graph. For the simulator and for a GPU.
#include <cmath>
#include <cstring>
#include <limits>

#include "../../cuda/backend.h"
#include "../../native/cpu/backend.h"
#include "../native/check.h"
#include "device_array.h"

namespace {

using namespace couplet;
using couplet::test::DeviceArray;
using couplet::test::Random;

struct Data {
  int32_t problems = 1, points = 1, channels = 1, centroids = 1, iterations = 20, sharing = 1;
  double tolerance = 0;
  uint64_t seed = 1;
  int64_t point_stride = 0, problem_stride = 0;  // of `values`
  std::vector<float> values;
  std::vector<float> weights;  // [problems / sharing, rounded up][points], or empty

  Data(int32_t problem_count, int32_t point_count, int32_t channel_count, int32_t centroid_count)
      : problems(problem_count), points(point_count), channels(channel_count), centroids(centroid_count) {
    point_stride = channels + points % 3;
    problem_stride = point_stride * points + 1;
    values.assign(static_cast<size_t>(problem_stride * problems), NAN);
  }
  float& value(int32_t problem, int32_t point, int32_t channel) {
    return values[static_cast<size_t>(problem * problem_stride + point * point_stride + channel)];
  }
  float value(int32_t problem, int32_t point, int32_t channel) const {
    return const_cast<Data*>(this)->value(problem, point, channel);
  }
  float weight(int32_t problem, int32_t point) const {
    return weights.empty() ? 1.0f : weights[static_cast<size_t>(problem / sharing * points + point)];
  }
  template <class Make>
  void fill(Make make) {
    for (int32_t p = 0; p < problems; ++p)
      for (int32_t n = 0; n < points; ++n)
        for (int32_t c = 0; c < channels; ++c) value(p, n, c) = static_cast<float>(make(p, n, c));
  }
  void weigh(Random& random, int32_t shared) {
    sharing = shared;
    weights.resize(static_cast<size_t>(((problems - 1) / shared + 1) * points));
    for (float& weight : weights) weight = random.below(5) == 0 ? 0.0f : static_cast<float>(random.uniform(0.01, 3));
  }
  size_t floats() const { return static_cast<size_t>(problems) * static_cast<size_t>(centroids * channels); }

  couplet_kmeans_params params(const float* points_at, const float* weights_at) const {
    couplet_kmeans_params p{};
    p.points = points_at;
    p.weights = weights.empty() ? nullptr : weights_at;
    p.problem_stride = problem_stride;
    p.point_stride = point_stride;
    p.weight_problem_stride = points;
    p.weight_point_stride = 1;
    p.seed = seed;
    p.tolerance = tolerance;
    p.problems = problems;
    p.point_count = points;
    p.channels = channels;
    p.centroid_count = centroids;
    p.weight_sharing = sharing;
    p.max_iterations = iterations;
    p.threads = 1;
    return p;
  }
  std::string text() const {
    return std::to_string(problems) + " problems of " + std::to_string(points) + " points, " +
           std::to_string(channels) + " channels, " + std::to_string(centroids) + " centroids" +
           (weights.empty() ? "" : ", weighted");
  }
};

struct Result {
  couplet_status status = COUPLET_OK;
  couplet_report report{};
  couplet_report found{};  // the workspace's
  std::vector<float> centroids;
  std::vector<double> inertia;
  std::vector<int32_t> assignments;
  std::vector<int32_t> iterations;
  double total() const {
    double sum = 0;
    for (double value : inertia) sum += value;
    return sum;
  }
  bool operator==(const Result& other) const {
    return centroids == other.centroids && inertia == other.inertia && assignments == other.assignments &&
           iterations == other.iterations;
  }
};

void expect(cudaError_t error, const char* what) {
  CHECK(error == cudaSuccess, "%s: %s", what, cudaGetErrorName(error));
}

Result on_gpu(const Data& data, const couplet_control* control = nullptr, bool capture = false) {
  DeviceArray<float> const values(data.values);
  DeviceArray<float> const weights(data.weights);
  DeviceArray<float> const centroids(data.floats());
  DeviceArray<double> const inertia(static_cast<size_t>(data.problems));
  DeviceArray<int32_t> const assignments(static_cast<size_t>(data.problems) * static_cast<size_t>(data.points));
  DeviceArray<int32_t> const iterations(static_cast<size_t>(data.problems));
  couplet_kmeans_params params = data.params(values.data(), weights.data());
  params.centroids = centroids.data();
  params.inertia = inertia.data();
  params.assignments = assignments.data();
  params.iterations = iterations.data();
  params.control = control;
  DeviceArray<uint8_t> const workspace(cuda::kmeans_entries.workspace(&params));
  cudaStream_t stream = nullptr;
  if (capture) {
    expect(cudaStreamCreate(&stream), "stream");
    expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin of capture");
  }
  Result result;
  result.status = cuda::kmeans_entries.run(&params, workspace.data(), stream, &result.report);
  if (capture) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    expect(cudaStreamEndCapture(stream, &graph), "end of capture");
    expect(cudaGraphInstantiate(&executable, graph, 0), "graph");
    expect(cudaGraphLaunch(executable, stream), "launch");
    expect(cudaStreamSynchronize(stream), "stream");
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
  }
  std::memcpy(&result.found, workspace.read().data(), sizeof result.found);
  result.centroids = centroids.read();
  result.inertia = inertia.read();
  result.assignments = assignments.read();
  result.iterations = iterations.read();
  return result;
}

Result on_cpu(const Data& data) {
  Result result;
  result.centroids.resize(data.floats());
  result.inertia.resize(static_cast<size_t>(data.problems));
  couplet_kmeans_params params = data.params(data.values.data(), data.weights.data());
  params.centroids = result.centroids.data();
  params.inertia = result.inertia.data();
  std::vector<uint8_t> workspace(cpu::kmeans_entries.workspace(&params) + 64);
  void* const aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
  result.status = cpu::kmeans_entries.run(&params, aligned, nullptr, &result.report);
  CHECK(result.status == COUPLET_OK, "%s", result.report.detail);
  return result;
}

double distance(const Data& data, const Result& result, int32_t problem, int32_t point, int32_t centroid) {
  double sum = 0;
  for (int32_t c = 0; c < data.channels; ++c) {
    double const difference =
        static_cast<double>(data.value(problem, point, c)) -
        static_cast<double>(
            result.centroids[static_cast<size_t>((problem * data.centroids + centroid) * data.channels + c)]);
    sum += difference * difference;
  }
  return sum;
}

// Inertia is that of the centroids and assignments, and no point has a nearer centroid than its own, rounding aside.
void check_consistent(const Data& data, const Result& result) {
  std::string const text = data.text();
  CHECK(result.status == COUPLET_OK && result.found.status == COUPLET_OK, "%s: %s", text.c_str(), result.report.detail);
  for (int32_t p = 0; p < data.problems; ++p) {
    bool weightless = true;
    for (int32_t n = 0; n < data.points; ++n) weightless = weightless && data.weight(p, n) == 0;
    double inertia = 0;
    int32_t beaten = 0;
    double magnitude = 0;
    for (int32_t n = 0; n < data.points; ++n)
      for (int32_t c = 0; c < data.channels; ++c)
        magnitude = std::max(magnitude, std::abs(static_cast<double>(data.value(p, n, c))));
    for (int32_t n = 0; n < data.points; ++n) {
      int32_t const own = result.assignments[static_cast<size_t>(p * data.points + n)];
      if (!CHECK(own >= 0 && own < data.centroids, "%s: assignment %d", text.c_str(), own)) return;
      double const away = distance(data, result, p, n, own);
      inertia += (weightless ? 1.0 : static_cast<double>(data.weight(p, n))) * away;
      for (int32_t k = 0; k < data.centroids; ++k)
        beaten += distance(data, result, p, n, k) < away * (1 - 1e-5) - 1e-12 * magnitude * magnitude;
    }
    CHECK(beaten == 0, "%s: %d nearer centroids in problem %d", text.c_str(), beaten, p);
    CHECK(std::abs(result.inertia[static_cast<size_t>(p)] - inertia) <= 1e-9 * inertia, "%s: inertia %g and not %g",
          text.c_str(), result.inertia[static_cast<size_t>(p)], inertia);
  }
}

void test_random(Random& random) {
  static constexpr int32_t channels[] = {1, 2, 3, 4, 7, 8, 16, 24, 32};
  for (int i = 0; i < 18; ++i) {
    Data data(static_cast<int32_t>(1 + random.below(3)), static_cast<int32_t>(1 + random.below(i % 6 == 0 ? 1200 : 90)),
              channels[i % 9], static_cast<int32_t>(1 + random.below(20)));
    data.seed = random.next();
    data.iterations = static_cast<int32_t>(random.below(7));
    double const offset = random.below(2) ? 0 : 50;
    data.fill([&](int, int, int) { return random.normal() + offset; });
    if (i % 2) data.weigh(random, 1 + i % 3);
    check_consistent(data, on_gpu(data));
  }
  // More centroids than a stage of shared memory holds, and more than points.
  Data wide(1, 150, 32, 135);
  wide.iterations = 2;
  wide.fill([&](int, int, int) { return random.normal(); });
  check_consistent(wide, on_gpu(wide));
  Data few(1, 5, 8, 600);
  few.fill([&](int, int, int) { return random.normal(); });
  Result const result = on_gpu(few);
  CHECK(result.total() == 0, "5 points, 600 centroids: inertia %g", result.total());
}

void test_inertia(Random& random) {
  for (int32_t kind = 0; kind < 2; ++kind) {
    Data data(3, 800, 8, 16);
    data.iterations = 8;
    data.tolerance = 1e-4;
    data.fill([&](int, int n, int c) {
      return kind == 0 ? random.normal() : random.normal() * 0.3 + n % 40 * (c % 3) * 0.1;
    });
    if (kind == 1) data.weigh(random, 3);
    Result const gpu = on_gpu(data);
    check_consistent(data, gpu);
    double const cpu = on_cpu(data).total();
    CHECK(gpu.total() < 1.01 * cpu && gpu.total() > 0.97 * cpu, "%s: inertia %g, CPU %g", data.text().c_str(),
          gpu.total(), cpu);
    std::printf("inertia %.4f of the CPU's: %s\n", gpu.total() / cpu, data.text().c_str());
  }
}

// Points that take as many values as there are centroids, or fewer: no error at all, at any scale and weight.
void test_plateaus(Random& random) {
  for (double scale : {1.0, 1e-30, 1e30, 0.1})
    for (int32_t values : {1, 5, 16}) {
      Data data(2, 60, 5, 16);
      data.iterations = 3;
      data.fill([&](int, int n, int c) { return scale * (1000.1 + n % values * 1.7 + c * (n % values)); });
      if (values != 5) data.weigh(random, 2);
      Result const result = on_gpu(data);
      CHECK(result.status == COUPLET_OK && result.found.status == COUPLET_OK, "%s", result.report.detail);
      CHECK(result.total() == 0, "%d values at scale %g: inertia %g", values, scale, result.total());
    }
  Data weightless(1, 40, 2, 3);
  weightless.fill([&](int, int, int) { return random.normal(); });
  Data const uniform = weightless;
  weightless.weights.assign(40, 0.0f);
  CHECK(on_gpu(weightless) == on_gpu(uniform), "%s", "weights that are all 0 do not count as all 1");
}

void test_same_bits(Random& random) {
  Data data(3, 300, 8, 12);
  data.iterations = 4;
  data.seed = 99;
  data.fill([&](int p, int, int) { return random.normal() * (p + 1); });
  data.weigh(random, 1);
  Result const once = on_gpu(data);
  CHECK(on_gpu(data) == once, "%s", "a second run differs");
  CHECK(on_gpu(data, nullptr, true) == once, "%s", "a captured run differs");

  struct Seen {
    int64_t last = 0, total = 0;
    int calls = 0;
    bool ordered = true;
  } seen;
  int32_t cancel = 0;
  couplet_control control = {&cancel,
                             [](void* user, int64_t done, int64_t total, int32_t, int32_t) {
                               Seen& s = *static_cast<Seen*>(user);
                               s.ordered = s.ordered && done >= s.last;
                               s.last = done;
                               s.total = total;
                               ++s.calls;
                             },
                             &seen};
  CHECK(on_gpu(data, &control) == once, "%s", "a run with a control differs");
  CHECK(seen.calls > 0 && seen.ordered && seen.last == seen.total && seen.total == 3 * 5, "%d calls, %lld of %lld",
        seen.calls, static_cast<long long>(seen.last), static_cast<long long>(seen.total));
  cancel = 1;
  CHECK(on_gpu(data, &control).status == COUPLET_CANCELLED, "%s", "not cancelled");

  Data alone(1, 300, 8, 12);
  alone.iterations = 4;
  alone.seed = 99;
  for (int32_t n = 0; n < 300; ++n)
    for (int32_t c = 0; c < 8; ++c) alone.value(0, n, c) = data.value(2, n, c);
  alone.weights.assign(data.weights.end() - 300, data.weights.end());
  Result const last = on_gpu(alone);
  CHECK(std::equal(last.centroids.begin(), last.centroids.end(), once.centroids.end() - 96), "%s",
        "the place in the batch shows");
}

void test_refusals(Random& random) {
  Data good(3, 50, 3, 4);
  good.fill([&](int, int, int) { return random.normal(); });
  good.weigh(random, 1);
  couplet_control const control{};
  auto const refused = [&](const Data& data, couplet_status status, int32_t problem, int64_t point, int32_t channel) {
    couplet_report const found = on_gpu(data).found;
    CHECK(found.status == status && found.kv_head == problem && found.token == point && found.channel == channel,
          "status %d, problem %d, point %lld, channel %d", found.status, found.kv_head,
          static_cast<long long>(found.token), found.channel);
    Result const told = on_gpu(data, &control);
    CHECK(told.status == status && told.report.kv_head == problem && told.report.detail[0], "status %d", told.status);
  };
  Data bad = good;
  bad.value(2, 49, 2) = NAN;
  refused(bad, COUPLET_NOT_FINITE, 2, 49, 2);
  bad.value(1, 7, 1) = -INFINITY;
  refused(bad, COUPLET_NOT_FINITE, 1, 7, 1);
  bad.weights[53] = -1;
  refused(bad, COUPLET_INVALID_ARGUMENT, 1, 3, -1);
  bad.weights[2] = INFINITY;
  refused(bad, COUPLET_NOT_FINITE, 0, 2, -1);

  DeviceArray<float> const memory(64);
  couplet_kmeans_params params = good.params(memory.data(), memory.data());
  params.centroids = memory.data();
  couplet_report report{};
  CHECK(cuda::kmeans_entries.check(&params, &report) == COUPLET_OK, "%s", report.detail);
  auto const invalid = [&](auto change, const char* what) {
    couplet_kmeans_params changed = params;
    change(changed);
    CHECK(cuda::kmeans_entries.check(&changed, &report) == COUPLET_INVALID_ARGUMENT, "%s is accepted", what);
  };
  invalid([](auto& p) { p.points = nullptr; }, "no points");
  invalid([](auto& p) { p.channels = 33; }, "33 channels");
  invalid([](auto& p) { p.centroid_count = 4097; }, "4097 centroids");
  invalid([](auto& p) { p.tolerance = NAN; }, "tolerance NaN");
  invalid([](auto& p) { p.point_stride = INT64_MAX / 4; }, "a stride beyond memory");
  invalid([](auto& p) { p.weight_sharing = 0; }, "weight sharing 0");
}

}  // namespace

int main() {
  Random random(5);
  test_random(random);
  test_inertia(random);
  test_plateaus(random);
  test_same_bits(random);
  test_refusals(random);
  return couplet::test::finish();
}
