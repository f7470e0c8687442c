// Rotary angles in device memory. The struct lives on the host; kernels get its `angles`.
#pragma once

#include "../native/abi/operations.h"
#include "gpu.h"

namespace couplet::cuda {

inline constexpr int rotary_block = 512;    // positions of which each has a row of its own
inline constexpr int rotary_blocks = 4096;  // blocks of which each has a row of its own

// Angles as (cos, sin). Linear ones (t * f_i, whatever the f_i) have a row for each digit of
//   position = offset + 512 block + 512 * 4096 wide
// and no amplitude; others a row for each position, amplitude and all.
struct Angles {
  const float2* offsets;    // device [512][pairs]; NULL where the angles are not linear
  const float2* steps;      // device [blocks, 4096 at most][pairs]
  const float2* wides;      // device [wides][pairs]
  const float* amplitudes;  // device [pairs]: of one rotation
  const float2* rows;       // device [positions][pairs]; NULL where the angles are linear
  int32_t pairs;            // rotary_dim / 2; 0: nothing is rotated
  int32_t kind;             // couplet_rotary_kind
};

struct Rotary {
  Angles angles;
  int32_t positions;
  int32_t head_dim;
  size_t bytes;  // of this struct and all it owns
  void* memory;  // device; holds all of the rows
};

inline const Rotary* rotary_of(const couplet_rotary* rotary) { return reinterpret_cast<const Rotary*>(rotary); }
inline Angles angles_of(const couplet_rotary* rotary) { return rotary ? rotary_of(rotary)->angles : Angles{}; }

// The sum of two angles.
__device__ __forceinline__ float2 add_angles(float2 a, float2 b) {
  return {a.x * b.x - a.y * b.y, a.y * b.x + a.x * b.y};
}

// The angle of pair i over whole blocks; linear angles alone, amplitude 1.
__device__ __forceinline__ float2 block_angle(const Angles& angles, int blocks, int pair) {
  float2 const angle = angles.steps[static_cast<int64_t>(blocks % rotary_blocks) * angles.pairs + pair];
  return blocks < rotary_blocks
             ? angle
             : add_angles(angle, angles.wides[static_cast<int64_t>(blocks / rotary_blocks) * angles.pairs + pair]);
}

// The angle of pair i at `position`, with its amplitude.
__device__ __forceinline__ float2 position_angle(const Angles& angles, int position, int pair) {
  if (angles.rows) return angles.rows[static_cast<int64_t>(position) * angles.pairs + pair];
  float2 const angle = add_angles(angles.offsets[position % rotary_block * angles.pairs + pair],
                                  block_angle(angles, position / rotary_block, pair));
  float const amplitude = angles.amplitudes[pair];
  return {angle.x * amplitude, angle.y * amplitude};
}

}  // namespace couplet::cuda
