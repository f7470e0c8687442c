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
  float*
      rows;  // float32 [kv_heads][groups][centroids][group_channels], as given: decode, attend, encode of many tokens
  float*
      columns;  // float32 [kv_heads][groups][group_channels][centroids]: encode of few tokens, whose lanes are centroids;
                // NULL below 16 centroids, where a vector of centroids would be mostly padding

  // Elements from the rows (or columns) of one group to those of the next.
  int64_t group_stride() const { return int64_t{centroids} * codec.group_channels; }
  const float* group_rows(int32_t kv_head, int32_t group) const {
    return rows + (int64_t{kv_head} * groups + group) * group_stride();
  }
  const float* group_columns(int32_t kv_head, int32_t group) const {
    return columns + (int64_t{kv_head} * groups + group) * group_stride();
  }
};

namespace couplet::cpu {

// Why `table` cannot serve an operation that was given these shapes; COUPLET_OK when it can.
couplet_status check_table(const couplet_table* table, const char* name, couplet_codec codec, int32_t kv_heads,
                           int32_t head_dim, couplet_report* report);

}  // namespace couplet::cpu
