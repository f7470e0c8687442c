#include "kmeans.h"

#include <algorithm>
#include <vector>

#include "../common/not_finite.h"

namespace couplet {
namespace {

struct Axis {
  int64_t count;
  int64_t stride;  // floats
};

// Strided rows of `channels` floats, as they lie side by side: [outer][inner][channels].
struct Gather {
  Axis outer, inner;
  int64_t channels;
  bool swapped;  // the first axis given is the inner one

  // The axis with the longer stride is the outer one, so that runs are long and the reading goes forward.
  Gather(Axis first, Axis second, int64_t row)
      : outer(first), inner(second), channels(row), swapped(second.stride > first.stride) {
    if (swapped) std::swap(outer, inner);
  }

  int64_t floats() const { return outer.count * inner.count * channels; }
  int64_t outer_stride() const { return inner.count * channels; }
  int64_t first_stride() const { return swapped ? channels : outer_stride(); }
  int64_t second_stride() const { return swapped ? outer_stride() : channels; }

  // `from` itself where its rows already lie so.
  const float* rows(const float* from, std::vector<float>& memory) const {
    bool const has_runs = inner.stride == channels || inner.count == 1;
    if (has_runs && (outer.stride == outer_stride() || outer.count == 1)) return from;
    memory.resize(static_cast<size_t>(floats()));
    float* to = memory.data();
    for (int64_t o = 0; o < outer.count; ++o)
      for (int64_t i = 0; i < (has_runs ? 1 : inner.count); ++i) {
        int64_t const run = has_runs ? outer_stride() : channels;
        std::memcpy(to, from + o * outer.stride + i * inner.stride, static_cast<size_t>(run) * sizeof(float));
        to += run;
      }
    return memory.data();
  }
};

class Run {
 public:
  Run(const Device& device, const KmeansCall& call, void* stream, couplet_report* report)
      : device_(device), call_(call), params_(call.params), stream_(stream), report_(report) {
    control_.cancel = params_.control ? params_.control->cancel : nullptr;
    control_.user = this;
    if (params_.control && params_.control->progress)
      control_.progress = [](void* run, int64_t done, int64_t, int32_t problem, int32_t iteration) {
        static_cast<Run*>(run)->progress(done, problem, iteration);
      };
  }

  couplet_status all() {
    if (device_.is_host()) return run(params_);
    int64_t const problem_bytes = int64_t{params_.point_count} * params_.channels * static_cast<int64_t>(sizeof(float));
    most_problems_ =
        call_.points_on_host
            ? static_cast<int32_t>(std::clamp<int64_t>(call_.staged_point_bytes / problem_bytes, 1, params_.problems))
            : params_.problems;
    if (couplet_status const status = device_.backend->kmeans.check(&params_, report_)) return status;
    for (first_ = 0; first_ < params_.problems;) {
      int32_t const count = slice_problems();
      if (couplet_status const status = slice(count)) return in_call(status);
      first_ += count;
    }
    return COUPLET_OK;
  }

 private:
  // The next problems: several that share their weights all, or some that share the same.
  int32_t slice_problems() const {
    int32_t const left = params_.problems - first_;
    int32_t const sharing = params_.weights ? params_.weight_sharing : 1;
    if (most_problems_ >= sharing) return std::min(left, most_problems_ - most_problems_ % sharing);
    return std::min({left, most_problems_, sharing - first_ % sharing});
  }

  couplet_status slice(int32_t problems) {
    couplet_kmeans_params p = params_;
    p.problems = problems;
    p.control = &control_;
    p.points += first_ * p.problem_stride;
    if (call_.points_on_host) {
      Gather const gather({problems, p.problem_stride}, {p.point_count, p.point_stride}, p.channels);
      if (couplet_status const status = upload(gather, &p.points, points_)) return status;
      p.problem_stride = gather.first_stride();
      p.point_stride = gather.second_stride();
    }
    if (p.weights)
      if (couplet_status const status = place_weights(&p)) return status;

    auto const count = static_cast<size_t>(problems);
    size_t const centroid_bytes = count * static_cast<size_t>(p.centroid_count * p.channels) * sizeof(float);
    size_t const assignment_bytes = count * static_cast<size_t>(p.point_count) * sizeof(int32_t);
    p.centroids = params_.centroids + int64_t{first_} * p.centroid_count * p.channels;
    if (couplet_status const status = reserve(count, centroid_bytes, assignment_bytes)) return status;
    if (call_.centroids_on_host) p.centroids = centroids_.get<float>();
    p.inertia = inertia_.get<double>();
    p.iterations = iterations_.get<int32_t>();
    p.assignments = assignments_.get<int32_t>();
    if (couplet_status const status = run(p)) return status;

    if (call_.centroids_on_host)
      if (couplet_status const status =
              copy(params_.centroids + int64_t{first_} * p.centroid_count * p.channels, p.centroids, centroid_bytes))
        return status;
    if (p.inertia)
      if (couplet_status const status = copy(params_.inertia + first_, p.inertia, count * sizeof(double)))
        return status;
    if (p.iterations)
      if (couplet_status const status = copy(params_.iterations + first_, p.iterations, count * sizeof(int32_t)))
        return status;
    if (p.assignments)
      return copy(params_.assignments + int64_t{first_} * p.point_count, p.assignments, assignment_bytes);
    return COUPLET_OK;
  }

