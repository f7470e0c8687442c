// kmeans against double arithmetic written here, and its promises: the same bits on any number of threads and on every
// instruction set, no allocation, quick cancellation, defined answers to ugly data.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <new>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../../native/cpu/backend.h"
#include "../../native/cpu/isa.h"
#include "../../native/cpu/kmeans_problem.h"
#include "check.h"

static std::atomic<int64_t> allocations{0};
[[gnu::noinline]] void* operator new(size_t bytes) {
  ++allocations;
  if (void* const memory = std::malloc(bytes ? bytes : 1)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

using couplet::cpu::Isa;
using couplet::test::Random;
couplet_kmeans_entries const& kmeans = couplet::cpu::kmeans_entries;
constexpr float infinity = std::numeric_limits<float>::infinity();

// A problem set with its results; contiguous unless the strides are changed.
struct Run {
  int problems, points, channels, centroids;
  std::vector<float> data, weights;  // weights: empty, [points] or [problems][points]
  int iterations = 100, threads = 1;
  uint64_t seed = 1;
  double tolerance = 0;
  const couplet_control* control = nullptr;

  std::vector<float> table;
  std::vector<double> inertia;
  std::vector<int32_t> assignments, iterations_run;
  couplet_report report{};

  Run(int problems, int points, int channels, int centroids, std::vector<float> data, std::vector<float> weights = {})
      : problems(problems),
        points(points),
        channels(channels),
        centroids(centroids),
        data(std::move(data)),
        weights(std::move(weights)) {}

  couplet_kmeans_params params() {
    table.assign(size_t(problems) * centroids * channels, -7);
    inertia.assign(size_t(problems), -7);
    assignments.assign(size_t(problems) * points, -7);
    iterations_run.assign(size_t(problems), -7);
    couplet_kmeans_params p{};
    p.points = data.data();
    p.weights = weights.empty() ? nullptr : weights.data();
    p.centroids = table.data();
    p.inertia = inertia.data();
    p.assignments = assignments.data();
    p.iterations = iterations_run.data();
    p.control = control;
    p.problem_stride = int64_t{points} * channels;
    p.point_stride = channels;
    p.weight_problem_stride = weights.size() > size_t(points) ? points : 0;
    p.weight_point_stride = 1;
    p.seed = seed;
    p.tolerance = tolerance;
    p.problems = problems;
    p.point_count = points;
    p.channels = channels;
    p.centroid_count = centroids;
    p.weight_sharing = 1;
    p.max_iterations = iterations;
    p.threads = threads;
    return p;
  }

  couplet_status run() { return run(params()); }
  couplet_status run(couplet_kmeans_params const& p) {
    report = {};
    if (couplet_status const status = kmeans.check(&p, &report); status != COUPLET_OK) return status;
    size_t const bytes = kmeans.workspace(&p);
    std::vector<char> memory(bytes + 128);
    char* const workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
    std::memset(workspace, 0xff, bytes);  // NaN everywhere: nothing is read before it is written
    std::memset(workspace + bytes, 0x5a, 64);
    couplet_status const status = kmeans.run(&p, workspace, nullptr, &report);
    bool const kept = std::all_of(workspace + bytes, workspace + bytes + 64, [](char byte) { return byte == 0x5a; });
    CHECK(kept, "wrote beyond the %zu bytes of workspace", bytes);
    return status;
  }

  double value(int problem, int point, int channel) const {
    return static_cast<double>(data[(size_t(problem) * points + point) * channels + channel]);
  }
  double weight(int problem, int point) const {
    if (weights.empty()) return 1;
    return static_cast<double>(
        weights[weights.size() > size_t(points) ? size_t(problem) * points + point : size_t(point)]);
  }
  double centroid(int problem, int index, int channel) const {
    return static_cast<double>(table[(size_t(problem) * centroids + index) * channels + channel]);
  }
  double distance(int problem, int point, int index) const {
    double sum = 0;
    for (int c = 0; c < channels; ++c) sum += std::pow(value(problem, point, c) - centroid(problem, index, c), 2);
    return sum;
  }
  int assigned(int problem, int point) const { return assignments[size_t(problem) * points + point]; }
};

bool same(Run const& a, Run const& b) {
  return a.table == b.table && a.inertia == b.inertia && a.assignments == b.assignments &&
         a.iterations_run == b.iterations_run;
}

// Nearest, means, inertia: all by a plain double loop.
void check_result(Run const& run, const char* name) {
  for (int p = 0; p < run.problems; ++p) {
    std::vector<double> middle(size_t(run.channels)), mass(size_t(run.centroids)),
        sums(size_t(run.centroids * run.channels));
    for (int n = 0; n < run.points; ++n)
      for (int c = 0; c < run.channels; ++c) middle[c] += run.value(p, n, c) / run.points;
    double radius =
        0;  // of points around their mean; scores are float32 sums of channels + 1 terms of that size, squared
    for (int n = 0; n < run.points; ++n) {
      double sum = 0;
      for (int c = 0; c < run.channels; ++c) sum += std::pow(run.value(p, n, c) - middle[c], 2);
      radius = std::max(radius, std::sqrt(sum));
    }
    double const margin = 4 * (run.channels + 4) * 0x1p-24 * radius * radius;
    double inertia = 0, total_weight = 0;
    int not_nearest = 0;
    for (int n = 0; n < run.points; ++n) total_weight += run.weight(p, n);
    for (int n = 0; n < run.points; ++n) {
      int const own = run.assigned(p, n);
      if (!CHECK(own >= 0 && own < run.centroids, "%s: problem %d point %d has centroid %d", name, p, n, own)) return;
      double best = std::numeric_limits<double>::infinity();
      for (int k = 0; k < run.centroids; ++k) best = std::min(best, run.distance(p, n, k));
      not_nearest += run.distance(p, n, own) > best + margin;
      double const weight = total_weight > 0 ? run.weight(p, n) : 1;
      inertia += weight * run.distance(p, n, own);
      mass[own] += weight;
      for (int c = 0; c < run.channels; ++c) sums[own * run.channels + c] += weight * run.value(p, n, c);
    }
    CHECK(not_nearest == 0, "%s: problem %d: %d points have a nearer centroid", name, p, not_nearest);
    CHECK(std::abs(run.inertia[p] - inertia) <= 1e-12 * inertia, "%s: problem %d: %.17g is %.17g", name, p,
          run.inertia[p], inertia);
    bool const converged = run.tolerance == 0 && run.iterations_run[p] < run.iterations;
    int empty = 0;
    for (int k = 0; k < run.centroids; ++k) {
      empty += mass[k] == 0;
      for (int c = 0; c < run.channels; ++c) {
        double const got = run.centroid(p, k, c), mean = sums[k * run.channels + c] / mass[k];
        CHECK(std::isfinite(got), "%s: problem %d centroid %d channel %d is %g", name, p, k, c, got);
        if (!converged || mass[k] == 0) continue;
        CHECK(std::abs(got - mean) <= 1.2e-7 * std::abs(mean) + 1e-45,
              "%s: problem %d centroid %d channel %d: %.9g is %.9g", name, p, k, c, got, mean);
      }
    }
    if (converged)
      CHECK(empty == 0 || run.inertia[p] <= margin * total_weight, "%s: problem %d: %d centroids stay empty", name, p,
            empty);
  }
}

std::vector<float> positive(Random& random, size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(-std::log(1 - random.uniform()));
  return values;
}

void random_problems() {
  Random random(1);
  struct Size {
    int problems, points, channels, centroids;
  };
  for (Size const size : {Size{2, 700, 8, 16},
                          {3, 333, 1, 7},
                          {1, 1000, 2, 256},
                          {2, 257, 3, 33},
                          {1, 515, 32, 20},
                          {1, 100, 31, 5},
                          {2, 64, 16, 1},
                          {1, 5000, 4, 64},
                          {1, 4200, 2, 4096},
                          {1, 1, 8, 1},
                          {4, 31, 7, 31}}) {
    for (bool const weighted : {false, true}) {
      size_t const rows = size_t(size.problems) * size.points;
      Run run(size.problems, size.points, size.channels, size.centroids, random.normals(rows * size.channels),
              weighted ? positive(random, rows) : std::vector<float>{});
      run.iterations = size.centroids > 1000 ? 1 : 200;
      std::string const name =
          std::to_string(size.points) + "x" + std::to_string(size.channels) + " " + std::to_string(size.centroids);
      CHECK(run.run() == COUPLET_OK, "%s: %s", name.c_str(), run.report.detail);
      check_result(run, name.c_str());
    }
  }
}

// From the same seeds, Lloyd in double: the same clusters where they are apart, nearly the same inertia where they are not.
void agrees_with_double_lloyd() {
  Random random(2);
  for (double const apart : {0.0, 8.0}) {
    int const points = 3000, channels = 4, centroids = 24, steps = 12;
    std::vector<float> data = random.normals(size_t(points) * channels);
    std::vector<float> const modes = random.normals(size_t(centroids) * channels, apart);
    for (int n = 0; n < points; ++n)
      for (int c = 0; c < channels; ++c) data[size_t(n) * channels + c] += modes[size_t(n % centroids) * channels + c];
    Run run(1, points, channels, centroids, data, positive(random, points));
    run.iterations = 0;
    CHECK(run.run() == COUPLET_OK, "%s", run.report.detail);
    std::vector<double> table(run.table.begin(), run.table.end());
    double inertia = 0;
    for (int step = 0; step <= steps; ++step) {
      std::vector<double> sums(table.size()), mass(centroids);
      inertia = 0;
      for (int n = 0; n < points; ++n) {
        int own = 0;
        double best = std::numeric_limits<double>::infinity();
        for (int k = 0; k < centroids; ++k) {
          double distance = 0;
          for (int c = 0; c < channels; ++c) distance += std::pow(run.value(0, n, c) - table[k * channels + c], 2);
          if (distance < best) best = distance, own = k;
        }
        double const weight = run.weight(0, n);
        inertia += weight * best;
        mass[own] += weight;
        for (int c = 0; c < channels; ++c) sums[own * channels + c] += weight * run.value(0, n, c);
      }
      if (step < steps)
        for (size_t i = 0; i < table.size(); ++i)
          table[i] = mass[i / channels] > 0 ? sums[i] / mass[i / channels] : table[i];
    }
    run.iterations = steps;
    CHECK(run.run() == COUPLET_OK, "%s", run.report.detail);
    CHECK(std::abs(run.inertia[0] - inertia) < 1e-4 * inertia, "apart %g: %.9g, double %.9g", apart, run.inertia[0],
          inertia);
    if (apart == 0) continue;
    double worst = 0;
    for (size_t i = 0; i < table.size(); ++i)
      worst = std::max(worst, std::abs(static_cast<double>(run.table[i]) - table[i]));
    CHECK(worst < 1e-5, "centroids differ by %g", worst);
  }
}

void inertia_never_grows() {
  Random random(3);
  for (int trial = 0; trial < 8; ++trial) {
    Run run(1, 900, 1 + trial, 3 << (trial % 5), random.normals(900 * (1 + trial)), positive(random, 900));
    double before = std::numeric_limits<double>::infinity();
    for (run.iterations = 0; run.iterations < 20; ++run.iterations) {
      CHECK(run.run() == COUPLET_OK, "%s", run.report.detail);
      CHECK(run.inertia[0] <= before * (1 + 1e-6), "trial %d iteration %d: %.9g after %.9g", trial, run.iterations,
            run.inertia[0], before);
      before = run.inertia[0];
    }
  }
}

void tolerance_stops_early() {
  Random random(4);
  Run run(1, 4000, 4, 64, random.normals(16000));
  run.run();
  Run coarse = run;
  coarse.tolerance = 1e-2;
  CHECK(coarse.run() == COUPLET_OK, "%s", coarse.report.detail);
  CHECK(coarse.iterations_run[0] > 1 && coarse.iterations_run[0] < run.iterations_run[0] / 2, "%d of %d",
        coarse.iterations_run[0], run.iterations_run[0]);
  check_result(coarse, "tolerance");
}

void threads_and_batches_change_nothing() {
  Random random(5);
  struct Size {
    int problems, points, channels, centroids;
  };
  // many small ones; a few that share threads; one alone, of several blocks
  for (Size const size : {Size{40, 300, 4, 16}, {3, 9000, 8, 128}, {1, 20000, 4, 120}, {5, 9000, 8, 128}}) {
    size_t const rows = size_t(size.problems) * size.points;
    Run one(size.problems, size.points, size.channels, size.centroids, random.normals(rows * size.channels),
            positive(random, rows));
    one.iterations = 2;
    CHECK(one.run() == COUPLET_OK, "%s", one.report.detail);
    for (int const threads : {2, 3, 7, 0}) {
      Run many = one;
      many.threads = threads;
      CHECK(many.run() == COUPLET_OK, "%s", many.report.detail);
      CHECK(same(one, many), "%d problems of %d points on %d threads", size.problems, size.points, threads);
    }
    for (int p = 0; p < std::min(size.problems, 3); ++p) {
      auto const part = [&](std::vector<float> const& all, size_t width) {
        return std::vector<float>(all.begin() + p * size.points * width, all.begin() + (p + 1) * size.points * width);
      };
      Run alone(1, size.points, size.channels, size.centroids, part(one.data, size.channels), part(one.weights, 1));
      alone.iterations = 2;
      alone.run();
      CHECK(alone.inertia[0] == one.inertia[p] &&
                std::equal(alone.table.begin(), alone.table.end(), one.table.begin() + p * alone.table.size()),
            "problem %d differs outside the batch", p);
    }
  }
}

void strides_and_shared_weights() {
  Random random(6);
  // [point][layer 2][head 3][channels 4], weights [point][layer 2], shared by the heads of a layer
  int const points = 500, channels = 4, problems = 6;
  std::vector<float> const cloud = random.normals(size_t(points) * problems * channels),
                           weights = positive(random, size_t(points) * 2);
  Run plain(problems, points, channels, 10, cloud, std::vector<float>(size_t(problems) * points));
  for (int p = 0; p < problems; ++p)
    for (int n = 0; n < points; ++n) {
      plain.weights[size_t(p) * points + n] = weights[size_t(n) * 2 + p / 3];
      for (int c = 0; c < channels; ++c)
        plain.data[(size_t(p) * points + n) * channels + c] = cloud[(size_t(n) * problems + p) * channels + c];
    }
  CHECK(plain.run() == COUPLET_OK, "%s", plain.report.detail);
  Run strided(problems, points, channels, 10, cloud, weights);
  couplet_kmeans_params params = strided.params();
  params.problem_stride = channels;
  params.point_stride = int64_t{problems} * channels;
  params.weight_sharing = 3;
  params.weight_problem_stride = 1;
  params.weight_point_stride = 2;
  CHECK(strided.run(params) == COUPLET_OK, "%s", strided.report.detail);
  CHECK(same(plain, strided), "strided input gives another result");
}

void instruction_sets_agree() {
  using namespace couplet::cpu;
  Random random(7);
  for (int channels = 1; channels <= 32; channels += channels < 9 ? 1 : 5) {
    int const points = 4200, centroids = 40 + channels;
    Run run(1, points, channels, centroids, random.normals(size_t(points) * channels), positive(random, points));
    for (size_t i = 0; i < 64; ++i) run.data[size_t(channels) * (100 + i)] = run.data[size_t(channels) * 99];
    run.iterations = 5;
    couplet_kmeans_params const params = run.params();
    KmeansShape const shape(params);
    std::vector<Run> results;
    for (Isa const isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
      if (isa > couplet::cpu::isa()) continue;
      for (int const threads : {1, 3}) {
        KmeansMemory counted;
        void* const memory = std::aligned_alloc(64, counted.lay_out(shape, threads, nullptr));
        KmeansProblem problem(params, shape, kmeans_body(isa), 0, threads, memory);
        problem.load();
        problem.seed();
        run.iterations_run[0] = 0;
        while (run.iterations_run[0] < run.iterations && problem.improve()) ++run.iterations_run[0];
        problem.write();
        std::free(memory);
        results.push_back(run);
        CHECK(same(results.front(), results.back()), "%s on %d threads, %d channels", isa_name(isa), threads, channels);
      }
    }
    run.run();
    CHECK(same(results.front(), run), "the backend's own choice, %d channels", channels);
  }
}

void seeds_matter() {
  Random random(8);
  Run run(1, 2000, 8, 64, random.normals(16000));
  run.run();
  Run again = run, other = run;
  again.run();
  other.seed = 2;
  other.run();
  CHECK(same(run, again), "the same seed gives another result");
  CHECK(run.table != other.table, "another seed gives the same result");
  CHECK(std::abs(run.inertia[0] - other.inertia[0]) < 0.05 * run.inertia[0], "%g and %g", run.inertia[0],
        other.inertia[0]);
}

void plateaus_have_no_error() {
  Random random(9);
  for (float const offset : {0.0f, 1000.0f, -3e6f}) {
    for (int const channels : {1, 2, 8}) {
      int const points = 5000, centroids = 100;
      std::vector<float> data(size_t(points) * channels);
      for (int n = 0; n < points; ++n)
        for (int c = 0; c < channels; ++c)
          data[size_t(n) * channels + c] =
              offset + static_cast<float>((n < centroids ? n : random.below(centroids)) * (c == 0) - c);
      Run run(1, points, channels, centroids, data, positive(random, points));
      CHECK(run.run() == COUPLET_OK, "%s", run.report.detail);
      CHECK(run.inertia[0] == 0, "offset %g, %d channels: %g", static_cast<double>(offset), channels, run.inertia[0]);
      check_result(run, "plateaus");
    }
  }
}

void fewer_points_than_centroids() {
  Run run(1, 5, 2, 16, {0, 0, 1, 0, 0, 1, 1, 1, 1, 1});
  CHECK(run.run() == COUPLET_OK, "%s", run.report.detail);
  CHECK(run.inertia[0] == 0, "%g", run.inertia[0]);
  std::set<std::pair<float, float>> distinct;
  for (int k = 0; k < 16; ++k) distinct.insert({run.table[2 * k], run.table[2 * k + 1]});
  CHECK(distinct.size() == 4, "%zu distinct centroids", distinct.size());
  for (int k = 4; k < 16; ++k)
    CHECK(run.table[2 * k] == run.table[6] && run.table[2 * k + 1] == run.table[7],
          "centroid %d does not repeat the last", k);
  for (int n = 0; n < 5; ++n)
    CHECK(run.assigned(0, n) < 4, "point %d has the repeated centroid %d", n, run.assigned(0, n));

  Run equal(1, 300, 3, 4, std::vector<float>(900, 2.5f));
  CHECK(equal.run() == COUPLET_OK, "%s", equal.report.detail);
  CHECK(equal.inertia[0] == 0 && std::all_of(equal.table.begin(), equal.table.end(), [](float x) { return x == 2.5f; }),
        "all points equal");
  CHECK(std::all_of(equal.assignments.begin(), equal.assignments.end(), [](int32_t k) { return k == 0; }),
        "ties go to the lowest index");
}

// Small problems with many equal points: every way of becoming empty.
void empty_clusters_are_filled() {
  Random random(10);
  for (int trial = 0; trial < 3000; ++trial) {
    int const points = 1 + int(random.below(24)), centroids = 1 + int(random.below(12)),
              channels = 1 + int(random.below(3));
    std::vector<float> data(size_t(points) * channels), weights(points);
    for (float& value : data) value = static_cast<float>(random.below(6));
    for (float& weight : weights) weight = static_cast<float>(random.below(3));
    Run run(1, points, channels, centroids, data, trial % 2 ? weights : std::vector<float>{});
    run.seed = uint64_t(trial);
    CHECK(run.run() == COUPLET_OK, "%s", run.report.detail);
    check_result(run, "small");
  }
}

void weights() {
  Random random(11);
  std::vector<float> data = random.normals(4000);
  std::vector<float> some = positive(random, 1000);
  for (size_t n = 0; n < 1000; n += 3) some[n] = 0;
  Run run(1, 1000, 4, 32, data, some);
  CHECK(run.run() == COUPLET_OK, "%s", run.report.detail);
  check_result(run, "some weights 0");
  run.iterations = 0;
  run.run();
  for (int k = 0; k < 32; ++k) {
    bool seed = false;
    for (int n = 0; n < 1000; ++n)
      seed = seed ||
             (some[n] > 0 && std::equal(&data[size_t(n) * 4], &data[size_t(n) * 4] + 4, &run.table[size_t(k) * 4]));
    CHECK(seed, "seed %d is not a point of positive weight", k);
  }

  Run none(1, 1000, 4, 32, data, std::vector<float>(1000, 0)), uniform(1, 1000, 4, 32, data),
      ones(1, 1000, 4, 32, data, std::vector<float>(1000, 1));
  none.run();
  uniform.run();
  ones.run();
  CHECK(same(none, uniform) && same(ones, uniform), "weights of 0 or of 1 everywhere are no weights");

  for (float const unit : {0x1p120f, 0x1p-100f}) {
    Run scaled(1, 1000, 4, 32, data, some), plain = scaled;
    for (float& weight : scaled.weights) weight *= unit;
    scaled.run();
    plain.run();
    CHECK(scaled.table == plain.table && scaled.assignments == plain.assignments, "a unit of weight matters");
    CHECK(std::abs(scaled.inertia[0] / static_cast<double>(unit) / plain.inertia[0] - 1) < 1e-12, "%g",
          scaled.inertia[0]);
  }

  std::vector<float> heavy(1000, 1);
  heavy[17] = 3e38f;
  Run pulled(1, 1000, 4, 1, data, heavy);
  CHECK(pulled.run() == COUPLET_OK, "%s", pulled.report.detail);
  for (int c = 0; c < 4; ++c)
    CHECK(pulled.table[c] == data[17 * 4 + c], "channel %d: %g", c, static_cast<double>(pulled.table[c]));
}

void extreme_values() {
  Random random(12);
  for (float const unit : {1e30f, 3e37f, 1e-30f, 1e-40f}) {
    Run run(1, 800, 8, 16, random.normals(6400));
    for (float& value : run.data) value *= unit;
    CHECK(run.run() == COUPLET_OK, "%s", run.report.detail);
    CHECK(std::isfinite(run.inertia[0]) && run.inertia[0] >= 0, "unit %g: inertia %g", static_cast<double>(unit),
          run.inertia[0]);
    check_result(run, "units");
  }
  Run corners(1, 4, 1, 2, {3.4e38f, -3.4e38f, 3.4e38f, -3.4e38f});
  CHECK(corners.run() == COUPLET_OK, "%s", corners.report.detail);
  CHECK(corners.inertia[0] == 0, "inertia %g", corners.inertia[0]);
  Run mixed(1, 600, 2, 8, random.normals(1200));
  mixed.data[77] = 1e30f;
  CHECK(mixed.run() == COUPLET_OK, "%s", mixed.report.detail);
  check_result(mixed, "one outlier");
}

void bad_numbers_are_reported() {
  Random random(13);
  for (int const threads : {1, 4}) {
    Run run(20, 100, 3, 4, random.normals(6000), positive(random, 2000));
    run.threads = threads;
    run.data[(7 * 100 + 42) * 3 + 2] = NAN;
    run.data[(11 * 100 + 1) * 3] = infinity;
    CHECK(run.run() == COUPLET_NOT_FINITE, "%s", run.report.detail);
    CHECK(run.report.kv_head == 7 && run.report.token == 42 && run.report.channel == 2,
          "problem %d point %lld channel %d", run.report.kv_head, static_cast<long long>(run.report.token),
          run.report.channel);
    run.data[(7 * 100 + 42) * 3 + 2] = -infinity;
    CHECK(run.run() == COUPLET_NOT_FINITE, "%s", run.report.detail);
    run.data[(7 * 100 + 42) * 3 + 2] = 0;
    run.weights[5 * 100 + 99] = -1e-20f;
    CHECK(run.run() == COUPLET_INVALID_ARGUMENT, "%s", run.report.detail);
    CHECK(run.report.kv_head == 5 && run.report.token == 99, "problem %d point %lld", run.report.kv_head,
          static_cast<long long>(run.report.token));
    run.weights[5 * 100 + 99] = NAN;
    CHECK(run.run() == COUPLET_NOT_FINITE, "%s", run.report.detail);
  }
}

void bad_arguments_are_refused() {
  Run run(2, 50, 3, 4, std::vector<float>(300, 1), std::vector<float>(100, 1));
  auto const refused = [&](const char* name, auto&& spoil) {
    couplet_kmeans_params params = run.params();
    spoil(params);
    couplet_report report{};
    CHECK(kmeans.check(&params, &report) == COUPLET_INVALID_ARGUMENT, "%s is accepted", name);
    CHECK(std::strstr(report.detail, name), "%s: %s", name, report.detail);
    CHECK(kmeans.check(&params, nullptr) == COUPLET_INVALID_ARGUMENT, "%s without a report", name);
  };
  using P = couplet_kmeans_params;
  refused("points", [](P& p) { p.points = nullptr; });
  refused("centroids", [](P& p) { p.centroids = nullptr; });
  for (int const count : {0, -1}) {
    refused("problems", [&](P& p) { p.problems = count; });
    refused("points", [&](P& p) { p.point_count = count; });
    refused("channels", [&](P& p) { p.channels = count; });
    refused("centroids", [&](P& p) { p.centroid_count = count; });
    refused("weightSharing", [&](P& p) { p.weight_sharing = count; });
  }
  refused("channels", [](P& p) { p.channels = 33; });
  refused("centroids", [](P& p) { p.centroid_count = 4097; });
  refused("iterations", [](P& p) { p.max_iterations = -1; });
  for (double const tolerance : {-1e-9, 1.0, double{NAN}, double{infinity}})
    refused("tolerance", [&](P& p) { p.tolerance = tolerance; });
  for (int64_t const stride : {int64_t{-1}, INT64_MAX, INT64_MAX / 3}) {
    refused("points", [&](P& p) { p.problem_stride = stride; });
    refused("points", [&](P& p) { p.point_stride = stride; });
    refused("weights", [&](P& p) { p.weight_problem_stride = stride; });
    refused("weights", [&](P& p) { p.weight_point_stride = stride; });
  }
  CHECK(kmeans.check(nullptr, nullptr) == COUPLET_INVALID_ARGUMENT, "NULL");
  couplet_kmeans_params const params = run.params();
  char text[64];
  kmeans.describe(&params, text, sizeof text);
  CHECK(std::strstr(text, "kmeans ") == text, "%s", text);
  CHECK(kmeans.run(&params, nullptr, nullptr, nullptr) == COUPLET_INVALID_ARGUMENT, "no workspace");
}

double process_seconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr double patience = 2;  // seconds
#else
constexpr double patience = 0.2;  // 100 ms on each of two threads
#endif

void cancels_quickly() {
  Random random(14);
  struct Size {
    int problems, points, channels, centroids;
  };
  for (Size const size : {Size{1, 300000, 8, 1024}, {1, 20000, 32, 4096}, {600, 2000, 8, 64}}) {
    for (int const delay_ms : {0, 5, 60}) {
      volatile int32_t cancel = 0;
      couplet_control const control{&cancel, nullptr, nullptr};
      Run run(size.problems, size.points, size.channels, size.centroids,
              std::vector<float>(size_t(size.problems) * size.points * size.channels));
      for (float& value : run.data) value = static_cast<float>(random.uniform());
      run.control = &control;
      run.threads = 2;
      double asked = 0;  // CPU time: this machine may have other work
      std::thread other([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms));
        asked = process_seconds();
        __atomic_store_n(&cancel, 1, __ATOMIC_RELAXED);
      });
      if (delay_ms == 0) other.join();
      CHECK(run.run() == COUPLET_CANCELLED, "after %d ms: status %d", delay_ms, run.report.status);
      double const returned = process_seconds();
      if (delay_ms > 0) other.join();
      CHECK(returned - asked < patience, "two threads went on for %.0f ms of CPU time together",
            1e3 * (returned - asked));
    }
  }
}

