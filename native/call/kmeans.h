// kmeans as a whole call: scratch memory, slices of problems, and copies where the arrays are not where the work is.
#pragma once

#include "memory.h"

namespace couplet {

// inertia, iterations and assignments are the host's. On a device of the host everything is.
struct KmeansCall {
  couplet_kmeans_params params{};
  bool points_on_host = true;
  bool weights_on_host = true;
  bool centroids_on_host = true;
  int64_t staged_point_bytes = int64_t{256}
                               << 20;  // 256 problems of 32,768 points of 8 channels: two for each SM of an H200
};

// Returns when it is done, having worked behind what `stream` holds. The calling thread has selected the device. Scratch on a
// device, besides the workspace of at most 1 GiB: so many bytes of points (one problem where that is more) with their weights and
// results, or, where the points are the device's own, the weights and results of all problems. When it fails, the results of
// earlier slices are written.
couplet_status run_kmeans(const Device& device, const KmeansCall& call, void* stream, couplet_report* report);

}  // namespace couplet
