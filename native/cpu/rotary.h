// Rotary angles for the CPU bodies. Immutable once made; read by many threads.
//
// A *row of angles* is a pair of float32 rows, cos and sin, of `stride` elements that start on a cache line. For the
// half-split kind entry i belongs to pair i. For the interleaved kind entry c belongs to channel c: cos twice, sin as
// (-sin, +sin), so that  rotated[c] = x[c] * cos[c] + x[c ^ 1] * sin[c].
//
// Linear angles (t * f_i, whatever the f_i and the amplitudes) are never looked up by position: with o the first position
// of a run of keys, key o + j is rotated by j only and the query of position t by t - o, and q.k is the same. So keys need
// the 64 offset rows alone, for all pages, heads and layers. Tables that are not linear are kept whole and both sides use
// the row of their position.
#pragma once

#include "../abi/operations.h"

struct couplet_rotary {
  int32_t kind;  // couplet_rotary_kind
  int32_t rotary_dim;
  int32_t positions;
  int32_t head_dim;
  bool linear;      // the angle is t * f_i at every position
  int32_t entries;  // of a row of angles: rotary_dim / 2 (half-split) or rotary_dim (interleaved)
  int64_t stride;   // entries rounded up to 16; the rest are 0
  size_t bytes;     // of this struct and all it owns

  float* cos;  // float32 [rows][stride]. Linear: offset, coarse and wide rows, amplitude 1; else a row per position
  float* sin;
  float* amplitude;  // float32 [stride]: of one rotation, 1 unless given tables have another. Linear only
  int32_t coarse_rows;
};

namespace couplet::cpu {

// Linear tables: a position is offset + 64 coarse + 64 * 4096 wide, and there is one row for each value of each digit.
constexpr int32_t rotary_offsets = 64;  // also the positions of a run of keys, at most
constexpr int32_t rotary_coarse = 4096;
constexpr int32_t rotary_max_stride = 256;  // elements of a row of angles, at most

struct AngleRows {
  const float* cos;  // float32 [rows][stride]
  const float* sin;
  int64_t stride;  // elements, a multiple of 16
};

// The rows by which keys of positions first, first + 1, ... are rotated. Linear: rotary_offsets rows; else up to the last position.
AngleRows key_angles(const couplet_rotary& rotary, int32_t first);

// Linear angles of a distance between positions, as rows that add up to it (amplitude 1).
struct AngleSum {
  const float* cos[3];
  const float* sin[3];
  int32_t count;  // 1 to 3
};
static inline AngleSum distance_angles(const couplet_rotary& rotary, int32_t distance) {
  int32_t const offset = distance % rotary_offsets, coarse = distance / rotary_offsets % rotary_coarse;
  int32_t const wide = distance / rotary_offsets / rotary_coarse;
  int64_t const rows[3] = {offset, rotary_offsets + coarse, rotary_offsets + rotary.coarse_rows + wide};
  AngleSum sum;
  for (int digit = 0; digit < 3; ++digit) {
    sum.cos[digit] = rotary.cos + rows[digit] * rotary.stride;
    sum.sin[digit] = rotary.sin + rows[digit] * rotary.stride;
  }
  sum.count = wide ? 3 : coarse ? 2 : 1;
  return sum;
}

// Writes the row of angles of `position` as the model means it, for queries and keys alike.
void position_angles(const couplet_rotary& rotary, int32_t position, float* cos, float* sin);

// Rotates one row of head_dim channels by a row of angles. out may be row itself.
void rotate_row(const couplet_rotary& rotary, const float* cos, const float* sin, const float* row, float* out);

// Why `rotary` cannot serve rows of head_dim channels at positions up to `last`; COUPLET_OK when it can.
couplet_status check_rotary(const couplet_rotary& rotary, int32_t head_dim, int64_t last, couplet_report* report);

}  // namespace couplet::cpu
