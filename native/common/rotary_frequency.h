// What a pair of given rotary tables turns by from one position to the next. Shared by the backends, which keep tables whose angles
// are linear in the position as a few rows and any others whole.
#pragma once

#include <cmath>

#include "../abi/operations.h"

namespace couplet {

// The frequency of pair i, from the phases of given tables: a first guess from position 1, then the phase of positions
// 2, 4, 8, ... narrows it (each halves what is uncertain), then least squares over rows of the whole table averages the
// float32 rounding of their angles away.
inline double rotary_frequency(const couplet_rotary_params& params, int32_t i) {
  int64_t const stride = params.rotary_dim / 2;
  int64_t const last = params.positions - 1;
  double frequency = 0;
  auto const phase_error = [&](int64_t t) {
    double const phase = std::atan2(params.sin[t * stride + i], params.cos[t * stride + i]);
    return std::remainder(phase - frequency * static_cast<double>(t), 2 * M_PI);
  };
  for (int64_t t = 1; t <= last; t *= 2) frequency += phase_error(t) / static_cast<double>(t);
  constexpr int64_t samples = 256;
  double products = 0, squares = 0;
  for (int64_t sample = 1; sample <= samples; ++sample) {
    int64_t const t = last * sample / samples;
    products += static_cast<double>(t) * phase_error(t);
    squares += static_cast<double>(t) * static_cast<double>(t);
  }
  return squares > 0 ? frequency + products / squares : 0;
}

// How far an entry of given tables at position t may lie from amplitude * (cos, sin)(t * frequency): a few roundings of the
// value (2^-22) and of the angle itself (t * frequency was rounded to float32 before cos saw it).
inline double rotary_tolerance(double amplitude, double frequency, int32_t t) {
  return amplitude * 0x1p-22 * (4 + t * std::fabs(frequency));
}

}  // namespace couplet
