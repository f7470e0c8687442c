// CUDA's device language for g++: what gpu.h includes instead of nvcc's built-ins. Included after CUDA's own headers, whose
// host paths give half, bfloat16 and the vector types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "collectives.h"
#include "device_state.h"
#include "phases.h"
#include "runtime.h"
#include "scheduler.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __constant__
#define __constant__ static  // with const and an initializer: there is no copy to a symbol

#define threadIdx (::sim::place->thread)
#define blockIdx (::sim::place->block)
#define blockDim (::sim::block_dim)
#define gridDim (::sim::grid_dim)
inline constexpr int warpSize = 32;

#define SIM_WHERE ::sim::Location where = ::sim::Location::current()

// ---- barriers and warps ------------------------------------------------------------------------------------------------
inline void __syncthreads(SIM_WHERE) { sim::barrier(0, 0, where); }
inline void __syncwarp(unsigned mask = ~0u, SIM_WHERE) { sim::sync_warp(mask, where); }

namespace sim {

template <class T>
T shuffle_value(unsigned mask, T value, int source, Location where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Shuffles stay inside the segment of `width` lanes; a source beyond it means the lane's own value.
inline int segment_begin(int width) { return lane() & ~(width - 1); }
inline int in_segment(int source, int width) {
  return source >= segment_begin(width) && source < segment_begin(width) + width ? source : -1;
}

}  // namespace sim

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIM_WHERE) {
  return sim::shuffle_value(mask, value, sim::segment_begin(width) + (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIM_WHERE) {
  int const source = sim::lane() ^ lane_mask;
  return sim::shuffle_value(mask, value, source < sim::segment_begin(width) + width ? source : -1, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIM_WHERE) {
  return sim::shuffle_value(mask, value, sim::in_segment(sim::lane() + static_cast<int>(delta), width), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIM_WHERE) {
  return sim::shuffle_value(mask, value, sim::in_segment(sim::lane() - static_cast<int>(delta), width), where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIM_WHERE) {
  return sim::reduce(sim::Reduction::ballot, mask, predicate ? 1u << sim::lane() : 0u, where);
}
inline int __any_sync(unsigned mask, int predicate, SIM_WHERE) {
  return static_cast<int>(sim::reduce(sim::Reduction::any, mask, predicate != 0, where));
}
inline int __all_sync(unsigned mask, int predicate, SIM_WHERE) {
  return static_cast<int>(sim::reduce(sim::Reduction::all, mask, predicate != 0, where));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIM_WHERE) {
  return sim::reduce(sim::Reduction::add, mask, value, where);
}
inline int __reduce_add_sync(unsigned mask, int value, SIM_WHERE) {
  return static_cast<int>(sim::reduce(sim::Reduction::add, mask, static_cast<unsigned>(value), where));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, SIM_WHERE) {
  return sim::reduce(sim::Reduction::minimum, mask, value, where);
}
inline int __reduce_min_sync(unsigned mask, int value, SIM_WHERE) {
  return static_cast<int>(sim::reduce(sim::Reduction::minimum_signed, mask, static_cast<unsigned>(value), where));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIM_WHERE) {
  return sim::reduce(sim::Reduction::maximum, mask, value, where);
}
inline int __reduce_max_sync(unsigned mask, int value, SIM_WHERE) {
  return static_cast<int>(sim::reduce(sim::Reduction::maximum_signed, mask, static_cast<unsigned>(value), where));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, SIM_WHERE) {
  return sim::reduce(sim::Reduction::bit_and, mask, value, where);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, SIM_WHERE) {
  return sim::reduce(sim::Reduction::bit_or, mask, value, where);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, SIM_WHERE) {
  return sim::reduce(sim::Reduction::bit_xor, mask, value, where);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIM_WHERE) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return sim::match_any(mask, bits, where);
}

// ---- atomics: integers alone, because the order of float additions would show in the result ---------------------------------
namespace sim {

template <class T>
concept AtomicInteger = std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

template <AtomicInteger T, class Update>
T atomic_update(T* address, Update update) {
  interruption();
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, update(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
  return old;
}

}  // namespace sim

template <sim::AtomicInteger T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return sim::atomic_update(address, [=](T old) { return old + value; });
}
template <sim::AtomicInteger T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return sim::atomic_update(address, [=](T old) { return old < value ? old : value; });
}
template <sim::AtomicInteger T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return sim::atomic_update(address, [=](T old) { return old > value ? old : value; });
}
template <sim::AtomicInteger T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return sim::atomic_update(address, [=](T old) { return old & value; });
}
template <sim::AtomicInteger T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return sim::atomic_update(address, [=](T old) { return old | value; });
}
template <sim::AtomicInteger T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return sim::atomic_update(address, [=](T) { return value; });
}
template <sim::AtomicInteger T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return sim::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}

