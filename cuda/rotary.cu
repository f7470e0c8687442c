#include "rotary.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "../native/common/check.h"
#include "../native/common/rotary_frequency.h"
#include "backend.h"

namespace couplet::cuda {
namespace {

// ---- angles on the host ----------------------------------------------------------------------------------------------------
struct Linear {
  std::vector<float2> offsets, steps, wides;
  std::vector<float> amplitudes;
};

std::vector<float2> rows_of(int64_t rows, double step, const std::vector<double>& frequencies) {
  std::vector<float2> angles;
  angles.reserve(static_cast<size_t>(rows) * frequencies.size());
  for (int64_t row = 0; row < rows; ++row)
    for (double const frequency : frequencies) {
      double const angle = static_cast<double>(row) * step * frequency;
      angles.push_back({static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))});
    }
  return angles;
}

Linear linear_of(int64_t positions, const std::vector<double>& frequencies, std::vector<float> amplitudes) {
  int64_t const blocks = (positions + rotary_block - 1) / rotary_block;
  int64_t const wides = (blocks + rotary_blocks - 1) / rotary_blocks;
  return {rows_of(rotary_block, 1, frequencies),
          rows_of(std::min<int64_t>(blocks, rotary_blocks), rotary_block, frequencies),
          rows_of(wides, double{rotary_block} * rotary_blocks, frequencies), std::move(amplitudes)};
}

std::vector<double> frequencies_of(const couplet_rotary_params& params) {
  std::vector<double> frequencies;
  for (int32_t i = 0; i < params.rotary_dim / 2; ++i) {
    int32_t const pair = rotary_pair(params, i);
    frequencies.push_back(params.cos ? rotary_frequency(params, pair)
                                     : std::pow(params.theta, -2.0 * pair / params.rotary_dim));
  }
  return frequencies;
}

// The amplitudes of given tables, which show at position 0; empty where an angle is not 0 there.
std::vector<float> amplitudes_of(const couplet_rotary_params& params) {
  int32_t const pairs = params.rotary_dim / 2;
  if (!params.cos) return std::vector<float>(static_cast<size_t>(pairs), 1.0f);
  for (int32_t i = 0; i < pairs; ++i)
    if (!(params.cos[i] > 0) || params.sin[i] != 0) return {};
  std::vector<float> amplitudes;
  for (int32_t i = 0; i < pairs; ++i) amplitudes.push_back(params.cos[rotary_pair(params, i)]);
  return amplitudes;
}

bool is_linear(const couplet_rotary_params& params, const Linear& linear, const std::vector<double>& frequencies) {
  size_t const pairs = frequencies.size();
  for (int32_t t = 0; t < params.positions; ++t)
    for (size_t i = 0; i < pairs; ++i) {
      auto const block = static_cast<size_t>(t / rotary_block);
      float2 angle = linear.offsets[static_cast<size_t>(t % rotary_block) * pairs + i];
      for (float2 const more :
           {linear.steps[block % rotary_blocks * pairs + i], linear.wides[block / rotary_blocks * pairs + i]})
        angle = {angle.x * more.x - angle.y * more.y, angle.y * more.x + angle.x * more.y};
      double const amplitude = linear.amplitudes[i];
      double const tolerance = rotary_tolerance(amplitude, frequencies[i], t);
      size_t const at =
          static_cast<size_t>(t) * pairs + static_cast<size_t>(rotary_pair(params, static_cast<int32_t>(i)));
      if (std::fabs(amplitude * angle.x - params.cos[at]) > tolerance) return false;
      if (std::fabs(amplitude * angle.y - params.sin[at]) > tolerance) return false;
    }
  return true;
}

// ---- angles on the device --------------------------------------------------------------------------------------------------
constexpr size_t alignment = 256;

struct Part {
  const void* host;
  size_t bytes;
  size_t offset;
};

template <class T>
Part part_of(const std::vector<T>& values, size_t* total) {
  Part const part{values.data(), values.size() * sizeof(T), *total};
  *total += (part.bytes + alignment - 1) / alignment * alignment;
  return part;
}

