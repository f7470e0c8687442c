// The inner loops of kmeans, once per instruction set. Every body gives the same bits: each (point, centroid) pair is one
// chain of fused multiply-adds over ascending channels, sums of many points are doubles in a fixed order.
#pragma once

#include <cstdint>

#include "isa.h"

namespace couplet::cpu {

// Points lie in blocks of 16, channel by channel, so that a vector register holds one channel of neighbouring points.
// Their number is padded to whole tiles with copies of the last point of weight 0.
inline constexpr int kmeans_lanes = 16;
inline constexpr int kmeans_tile = 32;  // points: the largest step of any body
inline constexpr int kmeans_group = 4;  // centroids whose scores a body keeps in registers at a time

struct KmeansScan {
  const float* lanes;       // float32 [points / 16][channels][16]
  const float* groups;      // float32 [group_count][channels][4], the centroids negated
  const float* half_norms;  // float32 [group_count][4], half the squared norm; infinity beyond the last centroid
  int32_t* nearest;         // in and out, [points]
  int32_t channels;
  int32_t group_count;
};

struct KmeansSpread {
  const float* lanes;    // float32 [points / 16][channels][16]
  const float* weights;  // float32 [points]
  const float* centre;   // float32 [channels], the new centroid
  float* distances;      // in and out, float32 [points], squared
  int32_t* nearest;      // in and out, [points]
  int32_t channels;
  int32_t index;  // of the new centroid
};

struct KmeansSums {
  const float* rows;       // float32 [points][channels]
  const float* weights;    // float32 [points]
  const int32_t* nearest;  // [points]
  double* sums;            // in and out, [centroids][channels]: weight * row
  double* masses;          // in and out, [centroids]: weight
  int32_t channels;
};

// A step of greedy seeding: of four candidates, each a point, the one that leaves the least distance becomes a centroid.
struct KmeansWeigh {
  const float* lanes;            // float32 [points / 16][channels][16]
  const float* norms;            // float32 [points], squared
  const float* weights;          // float32 [points]
  const float* distances;        // float32 [points], squared
  const float* candidates;       // float32 [channels][4], times -2
  const float* candidate_norms;  // float32 [4], squared
  int32_t channels;
};
inline constexpr int kmeans_candidates = 4;

// begin and end are multiples of kmeans_tile, but for add, which takes any.
struct KmeansBody {
  // Writes the centroid nearest to each point, the lowest index among equals; returns how many changed.
  int64_t (*scan)(const KmeansScan&, int64_t begin, int64_t end);
  // Takes one more centroid into account; returns the sum of weight * distance.
  double (*spread)(const KmeansSpread&, int64_t begin, int64_t end);
  // Writes the sum of weight * distance with each candidate taken into account, float64 [4]. Of lower precision.
  void (*weigh)(const KmeansWeigh&, int64_t begin, int64_t end, double* sums);
  void (*add)(const KmeansSums&, int64_t begin, int64_t end);
};

const KmeansBody& kmeans_body(Isa isa);

}  // namespace couplet::cpu
