// The centroids of one layer and side in device memory. The struct itself lives on the host; kernels get its pointers.
//
// A new order of the centroids is a new member here, made in create (table.cu) beside a comment that gives its shape, its type and
// who reads it.
#pragma once

#include "../native/abi/operations.h"
#include "gpu.h"

namespace couplet::cuda {

struct Table {
  couplet_codec codec;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t groups;     // head_dim / group_channels
  int32_t centroids;  // of one group: 2^code_bits
  size_t bytes;       // of this struct and all it owns

  // Device, float32 [kv_heads][groups][centroids][group_channels], as given.
  float* rows;
  // Device, float32 [kv_heads][groups][group_channels][group_channels], as given, or NULL. Read by encode.
  float* metric;
  // Device, float32, the rows under the metric; NULL without one. Read by encode.
  float* measured;
  // Device, float16, the same as rows, rounded to nearest (infinite where a centroid is beyond 65504). Read by decode to float16.
  __half* float16_rows;
  // Device, float16 [kv_heads][centroids][groups][channels] of 2c8b, 4c8b, 8c8b and 8c10b, headDim a multiple of 16: a group keeps to its
  // banks whatever the code is. Read by attend/gather, attend/lookup and attend/staged. NULL for others, and where a centroid is too
  // large for float16 once it is rotated.
  __half* by_code;
  // Device, uint8 [kv_heads][centroids][groups][channels] of 8c8b at headDim 128: the level of each centroid, 0 to 127, where all lie on levels,
  // evenly spaced from the least to the largest centroid of a channel. Read by attend/lookup for values. NULL where some lie between.
  uint8_t* levels;
  // Device, float32 [kv_heads][head_dim] {least, step * 2^24}: what levels stand for, as float16 numbers of their bits. NULL likewise.
  float2* level_scales;
};

// The opaque handles of the waist are these structs.
inline const Table* table_of(const couplet_table* table) { return reinterpret_cast<const Table*>(table); }

// Why `table` cannot serve an operation that was given these shapes; COUPLET_OK when it can.
couplet_status check_table(const couplet_table* table, const char* name, couplet_codec codec, int32_t kv_heads,
                           int32_t head_dim, couplet_report* report);

}  // namespace couplet::cuda
