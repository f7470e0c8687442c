// Elements of the rows that operations read and write: float32, float16 or bfloat16.
#pragma once

#include "../../native/abi/status.h"
#include "../gpu.h"

namespace couplet::cuda {

inline int element_bytes(int32_t dtype) { return dtype == COUPLET_FLOAT32 ? 4 : 2; }

inline const char* dtype_name(int32_t dtype) {
  return dtype == COUPLET_FLOAT32 ? "float32" : dtype == COUPLET_FLOAT16 ? "float16" : "bfloat16";
}

// rows[at], exact in float32. dtype is the same for all threads, so that the branch costs next to nothing.
__device__ __forceinline__ float load_element(const void* rows, int32_t dtype, int64_t at) {
  if (dtype == COUPLET_FLOAT32) return __ldg(static_cast<const float*>(rows) + at);
  uint16_t const bits = __ldg(static_cast<const unsigned short*>(rows) + at);
  return dtype == COUPLET_FLOAT16 ? __half2float(__ushort_as_half(bits)) : __bfloat162float(__ushort_as_bfloat16(bits));
}

// Rounded to nearest, ties to even.
__device__ __forceinline__ void store_element(float* to, float value) { *to = value; }
__device__ __forceinline__ void store_element(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void store_element(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

__device__ __forceinline__ void store_element(void* rows, int32_t dtype, int64_t at, float value) {
  if (dtype == COUPLET_FLOAT32)
    store_element(static_cast<float*>(rows) + at, value);
  else if (dtype == COUPLET_FLOAT16)
    store_element(static_cast<__half*>(rows) + at, value);
  else
    store_element(static_cast<__nv_bfloat16*>(rows) + at, value);
}

// Two float16 and the register that holds them.
__device__ __forceinline__ __half2 half2_of(uint32_t bits) {
  __half2 value;
  memcpy(static_cast<void*>(&value), &bits, sizeof bits);
  return value;
}
__device__ __forceinline__ uint32_t bits_of(__half2 value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace couplet::cuda
