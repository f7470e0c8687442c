#include "nearest.h"

namespace couplet::cpu {

// Differences of floats reach 2^129, their squares 2^258 and 2^-298: far inside double.
uint16_t nearest_in_double(const float* point, int64_t stride, const float* table, int32_t channels, int32_t centroids,
                           uint16_t found) {
  // Most points that come here are centroids themselves (decoded rows that are encoded again). A lower index at distance 0
  // would have been found, so nothing is left to search.
  const float* const centroid = table + int64_t{found} * channels;
  int32_t equal = 0;
  while (equal < channels && point[equal * stride] == centroid[equal]) ++equal;
  if (equal == channels) return found;

  double best = __builtin_inf();
  int32_t index = 0;
  for (int32_t centroid = 0; centroid < centroids; ++centroid, table += channels) {
    double distance = 0;
    for (int32_t channel = 0; channel < channels; ++channel) {
      double const difference = static_cast<double>(point[channel * stride]) - static_cast<double>(table[channel]);
      distance += difference * difference;
    }
    if (distance < best) {
      best = distance;
      index = centroid;
    }
  }
  return static_cast<uint16_t>(index);
}

}  // namespace couplet::cpu
