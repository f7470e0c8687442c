// One kmeans problem on one block: k-means++ and Lloyd on a slice of the workspace. Every sum has a fixed order (a thread's points
// ascending, then threads ascending; a warp's points ascending, then warps), so the result depends on the data and the seed alone.
//
// Distances are sums of squared differences, not norms and products: 16 instructions for 8 channels instead of 8, but nothing
// cancels, so that points equal to their centroid are at distance 0 exactly. Means move by the mean of (point - centroid), which
// keeps float32 sums exact there too, and small everywhere else.
#pragma once

#include <climits>

#include "../../native/common/check.h"
#include "../gpu.h"

namespace couplet::cuda::kmeans {

inline constexpr int block_threads = 512;
inline constexpr int warp_lanes = 32;
inline constexpr int block_warps = block_threads / warp_lanes;
inline constexpr int candidates = 4;       // draws of a seeding step, of which the best becomes a centroid
inline constexpr int stage_floats = 4096;  // of centroids in shared memory at a time
inline constexpr int most_channels = kmeans_most_channels;

// What a problem keeps from one launch to the next.
struct State {
  uint64_t random;
  double inertia;  // of the present centroids and assignments, in scaled units
  double before;   // of those before the last iteration
  int32_t iterations;
  int32_t finished;
};

// The arrays of one problem in the workspace. Stride is the number of channels, padded with zeros to a power of two.
struct Arrays {
  State* state;
  float* rows;       // float32 [points][stride], scaled by a power of two so that no square overflows
  float* weights;    // float32 [points], likewise
  float* distances;  // float32 [points], squared, to the nearest of the centroids seeded so far
  int32_t* nearest;  // [points]
  float* centroids;  // float32 [centroids][stride], scaled as rows
  float* sums;       // float32 [block_warps][centroids][stride]: weight * (point - centroid)
  float* masses;     // float32 [block_warps][centroids]: weight
};

struct Shared {
  alignas(16) float stage[stage_floats];
  alignas(16) float chosen[candidates][most_channels];  // candidate points
  double columns[block_threads];                        // of the points of one thread: sum of weight * distance
  double partial[candidates][block_warps];
  double total;
  int32_t flag;
};

// SplitMix64: the share, in [0, 1), of the step-th draw from here (0 is the next).
__device__ __forceinline__ double share_of(uint64_t state, uint64_t step) {
  uint64_t z = state + (step + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}
__device__ __forceinline__ uint64_t advanced(uint64_t state, uint64_t steps) {
  return state + steps * 0x9e3779b97f4a7c15u;
}

__device__ __forceinline__ double warp_sum(double value) {
  for (int step = 1; step < warp_lanes; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// By a warp: the first entry whose running sum exceeds target, which becomes what is left of it. Rounding may leave a little beyond
// the last entry: then the last one that has mass is it. -1 when none has.
template <class MassOf>
__device__ __forceinline__ int32_t pick(double& target, int32_t count, MassOf mass_of) {
  int32_t const lane = gpu::lane_id();
  int32_t last = -1;
  for (int32_t first = 0; first < count; first += warp_lanes) {
    double const mass = first + lane < count ? mass_of(first + lane) : 0;
    double running = mass;
    for (int step = 1; step < warp_lanes; step *= 2) {
      double const below = __shfl_up_sync(~0u, running, static_cast<unsigned>(step));
      if (lane >= step) running += below;
    }
    unsigned const hits = __ballot_sync(~0u, mass > 0 && target < running);
    if (hits) {
      int const hit = __ffs(static_cast<int>(hits)) - 1;
      target -= __shfl_sync(~0u, running - mass, hit);
      return first + hit;
    }
    unsigned const present = __ballot_sync(~0u, mass > 0);
    if (present) last = first + 31 - __clz(static_cast<int>(present));
    target -= __shfl_sync(~0u, running, warp_lanes - 1);
  }
  return last;
}

template <int Stride>
class Problem {
 public:
  __device__ Problem(const Arrays& arrays, Shared& shared, int32_t points, int32_t centroids)
      : a_(arrays),
        shared_(shared),
        points_(points),
        centroids_(centroids),
        thread_(static_cast<int32_t>(threadIdx.x)) {}

  // Centroids [first, end) of greedy k-means++: of some points drawn with probability weight * squared distance to the nearest
  // centroid so far, the one that leaves the smallest sum of those is next. When that sum is 0 the last centroid is repeated.
  __device__ void seed(int32_t first, int32_t end) {
    if (first == 0) {
      for (int32_t n = thread_; n < points_; n += block_threads) {
        a_.distances[n] = 1;
        a_.nearest[n] = 0;
      }
    }
    weigh_columns();
    for (int32_t index = first; index < end; ++index) {
      int32_t const draws = index == 0 ? 1 : candidates;
      if (!draw(draws)) {
        if (thread_ < Stride && index > 0)
          a_.centroids[index * Stride + thread_] = a_.centroids[(index - 1) * Stride + thread_];
        __syncthreads();
        continue;
      }
      if (index == 0)
        for (int32_t n = thread_; n < points_; n += block_threads) a_.distances[n] = __uint_as_float(0x7f7fffffu);
      spread(index, draws == 1 ? 0 : best_candidate());
    }
    if (thread_ == 0) a_.state->inertia = shared_.total;
  }

  // Lloyd iterations, at most `count`.
  __device__ void improve(int32_t count, double tolerance) {
    for (int32_t i = 0; i < count && !a_.state->finished; ++i) {
      double const inertia = a_.state->inertia;
      double const before = a_.state->before;
      bool const enough = a_.state->iterations > 0 && tolerance > 0 && before - inertia <= tolerance * before;
      __syncthreads();  // all have read the state
      if (enough) {
        if (thread_ == 0) a_.state->finished = 1;
        return;
      }
      add_up();
      bool const empty = move_centroids();
      bool const refilled = empty && refill();
      double next;
      bool const changed = scan(next);
      if (thread_ == 0) {
        a_.state->before = inertia;
        a_.state->inertia = next;
        a_.state->iterations += 1;
        a_.state->finished = !changed && !refilled;
      }
      __syncthreads();
    }
  }

 private:
  static constexpr int piece = Stride < 4 ? Stride : 4;

  // Channels floats; four and more are aligned to 16 bytes.
  template <int Channels>
  __device__ __forceinline__ static void load_row(const float* from, float (&to)[Channels]) {
    if constexpr (Channels >= 4) {
#pragma unroll
      for (int c = 0; c < Channels; c += 4) {
        float4 const four = *reinterpret_cast<const float4*>(from + c);
        to[c] = four.x;
        to[c + 1] = four.y;
        to[c + 2] = four.z;
        to[c + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int c = 0; c < Channels; ++c) to[c] = from[c];
    }
  }

  __device__ __forceinline__ static void store_row(const float (&from)[Stride], float* to) {
    if constexpr (Stride >= 4) {
#pragma unroll
      for (int c = 0; c < Stride; c += 4)
        *reinterpret_cast<float4*>(to + c) = {from[c], from[c + 1], from[c + 2], from[c + 3]};
    } else {
#pragma unroll
      for (int c = 0; c < Stride; ++c) to[c] = from[c];
    }
  }

  template <int Channels>
  __device__ __forceinline__ static void add_distance(const float (&point)[Channels], const float (&centroid)[Channels],
                                                      float& sum) {
#pragma unroll
    for (int c = 0; c < Channels; ++c) {
      float const difference = point[c] - centroid[c];
      sum = __fmaf_rn(difference, difference, sum);
    }
  }

  __device__ __forceinline__ static float distance(const float (&point)[Stride], const float* centroid) {
    float row[Stride];
    load_row(centroid, row);
    float sum = 0;
    add_distance(point, row, sum);
    return sum;
  }

  // Sum over the block in shared_.total, seen by all; `values` by thread are summed by warp, then warps ascending.
  __device__ void sum_of_block(double value) {
    double const sum = warp_sum(value);
    if (thread_ % warp_lanes == 0) shared_.partial[0][thread_ / warp_lanes] = sum;
    __syncthreads();
    if (thread_ == 0) {
      double total = 0;
      for (int warp = 0; warp < block_warps; ++warp) total += shared_.partial[0][warp];
      shared_.total = total;
    }
    __syncthreads();
  }

  __device__ void weigh_columns() {
    double mass = 0;
    for (int32_t n = thread_; n < points_; n += block_threads)
      mass += static_cast<double>(a_.weights[n] * a_.distances[n]);
    shared_.columns[thread_] = mass;
    sum_of_block(mass);
  }

  // shared_.chosen: `count` points, drawn by a warp each. False when all mass is 0.
  __device__ bool draw(int32_t count) {
    double const total = shared_.total;
    uint64_t const random = a_.state->random;
    if (!(total > 0)) return false;
    int32_t const warp = thread_ / warp_lanes;
    if (warp < count) {
      double target = share_of(random, static_cast<uint64_t>(warp)) * total;
      int32_t const column = pick(target, block_threads, [&](int32_t i) { return shared_.columns[i]; });
      int32_t const rows = (points_ - column + block_threads - 1) / block_threads;
      int32_t const row = pick(target, rows, [&](int32_t i) {
        int32_t const n = column + i * block_threads;
        return static_cast<double>(a_.weights[n] * a_.distances[n]);
      });
      int32_t const point = column + row * block_threads;
      int32_t const lane = thread_ % warp_lanes;
      if (lane < Stride) shared_.chosen[warp][lane] = a_.rows[int64_t{point} * Stride + lane];
    }
    __syncthreads();
    if (thread_ == 0) a_.state->random = advanced(random, static_cast<uint64_t>(count));
    return true;
  }

  __device__ int32_t best_candidate() {
    double sums[candidates] = {};
#pragma unroll(Stride <= 8 ? 2 : 1)
    for (int32_t n = thread_; n < points_; n += block_threads) {
      const float* const row = a_.rows + int64_t{n} * Stride;
      float away[candidates] = {};
#pragma unroll(Stride <= 16 ? Stride : 1)  // 32 channels of all candidates at a time would spill
      for (int first = 0; first < Stride; first += piece) {
        float point[piece];
        load_row(row + first, point);
#pragma unroll
        for (int j = 0; j < candidates; ++j) {
          float candidate[piece];
          load_row(shared_.chosen[j] + first, candidate);
          add_distance(point, candidate, away[j]);
        }
      }
      float const weight = a_.weights[n];
      float const nearest = a_.distances[n];
#pragma unroll
      for (int j = 0; j < candidates; ++j) sums[j] += static_cast<double>(weight * fminf(nearest, away[j]));
    }
#pragma unroll
    for (int j = 0; j < candidates; ++j) {
      double const sum = warp_sum(sums[j]);
      if (thread_ % warp_lanes == 0) shared_.partial[j][thread_ / warp_lanes] = sum;
    }
    __syncthreads();
    int32_t best = 0;
    double least = 0;
    for (int32_t j = 0; j < candidates; ++j) {
      double sum = 0;
      for (int warp = 0; warp < block_warps; ++warp) sum += shared_.partial[j][warp];
      if (j > 0 && !(sum < least)) continue;
      least = sum;
      best = j;
    }
    __syncthreads();  // all have read the sums
    return best;
  }

  // shared_.chosen[candidate] becomes centroid `index`; distances, nearest and columns follow.
  __device__ void spread(int32_t index, int32_t candidate) {
    const float* const chosen = shared_.chosen[candidate];
    if (thread_ < Stride) a_.centroids[index * Stride + thread_] = chosen[thread_];
    // Loads of a few points are under way together: stores keep the compiler from it.
    constexpr int own = Stride <= 8 ? 4 : 1;
    double mass = 0;
    for (int32_t base = thread_; base < points_; base += own * block_threads) {
      float point[own][Stride];
      float nearest[own];
      float weight[own];
#pragma unroll
      for (int t = 0; t < own; ++t) {
        int32_t const n = base + t * block_threads;
        bool const inside = n < points_;
        load_row(a_.rows + int64_t{inside ? n : 0} * Stride, point[t]);
        nearest[t] = inside ? a_.distances[n] : 0.0f;
        weight[t] = inside ? a_.weights[n] : 0.0f;
      }
#pragma unroll
      for (int t = 0; t < own; ++t) {
        int32_t const n = base + t * block_threads;
        float const away = distance(point[t], chosen);
        if (away < nearest[t]) {  // not beyond the last point, where 0 is
          nearest[t] = away;
          a_.distances[n] = away;
          a_.nearest[n] = index;
        }
        mass += static_cast<double>(weight[t] * nearest[t]);
      }
    }
    shared_.columns[thread_] = mass;
    sum_of_block(mass);
  }

  // Each warp its own sums, 32 points at a time, a lane each. Lanes with the same centroid take turns, the lowest first: no two
  // threads share a float, and every sum has its points in ascending order.
  __device__ void add_up() {
    int32_t const lane = thread_ % warp_lanes;
    int32_t const warp = thread_ / warp_lanes;
    for (int32_t i = lane; i < centroids_ * Stride; i += warp_lanes) sums_of(warp, 0)[i] = 0;
    for (int32_t i = lane; i < centroids_; i += warp_lanes) mass_of(warp, i) = 0;
    __syncwarp();
    for (int32_t first = warp * warp_lanes; first < points_; first += block_threads) {
      int32_t const n = min(first + lane, points_ - 1);
      bool const inside = first + lane < points_;
      int32_t const index = a_.nearest[n];
      float const weight = a_.weights[n];
      float offset[Stride];
      float centroid[Stride];
      load_row(a_.rows + int64_t{n} * Stride, offset);
      load_row(a_.centroids + index * Stride, centroid);
#pragma unroll
      for (int c = 0; c < Stride; ++c) offset[c] -= centroid[c];
      int const turn = __popc(__match_any_sync(~0u, index) & ((1u << lane) - 1));
      for (int now = 0; __any_sync(~0u, inside && turn >= now); ++now) {
        if (inside && turn == now) add(weight, offset, index, warp);
        __syncwarp();
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void add(float weight, const float (&offset)[Stride], int32_t index, int32_t warp) {
    float* const row = sums_of(warp, index);
    float sum[Stride];
    load_row(row, sum);
#pragma unroll
    for (int c = 0; c < Stride; ++c) sum[c] = __fmaf_rn(weight, offset[c], sum[c]);
    store_row(sum, row);
    mass_of(warp, index) += weight;
  }

  // To the means. True, for all threads, when a centroid has no weight: its mass in the first set of sums stays 0.
  __device__ bool move_centroids() {
    if (thread_ == 0) shared_.flag = 0;
    __syncthreads();
    for (int32_t index = thread_; index < centroids_; index += block_threads) {
      double mass = 0;
      for (int32_t warp = 0; warp < block_warps; ++warp) mass += static_cast<double>(mass_of(warp, index));
      if (!(mass > 0)) {
        atomicOr(&shared_.flag, 1);
        continue;
      }
#pragma unroll 1
      for (int c = 0; c < Stride; ++c) {
        double sum = 0;
        for (int32_t warp = 0; warp < block_warps; ++warp) sum += static_cast<double>(sums_of(warp, index)[c]);
        float& value = a_.centroids[index * Stride + c];
        value = static_cast<float>(static_cast<double>(value) + sum / mass);
      }
      mass_of(0, index) = static_cast<float>(mass);
    }
    __syncthreads();
    return shared_.flag != 0;
  }

  __device__ float* sums_of(int32_t warp, int32_t index) const {
    return a_.sums + (int64_t{warp} * centroids_ + index) * Stride;
  }
  __device__ float& mass_of(int32_t warp, int32_t index) const { return a_.masses[int64_t{warp} * centroids_ + index]; }

  // A place for each centroid without weight, drawn as in seeding. Whether one got it, for all threads.
  __device__ bool refill() {
    for (int32_t n = thread_; n < points_; n += block_threads) {
      float point[Stride];
      load_row(a_.rows + int64_t{n} * Stride, point);
      a_.distances[n] = distance(point, a_.centroids + a_.nearest[n] * Stride);
    }
    weigh_columns();
    bool refilled = false;
    for (int32_t index = 0; index < centroids_; ++index) {
      if (mass_of(0, index) > 0) continue;
      if (!draw(1)) break;
      spread(index, 0);
      refilled = true;
    }
    __syncthreads();
    return refilled;
  }

  // The nearest centroid of every point, the lowest index among equals, and the inertia. Whether one changed, for all threads.
  // A thread has a few points in registers, and the centroids pass by in shared memory, the same for all lanes.
  __device__ bool scan(double& inertia) {
    constexpr int own = Stride <= 8 ? 4 : Stride == 16 ? 2 : 1;
    constexpr int32_t stage_rows = stage_floats / Stride;
    bool const one_stage = centroids_ <= stage_rows;
    if (one_stage) load_stage(0, centroids_);
    double sum = 0;
    int32_t changed = 0;
    for (int32_t base = 0; base < points_; base += own * block_threads) {
      float point[own][Stride];
      float best[own];
      int32_t code[own];
#pragma unroll
      for (int t = 0; t < own; ++t) {
        int32_t const n = base + t * block_threads + thread_;
        load_row(a_.rows + int64_t{min(n, points_ - 1)} * Stride, point[t]);
        best[t] = __uint_as_float(0x7f800000u);
        code[t] = 0;
      }
      for (int32_t first = 0; first < centroids_; first += stage_rows) {
        int32_t const count = min(centroids_ - first, stage_rows);
        if (!one_stage) load_stage(first, count);
#pragma unroll 2
        for (int32_t k = 0; k < count; ++k) {
          float centroid[Stride];
          load_row(shared_.stage + k * Stride, centroid);
#pragma unroll
          for (int t = 0; t < own; ++t) {
            float away = 0;
            add_distance(point[t], centroid, away);
            if (away < best[t]) {
              best[t] = away;
              code[t] = first + k;
            }
          }
        }
      }
#pragma unroll
      for (int t = 0; t < own; ++t) {
        int32_t const n = base + t * block_threads + thread_;
        if (n >= points_) continue;
        changed |= a_.nearest[n] != code[t];
        a_.nearest[n] = code[t];
        sum += static_cast<double>(a_.weights[n] * best[t]);
      }
    }
    if (thread_ == 0) shared_.flag = 0;
    sum_of_block(sum);  // its barriers put the flag's reset before, and those below its reading after, what others add
    if (changed) atomicOr(&shared_.flag, 1);
    __syncthreads();
    inertia = shared_.total;
    return shared_.flag != 0;
  }

  __device__ void load_stage(int32_t first, int32_t count) {
    __syncthreads();  // all have read the stage before, and the centroids are written
    for (int32_t i = thread_; i < count * Stride; i += block_threads)
      shared_.stage[i] = a_.centroids[first * Stride + i];
    __syncthreads();
  }

  Arrays const a_;
  Shared& shared_;
  int32_t const points_;
  int32_t const centroids_;
  int32_t const thread_;
};

}  // namespace couplet::cuda::kmeans
