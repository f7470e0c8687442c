#include "rotary.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <type_traits>
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
  for (int32_t i = 0; i < params.rotary_dim / 2; ++i)
    frequencies.push_back(params.cos ? rotary_frequency(params, i)
                                     : std::pow(params.theta, -2.0 * i / params.rotary_dim));
  return frequencies;
}

// The amplitudes of given tables, which show at position 0; empty where an angle is not 0 there.
std::vector<float> amplitudes_of(const couplet_rotary_params& params) {
  int32_t const pairs = params.rotary_dim / 2;
  if (!params.cos) return std::vector<float>(static_cast<size_t>(pairs), 1.0f);
  for (int32_t i = 0; i < pairs; ++i)
    if (!(params.cos[i] > 0) || params.sin[i] != 0) return {};
  return {params.cos, params.cos + pairs};
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
      size_t const at = static_cast<size_t>(t) * pairs + i;
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
  auto const count = static_cast<size_t>(params.positions) * static_cast<size_t>(params.rotary_dim / 2);
  std::vector<float2> rows(count);
  for (size_t entry = 0; entry < count; ++entry) rows[entry] = {params.cos[entry], params.sin[entry]};
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

// Columns of what lies at `place`, rows of `pairs` elements each, in another order; on the host.
template <class T>
void reorder_columns(const Rotary& rotary, const T* place, int64_t rows, const int32_t* order,
                     const std::vector<char>& from, std::vector<char>* to) {
  if (!place) return;
  int64_t const pairs = rotary.angles.pairs;
  size_t const offset =
      static_cast<size_t>(reinterpret_cast<const char*>(place) - static_cast<const char*>(rotary.memory));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < pairs; ++i)
      std::memcpy(to->data() + offset + static_cast<size_t>(row * pairs + i) * sizeof(T),
                  from.data() + offset + static_cast<size_t>(row * pairs + order[i]) * sizeof(T), sizeof(T));
}

cudaError_t fill_reordered(const Rotary& from, const int32_t* order, Rotary* rotary) {
  size_t const total = from.bytes - sizeof(Rotary);
  std::vector<char> given(total), moved(total);
  if (cudaError_t const error = cudaMemcpy(given.data(), from.memory, total, cudaMemcpyDeviceToHost)) return error;
  const Angles& angles = from.angles;
  int64_t const blocks = (int64_t{from.positions} + rotary_block - 1) / rotary_block;
  reorder_columns(from, angles.offsets, rotary_block, order, given, &moved);
  reorder_columns(from, angles.steps, std::min<int64_t>(blocks, rotary_blocks), order, given, &moved);
  reorder_columns(from, angles.wides, (blocks + rotary_blocks - 1) / rotary_blocks, order, given, &moved);
  reorder_columns(from, angles.amplitudes, 1, order, given, &moved);
  reorder_columns(from, angles.rows, from.positions, order, given, &moved);
  if (cudaError_t const error = cudaMalloc(&rotary->memory, total)) return error;
  auto const rebased = [&](const auto*& place) {
    using Element = std::remove_reference_t<decltype(*place)>;
    if (place)
      place = reinterpret_cast<Element*>(static_cast<char*>(rotary->memory) + (reinterpret_cast<const char*>(place) -
                                                                               static_cast<const char*>(from.memory)));
  };
  rebased(rotary->angles.offsets);
  rebased(rotary->angles.steps);
  rebased(rotary->angles.wides);
  rebased(rotary->angles.amplitudes);
  rebased(rotary->angles.rows);
  return cudaMemcpy(rotary->memory, moved.data(), total, cudaMemcpyHostToDevice);
}

couplet_status reorder(const couplet_rotary* handle, const int32_t* order, couplet_rotary** out,
                       couplet_report* report) {
  if (!handle || !out)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a rotary embedding and a place but received NULL");
  *out = nullptr;
  const Rotary& from = *rotary_of(handle);
  if (couplet_status const status = check_pair_order(order, from.angles.pairs, report)) return status;
  auto* const rotary = new (std::nothrow) Rotary(from);
  if (!rotary) return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for rotary angles");
  rotary->memory = nullptr;
  cudaError_t error = cudaErrorMemoryAllocation;
  try {
    error = fill_reordered(from, order, rotary);
  } catch (const std::bad_alloc&) {
  }
  auto* const made = reinterpret_cast<couplet_rotary*>(rotary);
  if (error) {
    destroy(made);
    return status_of(error, report, "making rotary angles");
  }
  *out = made;
  return COUPLET_OK;
}

size_t bytes(const couplet_rotary* rotary) { return rotary ? rotary_of(rotary)->bytes : 0; }

}  // namespace

const couplet_rotary_entries rotary_entries = {
    .create = create, .reorder = reorder, .destroy = destroy, .bytes = bytes};

}  // namespace couplet::cuda
