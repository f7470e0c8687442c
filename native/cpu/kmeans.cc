// kmeans: checks, plan, progress. The learning itself is in kmeans_problem.cc.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <mutex>

#include "../common/check.h"
#include "../common/control.h"
#include "../common/not_finite.h"
#include "backend.h"
#include "kmeans_problem.h"
#include "pool.h"

namespace couplet::cpu {

extern const KmeansBody kmeans_portable;
#if defined(__x86_64__)
extern const KmeansBody kmeans_avx2;
extern const KmeansBody kmeans_avx512;
#endif

const KmeansBody& kmeans_body([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return kmeans_avx512;
  if (isa == Isa::avx2) return kmeans_avx2;
#endif
  return kmeans_portable;
}

namespace {

constexpr size_t most_bytes_side_by_side = size_t{1} << 30;
// Below this many (point, centroid, channel) triples, about 0.1 ms of work, threads cost more than they help.
constexpr int64_t least_shared_work = int64_t{1} << 23;

// Problems run side by side, one thread each; those that are left over, or too large for that, run one after another
// with all threads on each. The workspace is that of the problems at work at the same time: at most 1 GiB side by side, or
// one problem. A problem takes points * (8 channels + 24) bytes, its centroids take centroids * (20 channels + 16), and sums
// by block another 8 centroids * (channels + 1): once on one thread, else per block, which is at most points * 2 (channels + 1).
struct Plan {
  KmeansShape shape;
  int threads;
  int32_t side_by_side;  // the first so many problems
  int workers;           // threads for them
  size_t alone_bytes;    // workspace of a problem on one thread
  size_t bytes;          // all of the workspace

  explicit Plan(const couplet_kmeans_params& params) : shape(params), threads(resolve_threads(params.threads)) {
    KmeansMemory memory;
    alone_bytes = memory.lay_out(shape, 1, nullptr);
    size_t const shared_bytes = memory.lay_out(shape, threads, nullptr);
    bool const small = shape.points * shape.channels * shape.centroids < least_shared_work;
    workers = std::min(threads, params.problems);
    bool const fits = alone_bytes * static_cast<size_t>(workers) <= most_bytes_side_by_side;
    if (small || threads == 1)
      side_by_side = params.problems;
    else
      side_by_side = fits ? params.problems - params.problems % threads : 0;
    bytes = std::max(side_by_side > 0 ? alone_bytes * static_cast<size_t>(workers) : 0,
                     side_by_side < params.problems ? shared_bytes : 0);
  }
};

// Hands progress to the caller: one call at a time, at most one per 10 ms, and always the last. A problem counts its
// max_iterations and one more for being written; what an early end saves counts as done.
class Progress {
 public:
  explicit Progress(const couplet_kmeans_params& params)
      : control_(params.control && params.control->progress ? params.control : nullptr),
        per_problem_(int64_t{params.max_iterations} + 1),
        total_(per_problem_ * params.problems) {}

  void iterated(int32_t problem, int32_t iteration) { advance(iteration > 0, problem, iteration); }
  void written(int32_t problem, int32_t iterations) { advance(per_problem_ - iterations, problem, iterations); }

 private:
  void advance(int64_t steps, int32_t problem, int32_t iteration) {
    if (!control_) return;
    std::lock_guard const lock(mutex_);
    done_ += steps;
    auto const now = std::chrono::steady_clock::now();
    if (done_ < total_ && now - last_ < std::chrono::milliseconds(10)) return;
    last_ = now;
    control_->progress(control_->user, done_, total_, problem, iteration);
  }

  const couplet_control* const control_;
  int64_t const per_problem_;
  int64_t const total_;
  std::mutex mutex_;
  std::chrono::steady_clock::time_point last_{};
  int64_t done_ = 0;
};

// The first number that is not allowed among points [first, end) of a problem; COUPLET_OK when there is none.
couplet_status check_numbers(const couplet_kmeans_params& params, int32_t problem, int64_t first, int64_t end,
                             couplet_report* report) {
  const float* const points = params.points + problem * params.problem_stride;
  for (int64_t n = first; n < end; ++n)
    for (int32_t c = 0; c < params.channels; ++c) {
      float const value = points[n * params.point_stride + c];
      if (std::isfinite(value)) continue;
      return point_not_finite(report, value, problem, n, c);
    }
  if (!params.weights || problem % params.weight_sharing != 0) return COUPLET_OK;
  const float* const weights = params.weights + problem / params.weight_sharing * params.weight_problem_stride;
  for (int64_t n = first; n < end; ++n) {
    float const weight = weights[n * params.weight_point_stride];
    if (std::isfinite(weight) && weight >= 0) continue;
    return weight_not_allowed(report, weight, problem, n);
  }
  return COUPLET_OK;
}

// All problems before any is learned: better now than after minutes. The report is that of the first bad piece.
couplet_status check_all_numbers(const couplet_kmeans_params& params, int threads, couplet_report* report) {
  constexpr int64_t piece_points = 1 << 15;
  int64_t const pieces = (params.point_count + piece_points - 1) / piece_points;
  auto const check_piece = [&](int64_t task, couplet_report* to) {
    int64_t const first = task % pieces * piece_points;
    int64_t const end = std::min<int64_t>(first + piece_points, params.point_count);
    return check_numbers(params, static_cast<int32_t>(task / pieces), first, end, to);
  };
  int64_t const tasks = params.problems * pieces;
  std::atomic<int64_t> first_bad{tasks};
  parallel_for(threads, tasks, [&](int64_t task, int) {
    if (task > first_bad || cancelled(params.control) || check_piece(task, nullptr) == COUPLET_OK) return;
    for (int64_t seen = first_bad; task < seen && !first_bad.compare_exchange_weak(seen, task);) {
    }
  });
  return first_bad == tasks ? COUPLET_OK : check_piece(first_bad, report);
}

void learn(const couplet_kmeans_params& params, const KmeansShape& shape, int32_t index, int threads, void* memory,
           Progress& progress) {
  if (cancelled(params.control)) return;
  KmeansProblem problem(params, shape, kmeans_body(isa()), index, threads, memory);
  problem.load();
  if (problem.cancelled()) return;
  problem.seed();
  if (problem.cancelled()) return;
  int32_t iteration = 0;
  progress.iterated(index, iteration);
  while (iteration < params.max_iterations && problem.improve()) progress.iterated(index, ++iteration);
  if (problem.cancelled()) return;
  problem.write();
  if (params.iterations) params.iterations[index] = iteration;
  progress.written(index, iteration);
}

couplet_status run(const couplet_kmeans_params* params, void* workspace, void*, couplet_report* report) {
  if (couplet_status const status = check_kmeans_params(params, report); status != COUPLET_OK) return status;
  if (!workspace) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected workspace but received NULL");
  Plan const plan(*params);
  if (couplet_status const status = check_all_numbers(*params, plan.threads, report); status != COUPLET_OK)
    return status;

  Progress progress(*params);
  parallel_for(plan.workers, plan.side_by_side, [&](int64_t task, int worker) {
    char* const memory = static_cast<char*>(workspace) + static_cast<size_t>(worker) * plan.alone_bytes;
    learn(*params, plan.shape, static_cast<int32_t>(task), 1, memory, progress);
  });
  for (int32_t problem = plan.side_by_side; problem < params->problems; ++problem)
    learn(*params, plan.shape, problem, plan.threads, workspace, progress);
  if (cancelled(params->control)) return fail(report, COUPLET_CANCELLED, {}, "kmeans was cancelled");
  return COUPLET_OK;
}

size_t workspace_bytes(const couplet_kmeans_params* params) { return Plan(*params).bytes; }

void describe(const couplet_kmeans_params*, char* text, size_t text_bytes) {
  std::snprintf(text, text_bytes, "kmeans %s", isa_name(isa()));
}

}  // namespace

const couplet_kmeans_entries kmeans_entries = {
    .check = check_kmeans_params, .workspace = workspace_bytes, .run = run, .describe = describe};

}  // namespace couplet::cpu
