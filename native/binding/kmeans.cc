// kmeans: the options object to its parameters. lib/native/operations.ts types what this exports.
#include "../call/kmeans.h"

#include "device.h"
#include "exports.h"

namespace couplet::binding {
namespace {

class KmeansWorker : public DeviceWorker {
 public:
  explicit KmeansWorker(const Options& options) : DeviceWorker(options) {
    couplet_kmeans_params& p = call_.params;
    p.problems = options.integer("problems", 1);
    p.point_count = options.integer("pointCount", 1);
    p.channels = options.integer("channels", 1);
    p.centroid_count = options.integer("centroidCount", 1);
    p.problem_stride = options.integer<int64_t>("problemStride", 0, most_stride);
    p.point_stride = options.integer<int64_t>("pointStride", 0, most_stride);
    p.weight_problem_stride = options.integer_or<int64_t>("weightProblemStride", 0, 0, most_stride);
    p.weight_point_stride = options.integer_or<int64_t>("weightPointStride", 1, 0, most_stride);
    p.weight_sharing = options.integer_or("weightSharing", 1, 1);
    p.max_iterations = options.integer("maxIterations", 0);
    p.tolerance = options.number("tolerance", 0, 1);
    p.seed = options.seed_or("seed", 0);
    p.threads = read_threads(options);

    int64_t const weight_rows = (int64_t{p.problems} + p.weight_sharing - 1) / p.weight_sharing;
    Place<float> const points = place<float>(
        options, "points", extent({{p.problems, p.problem_stride}, {p.point_count, p.point_stride}, {p.channels, 1}}));
    Place<float> const weights = place_or_none<float>(
        options, "weights", extent({{weight_rows, p.weight_problem_stride}, {p.point_count, p.weight_point_stride}}));
    Place<float> const centroids =
        place<float>(options, "centroids", product({p.problems, p.centroid_count, p.channels}));
    p.points = points.data;
    p.weights = weights.data;
    p.centroids = centroids.data;
    call_.points_on_host = points.on_host;
    call_.weights_on_host = weights.on_host;
    call_.centroids_on_host = centroids.on_host;
    p.inertia = pin(options.array<double>("inertia", product({p.problems})));
    p.iterations = pin(options.array<int32_t>("iterations", product({p.problems})));
    p.assignments = pin(options.array_or_none<int32_t>("assignments", product({p.problems, p.point_count})));
    read_control(options);
    p.control = control();
  }

 protected:
  couplet_status run(const Device& device, couplet_report* report) override {
    return run_kmeans(device, call_, stream(), report);
  }
  PlaceNames places() const override { return {.kv_head = "problem", .token = "point"}; }

 private:
  KmeansCall call_;
};

}  // namespace

void export_kmeans(Napi::Env env, Napi::Object exports) {
  exports.Set("kmeans", Napi::Function::New(env, promise_form<KmeansWorker>, "kmeans"));
  exports.Set("kmeansSync", Napi::Function::New(env, sync_form<KmeansWorker>, "kmeansSync"));
}

}  // namespace couplet::binding
