// Weighted sums of coded values for the few query heads that share them. Included only by the bodies' own files.
//
// Three ways, all over one group of channels and many tokens, so that the group's part of every table stays in L1:
//   mass    adds the probability of each token to mass[code][head] and multiplies by the centroids once, at the end of the task
//   row     looks each centroid up and adds its multiple to registers
//   gather  the same for centroids of two channels, whole vectors of tokens at a time
#pragma once

#include "attend_rows.h"

namespace couplet::cpu::COUPLET_BODY {

constexpr int block_units = 32;  // units whose scores wait for their values: 1024 tokens
constexpr int block_tokens = block_units * 32;

struct ValueBlock {
  const float* centroids;      // of the first group: float32 [centroids][channels]
  int64_t group_stride;        // elements from one group's centroids to the next's
  const uint16_t* places;      // [groups][block_tokens]: rows of mass, or of centroids
  const float* probabilities;  // float32 [tokens][heads]; for gather [heads][tokens][2], each probability twice
  int32_t tokens;              // a multiple of 32
  float* mass;                 // of the group: float32 [centroids][heads]
  float* weighted;             // of the group: float32 [heads][padded]
  int64_t padded;
};

// Vectors of one centroid's channels, or of one token's heads.
template <int count>
struct RowOf;

typedef float Four __attribute__((vector_size(16)));
template <>
struct RowOf<4> {
  using Type = Four;
};
static inline Four fused_row(Four a, Four b, Four c) { return _mm_fmadd_ps(a, b, c); }

typedef float Eight __attribute__((vector_size(32)));
template <>
struct RowOf<8> {
  using Type = Eight;
};
static inline Eight fused_row(Eight a, Eight b, Eight c) { return _mm256_fmadd_ps(a, b, c); }

#if defined(__AVX512F__)
typedef float Sixteen __attribute__((vector_size(64)));
template <>
struct RowOf<16> {
  using Type = Sixteen;
};
static inline Sixteen fused_row(Sixteen a, Sixteen b, Sixteen c) { return _mm512_fmadd_ps(a, b, c); }
#endif

template <class Row>
static inline Row load_row(const float* from) {
  typedef Row RowAnywhere __attribute__((aligned(4), may_alias));
  return *reinterpret_cast<const RowAnywhere*>(from);
}
template <class Row>
static inline void store_row(float* to, Row value) {
  typedef Row RowAnywhere __attribute__((aligned(4), may_alias));
  *reinterpret_cast<RowAnywhere*>(to) = value;
}

using ValueFunction = void (*)(const ValueBlock& values);

// (Everything read in these loops is copied from the block first: for all the compiler knows, a store might change the block.)
template <int heads>
static void add_mass(const ValueBlock& values) {
  using Row = typename RowOf<heads>::Type;
  const uint16_t* places = values.places;
  const float* probabilities = values.probabilities;
  float* const mass = values.mass;
  for (const uint16_t* const end = places + values.tokens; places < end; places += 4, probabilities += 4 * heads) {
    uint64_t four;
    memcpy(&four, places, sizeof four);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, four >>= 16) {
      float* const to = const_cast<float*>(row_at(mass, four));
      store_row<Row>(to, load_row<Row>(to) + load_row<Row>(probabilities + i * heads));
    }
  }
}

// weighted += mass^T . centroids, for all centroids of a group. Lanes are heads.
template <int channels, int heads>
static void spend_mass(const ValueBlock& values, int32_t centroids) {
  using Row = typename RowOf<heads>::Type;
  Row sums[channels] = {};
  for (int32_t code = 0; code < centroids; ++code) {
    Row const mass = load_row<Row>(values.mass + int64_t{code} * heads);
    const float* const centroid = values.centroids + int64_t{code} * channels;
#pragma GCC unroll 16
    for (int c = 0; c < channels; ++c) sums[c] = fused_row(mass, centroid[c] - Row{}, sums[c]);
  }
  for (int c = 0; c < channels; ++c)
    for (int head = 0; head < heads; ++head) values.weighted[head * values.padded + c] += sums[c][head];
}

template <int channels, int heads, int groups>
static void add_rows(const ValueBlock& values) {
  using Row = typename RowOf<channels>::Type;
  Row sums[groups][heads] = {};
  const uint16_t* places = values.places;
  const float* probabilities = values.probabilities;
  const float* const centroids = values.centroids;
  int64_t const group_stride = values.group_stride;
  for (const uint16_t* const end = places + values.tokens; places < end; places += 4, probabilities += 4 * heads) {
    uint64_t four[groups];
    for (int group = 0; group < groups; ++group)
      memcpy(&four[group], places + group * block_tokens, sizeof four[group]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
      for (int group = 0; group < groups; ++group) {
        Row const row = load_row<Row>(row_at(centroids + group * group_stride, four[group]));
        four[group] >>= 16;
#pragma GCC unroll 8
        for (int head = 0; head < heads; ++head)
          sums[group][head] = fused_row(row, probabilities[i * heads + head] - Row{}, sums[group][head]);
      }
    }
  }
  for (int group = 0; group < groups; ++group)
    for (int head = 0; head < heads; ++head) {
      float* const to = values.weighted + head * values.padded + group * channels;
      store_row<Row>(to, load_row<Row>(to) + sums[group][head]);
    }
}

template <int heads>
static void add_gathered(const ValueBlock& values) {
  constexpr int tokens = width / 2;
  Floats sums[heads] = {};
  RowReader<2> reader(values.places);
  for (int32_t token = 0; token < values.tokens; token += tokens) {
    Floats const rows = reader.read(values.centroids, token / tokens);
#pragma GCC unroll 8
    for (int head = 0; head < heads; ++head)
      sums[head] = fused(rows, load(values.probabilities + 2 * (head * block_tokens + token)), sums[head]);
  }
  for (int head = 0; head < heads; ++head) {
    float x = 0, y = 0;
    for (int lane = 0; lane < width; lane += 2) x += sums[head][lane], y += sums[head][lane + 1];
    values.weighted[head * values.padded] += x;
    values.weighted[head * values.padded + 1] += y;
  }
}

// Groups that one call of a row function covers when there are as many: their chains of additions run side by side.
static inline int32_t groups_at_once(int32_t channels, int32_t heads) { return channels == 2 || heads > 2 ? 1 : 4; }

template <int channels>
static inline ValueFunction row_function(int32_t heads, int32_t groups) {
  if (heads == 8) return add_rows<channels, 8, 1>;
  if (heads == 4) return add_rows<channels, 4, 1>;
  if (heads == 2) return groups == 4 ? add_rows<channels, 2, 4> : add_rows<channels, 2, 1>;
  return groups == 4 ? add_rows<channels, 1, 4> : add_rows<channels, 1, 1>;
}

static inline ValueFunction gather_function(int32_t heads) {
  if (heads == 8) return add_gathered<8>;
  if (heads == 4) return add_gathered<4>;
  if (heads == 2) return add_gathered<2>;
  return add_gathered<1>;
}

// NULL when no kernel looks up rows of so many channels.
static inline ValueFunction find_value_function(int32_t channels, int32_t heads, int32_t groups) {
  switch (channels) {
    case 2: return gather_function(heads);
    case 4: return row_function<4>(heads, groups);
    case 8: return row_function<8>(heads, groups);
#if defined(__AVX512F__)
    case 16: return row_function<16>(heads, groups);
#endif
    default: return nullptr;
  }
}

}  // namespace couplet::cpu::COUPLET_BODY
