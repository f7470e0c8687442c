#include <cmath>
#include <memory>

#include "../../native/cpu/backend.h"
#include "kernels.h"
#include "operations.h"

namespace couplet::bench {
namespace {

constexpr uint64_t seed = 10;
// Two different descents from random seeds end this close on normal points: the mean of a few problems, relative.
constexpr double most_difference = 0.03;
constexpr int32_t checked_problems = 4;
constexpr int32_t checked_points = 4096;

couplet_kmeans_params params_of(const Case& what, int32_t problems, int32_t points, int32_t iterations) {
  couplet_kmeans_params p{};
  p.problem_stride = int64_t{points} * what.codec.group_channels;
  p.point_stride = what.codec.group_channels;
  p.seed = seed;
  p.problems = problems;
  p.point_count = points;
  p.channels = what.codec.group_channels;
  p.centroid_count = couplet_codec_centroids(what.codec);
  p.weight_sharing = 1;
  p.max_iterations = iterations;
  return p;
}

// Arrays of `problems` problems on the device.
class Problems {
 public:
  Problems(const Case& what, int32_t problems, int32_t points, int32_t iterations, cudaStream_t stream)
      : params_(params_of(what, problems, points, iterations)),
        points_(static_cast<size_t>(problems * params_.problem_stride)),
        centroids_(static_cast<size_t>(problems) * static_cast<size_t>(params_.centroid_count * params_.channels)),
        inertia_(static_cast<size_t>(problems)),
        iterations_(static_cast<size_t>(problems)) {
    must(fill_normals(points_.data(), points_.size(), seed, stream), "filling points");
    must(cudaStreamSynchronize(stream), "filling points");
    params_.points = points_.data();
    params_.centroids = centroids_.data();
    params_.inertia = inertia_.data();
    params_.iterations = iterations_.data();
    workspace_ = std::make_unique<DeviceArray<uint8_t>>(cuda::kmeans_entries.workspace(&params_));
  }

  void run(cudaStream_t stream) const {
    couplet_report report{};
    must(cuda::kmeans_entries.run(&params_, workspace_->data(), stream, &report), report);
  }

  std::string body() const {
    char text[128] = "";
    cuda::kmeans_entries.describe(&params_, text, sizeof text);
    return text;
  }
  double mean_inertia() const { return mean_of(inertia_.read()); }
  double mean_iterations() const { return mean_of(iterations_.read()); }

  double host_mean_inertia() const {
    std::vector<float> const points = points_.read();
    std::vector<float> centroids(centroids_.size());
    std::vector<double> inertia(inertia_.size());
    couplet_kmeans_params p = params_;
    p.points = points.data();
    p.centroids = centroids.data();
    p.inertia = inertia.data();
    p.iterations = nullptr;
    couplet_report report{};
    std::vector<uint8_t> workspace(cpu::kmeans_entries.workspace(&p));
    must(cpu::kmeans_entries.run(&p, workspace.data(), nullptr, &report), report);
    return mean_of(inertia);
  }

 private:
  template <class T>
  static double mean_of(const std::vector<T>& values) {
    double sum = 0;
    for (T value : values) sum += static_cast<double>(value);
    return sum / static_cast<double>(values.size());
  }

  couplet_kmeans_params params_;
  DeviceArray<float> const points_;
  DeviceArray<float> const centroids_;
  DeviceArray<double> const inertia_;
  DeviceArray<int32_t> const iterations_;
  std::unique_ptr<DeviceArray<uint8_t>> workspace_;  // whose size the parameters decide
};

}  // namespace

void kmeans(const Case& what, int32_t iterations, Meter& meter, Report& report) {
  Result result{};
  {
    int32_t const points = std::min(what.context, checked_points);
    Problems const few(what, std::min(what.batch, checked_problems), points, iterations, meter.stream());
    few.run(meter.stream());
    meter.wait();
    result.check = "relative difference of the mean inertia of 4 problems of 4096 points from the CPU backend's";
    result.error = std::abs(few.mean_inertia() / few.host_mean_inertia() - 1);
    result.body = few.body();
    if (!(result.error < most_difference)) return report.refuse(what, result);
  }
  Problems const all(what, what.batch, what.context, iterations, meter.stream());
  result.body = all.body();
  result.timing = meter.time([&](cudaStream_t stream) { all.run(stream); });
  double const done = all.mean_iterations();
  double const pairs = static_cast<double>(what.batch) * what.context * couplet_codec_centroids(what.codec) * done;
  char note[128];
  std::snprintf(note, sizeof note, "%.1f iterations, %.2f pairs of point and centroid a ns", done,
                pairs / result.timing.microseconds * 1e-3);
  result.note = note;
  // The points once for inspection and loading, then rows and codes in every iteration.
  double const row_bytes = 4.0 * what.codec.group_channels;
  result.bytes = static_cast<double>(what.batch) * what.context * (2 * row_bytes + done * (row_bytes + 8));
  report.add(what, result);
}

}  // namespace couplet::bench
