#include "rotary.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "../common/check.h"
#include "../common/rotary_frequency.h"
#include "backend.h"

namespace couplet::cpu {
namespace {

constexpr int32_t wide_step = rotary_offsets * rotary_coarse;

int64_t rows_for(int64_t positions, int64_t step) { return (positions + step - 1) / step; }

int32_t pairs(const couplet_rotary& rotary) { return rotary.rotary_dim / 2; }

// Puts the angle of pair i into its place in a row of angles.
void put(const couplet_rotary& rotary, int64_t row, int32_t i, double cos, double sin) {
  float* const row_cos = rotary.cos + row * rotary.stride;
  float* const row_sin = rotary.sin + row * rotary.stride;
  if (rotary.kind == COUPLET_ROTARY_HALF) {
    row_cos[i] = static_cast<float>(cos);
    row_sin[i] = static_cast<float>(sin);
  } else {
    row_cos[2 * i] = row_cos[2 * i + 1] = static_cast<float>(cos);
    row_sin[2 * i] = static_cast<float>(-sin);
    row_sin[2 * i + 1] = static_cast<float>(sin);
  }
}

// cos and sin of the sum of two angles, entry by entry; the signs of an interleaved sin row come out right as well.
void add_angles(int64_t stride, const float* cos, const float* sin, float* sum_cos, float* sum_sin) {
  for (int64_t e = 0; e < stride; ++e) {
    float const c = sum_cos[e] * cos[e] - sum_sin[e] * sin[e];
    sum_sin[e] = sum_sin[e] * cos[e] + sum_cos[e] * sin[e];
    sum_cos[e] = c;
  }
}

// The row of angles of a distance between positions, amplitude 1.
void add_up(const couplet_rotary& rotary, int32_t distance, float* cos, float* sin) {
  AngleSum const angles = distance_angles(rotary, distance);
  std::memcpy(cos, angles.cos[0], static_cast<size_t>(rotary.stride) * sizeof(float));
  std::memcpy(sin, angles.sin[0], static_cast<size_t>(rotary.stride) * sizeof(float));
  for (int32_t i = 1; i < angles.count; ++i) add_angles(rotary.stride, angles.cos[i], angles.sin[i], cos, sin);
}

float* allocate(couplet_rotary* rotary, int64_t count) {
  size_t const bytes = static_cast<size_t>(count) * sizeof(float);
  float* const memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (!memory) return nullptr;
  std::memset(memory, 0, bytes);
  rotary->bytes += bytes;
  return memory;
}

bool allocate_rows(couplet_rotary* rotary, int64_t rows) {
  std::free(rotary->cos);
  std::free(rotary->sin);
  rotary->bytes =
      sizeof(couplet_rotary) + (rotary->amplitude ? static_cast<size_t>(rotary->stride) * sizeof(float) : 0);
  rotary->cos = allocate(rotary, rows * rotary->stride);
  rotary->sin = allocate(rotary, rows * rotary->stride);
  return rotary->cos && rotary->sin;
}

// Fills offset, coarse and wide rows for angles t * frequency[i].
bool fill_linear(couplet_rotary* rotary, const std::vector<double>& frequency) {
  int64_t const coarse = std::min<int64_t>(rows_for(rotary->positions, rotary_offsets), rotary_coarse);
  int64_t const wide = rows_for(rotary->positions, wide_step);
  rotary->coarse_rows = static_cast<int32_t>(coarse);
  if (!allocate_rows(rotary, rotary_offsets + coarse + wide)) return false;
  auto const fill = [&](int64_t first_row, int64_t rows, double step) {
    for (int64_t row = 0; row < rows; ++row)
      for (int32_t i = 0; i < pairs(*rotary); ++i) {
        double const angle = static_cast<double>(row) * step * frequency[static_cast<size_t>(i)];
        put(*rotary, first_row + row, i, std::cos(angle), std::sin(angle));
      }
  };
  fill(0, rotary_offsets, 1);
  fill(rotary_offsets, coarse, rotary_offsets);
  fill(rotary_offsets + coarse, wide, wide_step);
  return true;
}

bool fill_given(couplet_rotary* rotary, const couplet_rotary_params& params) {
  if (!allocate_rows(rotary, rotary->positions)) return false;
  for (int64_t row = 0, at = 0; row < rotary->positions; ++row)
    for (int32_t i = 0; i < pairs(*rotary); ++i, ++at) put(*rotary, row, i, params.cos[at], params.sin[at]);
  return true;
}

// Whether every entry of the given tables is amplitude * (cos, sin)(t * frequency) up to what float32 arithmetic does to it.
bool is_linear(const couplet_rotary& rotary, const couplet_rotary_params& params,
               const std::vector<double>& frequency) {
  int32_t const step = rotary.kind == COUPLET_ROTARY_HALF ? 1 : 2;
  alignas(64) float cos[rotary_max_stride], sin[rotary_max_stride];
  for (int32_t t = 0; t < params.positions; ++t) {
    add_up(rotary, t, cos, sin);
    for (int32_t i = 0; i < pairs(rotary); ++i) {
      int64_t const at = int64_t{t} * pairs(rotary) + i;
      int32_t const entry = step == 1 ? i : 2 * i + 1;  // of an interleaved row, the one whose sin has its own sign
      double const amplitude = rotary.amplitude[entry];
      double const tolerance = rotary_tolerance(amplitude, frequency[static_cast<size_t>(i)], t);
      if (std::fabs(amplitude * cos[entry] - params.cos[at]) > tolerance) return false;
      if (std::fabs(amplitude * sin[entry] - params.sin[at]) > tolerance) return false;
    }
  }
  return true;
}

// Turns given tables into linear ones where they are; otherwise keeps them. False when memory is out.
bool fill_from_tables(couplet_rotary* rotary, const couplet_rotary_params& params) {
  std::vector<double> frequency(static_cast<size_t>(pairs(*rotary)));
  bool candidate = true;
  for (int32_t i = 0; i < pairs(*rotary); ++i) {
    float const amplitude = params.cos[i];  // the angle of position 0 is 0
    candidate = candidate && amplitude > 0 && params.sin[i] == 0;
    if (rotary->kind == COUPLET_ROTARY_HALF)
      rotary->amplitude[i] = amplitude;
    else
      rotary->amplitude[2 * i] = rotary->amplitude[2 * i + 1] = amplitude;
    frequency[static_cast<size_t>(i)] = rotary_frequency(params, i);
  }
  if (candidate) {
    if (!fill_linear(rotary, frequency)) return false;
    rotary->linear = is_linear(*rotary, params, frequency);
  }
  return rotary->linear || fill_given(rotary, params);
}

bool fill_from_theta(couplet_rotary* rotary, double theta) {
  std::vector<double> frequency(static_cast<size_t>(pairs(*rotary)));
  for (int32_t i = 0; i < pairs(*rotary); ++i)
    frequency[static_cast<size_t>(i)] = std::pow(theta, -2.0 * i / rotary->rotary_dim);
  for (int32_t entry = 0; entry < rotary->entries; ++entry) rotary->amplitude[entry] = 1;
  rotary->linear = true;
  return fill_linear(rotary, frequency);
}

void destroy(couplet_rotary* rotary) {
  if (!rotary) return;
  std::free(rotary->cos);
  std::free(rotary->sin);
  std::free(rotary->amplitude);
  delete rotary;
}

couplet_status create(const couplet_rotary_params* params, couplet_rotary** out, couplet_report* report) {
  if (couplet_status const status = check_rotary_params(params, report)) return status;
  if (!out) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a place for `rotary` but received NULL");
  *out = nullptr;
  int32_t const entries = params->kind == COUPLET_ROTARY_HALF ? params->rotary_dim / 2 : params->rotary_dim;
  couplet_rotary* const rotary = new (std::nothrow) couplet_rotary{
      .kind = params->kind,
      .rotary_dim = params->rotary_dim,
      .positions = params->positions,
      .head_dim = params->head_dim,
      .linear = false,
      .entries = entries,
      .stride = (entries + 15) / 16 * 16,
      .bytes = sizeof(couplet_rotary),
      .cos = nullptr,
      .sin = nullptr,
      .amplitude = nullptr,
      .coarse_rows = 0,
  };
  if (!rotary) return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for rotary angles");
  bool filled = false;
  try {
    rotary->amplitude = allocate(rotary, rotary->stride);
    filled =
        rotary->amplitude && (params->cos ? fill_from_tables(rotary, *params) : fill_from_theta(rotary, params->theta));
  } catch (const std::bad_alloc&) {
  }
  if (!filled) {
    destroy(rotary);
    return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for rotary angles of %d positions", params->positions);
  }
  *out = rotary;
  return COUPLET_OK;
}

// Rows and amplitudes hold for each pair what belongs to it, once or, of an interleaved rotary embedding, twice.
void reorder_row(const couplet_rotary& rotary, const int32_t* order, const float* from, float* to) {
  int32_t const width = rotary.entries / pairs(rotary);
  for (int32_t entry = 0; entry < rotary.entries; ++entry)
    to[entry] = from[order[entry / width] * width + entry % width];
}

couplet_status reorder(const couplet_rotary* from, const int32_t* order, couplet_rotary** out, couplet_report* report) {
  if (!from || !out)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a rotary embedding and a place but received NULL");
  *out = nullptr;
  if (couplet_status const status = check_pair_order(order, pairs(*from), report)) return status;
  auto* const rotary = new (std::nothrow) couplet_rotary(*from);
  if (!rotary) return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for rotary angles");
  rotary->cos = rotary->sin = nullptr;
  rotary->amplitude = allocate(rotary, rotary->stride);
  int64_t const rows =
      from->linear ? rotary_offsets + from->coarse_rows + rows_for(from->positions, wide_step) : from->positions;
  if (!rotary->amplitude || !allocate_rows(rotary, rows)) {
    destroy(rotary);
    return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for rotary angles of %d positions", from->positions);
  }
  reorder_row(*from, order, from->amplitude, rotary->amplitude);
  for (int64_t at = 0; at < rows * from->stride; at += from->stride) {
    reorder_row(*from, order, from->cos + at, rotary->cos + at);
    reorder_row(*from, order, from->sin + at, rotary->sin + at);
  }
  *out = rotary;
  return COUPLET_OK;
}

size_t bytes(const couplet_rotary* rotary) { return rotary ? rotary->bytes : 0; }

}  // namespace

AngleRows key_angles(const couplet_rotary& rotary, int32_t first) {
  int64_t const at = rotary.linear ? 0 : first * rotary.stride;
  return {rotary.cos + at, rotary.sin + at, rotary.stride};
}

void position_angles(const couplet_rotary& rotary, int32_t position, float* cos, float* sin) {
  if (!rotary.linear) {
    size_t const bytes = static_cast<size_t>(rotary.stride) * sizeof(float);
    std::memcpy(cos, rotary.cos + position * rotary.stride, bytes);
    std::memcpy(sin, rotary.sin + position * rotary.stride, bytes);
    return;
  }
  add_up(rotary, position, cos, sin);
  for (int64_t e = 0; e < rotary.stride; ++e) {
    cos[e] *= rotary.amplitude[e];
    sin[e] *= rotary.amplitude[e];
  }
}

void rotate_row(const couplet_rotary& rotary, const float* cos, const float* sin, const float* row, float* out) {
  int32_t const half = rotary.rotary_dim / 2;
  bool const interleaved = rotary.kind == COUPLET_ROTARY_INTERLEAVED;
  for (int32_t i = 0; i < half; ++i) {
    int32_t const first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
    int32_t const entry = interleaved ? 2 * i + 1 : i;  // of an interleaved row, the one whose sin has its own sign
    float const x = row[first], y = row[second];
    out[first] = x * cos[entry] - y * sin[entry];
    out[second] = y * cos[entry] + x * sin[entry];
  }
  if (out != row)
    std::memcpy(out + 2 * half, row + 2 * half, static_cast<size_t>(rotary.head_dim - 2 * half) * sizeof(float));
}

couplet_status check_rotary(const couplet_rotary& rotary, int32_t head_dim, int64_t last, couplet_report* report) {
  if (rotary.head_dim != head_dim)
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected a rotary embedding of headDim %d but received one of %d", head_dim, rotary.head_dim);
  if (last >= rotary.positions)
    return fail(report, COUPLET_INVALID_ARGUMENT, {.token = last},
                "Expected positions below %d, the end of the rotary tables, but received %lld", rotary.positions,
                static_cast<long long>(last));
  return COUPLET_OK;
}

const couplet_rotary_entries rotary_entries = {
    .create = create, .reorder = reorder, .destroy = destroy, .bytes = bytes};

}  // namespace couplet::cpu
