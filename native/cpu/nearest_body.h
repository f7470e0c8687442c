// The bodies of nearest.h, written once in the lanes of nearest_lanes.h. Included by files that define COUPLET_ISA.
//
//   across_tokens:    lanes are tokens, a centroid is broadcast. Rows are turned into a tile [channels][tokens] first.
//   across_centroids: lanes are centroids (columns of the table), the token is broadcast.
// Per register, channel and centroid both take a subtraction and an fma, which is what limits them; loads are hidden.
#pragma once

#include "nearest.h"
#include "nearest_lanes.h"

namespace couplet::cpu::COUPLET_ISA {
namespace {

// max over |bits| as an integer: the exponent of an infinity or a NaN is larger than any other.
inline bool finite(const void* row, int32_t channels, bool half) {
  if (half) {
    const uint16_t* const values = static_cast<const uint16_t*>(row);
    uint16_t largest = 0;
    for (int32_t c = 0; c < channels; ++c) {
      uint16_t const magnitude = values[c] & 0x7fffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    return largest < 0x7c00u;
  }
  const float* const values = static_cast<const float*>(row);
  int32_t largest = 0;
  for (int32_t c = 0; c < channels; ++c) {
    int32_t const magnitude = __builtin_bit_cast(int32_t, values[c]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < 0x7f800000;
}

// Lanes past the last token are set to zero: what lies there could be subnormal, which costs some processors 100 cycles.
inline void gather_tile(const NearestGroup& group, float* tile) {
  int32_t const stride = tile_tokens(group.channels);
  for (int32_t token = 0; token < group.tokens; ++token) {
    float* const to = tile + token;
    if (group.half) {
      const uint16_t* const row = static_cast<const uint16_t*>(group.rows) + token * group.token_stride;
      for (int32_t c = 0; c < group.channels; ++c) to[c * stride] = widen(row[c]);
    } else {
      const float* const row = static_cast<const float*>(group.rows) + token * group.token_stride;
      for (int32_t c = 0; c < group.channels; ++c) to[c * stride] = row[c];
    }
  }
  for (int32_t token = group.tokens; token % lanes != 0; ++token)
    for (int32_t c = 0; c < group.channels; ++c) tile[c * stride + token] = 0;
}

// Codes of registers * lanes tokens that start at tile[0]. fixed_channels: the number of channels, or 0 when it is only
// known at run time.
template <int registers, int fixed_channels>
inline void search_tokens(const NearestGroup& group, const float* tile, uint16_t* codes, float* distances) {
  int32_t const channels = fixed_channels ? fixed_channels : group.channels;
  int32_t const stride = tile_tokens(channels);
  Floats best[registers];
  Indices index[registers];
  for (int r = 0; r < registers; ++r) {
    best[r] = broadcast(__builtin_inff());
    index[r] = broadcast_index(0);
  }
  Indices candidate = broadcast_index(0);
  Indices const one = broadcast_index(1);
  const float* centroid = group.table;
  for (int32_t k = 0; k < group.centroids; ++k, centroid += channels, candidate = add(candidate, one)) {
    Floats distance[registers];
    Floats value = broadcast(centroid[0]);
    for (int r = 0; r < registers; ++r) distance[r] = square(subtract(load(tile + r * lanes), value));
    for (int32_t c = 1; c < channels; ++c) {
      value = broadcast(centroid[c]);
      for (int r = 0; r < registers; ++r)
        distance[r] = add_square(distance[r], subtract(load(tile + c * stride + r * lanes), value));
    }
    for (int r = 0; r < registers; ++r) keep_smaller(best[r], index[r], distance[r], candidate);
  }
  for (int r = 0; r < registers; ++r) {
    store_low(codes + r * lanes, index[r]);
    store(distances + r * lanes, best[r]);
  }
}

template <int fixed_channels>
inline void search_tile(const NearestGroup& group, const float* tile, uint16_t* codes, float* distances) {
  int32_t token = 0;
  for (; token + 3 * lanes < group.tokens; token += 4 * lanes)
    search_tokens<4, fixed_channels>(group, tile + token, codes + token, distances + token);
  switch ((group.tokens - token + lanes - 1) / lanes) {
    case 3: return search_tokens<3, fixed_channels>(group, tile + token, codes + token, distances + token);
    case 2: return search_tokens<2, fixed_channels>(group, tile + token, codes + token, distances + token);
    case 1: return search_tokens<1, fixed_channels>(group, tile + token, codes + token, distances + token);
    default: return;
  }
}

void across_tokens(const NearestGroup& group, uint16_t* codes) {
  alignas(64) float tile[tile_floats];
  alignas(64) float distances[64];
  gather_tile(group, tile);
  switch (group.channels) {
    case 1: search_tile<1>(group, tile, codes, distances); break;
    case 2: search_tile<2>(group, tile, codes, distances); break;
    case 4: search_tile<4>(group, tile, codes, distances); break;
    case 8: search_tile<8>(group, tile, codes, distances); break;
    default: search_tile<0>(group, tile, codes, distances); break;
  }
  for (int32_t token = 0; token < group.tokens; token += lanes) {
    uint32_t again = outside(load(distances + token), smallest_trusted, __builtin_inff());
    for (; again; again &= again - 1) {
      int32_t const t = token + __builtin_ctz(again);
      if (t < group.tokens)
        codes[t] = nearest_in_double(tile + t, tile_tokens(group.channels), group.table, group.channels,
                                     group.centroids, codes[t]);
    }
  }
}

// registers * lanes centroids at a time, so that a channel of the token is broadcast once for all of them.
template <int registers>
inline int32_t search_centroids(const NearestGroup& group, const float* point, float* smallest_distance) {
  Floats best = broadcast(__builtin_inff());
  Indices index = broadcast_index(0);
  Indices candidate = count_up();
  Indices const step = broadcast_index(lanes);
  for (int32_t k = 0; k < group.centroids; k += registers * lanes) {
    const float* column = group.columns + k;
    Floats distance[registers];
    Floats value = broadcast(point[0]);
    for (int r = 0; r < registers; ++r) distance[r] = square(subtract(value, load(column + r * lanes)));
    for (int32_t c = 1; c < group.channels; ++c) {
      column += group.centroids;
      value = broadcast(point[c]);
      for (int r = 0; r < registers; ++r)
        distance[r] = add_square(distance[r], subtract(value, load(column + r * lanes)));
    }
    for (int r = 0; r < registers; ++r) {
      keep_smaller(best, index, distance[r], candidate);
      candidate = add(candidate, step);
    }
  }
  return smallest(best, index, smallest_distance);
}

void across_centroids(const NearestGroup& group, uint16_t* codes) {
  float wide[COUPLET_MAX_HEAD_DIM];
  for (int32_t token = 0; token < group.tokens; ++token) {
    const float* point = static_cast<const float*>(group.rows) + token * group.token_stride;
    if (group.half) {
      const uint16_t* const row = static_cast<const uint16_t*>(group.rows) + token * group.token_stride;
      for (int32_t c = 0; c < group.channels; ++c) wide[c] = widen(row[c]);
      point = wide;
    }
    float distance;
    int32_t const code = group.centroids % (4 * lanes) == 0 ? search_centroids<4>(group, point, &distance)
                                                            : search_centroids<1>(group, point, &distance);
    codes[token] =
        distance >= smallest_trusted && distance < __builtin_inff()
            ? static_cast<uint16_t>(code)
            : nearest_in_double(point, 1, group.table, group.channels, group.centroids, static_cast<uint16_t>(code));
  }
}

}  // namespace
}  // namespace couplet::cpu::COUPLET_ISA
