// Vectors whose lanes are (token, channel): `width / channels` tokens side by side, each with the `channels` floats of one
// centroid. Included only by the bodies' own files, like attend_lanes.h.
#pragma once

#include "attend_lanes.h"
#include "unpack.h"

namespace couplet::cpu::COUPLET_BODY {

// Lanes whose index has bit `distance`: all ones.
template <int distance, int... lane>
static inline Ints odd_lanes(Lanes<lane...>) {
  return Ints{((lane & distance) ? -1 : 0)...};
}

// One step of summing two vectors across lanes: of each pair of lanes `distance` apart, the low one of the result holds the sum
// of a's pair and the high one that of b's. One blend, one shuffle, one addition.
template <int distance, int... lane>
static inline Floats fold(Floats a, Floats b, Lanes<lane...>) {
  Floats const own = odd_lanes<distance>(AllLanes{}) ? b : a;
  Floats const other =
      __builtin_shufflevector(a, b, ((lane & distance) ? width + (lane ^ distance) : (lane ^ distance))...);
  return own + other;
}

// Sums each of channels vectors over its channels: lane (token, i) of the result is the sum of v[i] over the channels of token.
template <int channels>
static inline Floats sum_channels(const Floats* v) {
  if constexpr (channels == 1) {
    return v[0];
  } else {
    Floats halves[channels / 2];
    for (int i = 0; i < channels / 2; ++i) halves[i] = fold<channels / 2>(v[i], v[i + channels / 2], AllLanes{});
    return sum_channels<channels / 2>(halves);
  }
}

// Blocks of `block` lanes of a and b alternate: low is a0 b0 a1 b1 ... from the lower half of each, high from the upper.
template <int block, int half, int... lane>
static inline Floats alternate(Floats a, Floats b, Lanes<lane...>) {
  return __builtin_shufflevector(
      a, b,
      (lane % block + (lane / (2 * block) + half * (width / block / 2)) * block + (lane / block % 2 ? width : 0))...);
}

// Lane (token, i) with i = vector * heads + head  ->  lane (vector * tokens + token) * heads + head.
template <int channels, int heads, int... lane>
static inline Floats in_token_order(Floats v, Lanes<lane...>) {
  constexpr int tokens = width / channels;
  return __builtin_shufflevector(v, v,
                                 (lane / heads % tokens * channels + lane / heads / tokens * heads + lane % heads)...);
}

// scores[token][head] from sums[vector][head], whose lanes are (token, channel); vectors * heads is a multiple of channels.
template <int channels, int heads, int vectors>
static inline void store_scores(const Floats (&sums)[vectors][heads], float* scores) {
  constexpr int tokens = width / channels;
  if constexpr (heads <= channels) {
    constexpr int together = channels / heads;  // vectors that fill one vector of scores
    static_assert(vectors % together == 0);
    for (int v = 0; v < vectors; v += together) {
      Floats const summed = sum_channels<channels>(&sums[v][0]);
      store(scores + v * tokens * heads, in_token_order<channels, heads>(summed, AllLanes{}));
    }
  } else {
    constexpr int parts = heads / channels;  // vectors of `channels` heads each, whose blocks are to alternate
    for (int v = 0; v < vectors; ++v) {
      Floats part[parts];
      for (int p = 0; p < parts; ++p) part[p] = sum_channels<channels>(&sums[v][p * channels]);
      float* const to = scores + v * tokens * heads;
      if constexpr (parts == 2) {
        store(to, alternate<channels, 0>(part[0], part[1], AllLanes{}));
        store(to + width, alternate<channels, 1>(part[0], part[1], AllLanes{}));
      } else {
        static_assert(parts == 4);
        Floats const even[2] = {alternate<channels, 0>(part[0], part[2], AllLanes{}),
                                alternate<channels, 1>(part[0], part[2], AllLanes{})};
        Floats const odd[2] = {alternate<channels, 0>(part[1], part[3], AllLanes{}),
                               alternate<channels, 1>(part[1], part[3], AllLanes{})};
        for (int half = 0; half < 2; ++half) {
          store(to + 2 * half * width, alternate<channels, 0>(even[half], odd[half], AllLanes{}));
          store(to + (2 * half + 1) * width, alternate<channels, 1>(even[half], odd[half], AllLanes{}));
        }
      }
    }
  }
}

// `channels` floats, once for every token of a vector.
template <int channels>
static inline Floats repeated(const float* from) {
  if constexpr (channels == width) return load(from);
#if defined(__AVX512F__)
  if constexpr (channels == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(from));
  if constexpr (channels == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
  if constexpr (channels == 2) return _mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const double*>(from)));
#else
  if constexpr (channels == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from));
  if constexpr (channels == 2) return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(from)));
#endif
}

// Codes are unpacked to *places*: uint16 distances from a table's first row in units of 8 bytes, which addresses scale by
// themselves. They are fetched by words of several, since loads are what lookups run out of first.
static inline const float* row_at(const float* table, uint64_t place) {
  return reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(table) + (place & 0xffff) * 8);
}

