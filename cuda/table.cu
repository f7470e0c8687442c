#include "table.h"

#include <cmath>
#include <new>
#include <vector>

#include "../native/common/report.h"
#include "backend.h"

namespace couplet::cuda {
namespace {

constexpr int32_t bank_groups = 8;       // rows of 16 bytes in the 128 bytes of all banks
constexpr float largest_banked = 40000;  // times sqrt(2), which a rotation may make of it, is below 65504

int64_t count_of(const couplet_table_params& params) {
  return int64_t{params.kv_heads} * params.head_dim * couplet_codec_centroids(params.codec);
}

couplet_status check(const couplet_table_params* params, couplet_report* report) {
  if (!params) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected parameters but received NULL");
  if (!params->centroids)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected an array for `centroids` but received NULL");
  if (params->head_dim < COUPLET_MIN_HEAD_DIM || params->head_dim > COUPLET_MAX_HEAD_DIM)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected %d to %d for `headDim` but received %d",
                COUPLET_MIN_HEAD_DIM, COUPLET_MAX_HEAD_DIM, params->head_dim);
  if (params->kv_heads < 1)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected 1 or more for `kvHeads` but received %d",
                params->kv_heads);
  if (!couplet_codec_valid(params->codec, params->head_dim))
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected groups that divide headDim %d and codes of 1 to %d bits for `codec` but received %dc%db",
                params->head_dim, COUPLET_MAX_CODE_BITS, params->codec.group_channels, params->codec.code_bits);
  int64_t const count = count_of(*params);
  for (int64_t at = 0; at < count; ++at) {
    if (std::isfinite(params->centroids[at])) continue;
    int64_t const channels = params->codec.group_channels;
    int64_t const centroids = couplet_codec_centroids(params->codec);
    int64_t const groups = couplet_codec_groups(params->codec, params->head_dim);
    int64_t const group = at / channels / centroids % groups;
    int32_t const kv_head = static_cast<int32_t>(at / channels / centroids / groups);
    return fail(
        report, COUPLET_NOT_FINITE,
        {.kv_head = kv_head, .channel = static_cast<int32_t>(group * channels + at % channels)},
        "Expected finite numbers for `centroids` but received %f in kv head %d, group %d, centroid %d, channel %d",
        static_cast<double>(params->centroids[at]), kv_head, static_cast<int>(group),
        static_cast<int>(at / channels % centroids), static_cast<int>(at % channels));
  }
  return COUPLET_OK;
}

bool fits_banks(const couplet_table_params& params) {
  if (params.codec.group_channels != 8 || params.codec.code_bits != 8) return false;
  if (couplet_codec_groups(params.codec, params.head_dim) % bank_groups) return false;
  int64_t const count = count_of(params);
  for (int64_t at = 0; at < count; ++at)
    if (std::fabs(params.centroids[at]) > largest_banked) return false;
  return true;
}

std::vector<__half> banked_of(const couplet_table_params& params) {
  constexpr int64_t channels = 8;
  constexpr int64_t centroids = 256;
  int64_t const groups = params.head_dim / channels;
  std::vector<__half> banked(static_cast<size_t>(count_of(params)));
  size_t from = 0;
  for (int64_t kv_head = 0; kv_head < params.kv_heads; ++kv_head)
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t code = 0; code < centroids; ++code) {
        int64_t const slab = kv_head * (groups / bank_groups) + group / bank_groups;
        int64_t const row = (slab * centroids + code) * bank_groups + group % bank_groups;
        for (int64_t channel = 0; channel < channels; ++channel)
          banked[static_cast<size_t>(row * channels + channel)] = __float2half_rn(params.centroids[from++]);
      }
  return banked;
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
  cudaFree(table->banked);
  delete table;
}

cudaError_t fill(Table* table, const couplet_table_params& params) {
  auto const count = static_cast<size_t>(count_of(params));
  if (cudaError_t const error = upload(params.centroids, count, &table->rows, &table->bytes)) return error;
  if (!fits_banks(params)) return cudaSuccess;
  try {
    std::vector<__half> const banked = banked_of(params);
    return upload(banked.data(), count, &table->banked, &table->bytes);
  } catch (const std::bad_alloc&) {
    return cudaErrorMemoryAllocation;
  }
}

couplet_status create(const couplet_table_params* params, couplet_table** out, couplet_report* report) {
  if (couplet_status const status = check(params, report)) return status;
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
      .banked = nullptr,
  };
  if (!table) return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for a table of centroids");
  auto* const handle = reinterpret_cast<couplet_table*>(table);
  if (cudaError_t const error = fill(table, *params)) {
    destroy(handle);
    return status_of(error, report, "making a table of centroids");
  }
  *out = handle;
  return COUPLET_OK;
}

size_t bytes(const couplet_table* table) { return table ? table_of(table)->bytes : 0; }

}  // namespace

couplet_status check_table(const couplet_table* handle, const char* name, couplet_codec codec, int32_t kv_heads,
                           int32_t head_dim, couplet_report* report) {
  if (!handle) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a table for `%s` but received NULL", name);
  const Table& table = *table_of(handle);
  if (table.codec.group_channels != codec.group_channels || table.codec.code_bits != codec.code_bits ||
      table.kv_heads != kv_heads || table.head_dim != head_dim)
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected a table of codec %dc%db, %d kv heads and headDim %d for `%s` but received %dc%db, %d and %d",
                codec.group_channels, codec.code_bits, kv_heads, head_dim, name, table.codec.group_channels,
                table.codec.code_bits, table.kv_heads, table.head_dim);
  return COUPLET_OK;
}

const couplet_table_entries table_entries = {.create = create, .destroy = destroy, .bytes = bytes};

}  // namespace couplet::cuda
