// The body of decode.h. Included by files that define COUPLET_ISA; everything here has internal linkage.
//
// Token by token, so that rows are written from front to back: a page of rows group by group would write 64 lines that, at
// the usual strides, all fall into one set of the L1 cache. Lookups come from L2 instead, and do not wait for each other.
#pragma once

#include "decode.h"
#include "half.h"

#if defined(__AVX2__)
#include "intrinsics.h"
#endif

namespace couplet::cpu::COUPLET_ISA {
namespace {

inline void narrow_row(const float* row, uint16_t* to, int32_t count) {
  int32_t c = 0;
#if defined(__AVX512F__)
  for (; c + 16 <= count; c += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c),
                        _mm512_cvtps_ph(_mm512_loadu_ps(row + c), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__AVX2__)
  for (; c + 8 <= count; c += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c),
                     _mm256_cvtps_ph(_mm256_loadu_ps(row + c), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; c < count; ++c) to[c] = float_to_half(row[c]);
}

// fixed_channels: the number of channels, or 0 when it is only known at run time.
template <int fixed_channels>
inline void look_up_row(const DecodeRows& call, int32_t token, float* row) {
  int32_t const channels = fixed_channels ? fixed_channels : call.channels;
  int64_t const group_stride = int64_t{call.centroids} * channels;
  const float* table = call.table;
  const uint16_t* codes = call.codes + token;
  for (int32_t group = 0; group < call.groups; ++group) {
    const float* const centroid = table + int64_t{*codes} * channels;
    if constexpr (fixed_channels != 0) {
      __builtin_memcpy(row, centroid, fixed_channels * sizeof(float));
    } else {
      for (int32_t c = 0; c < channels; ++c) row[c] = centroid[c];
    }
    row += channels;
    table += group_stride;
    codes += decode_tokens;
  }
}

template <int fixed_channels>
inline void look_up(const DecodeRows& call) {
  if (call.half) {
    alignas(64) float row[COUPLET_MAX_HEAD_DIM];
    uint16_t* to = static_cast<uint16_t*>(call.rows);
    for (int32_t token = 0; token < call.tokens; ++token, to += call.token_stride) {
      look_up_row<fixed_channels>(call, token, row);
      narrow_row(row, to, call.groups * call.channels);
    }
  } else {
    float* to = static_cast<float*>(call.rows);
    for (int32_t token = 0; token < call.tokens; ++token, to += call.token_stride)
      look_up_row<fixed_channels>(call, token, to);
  }
}

void rows(const DecodeRows& call) {
  switch (call.channels) {
    case 1: return look_up<1>(call);
    case 2: return look_up<2>(call);
    case 4: return look_up<4>(call);
    case 8: return look_up<8>(call);
    case 16: return look_up<16>(call);
    default: return look_up<0>(call);
  }
}

}  // namespace
}  // namespace couplet::cpu::COUPLET_ISA
