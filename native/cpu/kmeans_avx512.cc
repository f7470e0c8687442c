// kmeans for AVX-512: 32 points against 4 centroids at a time. More scores in registers (8, 16) measured slower.
#include "intrinsics.h"

#include "kmeans_body.h"

namespace couplet::cpu {
namespace {

constexpr int lanes = 16;
constexpr int vectors = 2;

using Mask = __mmask16;

struct Floats {
  __m512 v;
  static Floats load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Floats set(float value) { return {_mm512_set1_ps(value)}; }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
};
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats minimum(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Floats select(Mask mask, Floats a, Floats b) { return {_mm512_mask_blend_ps(mask, b.v, a.v)}; }

struct Ints {
  __m512i v;
  static Ints load(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
  static Ints set(int32_t value) { return {_mm512_set1_epi32(value)}; }
  void store(int32_t* to) const { _mm512_storeu_si512(to, v); }
};
inline Ints select(Mask mask, Ints a, Ints b) { return {_mm512_mask_blend_epi32(mask, b.v, a.v)}; }

struct Doubles {
  __m512d low, high;
  static Doubles zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  void add(int, Floats a) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
  }
  void store(double* to) const {
    _mm512_storeu_pd(to, low);
    _mm512_storeu_pd(to + 8, high);
  }
};

}  // namespace
}  // namespace couplet::cpu

#include "kmeans_kernel.h"

namespace couplet::cpu {
extern const KmeansBody kmeans_avx512;
const KmeansBody kmeans_avx512 = {.scan = scan, .spread = spread, .weigh = weigh, .add = add};
}  // namespace couplet::cpu
