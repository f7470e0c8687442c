// Rotary embedding in vectors. Included only by the bodies' own files, like attend_lanes.h.
#pragma once

#include "attend_lanes.h"
#include "rotary.h"

namespace couplet::cpu::COUPLET_BODY {

// Rotates the rotary channels of a row by a row of angles. out may be row itself.
static inline void rotate(const couplet_rotary& rotary, const float* cos, const float* sin, const float* row,
                          float* out) {
  int32_t const half = rotary.rotary_dim / 2;
  int32_t i = 0;
  if (rotary.kind == COUPLET_ROTARY_HALF) {
    for (; i + width <= half; i += width) {
      Floats const x = load(row + i), y = load(row + i + half), c = load(cos + i), s = load(sin + i);
      store(out + i, fused_negative(y, s, x * c));
      store(out + i + half, fused(x, s, y * c));
    }
    for (; i < half; ++i) {
      float const x = row[i], y = row[i + half];
      out[i] = x * cos[i] - y * sin[i];
      out[i + half] = y * cos[i] + x * sin[i];
    }
  } else {
    for (; i + width <= 2 * half; i += width) {
      Floats const x = load(row + i);
      store(out + i, fused(swapped<1>(x, AllLanes{}), load(sin + i), x * load(cos + i)));
    }
    for (; i < 2 * half; i += 2) {
      float const x = row[i], y = row[i + 1];
      out[i] = x * cos[i] + y * sin[i];
      out[i + 1] = y * cos[i + 1] + x * sin[i + 1];
    }
  }
}

// The row of angles by which a query of `position` meets keys rotated by key_angles(rotary, first): written to `row`, cos then
// sin, [2][rotary_max_stride]. Where angles are linear the amplitude is left to scale_by_amplitude.
static inline void turn_towards(const couplet_rotary& rotary, int32_t position, int32_t first, float* row) {
  float* const row_sin = row + rotary_max_stride;
  if (!rotary.linear) return position_angles(rotary, position, row, row_sin);
  AngleSum const sum = distance_angles(rotary, position - first);
  for (int64_t i = 0; i < rotary.stride; i += width) {
    Floats cos = load(sum.cos[0] + i), sin = load(sum.sin[0] + i);
    for (int32_t k = 1; k < sum.count; ++k) {
      Floats const c = load(sum.cos[k] + i), s = load(sum.sin[k] + i);
      Floats const turned = fused_negative(sin, s, cos * c);
      sin = fused(cos, s, sin * c);
      cos = turned;
    }
    store(row + i, cos);
    store(row_sin + i, sin);
  }
}

// Linear angles: a query carries the amplitude of both sides.
static inline void scale_by_amplitude(const couplet_rotary& rotary, float* query) {
  if (!rotary.linear) return;
  for (int32_t channel = 0; channel < rotary.rotary_dim; ++channel) {
    float const amplitude = rotary.amplitude[channel % rotary.entries];
    query[channel] *= amplitude * amplitude;
  }
}

}  // namespace couplet::cpu::COUPLET_BODY