void progress_is_told() {
  Random random(15);
  struct Seen {
    std::atomic<int> inside{0};
    int calls = 0, overlaps = 0, backward = 0;
    int64_t done = -1, total = -1;
  };
  for (int const threads : {1, 4}) {
    Seen seen;
    couplet_control const control{nullptr,
                                  [](void* user, int64_t done, int64_t total, int32_t problem, int32_t iteration) {
                                    Seen& s = *static_cast<Seen*>(user);
                                    s.overlaps += ++s.inside != 1;
                                    s.backward += done < s.done || done > total || problem < 0 || problem >= 30 ||
                                                  iteration < 0 || iteration > 9;
                                    s.done = done;
                                    s.total = total;
                                    ++s.calls;
                                    --s.inside;
                                  },
                                  &seen};
    Run run(30, 500, 4, 16, random.normals(60000));
    run.iterations = 9;
    run.threads = threads;
    run.control = &control;
    CHECK(run.run() == COUPLET_OK, "%s", run.report.detail);
    CHECK(seen.calls >= 2 && seen.done == 300 && seen.total == 300, "%d calls, %lld of %lld", seen.calls,
          static_cast<long long>(seen.done), static_cast<long long>(seen.total));
    CHECK(seen.overlaps == 0 && seen.backward == 0, "%d overlap, %d go backward", seen.overlaps, seen.backward);
  }
}

