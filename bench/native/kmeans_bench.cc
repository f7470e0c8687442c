// kmeans on points of a stated kind. Prints one JSON object per line and kind of data:
//   cpu_ms    CPU time of the calling thread for one problem (median of --repeats runs of all problems, divided by --problems);
//             with --threads above 1, wall time instead, and the key is wall_ms
//   gflops    2 * points * centroids * channels * (iterations + 1) / time: the multiply-adds of the distances in Lloyd
//             iterations and the last assignment; seeding, means and argmin are in the time and not in the count
//   inertia   sum over points of the squared distance to the nearest centroid, in double, mean over the problems
// Before timing, assignments are compared with a double-precision search: one that is worse by more than rounding ends the run.
//   kmeans_bench [--points 16384] [--centroids 256] [--channels 8] [--iterations 25] [--problems 4] [--threads 1]
//                [--repeats 3] [--data normal,clusters,heavy,flat] [--write PREFIX]
// --write saves the points of each kind as PREFIX.<kind>.f32 (float32 [problems][points][channels]) for bench/peers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

#include <algorithm>

#include "../../native/cpu/backend.h"
#include "../../test/native/check.h"

namespace {

struct Options {
  int points = 16384, centroids = 256, channels = 8, iterations = 25, problems = 4, threads = 1, repeats = 3;
  std::string data = "normal,clusters,heavy,flat", write;
};

double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// normal: no structure, the hardest to cluster. clusters: as many as centroids. heavy: normal with a few large channels and
// rare outliers, as keys have. flat: uniform in a cube.
std::vector<float> make_points(const Options& options, const std::string& kind) {
  couplet::test::Random random(7);
  size_t const channels = static_cast<size_t>(options.channels);
  size_t const rows = static_cast<size_t>(options.problems) * static_cast<size_t>(options.points);
  std::vector<float> const modes = random.normals(static_cast<size_t>(options.centroids) * channels, 4);
  std::vector<float> points(rows * channels);
  for (size_t n = 0; n < rows; ++n) {
    const float* const mode = modes.data() + static_cast<size_t>(random.below(options.centroids)) * channels;
    double const outlier = random.uniform() < 0.002 ? 10 : 1;
    for (size_t c = 0; c < channels; ++c) {
      double value = kind == "flat" ? random.uniform(-1, 1) : random.normal();
      if (kind == "clusters") value += static_cast<double>(mode[c]);
      if (kind == "heavy") value = value * outlier * (c % 8 == 3 ? 6 : 1) + (c % 4 == 1 ? 5 : 0);
      points[n * channels + c] = static_cast<float>(value);
    }
  }
  return points;
}

// Every 97th point: is its centroid the nearest one, within the rounding of float32 scores?
bool assignments_hold(const Options& options, const std::vector<float>& points, const std::vector<float>& centroids,
                      const std::vector<int32_t>& assignments) {
  int const channels = options.channels;
  auto const distance = [&](const float* x, const float* c) {
    double sum = 0;
    for (int i = 0; i < channels; ++i) sum += std::pow(static_cast<double>(x[i]) - static_cast<double>(c[i]), 2);
    return sum;
  };
  for (size_t row = 0; row < assignments.size(); row += 97) {
    const float* const x = points.data() + row * static_cast<size_t>(channels);
    const float* const table = centroids.data() + row / static_cast<size_t>(options.points) *
                                                      static_cast<size_t>(options.centroids * channels);
    double best = INFINITY, norm = 0;
    for (int k = 0; k < options.centroids; ++k) best = std::min(best, distance(x, table + k * channels));
    for (int i = 0; i < channels; ++i) norm += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    if (distance(x, table + assignments[row] * channels) > best + 1e-5 * (norm + 100)) return false;
  }
  return true;
}

int run(const Options& options, const std::string& kind) {
  std::vector<float> const points = make_points(options, kind);
  if (!options.write.empty()) {
    std::FILE* const file = std::fopen((options.write + "." + kind + ".f32").c_str(), "wb");
    if (!file || std::fwrite(points.data(), sizeof(float), points.size(), file) != points.size() ||
        std::fclose(file) != 0) {
      std::perror(options.write.c_str());
      return 1;
    }
  }
  size_t const problems = static_cast<size_t>(options.problems);
  std::vector<float> centroids(problems * static_cast<size_t>(options.centroids * options.channels));
  std::vector<double> inertia(problems);
  std::vector<int32_t> assignments(problems * static_cast<size_t>(options.points)), iterations(problems);
  couplet_kmeans_params params{};
  params.points = points.data();
  params.centroids = centroids.data();
  params.inertia = inertia.data();
  params.assignments = assignments.data();
  params.iterations = iterations.data();
  params.problem_stride = int64_t{options.points} * options.channels;
  params.point_stride = options.channels;
  params.seed = 1;
  params.problems = options.problems;
  params.point_count = options.points;
  params.channels = options.channels;
  params.centroid_count = options.centroids;
  params.weight_sharing = 1;
  params.max_iterations = options.iterations;
  params.threads = options.threads;
  couplet_kmeans_entries const& kmeans = couplet::cpu::kmeans_entries;
  couplet_report report;
  if (kmeans.check(&params, &report) != COUPLET_OK) return std::fprintf(stderr, "%s\n", report.detail), 1;
  void* const workspace = std::aligned_alloc(64, std::max<size_t>(64, kmeans.workspace(&params)));
  std::vector<double> times;
  for (int repeat = 0; repeat < options.repeats; ++repeat) {
    clockid_t const clock = options.threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
    double const start = seconds(clock);
    if (kmeans.run(&params, workspace, nullptr, &report) != COUPLET_OK)
      return std::fprintf(stderr, "%s\n", report.detail), 1;
    times.push_back((seconds(clock) - start) / options.problems);
    if (repeat == 0 && !assignments_hold(options, points, centroids, assignments))
      return std::fprintf(stderr, "%s: an assignment is not the nearest centroid\n", kind.c_str()), 1;
  }
  std::free(workspace);
  std::sort(times.begin(), times.end());
  double const time = times[times.size() / 2];
  double inertia_sum = 0, work = 0;
  for (size_t p = 0; p < problems; ++p) {
    inertia_sum += inertia[p];
    work += 2.0 * options.points * options.centroids * options.channels * (iterations[p] + 1) / options.problems;
  }
  char body[64];
  kmeans.describe(&params, body, sizeof body);
  std::printf(
      "{\"who\": \"%s\", \"data\": \"%s\", \"points\": %d, \"centroids\": %d, \"channels\": %d, \"iterations\": %d, "
      "\"%s\": %.2f, \"gflops\": %.1f, \"inertia\": %.8g}\n",
      body, kind.c_str(), options.points, options.centroids, options.channels, iterations[0],
      options.threads == 1 ? "cpu_ms" : "wall_ms", time * 1e3, work / time / 1e9, inertia_sum / options.problems);
  std::fflush(stdout);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  Options options;
  struct {
    const char* name;
    int* number;
    std::string* text;
  } const known[] = {{"--points", &options.points, nullptr},     {"--centroids", &options.centroids, nullptr},
                     {"--channels", &options.channels, nullptr}, {"--iterations", &options.iterations, nullptr},
                     {"--problems", &options.problems, nullptr}, {"--threads", &options.threads, nullptr},
                     {"--repeats", &options.repeats, nullptr},   {"--data", nullptr, &options.data},
                     {"--write", nullptr, &options.write}};
  for (int i = 1; i < count; i += 2) {
    auto const option =
        std::find_if(std::begin(known), std::end(known), [&](auto& o) { return !std::strcmp(o.name, arguments[i]); });
    if (option == std::end(known) || i + 1 == count)
      return std::fprintf(stderr, "Unknown or incomplete option %s\n", arguments[i]), 2;
    if (option->text) *option->text = arguments[i + 1];
    if (option->number) *option->number = std::atoi(arguments[i + 1]);
  }
  for (size_t at = 0; at < options.data.size();) {
    size_t const comma = std::min(options.data.find(',', at), options.data.size());
    if (int const failed = run(options, options.data.substr(at, comma - at))) return failed;
    at = comma + 1;
  }
  return 0;
}
