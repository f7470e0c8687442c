// The search for the nearest centroid on the device: the steps of native/cpu/nearest.h, pair by pair, so that the codes are the
// CPU's. The sum over channels, ascending, of fma(d, d, sum) in float32 with d = x - centroid; the smallest wins, the lowest index
// among equals; where it overflowed or is tiny, the same sums in double, without fma, decide.
#pragma once

#include "../device/elements.h"

namespace couplet::cuda {

__device__ __forceinline__ bool is_trusted(float distance) {
  return distance >= 0x1p-90f && distance < __uint_as_float(0x7f800000u);
}

// Channels of one group of one token in memory.
struct Point {
  const void* rows;
  int64_t at;  // elements
  int32_t dtype;

  __device__ __forceinline__ float operator[](int32_t channel) const { return load_element(rows, dtype, at + channel); }
};

// A point under the metric of its group: native/common/metric.h, for memory of the device.
struct MeasuredPoint {
  Point point;
  const float* matrix;  // [channels][channels]
  int32_t channels;

  __device__ __forceinline__ float operator[](int32_t row) const {
    double sum = 0;
    for (int32_t c = 0; c < channels; ++c)
      sum += static_cast<double>(__ldg(matrix + row * channels + c)) * static_cast<double>(point[c]);
    double const most = 3.40282346638528859812e38;  // FLT_MAX
    return static_cast<float>(fmin(fmax(sum, -most), most));
  }
};

// For a search that ended with an infinite or tiny sum at centroid `found`. Differences of floats reach 2^129, their squares 2^258
// and 2^-298: far inside double. point[c] is channel c.
template <class Channel>
__device__ __forceinline__ int32_t nearest_in_double(Channel point, const float* table, int32_t channels,
                                                     int32_t centroids, int32_t found) {
  // Most points that come here are centroids themselves; a lower index at distance 0 would have been found.
  bool equal = true;
  for (int32_t c = 0; c < channels; ++c) equal = equal && point[c] == __ldg(table + int64_t{found} * channels + c);
  if (equal) return found;
  double best = 0;
  int32_t index = -1;
  for (int32_t k = 0; k < centroids; ++k) {
    double distance = 0;
    for (int32_t c = 0; c < channels; ++c) {
      double const difference =
          static_cast<double>(point[c]) - static_cast<double>(__ldg(table + int64_t{k} * channels + c));
      distance = __dadd_rn(distance, __dmul_rn(difference, difference));  // nvcc would make an fma of the operators
    }
    if (index < 0 || distance < best) {
      best = distance;
      index = k;
    }
  }
  return index;
}

}  // namespace couplet::cuda
