// One problem of a kmeans call: k-means++ and Lloyd on a slice of the workspace, on one thread or on several.
// The result depends on points, weights, seed and limits alone: every sum has a fixed order (points in ascending order
// inside a block, then blocks in ascending order), whichever thread computes a block.
#pragma once

#include <cstddef>

#include "../abi/operations.h"
#include "kmeans_body.h"

namespace couplet::cpu {

// How a problem is cut into pieces of work; a function of its size alone.
struct KmeansShape {
  explicit KmeansShape(const couplet_kmeans_params& params);

  int64_t points;
  int64_t padded;  // points, rounded up to kmeans_tile
  int64_t blocks;  // of block_points: each sums its points on its own, the sums are then added in order
  int64_t block_points;
  int64_t chunks;       // of chunk_points: seeding draws a chunk first, then a point of it
  int64_t scan_points;  // of one scan: below 20 ms of work for the slowest body, so that cancelling is quick
  int32_t channels;
  int32_t centroids;
  int32_t groups;  // of kmeans_group centroids

  static constexpr int64_t chunk_points = 512;
};

// The arrays of one problem, all in the workspace.
struct KmeansMemory {
  float* rows;           // float32 [points][channels], as given
  float* lanes;          // float32 [padded / 16][channels][16], centred and scaled
  float* weights;        // float32 [padded], scaled by a power of two: the largest is in [1, 2)
  float* distances;      // float32 [padded], squared, to the nearest of the centroids seeded so far
  int32_t* nearest;      // [padded]
  float* norms;          // float32 [padded], squared norm of a point as in lanes
  double* chunk_sums;    // [chunks][kmeans_candidates]
  double* chunk_mass;    // [chunks], sum of weight * distance
  double* block_values;  // [blocks]
  double* means;         // [centroids][channels], in the units of the points
  float* groups;         // float32 [groups][channels][kmeans_group]: centroids negated, centred and scaled
  float* half_norms;     // float32 [groups][kmeans_group]
  double* sums;          // [centroids][channels], sum of weight * point
  double* masses;        // [centroids], sum of weight
  double* block_sums;    // [block sets][centroids][channels]; every block when there are threads to share, else one
  double* block_masses;  // [block sets][centroids]

  // Places the arrays from `memory` on (64-byte aligned; NULL: only counts) and returns their bytes.
  size_t lay_out(const KmeansShape& shape, int threads, void* memory);
};

class KmeansProblem {
 public:
  KmeansProblem(const couplet_kmeans_params& params, const KmeansShape& shape, const KmeansBody& body, int32_t problem,
                int threads, void* memory);

  bool cancelled() const;  // once true, the state is no longer meaningful

  // In this order, each once:
  void load();
  void seed();
  bool improve();  // one Lloyd iteration, as often as wanted; false, and nothing done, when no further one is worth it
  void write();

 private:
  template <class Body>
  void over_blocks(Body&& body);
  template <class Body>
  void over_chunks(Body&& body);

  int64_t draw();
  int64_t draw_best();
  void add_centroid(int32_t index, int64_t point);
  void set_centroid(int32_t index);
  int32_t refill();
  int64_t scan();
  void add_up();
  double inertia() const;
  float scaled(double value, int32_t channel) const;
  float& lane(int64_t point, int32_t channel) const;

  const couplet_kmeans_params& params_;
  const KmeansShape& shape_;
  const KmeansBody& body_;
  KmeansMemory memory_;
  int32_t const problem_;
  int const threads_;
  uint64_t random_;
  double centre_[32] = {};  // scanned are (point - centre) * scale, so that no square overflows or cancels needlessly
  double scale_ = 1;        // a power of two
  double weight_unit_ = 1;  // weight as given / weight in memory_; a power of two
  double spread_ = 0;       // sum of weight * squared distance to the centre
  double inertia_ = 0;      // of the centroids before the last iteration
  bool started_ = false;
  bool settled_ = false;
};

}  // namespace couplet::cpu
