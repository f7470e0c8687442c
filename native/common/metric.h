// Points and centroids under the metric of a group (couplet_table_params): what encode compares. cuda/encode/nearest.h has the same
// for points on a device.
#pragma once

#include <cfloat>

#include "../abi/operations.h"

namespace couplet {

// Channel `row` of M x in float32. Products of two floats are exact in double and are added in ascending order, so that every
// processor gets the same number, with fma or without; what float32 cannot hold becomes the largest number that it can.
// point[c] is channel c of x.
template <class Point>
inline float measured_channel(const float* matrix, int32_t channels, int32_t row, const Point& point) {
  double sum = 0;
  for (int32_t c = 0; c < channels; ++c)
    sum += static_cast<double>(matrix[row * channels + c]) * static_cast<double>(point[c]);
  double const most = static_cast<double>(FLT_MAX);
  return static_cast<float>(sum < -most ? -most : sum > most ? most : sum);
}

// All centroids of a table under its metric, [kv_heads][groups][centroids][group_channels] to `out`.
inline void measure_centroids(const couplet_table_params& params, float* out) {
  int32_t const channels = params.codec.group_channels;
  int64_t const centroids = couplet_codec_centroids(params.codec);
  int64_t const count = int64_t{params.kv_heads} * couplet_codec_groups(params.codec, params.head_dim) * centroids;
  for (int64_t centroid = 0; centroid < count; ++centroid)
    for (int32_t row = 0; row < channels; ++row)
      out[centroid * channels + row] = measured_channel(params.metric + centroid / centroids * channels * channels,
                                                        channels, row, params.centroids + centroid * channels);
}

inline int64_t metric_floats(const couplet_table_params& params) {
  return int64_t{params.kv_heads} * params.head_dim * params.codec.group_channels;
}

}  // namespace couplet