namespace sim {

// In the kernel's own translation unit, so that sanitizers see the copy and say its line.
inline void land(const AsyncCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.source_bytes);
  std::memset(static_cast<char*>(copy.to) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

}  // namespace sim

// ---- loads with cache hints ----------------------------------------------------------------------------------------------
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldca(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}

// ---- bits ----------------------------------------------------------------------------------------------------------------
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __clzll(long long value) { return std::countl_zero(static_cast<unsigned long long>(value)); }
inline unsigned __brev(unsigned value) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (value >> bit & 1) << (31 - bit);
  return reversed;
}
// CUDA's function is not the instruction: it clears bit 3 of each nibble, by which prmt would repeat a byte's sign.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  uint64_t const bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int index = 0; index < 4; ++index)
    result |= (static_cast<unsigned>(bytes >> (8 * (selector >> (4 * index) & 7))) & 0xff) << (8 * index);
  return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __umulhi(unsigned left, unsigned right) { return static_cast<unsigned>(uint64_t{left} * right >> 32); }
inline int __dp4a(int left, int right, int sum) {
  for (int byte = 0; byte < 4; ++byte)
    sum += static_cast<int8_t>(left >> (8 * byte)) * static_cast<int8_t>(right >> (8 * byte));
  return sum;
}
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }

// ---- arithmetic ------------------------------------------------------------------------------------------------------------
inline int min(int left, int right) { return left < right ? left : right; }
inline unsigned min(unsigned left, unsigned right) { return left < right ? left : right; }
inline long long min(long long left, long long right) { return left < right ? left : right; }
inline float min(float left, float right) { return fminf(left, right); }
inline double min(double left, double right) { return fmin(left, right); }
inline int max(int left, int right) { return left > right ? left : right; }
inline unsigned max(unsigned left, unsigned right) { return left > right ? left : right; }
inline long long max(long long left, long long right) { return left > right ? left : right; }
inline float max(float left, float right) { return fmaxf(left, right); }
inline double max(double left, double right) { return fmax(left, right); }
inline float __fmaf_rn(float left, float right, float sum) { return fmaf(left, right, sum); }
inline double __fma_rn(double left, double right, double sum) { return fma(left, right, sum); }
inline float __fadd_rn(float left, float right) { return left + right; }
inline float __fsub_rn(float left, float right) { return left - right; }
inline float __fmul_rn(float left, float right) { return left * right; }
inline float __fdiv_rn(float left, float right) { return left / right; }
inline float __fsqrt_rn(float value) { return sqrtf(value); }
inline double __dadd_rn(double left, double right) { return left + right; }
inline double __dmul_rn(double left, double right) { return left * right; }
inline float rsqrtf(float value) { return 1 / sqrtf(value); }
inline float __frcp_rn(float value) { return 1 / value; }
inline float __fdividef(float left, float right) { return left / right; }
inline float __saturatef(float value) { return value > 0 ? (value < 1 ? value : 1.0f) : 0.0f; }
inline float __expf(float value) { return expf(value); }
inline float __logf(float value) { return logf(value); }
inline float __log2f(float value) { return log2f(value); }
inline float __sinf(float value) { return sinf(value); }
inline float __cosf(float value) { return cosf(value); }
inline int __float2int_rn(float value) { return static_cast<int>(rintf(value)); }
inline int __float2int_rz(float value) { return static_cast<int>(value); }
inline int __float2int_rd(float value) { return static_cast<int>(floorf(value)); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __uint2float_rn(unsigned value) { return static_cast<float>(value); }
inline float __double2float_rn(double value) { return static_cast<float>(value); }

// CUDA's headers give these to devices alone. One rounding: the product of two 16-bit floats is exact in double.
inline __half __hfma(__half left, __half right, __half sum) {
  return __double2half(double{__half2float(left)} * __half2float(right) + __half2float(sum));
}
inline __half2 __hfma2(__half2 left, __half2 right, __half2 sum) {
  return {__hfma(left.x, right.x, sum.x), __hfma(left.y, right.y, sum.y)};
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 left, __nv_bfloat16 right, __nv_bfloat16 sum) {
  return __double2bfloat16(double{__bfloat162float(left)} * __bfloat162float(right) + __bfloat162float(sum));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 left, __nv_bfloat162 right, __nv_bfloat162 sum) {
  return {__hfma(left.x, right.x, sum.x), __hfma(left.y, right.y, sum.y)};
}
