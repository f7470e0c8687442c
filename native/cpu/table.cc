#include "table.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../common/report.h"
#include "backend.h"

namespace couplet::cpu {
namespace {

constexpr int32_t smallest_columns = 16;  // centroids; one AVX-512 register of float32

// 64-byte aligned floats, counted in table->bytes; NULL when memory is out.
float* allocate(couplet_table* table, int64_t count) {
  size_t const bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  float* const memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (memory) table->bytes += bytes;
  return memory;
}

void destroy(couplet_table* table) {
  if (!table) return;
  std::free(table->rows);
  std::free(table->columns);
  delete table;
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
  return COUPLET_OK;
}

// The first centroid that is not finite, in memory order.
couplet_status check_finite(const couplet_table* table, couplet_report* report) {
  int64_t const count = int64_t{table->kv_heads} * table->groups * group_stride(*table);
  int64_t at = 0;
  while (at < count && std::isfinite(table->rows[at])) ++at;
  if (at == count) return COUPLET_OK;
  int32_t const channel = static_cast<int32_t>(at % table->codec.group_channels);
  int64_t const centroid = at / table->codec.group_channels % table->centroids;
  int32_t const group = static_cast<int32_t>(at / group_stride(*table) % table->groups);
  int32_t const kv_head = static_cast<int32_t>(at / group_stride(*table) / table->groups);
  return fail(
      report, COUPLET_NOT_FINITE, {.kv_head = kv_head, .channel = group * table->codec.group_channels + channel},
      "Expected finite numbers for `centroids` but received %f in kv head %d, group %d, centroid %d, channel %d",
      static_cast<double>(table->rows[at]), kv_head, group, static_cast<int>(centroid), channel);
}

void fill_columns(couplet_table* table) {
  int32_t const channels = table->codec.group_channels;
  for (int32_t kv_head = 0; kv_head < table->kv_heads; ++kv_head)
    for (int32_t group = 0; group < table->groups; ++group) {
      const float* const rows = table->rows + group_offset(*table, kv_head, group);
      float* const columns = table->columns + group_offset(*table, kv_head, group);
      for (int32_t channel = 0; channel < channels; ++channel)
        for (int32_t centroid = 0; centroid < table->centroids; ++centroid)
          columns[int64_t{channel} * table->centroids + centroid] = rows[int64_t{centroid} * channels + channel];
    }
}

couplet_status create(const couplet_table_params* params, couplet_table** out, couplet_report* report) {
  if (couplet_status const status = check(params, report)) return status;
  if (!out) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a place for `table` but received NULL");
  *out = nullptr;

  couplet_table* const table = new (std::nothrow) couplet_table{
      .codec = params->codec,
      .kv_heads = params->kv_heads,
      .head_dim = params->head_dim,
      .groups = couplet_codec_groups(params->codec, params->head_dim),
      .centroids = couplet_codec_centroids(params->codec),
      .bytes = sizeof(couplet_table),
      .rows = nullptr,
      .columns = nullptr,
  };
  if (!table) return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for a table of centroids");

  int64_t const count = int64_t{table->kv_heads} * table->groups * group_stride(*table);
  bool const with_columns = table->centroids >= smallest_columns;
  table->rows = allocate(table, count);
  if (with_columns) table->columns = allocate(table, count);
  if (!table->rows || (with_columns && !table->columns)) {
    destroy(table);
    return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for a table of %lld centroid channels",
                static_cast<long long>(count));
  }

  std::memcpy(table->rows, params->centroids, static_cast<size_t>(count) * sizeof(float));
  if (couplet_status const status = check_finite(table, report)) {
    destroy(table);
    return status;
  }
  if (with_columns) fill_columns(table);
  *out = table;
  return COUPLET_OK;
}

size_t bytes(const couplet_table* table) { return table ? table->bytes : 0; }

}  // namespace

couplet_status check_table(const couplet_table* table, const char* name, couplet_codec codec, int32_t kv_heads,
                           int32_t head_dim, couplet_report* report) {
  if (!table) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a table for `%s` but received NULL", name);
  if (table->codec.group_channels != codec.group_channels || table->codec.code_bits != codec.code_bits ||
      table->kv_heads != kv_heads || table->head_dim != head_dim)
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected a table of codec %dc%db, %d kv heads and headDim %d for `%s` but received %dc%db, %d and %d",
                codec.group_channels, codec.code_bits, kv_heads, head_dim, name, table->codec.group_channels,
                table->codec.code_bits, table->kv_heads, table->head_dim);
  return COUPLET_OK;
}

const couplet_table_entries table_entries = {.create = create, .destroy = destroy, .bytes = bytes};

}  // namespace couplet::cpu
