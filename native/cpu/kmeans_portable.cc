// kmeans for any processor, on GCC's vector types. Where there is no fused multiply-add, one is made from double
// arithmetic with the very same result (about 20 operations; such x86 processors predate 2013).
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kmeans_body.h"

namespace couplet::cpu {
namespace {

constexpr int lanes = 4;
constexpr int vectors = 4;

using Floats4 = float __attribute__((vector_size(16)));
using Doubles4 = double __attribute__((vector_size(32)));
using Ints4 = int32_t __attribute__((vector_size(16)));
using Mask = Ints4;

#if defined(__aarch64__)
inline Floats4 fused(Floats4 a, Floats4 b, Floats4 c) { return vfmaq_f32(c, a, b); }
#elif defined(__FP_FAST_FMAF)
inline Floats4 fused(Floats4 a, Floats4 b, Floats4 c) {
  for (int i = 0; i < 4; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
#else
// The product of two floats is exact in double. Their sum with c is rounded to odd: when it is inexact its last bit is set,
// so that the final rounding to float sees on which side of a tie the true sum lies (Boldo and Melquiond, 2008).
inline Floats4 fused(Floats4 a, Floats4 b, Floats4 c) {
  using Bits4 = int64_t __attribute__((vector_size(32)));
  Doubles4 const product = __builtin_convertvector(a, Doubles4) * __builtin_convertvector(b, Doubles4);
  Doubles4 const addend = __builtin_convertvector(c, Doubles4);
  Doubles4 const sum = product + addend;
  Doubles4 const part = sum - product;
  Doubles4 const error = (product - (sum - part)) + (addend - part);
  Bits4 const bits = reinterpret_cast<Bits4>(sum);
  Bits4 const inexact = (error > 0) | (error < 0);
  Bits4 const outward = (error > 0) == (sum > 0);  // -1 where the true sum is farther from zero
  Bits4 const even = (bits & 1) - 1;
  Bits4 const odd = bits + ((-2 * outward - 1) & inexact & even);
  return __builtin_convertvector(reinterpret_cast<Doubles4>(odd), Floats4);
}
#endif

struct Floats {
  Floats4 v;
  static Floats load(const float* from) {
    Floats4 v;
    __builtin_memcpy(&v, from, sizeof v);
    return {v};
  }
  static Floats set(float value) { return {Floats4{value, value, value, value}}; }
  void store(float* to) const { __builtin_memcpy(to, &v, sizeof v); }
};
inline Floats operator+(Floats a, Floats b) { return {a.v + b.v}; }
inline Floats operator-(Floats a, Floats b) { return {a.v - b.v}; }
inline Floats operator*(Floats a, Floats b) { return {a.v * b.v}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {fused(a.v, b.v, c.v)}; }
inline Floats minimum(Floats a, Floats b) { return {a.v < b.v ? a.v : b.v}; }
inline Mask less(Floats a, Floats b) { return a.v < b.v; }
inline Floats select(Mask mask, Floats a, Floats b) { return {mask ? a.v : b.v}; }

struct Ints {
  Ints4 v;
  static Ints load(const int32_t* from) {
    Ints4 v;
    __builtin_memcpy(&v, from, sizeof v);
    return {v};
  }
  static Ints set(int32_t value) { return {Ints4{value, value, value, value}}; }
  void store(int32_t* to) const { __builtin_memcpy(to, &v, sizeof v); }
};
inline Ints select(Mask mask, Ints a, Ints b) { return {mask ? a.v : b.v}; }

struct Doubles {
  double sums[kmeans_lanes];
  static Doubles zero() { return {}; }
  void add(int first, Floats a) {
    for (int i = 0; i < lanes; ++i) sums[first + i] += static_cast<double>(a.v[i]);
  }
  void store(double* to) const { __builtin_memcpy(to, sums, sizeof sums); }
};

}  // namespace
}  // namespace couplet::cpu

#include "kmeans_kernel.h"

namespace couplet::cpu {
extern const KmeansBody kmeans_portable;
const KmeansBody kmeans_portable = {.scan = scan, .spread = spread, .weigh = weigh, .add = add};
}  // namespace couplet::cpu
