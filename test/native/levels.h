// Centroids on levels, as lib/transform/levels.ts makes them.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../../native/abi/operations.h"

namespace couplet::test {

// [...][centroids][group_channels]: each channel of a group on 128 levels from its least centroid to its largest.
inline void put_on_levels(couplet_codec codec, std::vector<float>& table) {
  auto const centroids = static_cast<size_t>(couplet_codec_centroids(codec));
  auto const channels = static_cast<size_t>(codec.group_channels);
  for (size_t group = 0; group < table.size(); group += centroids * channels)
    for (size_t channel = 0; channel < channels; ++channel) {
      auto const centroid = [&](size_t code) -> float& { return table[group + code * channels + channel]; };
      double least = centroid(0);
      double largest = least;
      for (size_t code = 1; code < centroids; ++code) {
        least = std::min<double>(least, centroid(code));
        largest = std::max<double>(largest, centroid(code));
      }
      double const step = (largest - least) / 127;
      if (step == 0) continue;
      for (size_t code = 0; code < centroids; ++code)
        centroid(code) = static_cast<float>(least + std::nearbyint((centroid(code) - least) / step) * step);
    }
}

}  // namespace couplet::test
