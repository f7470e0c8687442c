#include "table.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "../common/check.h"
#include "../common/metric.h"
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
  if (table->measured != table->rows) std::free(table->measured);
  std::free(table->rows);
  std::free(table->metric);
  std::free(table->columns);
  delete table;
}

void fill_columns(couplet_table* table) {
  int32_t const channels = table->codec.group_channels;
  for (int32_t kv_head = 0; kv_head < table->kv_heads; ++kv_head)
    for (int32_t group = 0; group < table->groups; ++group) {
      const float* const rows = table->measured + group_offset(*table, kv_head, group);
      float* const columns = table->columns + group_offset(*table, kv_head, group);
      for (int32_t channel = 0; channel < channels; ++channel)
        for (int32_t centroid = 0; centroid < table->centroids; ++centroid)
          columns[int64_t{channel} * table->centroids + centroid] = rows[int64_t{centroid} * channels + channel];
    }
}

couplet_status create(const couplet_table_params* params, couplet_table** out, couplet_report* report) {
  if (couplet_status const status = check_table_params(params, report)) return status;
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
      .metric = nullptr,
      .measured = nullptr,
      .columns = nullptr,
  };
  if (!table) return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for a table of centroids");

  int64_t const count = int64_t{table->kv_heads} * table->groups * group_stride(*table);
  bool const with_columns = table->centroids >= smallest_columns;
  bool const with_metric = params->metric != nullptr;
  table->rows = allocate(table, count);
  table->metric = with_metric ? allocate(table, metric_floats(*params)) : nullptr;
  table->measured = with_metric ? allocate(table, count) : table->rows;
  if (with_columns) table->columns = allocate(table, count);
  if (!table->rows || !table->measured || (with_metric && !table->metric) || (with_columns && !table->columns)) {
    destroy(table);
    return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for a table of %lld centroid channels",
                static_cast<long long>(count));
  }

  couplet_status status = check_centroids(*params, report);
  if (status == COUPLET_OK) status = check_metric(*params, report);
  if (status != COUPLET_OK) {
    destroy(table);
    return status;
  }
  std::memcpy(table->rows, params->centroids, static_cast<size_t>(count) * sizeof(float));
  if (with_metric) {
    std::memcpy(table->metric, params->metric, static_cast<size_t>(metric_floats(*params)) * sizeof(float));
    measure_centroids(*params, table->measured);
  }
  if (with_columns) fill_columns(table);
  *out = table;
  return COUPLET_OK;
}

size_t bytes(const couplet_table* table) { return table ? table->bytes : 0; }

}  // namespace

couplet_status check_table(const couplet_table* table, const char* name, couplet_codec codec, int32_t kv_heads,
                           int32_t head_dim, couplet_report* report) {
  return check_table_shape(table, name, codec, kv_heads, head_dim, report);
}

const couplet_table_entries table_entries = {.create = create, .destroy = destroy, .bytes = bytes};

}  // namespace couplet::cpu