template <class... Parts>
cudaError_t upload(Rotary* rotary, size_t total, const Parts&... parts) {
  if (cudaError_t const error = cudaMalloc(&rotary->memory, total)) return error;
  rotary->bytes += total;
  cudaError_t error = cudaSuccess;
  for (const Part& part : {parts...})
    if (error == cudaSuccess)
      error =
          cudaMemcpy(static_cast<char*>(rotary->memory) + part.offset, part.host, part.bytes, cudaMemcpyHostToDevice);
  return error;
}

template <class T>
const T* at(const Rotary& rotary, const Part& part) {
  return reinterpret_cast<const T*>(static_cast<const char*>(rotary.memory) + part.offset);
}

cudaError_t keep_linear(Rotary* rotary, const Linear& linear) {
  size_t total = 0;
  Part const offsets = part_of(linear.offsets, &total);
  Part const steps = part_of(linear.steps, &total);
  Part const wides = part_of(linear.wides, &total);
  Part const amplitudes = part_of(linear.amplitudes, &total);
  cudaError_t const error = upload(rotary, total, offsets, steps, wides, amplitudes);
  rotary->angles.offsets = at<float2>(*rotary, offsets);
  rotary->angles.steps = at<float2>(*rotary, steps);
  rotary->angles.wides = at<float2>(*rotary, wides);
  rotary->angles.amplitudes = at<float>(*rotary, amplitudes);
  return error;
}

cudaError_t keep_given(Rotary* rotary, const couplet_rotary_params& params) {
  int32_t const pairs = params.rotary_dim / 2;
  std::vector<float2> rows;
  rows.reserve(static_cast<size_t>(params.positions) * static_cast<size_t>(pairs));
  for (int64_t row = 0; row < params.positions; ++row)
    for (int32_t i = 0; i < pairs; ++i) {
      int64_t const at = row * pairs + rotary_pair(params, i);
      rows.push_back({params.cos[at], params.sin[at]});
    }
  size_t total = 0;
  Part const part = part_of(rows, &total);
  cudaError_t const error = upload(rotary, total, part);
  rotary->angles.rows = at<float2>(*rotary, part);
  return error;
}

cudaError_t fill(Rotary* rotary, const couplet_rotary_params& params) {
  try {
    std::vector<float> amplitudes = amplitudes_of(params);
    if (amplitudes.empty()) return keep_given(rotary, params);
    std::vector<double> const frequencies = frequencies_of(params);
    Linear const linear = linear_of(params.positions, frequencies, std::move(amplitudes));
    return params.cos && !is_linear(params, linear, frequencies) ? keep_given(rotary, params)
                                                                 : keep_linear(rotary, linear);
  } catch (const std::bad_alloc&) {
    return cudaErrorMemoryAllocation;
  }
}

// ---- entries ---------------------------------------------------------------------------------------------------------------
void destroy(couplet_rotary* handle) {
  if (!handle) return;
  auto* const rotary = reinterpret_cast<Rotary*>(handle);
  cudaFree(rotary->memory);
  delete rotary;
}

couplet_status create(const couplet_rotary_params* params, couplet_rotary** out, couplet_report* report) {
  if (couplet_status const status = check_rotary_params(params, report)) return status;
  if (!out) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a place for `rotary` but received NULL");
  *out = nullptr;
  auto* const rotary = new (std::nothrow) Rotary{
      .angles = {.offsets = nullptr,
                 .steps = nullptr,
                 .wides = nullptr,
                 .amplitudes = nullptr,
                 .rows = nullptr,
                 .pairs = params->rotary_dim / 2,
                 .kind = params->kind},
      .positions = params->positions,
      .head_dim = params->head_dim,
      .bytes = sizeof(Rotary),
      .memory = nullptr,
  };
  if (!rotary) return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for rotary angles");
  auto* const handle = reinterpret_cast<couplet_rotary*>(rotary);
  if (cudaError_t const error = fill(rotary, *params)) {
    destroy(handle);
    return status_of(error, report, "making rotary angles");
  }
  *out = handle;
  return COUPLET_OK;
}

size_t bytes(const couplet_rotary* rotary) { return rotary ? rotary_of(rotary)->bytes : 0; }

}  // namespace

const couplet_rotary_entries rotary_entries = {.create = create, .destroy = destroy, .bytes = bytes};

}  // namespace couplet::cuda
