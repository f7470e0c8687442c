// The search for the nearest centroid: bodies by instruction set, which all give the same codes.
//
// The distance is the sum over channels, in ascending order, of fma(d, d, sum) in float32 with d = x - centroid; the smallest
// wins, the lowest index among equals. That decides unless the smallest sum is an infinity (it overflowed: values beyond
// about 1e19) or below smallest_trusted (squares were lost to underflow, or the point is a centroid); then the same sums in
// double, without fma, decide. Every body takes exactly these steps for every pair of point and centroid, and only the
// order of the pairs differs, so the codes do not depend on the body, the number of threads or the number of tokens.
#pragma once

#include "../abi/layout.h"

namespace couplet::cpu {

constexpr int32_t tile_floats = 8192;  // 32 KB on the stack of a thread: a quarter of the smallest default (musl)

// Most tokens of one search: 64, or 32 where groups have more than 128 channels. A multiple of every body's lanes.
static constexpr int32_t tile_tokens(int32_t channels) { return channels <= tile_floats / 64 ? 64 : 32; }

// Squares below the least normal float lose up to 2^-150 each; 256 of them are 2^-52 of this.
constexpr float smallest_trusted = 0x1p-90f;

// Tokens of one group: channel c of token t is rows[t * token_stride + c].
struct NearestGroup {
  const void* rows;      // float32, or float16 when half is set; finite
  int64_t token_stride;  // elements
  const float* table;    // float32 [centroids][channels]
  const float* columns;  // float32 [channels][centroids], or NULL; 64-byte aligned, centroids a multiple of 16
  int32_t tokens;        // 1 to tile_tokens(channels)
  int32_t channels;
  int32_t centroids;
  bool half;
};

struct NearestBody {
  const char* name;
  int32_t lanes;
  bool (*finite)(const void* row, int32_t channels, bool half);
  void (*across_tokens)(const NearestGroup& group, uint16_t* codes);     // codes: room for 64
  void (*across_centroids)(const NearestGroup& group, uint16_t* codes);  // only with columns
};

extern const NearestBody nearest_portable;
#if defined(__x86_64__)
extern const NearestBody nearest_avx2;
extern const NearestBody nearest_avx512;
#endif

// The search in double, for a point whose float32 search ended with an infinite or tiny sum at centroid `found`.
// point: channel c at point[c * stride].
uint16_t nearest_in_double(const float* point, int64_t stride, const float* table, int32_t channels, int32_t centroids,
                           uint16_t found);

}  // namespace couplet::cpu
