// The centroids of one layer and side as the CPU bodies want them. Immutable once made; read by many threads.
//
// A new order of the centroids is a new member here, allocated in create (allocate counts it in `bytes`,
// destroy frees it) in table.cc, next to a comment that gives its shape, its type and who reads it.
#pragma once

#include "../abi/operations.h"

struct couplet_table {
  couplet_codec codec;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t groups;     // head_dim / group_channels
  int32_t centroids;  // of one group: 2^code_bits
  size_t bytes;       // of this struct and all it owns

  // All of them start on a cache line (64 bytes).

  // float32 [kv_heads][groups][centroids][group_channels], as given: decode, attend.
  float* rows;
  // float32 [kv_heads][groups][group_channels][group_channels], as given, or NULL.
  float* metric;
  // The rows under the metric: encode of many tokens. Without a metric `rows` itself.
  float* measured;
  // float32 [kv_heads][groups][group_channels][centroids], of `measured`: encode of few tokens, whose lanes are centroids. NULL
  // below 16 centroids, where a register of centroids would be mostly padding.
  float* columns;
};

namespace couplet::cpu {

// Elements from the rows (or columns) of one group to those of the next. Static, as all that files of several instruction
// sets may include: a member function would be one weak symbol, compiled with whichever flags the linker meets first.
static inline int64_t group_stride(const couplet_table& table) {
  return int64_t{table.centroids} * table.codec.group_channels;
}
static inline int64_t group_offset(const couplet_table& table, int32_t kv_head, int32_t group) {
  return (int64_t{kv_head} * table.groups + group) * group_stride(table);
}
static inline int64_t metric_offset(const couplet_table& table, int32_t kv_head, int32_t group) {
  return (int64_t{kv_head} * table.groups + group) * table.codec.group_channels * table.codec.group_channels;
}

// Why `table` cannot serve an operation that was given these shapes; COUPLET_OK when it can.
couplet_status check_table(const couplet_table* table, const char* name, couplet_codec codec, int32_t kv_heads,
                           int32_t head_dim, couplet_report* report);

}  // namespace couplet::cpu
