// kmeans for AVX2 and FMA: 16 points against 4 centroids at a time, 8 of the 16 registers hold scores.
#include "intrinsics.h"

#include "kmeans_body.h"

namespace couplet::cpu {
namespace {

constexpr int lanes = 8;
constexpr int vectors = 2;

struct Mask {
  __m256 v;
};

struct Floats {
  __m256 v;
  static Floats load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static Floats set(float value) { return {_mm256_set1_ps(value)}; }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
};
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats minimum(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Mask less(Floats a, Floats b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Floats select(Mask mask, Floats a, Floats b) { return {_mm256_blendv_ps(b.v, a.v, mask.v)}; }

struct Ints {
  __m256i v;
  static Ints load(const int32_t* from) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))}; }
  static Ints set(int32_t value) { return {_mm256_set1_epi32(value)}; }
  void store(int32_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
};
inline Ints select(Mask mask, Ints a, Ints b) { return {_mm256_blendv_epi8(b.v, a.v, _mm256_castps_si256(mask.v))}; }

struct Doubles {
  __m256d quarter[4];
  static Doubles zero() {
    __m256d const zero = _mm256_setzero_pd();
    return {{zero, zero, zero, zero}};
  }
  void add(int first, Floats a) {
    __m256d* const sums = quarter + first / 4;
    sums[0] = _mm256_add_pd(sums[0], _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)));
    sums[1] = _mm256_add_pd(sums[1], _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
  }
  void store(double* to) const {
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(to + 4 * i, quarter[i]);
  }
};

}  // namespace
}  // namespace couplet::cpu

#include "kmeans_kernel.h"

namespace couplet::cpu {
extern const KmeansBody kmeans_avx2;
const KmeansBody kmeans_avx2 = {.scan = scan, .spread = spread, .weigh = weigh, .add = add};
}  // namespace couplet::cpu