void nothing_is_allocated() {
  Random random(16);
  for (int const problems : {1, 8}) {
    Run run(problems, 9000, 8, 64, random.normals(size_t(problems) * 72000));
    run.iterations = 3;
    run.threads = 2;
    couplet_kmeans_params const params = run.params();
    size_t const bytes = kmeans.workspace(&params);
    void* const workspace = std::aligned_alloc(64, bytes);
    kmeans.run(&params, workspace, nullptr, nullptr);  // starts the threads
    int64_t const before = allocations;
    CHECK(kmeans.run(&params, workspace, nullptr, nullptr) == COUPLET_OK, "run");
    CHECK(allocations == before, "%lld allocations", static_cast<long long>(allocations - before));
    std::free(workspace);
  }
}

}  // namespace

int main() {
  random_problems();
  agrees_with_double_lloyd();
  inertia_never_grows();
  tolerance_stops_early();
  threads_and_batches_change_nothing();
  strides_and_shared_weights();
  instruction_sets_agree();
  seeds_matter();
  plateaus_have_no_error();
  fewer_points_than_centroids();
  empty_clusters_are_filled();
  weights();
  extreme_values();
  bad_numbers_are_reported();
  bad_arguments_are_refused();
  cancels_quickly();
  progress_is_told();
  nothing_is_allocated();
  return couplet::test::finish();
}