  couplet_status place_weights(couplet_kmeans_params* p) {
    // A slice begins where weights change, or lies within problems that share theirs.
    bool const is_within = first_ % p->weight_sharing != 0 || p->problems < p->weight_sharing;
    p->weights += first_ / p->weight_sharing * p->weight_problem_stride;
    if (is_within) p->weight_sharing = p->problems;
    if (!call_.weights_on_host) return COUPLET_OK;
    int64_t const rows = p->weight_problem_stride == 0 ? 1 : (p->problems - 1) / p->weight_sharing + 1;
    Gather const gather({rows, p->weight_problem_stride}, {p->point_count, p->weight_point_stride}, 1);
    if (couplet_status const status = upload(gather, &p->weights, weights_)) return status;
    p->weight_problem_stride = rows == 1 ? 0 : gather.first_stride();
    p->weight_point_stride = gather.second_stride();
    return COUPLET_OK;
  }

  couplet_status reserve(size_t problems, size_t centroid_bytes, size_t assignment_bytes) {
    if (call_.centroids_on_host)
      if (couplet_status const status = grow(centroids_, centroid_bytes)) return status;
    if (params_.inertia)
      if (couplet_status const status = grow(inertia_, problems * sizeof(double))) return status;
    if (params_.iterations)
      if (couplet_status const status = grow(iterations_, problems * sizeof(int32_t))) return status;
    return params_.assignments ? grow(assignments_, assignment_bytes) : COUPLET_OK;
  }

  couplet_status upload(const Gather& gather, const float** rows, DeviceMemory& memory) {
    size_t const bytes = static_cast<size_t>(gather.floats()) * sizeof(float);
    if (couplet_status const status = grow(memory, bytes)) return status;
    if (couplet_status const status = copy(memory.get(), gather.rows(*rows, gathered_), bytes)) return status;
    *rows = memory.get<float>();
    return COUPLET_OK;
  }

  couplet_status run(const couplet_kmeans_params& p) {
    const couplet_kmeans_entries& entries = device_.backend->kmeans;
    if (couplet_status const status = entries.check(&p, report_)) return status;
    if (couplet_status const status = grow(workspace_, entries.workspace(&p))) return status;
    if (couplet_status const status = entries.run(&p, workspace_.get(), stream_, report_)) return status;
    return device_.backend->memory.synchronize(stream_, report_);
  }

  // A slice counts problems from its own start; the caller knows only those of the whole call.
  couplet_status in_call(couplet_status status) {
    bool const is_number = status == COUPLET_NOT_FINITE || status == COUPLET_INVALID_ARGUMENT;
    if (!is_number || first_ == 0 || report_->kv_head < 0) return status;
    int32_t const problem = report_->kv_head + first_;
    int64_t const point = report_->token;
    bool const is_weight = report_->channel < 0;
    const float* const number =
        is_weight ? params_.weights + problem / params_.weight_sharing * params_.weight_problem_stride +
                        point * params_.weight_point_stride
                  : params_.points + problem * params_.problem_stride + point * params_.point_stride + report_->channel;
    int32_t const channel = report_->channel;
    float value = 0;
    if (couplet_status const failed = copy(&value, number, sizeof value)) return failed;
    return is_weight ? weight_not_allowed(report_, value, problem, point)
                     : point_not_finite(report_, value, problem, point, channel);
  }

  // Problems that are learned count their iterations and one more for being written, as every backend counts.
  void progress(int64_t done, int32_t problem, int32_t iteration) {
    int64_t const of_each = int64_t{params_.max_iterations} + 1;
    params_.control->progress(params_.control->user, first_ * of_each + done, params_.problems * of_each,
                              first_ + problem, iteration);
  }

  couplet_status grow(DeviceMemory& memory, size_t bytes) {
    return memory.bytes() >= bytes ? COUPLET_OK : memory.allocate(device_, bytes, report_);
  }

  couplet_status copy(void* to, const void* from, size_t bytes) {
    return device_.backend->memory.copy(to, from, bytes, stream_, report_);
  }

  const Device& device_;
  const KmeansCall& call_;
  const couplet_kmeans_params& params_;
  void* const stream_;
  couplet_report* const report_;
  couplet_control control_{};
  int32_t most_problems_ = 0;
  int32_t first_ = 0;  // problem of the slice
  std::vector<float> gathered_;
  DeviceMemory points_, weights_, centroids_, inertia_, iterations_, assignments_, workspace_;
};

}  // namespace

couplet_status run_kmeans(const Device& device, const KmeansCall& call, void* stream, couplet_report* report) {
  return Run(device, call, stream, report).all();
}

}  // namespace couplet
