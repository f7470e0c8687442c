// The loops of kmeans_body.h over the vector type of one instruction set. The including file defines before it includes
// this, in an anonymous namespace:
//   lanes     numbers in a vector register
//   vectors   registers of points that share one load of a centroid
//   Floats    load, set, store, + - *, fma(a, b, c), minimum, less -> Mask, select(Mask, a, b)
//   Ints      load, set, store, select
//   Doubles   16 sums: zero, add(first lane, Floats), store
// No bounds (Hamerly's) spare part of the search: on points without structure 59 to 85 % of them would still need it in the
// first 25 iterations, and picking those costs about what is saved.
#pragma once

#include "kmeans_body.h"

namespace couplet::cpu {
namespace {

#define UNROLL _Pragma("GCC unroll 16")  // for loops over registers

constexpr int tile_points = vectors * lanes;
static_assert(kmeans_tile % tile_points == 0 && kmeans_lanes % lanes == 0 && tile_points % kmeans_lanes == 0);

// The first channel of a point; its other channels and the neighbours that share a register follow from there.
inline const float* lane_at(const float* blocks, int32_t channels, int64_t point) {
  return blocks + point / kmeans_lanes * channels * kmeans_lanes + point % kmeans_lanes;
}

// Sixteen numbers to one, always in the same order.
template <class Number>
inline Number fold(Number* numbers) {
  for (int step = kmeans_lanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) numbers[i] += numbers[i + step];
  return numbers[0];
}

int64_t scan(const KmeansScan& shared, int64_t begin, int64_t end) {
  KmeansScan const task = shared;  // a copy, which no store can change: its counts stay in registers
  int64_t changed = 0;
  for (int64_t tile = begin; tile < end; tile += tile_points) {
    const float* x[vectors];
    Floats best[vectors];
    Ints best_index[vectors];
    for (int v = 0; v < vectors; ++v) {
      x[v] = lane_at(task.lanes, task.channels, tile + v * lanes);
      best[v] = Floats::set(__builtin_inff());
      best_index[v] = Ints::set(0);
    }
    const float* centroids = task.groups;
    for (int32_t first = 0; first < task.group_count * kmeans_group; first += kmeans_group) {
      Floats score[kmeans_group][vectors];
      UNROLL
      for (int j = 0; j < kmeans_group; ++j) {
        Floats const half_norm = Floats::set(task.half_norms[first + j]);
        UNROLL
        for (int v = 0; v < vectors; ++v) score[j][v] = half_norm;
      }
      for (int32_t c = 0; c < task.channels; ++c, centroids += kmeans_group) {
        Floats value[vectors];
        UNROLL
        for (int v = 0; v < vectors; ++v) value[v] = Floats::load(x[v] + c * kmeans_lanes);
        UNROLL
        for (int j = 0; j < kmeans_group; ++j) {
          Floats const centroid = Floats::set(centroids[j]);
          UNROLL
          for (int v = 0; v < vectors; ++v) score[j][v] = fma(value[v], centroid, score[j][v]);
        }
      }
      UNROLL
      for (int j = 0; j < kmeans_group; ++j) {
        Ints const index = Ints::set(first + j);
        UNROLL
        for (int v = 0; v < vectors; ++v) {
          best_index[v] = select(less(score[j][v], best[v]), index, best_index[v]);
          best[v] = minimum(score[j][v], best[v]);
        }
      }
    }
    alignas(64) int32_t nearest[tile_points];
    for (int v = 0; v < vectors; ++v) best_index[v].store(nearest + v * lanes);
    for (int i = 0; i < tile_points; ++i) {
      changed += nearest[i] != task.nearest[tile + i];
      task.nearest[tile + i] = nearest[i];
    }
  }
  return changed;
}

double spread(const KmeansSpread& shared, int64_t begin, int64_t end) {
  KmeansSpread const task = shared;
  Doubles mass = Doubles::zero();
  for (int64_t block = begin; block < end; block += kmeans_lanes) {
    UNROLL
    for (int first = 0; first < kmeans_lanes; first += lanes) {
      int64_t const point = block + first;
      const float* const x = lane_at(task.lanes, task.channels, point);
      Floats distance = Floats::set(0);
      for (int32_t c = 0; c < task.channels; ++c) {
        Floats const difference = Floats::load(x + c * kmeans_lanes) - Floats::set(task.centre[c]);
        distance = fma(difference, difference, distance);
      }
      Floats const before = Floats::load(task.distances + point);
      Mask const closer = less(distance, before);
      distance = select(closer, distance, before);
      distance.store(task.distances + point);
      select(closer, Ints::set(task.index), Ints::load(task.nearest + point)).store(task.nearest + point);
      mass.add(first, distance * Floats::load(task.weights + point));
    }
  }
  alignas(64) double sums[kmeans_lanes];
  mass.store(sums);
  return fold(sums);
}

void weigh(const KmeansWeigh& shared, int64_t begin, int64_t end, double* sums) {
  KmeansWeigh const task = shared;
  constexpr int parts = kmeans_lanes / lanes;
  Floats sum[parts][kmeans_candidates];
  for (auto& part : sum)
    for (Floats& value : part) value = Floats::set(0);
  for (int64_t tile = begin; tile < end; tile += tile_points) {
    const float* const x = lane_at(task.lanes, task.channels, tile);
    Floats distance[vectors][kmeans_candidates];
    UNROLL
    for (int v = 0; v < vectors; ++v) {
      Floats const norm = Floats::load(task.norms + tile + v * lanes);
      UNROLL
      for (int j = 0; j < kmeans_candidates; ++j) distance[v][j] = norm + Floats::set(task.candidate_norms[j]);
    }
    for (int32_t c = 0; c < task.channels; ++c) {
      UNROLL
      for (int v = 0; v < vectors; ++v) {
        int64_t const block = v * lanes / kmeans_lanes, first = v * lanes % kmeans_lanes;
        Floats const value = Floats::load(x + (block * task.channels + c) * kmeans_lanes + first);
        UNROLL
        for (int j = 0; j < kmeans_candidates; ++j)
          distance[v][j] = fma(value, Floats::set(task.candidates[c * kmeans_candidates + j]), distance[v][j]);
      }
    }
    UNROLL
    for (int v = 0; v < vectors; ++v) {
      Floats const before = Floats::load(task.distances + tile + v * lanes);
      Floats const weight = Floats::load(task.weights + tile + v * lanes);
      UNROLL
      for (int j = 0; j < kmeans_candidates; ++j)
        sum[v % parts][j] = fma(minimum(distance[v][j], before), weight, sum[v % parts][j]);
    }
  }
  for (int j = 0; j < kmeans_candidates; ++j) {
    alignas(64) float of_lanes[kmeans_lanes];
    for (int part = 0; part < parts; ++part) sum[part][j].store(of_lanes + part * lanes);
    sums[j] = static_cast<double>(fold(of_lanes));
  }
}

// weight * value is exact in double (24 + 24 bits), so it does not matter whether the compiler fuses it.
template <class Values, class Sums>
inline void add_values(double* sums, const float* values, double weight) {
  Values from;
  Sums to;
  __builtin_memcpy(&from, values, sizeof from);
  __builtin_memcpy(&to, sums, sizeof to);
  to += __builtin_convertvector(from, Sums) * weight;
  __builtin_memcpy(sums, &to, sizeof to);
}

using Floats2 = float __attribute__((vector_size(8)));
using Floats4 = float __attribute__((vector_size(16)));
using Floats8 = float __attribute__((vector_size(32)));
using Doubles2 = double __attribute__((vector_size(16)));
using Doubles4 = double __attribute__((vector_size(32)));
using Doubles8 = double __attribute__((vector_size(64)));

void add(const KmeansSums& shared, int64_t begin, int64_t end) {
  KmeansSums const task = shared;
  int32_t const channels = task.channels;
  for (int64_t point = begin; point < end; ++point) {
    int64_t const nearest = task.nearest[point];
    double const weight = static_cast<double>(task.weights[point]);
    const float* const row = task.rows + point * channels;
    double* const sums = task.sums + nearest * channels;
    int32_t c = 0;
    for (; c + 8 <= channels; c += 8) add_values<Floats8, Doubles8>(sums + c, row + c, weight);
    if (channels & 4) add_values<Floats4, Doubles4>(sums + c, row + c, weight), c += 4;
    if (channels & 2) add_values<Floats2, Doubles2>(sums + c, row + c, weight), c += 2;
    if (channels & 1) sums[c] += weight * static_cast<double>(row[c]);
    task.masses[nearest] += weight;
  }
}

#undef UNROLL

}  // namespace
}  // namespace couplet::cpu