// log2 of the places from one row of `floats` floats (2, 4, 8 or 16) to the next.
constexpr int place_shift(int32_t floats) { return floats == 16 ? 3 : floats == 8 ? 2 : floats == 4 ? 1 : 0; }

// Looks up the centroids of a row of places, one vector of `width / channels` tokens after the other.
template <int channels>
class RowReader {
  static constexpr int tokens = width / channels;
  static constexpr int vectors_of_word = tokens < 4 ? 4 / tokens : 1;

 public:
  explicit RowReader(const uint16_t* places) : places_(places) {}

  // Vector v of the row; v counts up from 0. Four places are read at once, so a row is followed by 3 readable ones.
  inline Floats read(const float* centroids, int v) {
    if constexpr (channels == 2) {
      return gather(centroids, places_ + v * tokens);
    } else {
      if (v % vectors_of_word == 0) memcpy(&word_, places_ + v * tokens, sizeof word_);
      Floats const rows = pick(centroids, word_);
      word_ >>= 16 * tokens % 64;
      return rows;
    }
  }

 private:
#if defined(__AVX512F__)
  static inline Floats gather(const float* centroids, const uint16_t* places) {
    __m256i const index = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places)));
    return _mm512_castpd_ps(_mm512_i32gather_pd(index, centroids, 8));
  }
  static inline Floats pick(const float* centroids, uint64_t word) {
    auto const row = [&](int i) { return row_at(centroids, word >> 16 * i); };
    if constexpr (channels == 16) return _mm512_load_ps(row(0));
    if constexpr (channels == 8)
      return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps(row(0))), _mm256_load_ps(row(1)), 1);
    __m512 rows = _mm512_castps128_ps512(_mm_load_ps(row(0)));
    rows = _mm512_insertf32x4(rows, _mm_load_ps(row(1)), 1);
    rows = _mm512_insertf32x4(rows, _mm_load_ps(row(2)), 2);
    return _mm512_insertf32x4(rows, _mm_load_ps(row(3)), 3);
  }
#else
  static inline Floats gather(const float* centroids, const uint16_t* places) {
    __m128i const index = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(places)));
    return _mm256_castpd_ps(_mm256_i32gather_pd(reinterpret_cast<const double*>(centroids), index, 8));
  }
  static inline Floats pick(const float* centroids, uint64_t word) {
    auto const row = [&](int i) { return row_at(centroids, word >> 16 * i); };
    if constexpr (channels == 8) return _mm256_load_ps(row(0));
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_load_ps(row(0))), _mm_load_ps(row(1)), 1);
  }
#endif

  const uint16_t* places_;
  uint64_t word_ = 0;
};

// Places of the 32 codes that start at slot `first` (a multiple of 32) of each of `rows` packed rows.
static inline void unpack_unit(const uint8_t* row, int64_t row_bytes, int32_t rows, int32_t bits, int32_t first,
                               int shift, uint16_t* places) {
#if defined(__AVX512BW__)
  __m128i const scale = _mm_cvtsi32_si128(shift);
  row += static_cast<int64_t>(first) * bits / 8;
  if (bits == 8) {
    for (int32_t i = 0; i < rows; ++i, row += row_bytes, places += 32) {
      __m256i const codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
      _mm512_storeu_si512(places, _mm512_sll_epi16(_mm512_cvtepu8_epi16(codes), scale));
    }
    return;
  }
  // Code i starts `offset` bits into 16-bit word i * bits / 16 and may run into the next one.
  alignas(64) static constexpr uint16_t count[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                     16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  __m512i const bit = _mm512_mullo_epi16(_mm512_load_si512(count), _mm512_set1_epi16(static_cast<short>(bits)));
  __m512i const word = _mm512_srli_epi16(bit, 4), next_word = _mm512_add_epi16(word, _mm512_set1_epi16(1));
  __m512i const offset = _mm512_and_si512(bit, _mm512_set1_epi16(15));
  __m512i const left = _mm512_sub_epi16(_mm512_set1_epi16(16), offset);
  __m512i const mask = _mm512_set1_epi16(static_cast<short>((1 << bits) - 1));
  for (int32_t i = 0; i < rows; ++i, row += row_bytes, places += 32) {
    __m512i const words = _mm512_maskz_loadu_epi8((uint64_t{1} << 4 * bits) - 1, row);
    __m512i const low = _mm512_srlv_epi16(_mm512_permutexvar_epi16(word, words), offset);
    __m512i const high = _mm512_sllv_epi16(_mm512_permutexvar_epi16(next_word, words), left);
    _mm512_storeu_si512(places, _mm512_sll_epi16(_mm512_and_si512(_mm512_or_si512(low, high), mask), scale));
  }
#else
  for (int32_t i = 0; i < rows; ++i, row += row_bytes, places += 32) {
    unpack_codes(row, bits, first, 32, places);
    for (int k = 0; k < 32; ++k) places[k] = static_cast<uint16_t>(places[k] << shift);
  }
#endif
}

}  // namespace couplet::cpu::COUPLET_BODY
