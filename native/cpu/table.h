// The centroids of one layer and side as the CPU bodies want them.
#pragma once

#include "../abi/operations.h"

struct couplet_table {
  couplet_codec codec;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t groups;
  int32_t centroids;
  float* rows;  // [kv_heads][groups][centroids][group_channels], 64-byte aligned, as given
};
