// Scores of a unit of coded keys for the few query heads that share them. Included only by the bodies' own files.
#pragma once

#include "attend_rotate.h"
#include "attend_rows.h"

namespace couplet::cpu::COUPLET_BODY {

constexpr int unit = 32;  // tokens that share one rotation of the queries; pages are whole units

// How rotary embedding falls on the groups of a head: group g < pairs turns with group g + pairs (half-split); then `turned`
// groups turn within themselves (interleaved); the rest pass through.
struct GroupRotation {
  int32_t pairs;
  int32_t turned;
  int32_t plain;
};

struct KeyUnit {
  const float* centroids;  // of the kv head: float32 [groups][centroids][channels]
  int64_t group_stride;    // elements
  const uint16_t* places;  // [groups][unit]
  const float* queries;    // float32 [groups][query_block(channels, heads)], turned towards this unit
  const float* cos;        // float32 [pairs + turned groups][unit][channels]
  const float* sin;        // likewise; of a turned group -sin and +sin alternate
  GroupRotation rotation;
  float* scores;  // out, float32 [unit][heads]
  struct Fetch {
    const uint8_t* from;
    int64_t bytes;
  } fetch[2];  // memory that is needed soon
};

// Floats from the queries of one group, [heads][channels], to those of the next: whole vectors, the rest of which is not read.
constexpr int query_block(int channels, int heads) { return (heads * channels + width - 1) / width * width; }

// Turns queries, [groups][query_block], by a row of angles.
template <int channels>
static void turn_queries(const GroupRotation& rotation, int32_t heads, const float* row, const float* queries,
                         float* out) {
  int64_t const block = query_block(channels, heads);
  int64_t const across = rotation.pairs * block;
  for (int32_t group = 0; group < rotation.pairs; ++group) {
    Floats const c = repeated<channels>(row + group * channels);
    Floats const s = repeated<channels>(row + rotary_max_stride + group * channels);
    for (int64_t i = group * block; i < (group + 1) * block; i += width) {
      Floats const x = load(queries + i), y = load(queries + i + across);
      store(out + i, fused_negative(y, s, x * c));
      store(out + i + across, fused(x, s, y * c));
    }
  }
  for (int32_t group = 0; group < rotation.turned; ++group) {
    Floats const c = repeated<channels>(row + group * channels);
    Floats const s = repeated<channels>(row + rotary_max_stride + group * channels);
    for (int64_t i = group * block; i < (group + 1) * block; i += width) {
      Floats const x = load(queries + i);
      store(out + i, fused(swapped<1>(x, AllLanes{}), s, x * c));
    }
  }
}

// Brings rows of angles of `tokens` keys into the order of the kernel's vectors: cos and sin [groups][unit][channels].
template <int channels>
static void arrange_angles(const GroupRotation& rotation, const AngleRows& rows, int32_t tokens, float* cos,
                           float* sin) {
  for (int32_t group = 0; group < rotation.pairs + rotation.turned; ++group)
    for (int32_t token = 0; token < tokens; ++token) {
      int64_t const to = (int64_t{group} * unit + token) * channels, from = token * rows.stride + group * channels;
      memcpy(cos + to, rows.cos + from, channels * sizeof(float));
      memcpy(sin + to, rows.sin + from, channels * sizeof(float));
    }
}

// Lanes are (token, channel). All heads share a centroid that was looked up and rotated once; their sums stay in registers
// over the whole row of channels, and are added up across channels once for the block.
template <int channels, int heads>
class KeyKernel {
  static constexpr int tokens = width / channels;  // of one vector
  static constexpr int sums_held = width == 16 ? 16 : 8;
  static constexpr int vectors = sums_held / heads < unit / tokens ? sums_held / heads : unit / tokens;
  static constexpr int block = vectors * tokens;

 public:
  static void run(const KeyUnit& keys) {
    for (int token = 0; token < unit; token += block) {
      for (const KeyUnit::Fetch& fetch : keys.fetch) {
        int64_t const end = fetch.bytes * (token + block) / unit;
        for (int64_t at = fetch.bytes * token / unit / 64 * 64; at < end; at += 64) __builtin_prefetch(fetch.from + at);
      }
      run_block(keys, token);
    }
  }

 private:
  // Vectors rotated before they meet the queries: for many heads all of the block, so that a query is loaded once for them;
  // for few heads one, since the queries themselves stay in registers.
  static constexpr int together = heads == 8 ? vectors : 1;

