#include "table.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <optional>
#include <vector>

#include "../native/common/check.h"
#include "../native/common/metric.h"
#include "backend.h"

namespace couplet::cuda {
namespace {

constexpr float largest_float16 = 40000;  // times sqrt(2), which a rotation may make of it, is below 65504

int64_t count_of(const couplet_table_params& params) {
  return int64_t{params.kv_heads} * params.head_dim * couplet_codec_centroids(params.codec);
}

bool fits_float16(const couplet_table_params& params) {
  int64_t const count = count_of(params);
  for (int64_t at = 0; at < count; ++at)
    if (std::fabs(params.centroids[at]) > largest_float16) return false;
  return true;
}

bool is_by_code(const couplet_table_params& params) {
  auto const [channels, bits] = params.codec;
  bool const codec = (bits == 8 && (channels == 2 || channels == 4 || channels == 8)) || (bits == 10 && channels == 8);
  return codec && params.head_dim % 16 == 0;
}

std::vector<__half> by_code_of(const couplet_table_params& params) {
  int64_t const centroids = couplet_codec_centroids(params.codec);
  int64_t const channels = params.codec.group_channels;
  int64_t const groups = params.head_dim / channels;
  std::vector<__half> by_code(static_cast<size_t>(count_of(params)));
  size_t from = 0;
  for (int64_t kv_head = 0; kv_head < params.kv_heads; ++kv_head)
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t code = 0; code < centroids; ++code)
        for (int64_t channel = 0; channel < channels; ++channel)
          by_code[static_cast<size_t>(((kv_head * centroids + code) * groups + group) * channels + channel)] =
              __float2half_rn(params.centroids[from++]);
  return by_code;
}

// Which of 128 even steps, from the least centroid of a channel to its largest, each centroid lies on.
struct Levels {
  std::vector<uint8_t> of_centroids;  // in the order of by_code
  std::vector<float2> scales;         // see Table::level_scales
};

bool may_have_levels(const couplet_table_params& params) {
  return params.codec.code_bits == 8 && params.codec.group_channels == 8 && params.head_dim == 128;
}

// Nothing where a centroid lies between two levels. A sixteenth of a step, half a thousandth of a channel's range, is about what float16, as
// which other bodies keep it, rounds its largest by, so that a table that was saved as float16 is still on its levels.
std::optional<Levels> levels_of(const couplet_table_params& params) {
  constexpr int last = 127;
  constexpr double most_error = 1.0 / 16;
  int const centroids = couplet_codec_centroids(params.codec);
  int const channels = params.codec.group_channels;
  int const groups = params.head_dim / channels;
  Levels levels;
  levels.of_centroids.resize(static_cast<size_t>(count_of(params)));
  const float* rows = params.centroids;
  for (int kv_head = 0; kv_head < params.kv_heads; ++kv_head)
    for (int group = 0; group < groups; ++group, rows += centroids * channels)
      for (int channel = 0; channel < channels; ++channel) {
        auto const centroid = [&](int code) { return double{rows[code * channels + channel]}; };
        double least = centroid(0);
        double largest = least;
        for (int code = 1; code < centroids; ++code) {
          least = std::min(least, centroid(code));
          largest = std::max(largest, centroid(code));
        }
        double const step = (largest - least) / last;
        uint8_t* const to = levels.of_centroids.data() +
                            static_cast<size_t>((int64_t{kv_head} * centroids * groups + group) * channels + channel);
        for (int code = 0; code < centroids; ++code) {
          double const place = step > 0 ? (centroid(code) - least) / step : 0;
          double const level = std::nearbyint(place);
          if (std::fabs(place - level) > most_error) return std::nullopt;
          to[static_cast<ptrdiff_t>(code) * groups * channels] = static_cast<uint8_t>(level);
        }
        levels.scales.push_back({static_cast<float>(least), static_cast<float>(std::ldexp(step, 24))});
      }
  return levels;
}

template <class T>
cudaError_t upload(const T* host, size_t count, T** device, size_t* bytes) {
  void* memory = nullptr;
  if (cudaError_t const error = cudaMalloc(&memory, count * sizeof(T))) return error;
  *device = static_cast<T*>(memory);
  *bytes += count * sizeof(T);
  return cudaMemcpy(memory, host, count * sizeof(T), cudaMemcpyHostToDevice);
}

void destroy(couplet_table* handle) {
  if (!handle) return;
  auto* const table = reinterpret_cast<Table*>(handle);
  cudaFree(table->rows);
  cudaFree(table->metric);
  cudaFree(table->measured);
  cudaFree(table->float16_rows);
  cudaFree(table->by_code);
  cudaFree(table->levels);
  cudaFree(table->level_scales);
  delete table;
}

// Device memory is had before the centroids are read: nothing else bounds their number.
couplet_status fill(Table* table, const couplet_table_params& params, couplet_report* report) {
  auto const count = static_cast<size_t>(count_of(params));
  void* memory = nullptr;
  cudaError_t error = cudaMalloc(&memory, count * sizeof(float));
  if (error != cudaSuccess) return status_of(error, report, "making a table of centroids");
  table->rows = static_cast<float*>(memory);
  table->bytes += count * sizeof(float);
  couplet_status status = check_centroids(params, report);
  if (status == COUPLET_OK) status = check_metric(params, report);
  if (status != COUPLET_OK) return status;
  error = cudaMemcpy(memory, params.centroids, count * sizeof(float), cudaMemcpyHostToDevice);
  try {
    if (error == cudaSuccess) {
      std::vector<__half> float16_rows(count);
      for (size_t at = 0; at < count; ++at) float16_rows[at] = __float2half_rn(params.centroids[at]);
      error = upload(float16_rows.data(), count, &table->float16_rows, &table->bytes);
    }
    if (error == cudaSuccess && params.metric) {
      error = upload(params.metric, static_cast<size_t>(metric_floats(params)), &table->metric, &table->bytes);
      std::vector<float> measured(count);
      measure_centroids(params, measured.data());
      if (error == cudaSuccess) error = upload(measured.data(), count, &table->measured, &table->bytes);
    }
    if (error == cudaSuccess && fits_float16(params) && is_by_code(params))
      error = upload(by_code_of(params).data(), count, &table->by_code, &table->bytes);
    if (error == cudaSuccess && table->by_code && may_have_levels(params))
      if (std::optional<Levels> const levels = levels_of(params)) {
        error = upload(levels->scales.data(), levels->scales.size(), &table->level_scales, &table->bytes);
        if (error == cudaSuccess) error = upload(levels->of_centroids.data(), count, &table->levels, &table->bytes);
      }
  } catch (const std::bad_alloc&) {
    error = cudaErrorMemoryAllocation;
  }
  return status_of(error, report, "making a table of centroids");
}

couplet_status create(const couplet_table_params* params, couplet_table** out, couplet_report* report) {
  if (couplet_status const status = check_table_params(params, report)) return status;
  if (!out) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a place for `table` but received NULL");
  *out = nullptr;
  auto* const table = new (std::nothrow) Table{
      .codec = params->codec,
      .kv_heads = params->kv_heads,
      .head_dim = params->head_dim,
      .groups = couplet_codec_groups(params->codec, params->head_dim),
      .centroids = couplet_codec_centroids(params->codec),
      .bytes = sizeof(Table),
      .rows = nullptr,
      .metric = nullptr,
      .measured = nullptr,
      .float16_rows = nullptr,
      .by_code = nullptr,
      .levels = nullptr,
      .level_scales = nullptr,
  };
  if (!table) return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for a table of centroids");
  auto* const handle = reinterpret_cast<couplet_table*>(table);
  if (couplet_status const status = fill(table, *params, report)) {
    destroy(handle);
    return status;
  }
  *out = handle;
  return COUPLET_OK;
}

size_t bytes(const couplet_table* table) { return table ? table_of(table)->bytes : 0; }

}  // namespace

couplet_status check_table(const couplet_table* handle, const char* name, couplet_codec codec, int32_t kv_heads,
                           int32_t head_dim, couplet_report* report) {
  return check_table_shape(handle ? table_of(handle) : nullptr, name, codec, kv_heads, head_dim, report);
}

const couplet_table_entries table_entries = {.create = create, .destroy = destroy, .bytes = bytes};

}  // namespace couplet::cuda
