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
  const float* queries;    // float32 [heads][padded], rotated for this unit
  int64_t padded;
  const float* cos;  // float32 [pairs + turned groups][unit][channels]
  const float* sin;  // likewise; of a turned group -sin and +sin alternate
  GroupRotation rotation;
  float* scores;  // out, float32 [unit][heads]
  struct Fetch {
    const uint8_t* from;
    int64_t bytes;
  } fetch[2];  // memory that is needed soon
};

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
                         const float* queries, int64_t padded) {
#pragma GCC unroll 8
    for (int head = 0; head < heads; ++head) {
      Floats const query = repeated<channels>(queries + head * padded);
#pragma GCC unroll 16
      for (int i = 0; i < together; ++i) sums[first + i][head] = fused(rows[i], query, sums[first + i][head]);
    }
  }

  static inline void run_block(const KeyUnit& keys, int token) {
    Floats sums[vectors][heads] = {};
    const uint16_t* places = keys.places + token;
    const float* centroids = keys.centroids;
    const float* queries = keys.queries;
    const float* cos = keys.cos + token * channels;
    const float* sin = keys.sin + token * channels;

    int64_t const across = keys.rotation.pairs;
    int64_t const table_across = across * keys.group_stride;
#pragma GCC unroll 1
    for (int32_t group = 0; group < keys.rotation.pairs; ++group) {
      RowReader<channels> low_rows(places), high_rows(places + across * unit);
#pragma GCC unroll 16
      for (int first = 0; first < vectors; first += together) {
        Floats low[together], high[together];
#pragma GCC unroll 16
        for (int i = 0; i < together; ++i) {
          int const v = first + i;
          Floats const x = low_rows.read(centroids, v), y = high_rows.read(centroids + table_across, v);
          Floats const c = load(cos + v * width), s = load(sin + v * width);
          low[i] = fused_negative(y, s, x * c);
          high[i] = fused(x, s, y * c);
        }
        add(sums, first, low, queries, keys.padded);
        add(sums, first, high, queries + across * channels, keys.padded);
      }
      places += unit, centroids += keys.group_stride, queries += channels, cos += unit * channels,
          sin += unit * channels;
    }
    places += across * unit, centroids += table_across, queries += across * channels;

#pragma GCC unroll 1
    for (int32_t group = 0; group < keys.rotation.turned; ++group) {
      RowReader<channels> rows(places);
#pragma GCC unroll 16
      for (int first = 0; first < vectors; first += together) {
        Floats turned[together];
#pragma GCC unroll 16
        for (int i = 0; i < together; ++i) {
          int const v = first + i;
          Floats const x = rows.read(centroids, v);
          turned[i] = fused(neighbours(x, AllLanes{}), load(sin + v * width), x * load(cos + v * width));
        }
        add(sums, first, turned, queries, keys.padded);
      }
      places += unit, centroids += keys.group_stride, queries += channels, cos += unit * channels,
          sin += unit * channels;
    }

#pragma GCC unroll 1
    for (int32_t group = 0; group < keys.rotation.plain; ++group) {
      RowReader<channels> rows(places);
#pragma GCC unroll 16
      for (int first = 0; first < vectors; first += together) {
        Floats plain[together];
#pragma GCC unroll 16
        for (int i = 0; i < together; ++i) plain[i] = rows.read(centroids, first + i);
        add(sums, first, plain, queries, keys.padded);
      }
      places += unit, centroids += keys.group_stride, queries += channels;
    }
    store_scores<channels, heads, vectors>(sums, keys.scores + token * heads);
  }
};

using KeyFunction = void (*)(const KeyUnit& keys);

template <int channels>
static inline KeyFunction key_function(int32_t heads) {
  if (heads == 8) return KeyKernel<channels, 8>::run;
  if (heads == 4) return KeyKernel<channels, 4>::run;
  if (heads == 2) return KeyKernel<channels, 2>::run;
  return KeyKernel<channels, 1>::run;
}

// NULL when no kernel looks up rows of so many channels.
static inline KeyFunction find_key_function(int32_t channels, int32_t heads) {
  switch (channels) {
    case 2: return key_function<2>(heads);
    case 4: return key_function<4>(heads);
    case 8: return key_function<8>(heads);
#if defined(__AVX512F__)
    case 16: return key_function<16>(heads);
#endif
    default: return nullptr;
  }
}

}  // namespace couplet::cpu::COUPLET_BODY