  static inline void add(Floats (&sums)[vectors][heads], int first, const Floats (&rows)[together],
                         const float* queries) {
#pragma GCC unroll 8
    for (int head = 0; head < heads; ++head) {
      Floats const query = repeated<channels>(queries + head * channels);
#pragma GCC unroll 16
      for (int i = 0; i < together; ++i) sums[first + i][head] = fused(rows[i], query, sums[first + i][head]);
    }
  }

  static inline void run_block(const KeyUnit& keys, int token) {
    constexpr int query_stride = query_block(channels, heads);
    Floats sums[vectors][heads] = {};
    int64_t const group_stride = keys.group_stride;
    int64_t const across = keys.rotation.pairs;
    const uint16_t *places = keys.places + token, *high_places = places + across * unit;
    const float *centroids = keys.centroids, *high_centroids = centroids + across * group_stride;
    const float *queries = keys.queries, *high_queries = queries + across * query_stride;
    const float *cos = keys.cos + token * channels, *sin = keys.sin + token * channels;

#pragma GCC unroll 1
    for (int32_t group = keys.rotation.pairs; group > 0; --group) {
      RowReader<channels> low_rows(places), high_rows(high_places);
#pragma GCC unroll 16
      for (int first = 0; first < vectors; first += together) {
        Floats low[together], high[together];
#pragma GCC unroll 16
        for (int i = 0; i < together; ++i) {
          int const v = first + i;
          Floats const x = low_rows.read(centroids, v), y = high_rows.read(high_centroids, v);
          Floats const c = load(cos + v * width), s = load(sin + v * width);
          low[i] = fused_negative(y, s, x * c);
          high[i] = fused(x, s, y * c);
        }
        add(sums, first, low, queries);
        add(sums, first, high, high_queries);
      }
      places += unit, centroids += group_stride, queries += query_stride;
      high_places += unit, high_centroids += group_stride, high_queries += query_stride;
      cos += unit * channels, sin += unit * channels;
    }
    places = high_places, centroids = high_centroids, queries = high_queries;

#pragma GCC unroll 1
    for (int32_t group = keys.rotation.turned; group > 0; --group) {
      RowReader<channels> rows(places);
#pragma GCC unroll 16
      for (int first = 0; first < vectors; first += together) {
        Floats turned[together];
#pragma GCC unroll 16
        for (int i = 0; i < together; ++i) {
          int const v = first + i;
          Floats const x = rows.read(centroids, v);
          turned[i] = fused(swapped<1>(x, AllLanes{}), load(sin + v * width), x * load(cos + v * width));
        }
        add(sums, first, turned, queries);
      }
      places += unit, centroids += group_stride, queries += query_stride;
      cos += unit * channels, sin += unit * channels;
    }

#pragma GCC unroll 1
    for (int32_t group = keys.rotation.plain; group > 0; --group) {
      RowReader<channels> rows(places);
#pragma GCC unroll 16
      for (int first = 0; first < vectors; first += together) {
        Floats plain[together];
#pragma GCC unroll 16
        for (int i = 0; i < together; ++i) plain[i] = rows.read(centroids, first + i);
        add(sums, first, plain, queries);
      }
      places += unit, centroids += group_stride, queries += query_stride;
    }
    store_scores<channels, heads, vectors>(sums, keys.scores + token * heads);
  }
};

struct KeyFunctions {
  void (*score)(const KeyUnit& keys);
  void (*turn)(const GroupRotation& rotation, int32_t heads, const float* row, const float* queries, float* out);
  void (*arrange)(const GroupRotation& rotation, const AngleRows& rows, int32_t tokens, float* cos, float* sin);
};

template <int channels>
static inline KeyFunctions key_functions(int32_t heads) {
  if (heads == 8) return {KeyKernel<channels, 8>::run, turn_queries<channels>, arrange_angles<channels>};
  if (heads == 4) return {KeyKernel<channels, 4>::run, turn_queries<channels>, arrange_angles<channels>};
  if (heads == 2) return {KeyKernel<channels, 2>::run, turn_queries<channels>, arrange_angles<channels>};
  return {KeyKernel<channels, 1>::run, turn_queries<channels>, arrange_angles<channels>};
}

// NULL when no kernel looks up rows of so many channels.
static inline KeyFunctions find_key_functions(int32_t channels, int32_t heads) {
  switch (channels) {
    case 2: return key_functions<2>(heads);
    case 4: return key_functions<4>(heads);
    case 8: return key_functions<8>(heads);
#if defined(__AVX512F__)
    case 16: return key_functions<16>(heads);
#endif
    default: return {};
  }
}

}  // namespace couplet::cpu::COUPLET_BODY
