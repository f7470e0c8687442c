// Key warps of 8c8b: codes and queries -> logits.
//   Keys are the A operand, rows = tokens. Lane (g, t) looks up groups 4s + t of tokens 8g to 8g + 7; lanes with odd g visit s ^ 1 where
//   the others visit s, so that the 8 lanes of a phase touch 8 groups. The queries are there twice: column 2q in the order of even
//   rows, column 2q + 1 in that of odd rows, and a row's logits are those of its own class.
//   Keys are rotated by their offset in the unit of 512, by angles that stay in 64 registers for the whole kernel: tokens 0 to 3 of a
//   lane's 8. For tokens 4 to 7 the query is rotated back by 4 instead.
#pragma once

#include "shared.h"

namespace couplet::cuda::attend::lookup::channels8 {

// [token's bit 1][its bit 0][s][pair of channels]
struct KeyAngles {
  __half2 cos[2][2][2][4];
  __half2 sin[2][2][2][4];
};

__device__ __forceinline__ void make_key_angles(const Angles& angles, int lane, KeyAngles& keys) {
  int const g = lane / 4;
  int const t = lane % 4;
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int const pair = 8 * (4 * (s ^ (g & 1)) + t) + 2 * c;
      auto const two_angles = [&](int offset) {
        return *reinterpret_cast<const float4*>(angles.offsets + offset * pairs + pair);
      };
      // Read: the angle of the lane's first token, and that between two tokens, 64 KB a block and not 256.
      float4 token = two_angles(warp_of_role() * page_tokens + 8 * g);
      float4 const next = two_angles(1);
#pragma unroll
      for (int z = 0; z < 2; ++z)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          keys.cos[z][r][s][c] = __floats2half2_rn(token.x, token.z);
          keys.sin[z][r][s][c] = __floats2half2_rn(token.y, token.w);
          float2 const even = add_angles({token.x, token.y}, {next.x, next.y});
          float2 const odd = add_angles({token.z, token.w}, {next.z, next.w});
          token = {even.x, even.y, odd.x, odd.y};
        }
    }
}

// Angles of 0.
__device__ __forceinline__ void clear_key_angles(KeyAngles& keys) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    keys.cos[i / 16][i / 8 % 2][i / 4 % 2][i % 4] = __floats2half2_rn(1, 1);
    keys.sin[i / 16][i / 8 % 2][i / 4 % 2][i % 4] = __floats2half2_rn(0, 0);
  }
}

// Where a lane looks all the time, in bytes.
struct KeyLane {
  unsigned column;
  unsigned query_column;

  __device__ __forceinline__ explicit KeyLane(int lane) {
    unsigned const g = static_cast<unsigned>(lane) / 4;
    unsigned const t = static_cast<unsigned>(lane) % 4;
    column = (4 * (g & 1) + t) * row_bytes;
    query_column = (g >> 1) * head_dim * 2 + column;
  }
};

// Codes of the lane's 8 tokens: [s] of groups 4s + t.
__device__ __forceinline__ void load_key_codes(const Pair& pair, int half, uint32_t (&codes)[4]) {
  unsigned const lane = gpu::fresh_lane_id();
  unsigned const column = (lane & 7) * page_tokens + ((lane & 28) * 2 ^ (lane & 2) * 16);  // s = 0
#pragma unroll
  for (int s = 0; s < 4; ++s)
    codes[s] = *reinterpret_cast<const uint32_t*>(pair.key_codes + (column ^ s % 2 * 256) + s / 2 * 512 + half * 4);
}

// Channels of a row, or those 64 further on.
__device__ __forceinline__ void load_key(const Shared& shared, unsigned at, int further, Row& row) {
  if (further)
    gpu::load_dynamic_shared<4, head_dim>(row.words, &shared, at);
  else
    gpu::load_dynamic_shared<4, 0>(row.words, &shared, at);
}

// Adds groups 4 i + t and those 8 further on to logits[z][r * 2 + column] of tokens 2 z + r.
__device__ __forceinline__ void multiply_keys(const Shared& shared, const KeyLane& lane, const KeyAngles& angles,
                                              const __half* queries, const uint32_t (&codes)[4], int i,
                                              float (&logits)[2][4]) {
  Row query[2];
#pragma unroll
  for (int j = 0; j < 2; ++j)
    query[j] = load_row(reinterpret_cast<const unsigned char*>(queries) + (lane.query_column ^ i * 64) + j * 128);
#pragma unroll
  for (int z = 0; z < 2; ++z) {
    Row key[2][2];  // [row g or g + 8][channels, and those 64 further on]
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        load_key(shared, row_offset(codes[i + 2 * j], 2 * z + r, lane.column ^ i * 64u), j, key[r][j]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        __half2 const x = half2_of(key[r][0].words[c]);
        __half2 const y = half2_of(key[r][1].words[c]);
        __half2 const cos = angles.cos[z][r][i][c];
        __half2 const sin = angles.sin[z][r][i][c];
        key[r][0].words[c] = bits_of(__hfma2(__hneg2(y), sin, __hmul2(x, cos)));
        key[r][1].words[c] = bits_of(__hfma2(x, sin, __hmul2(y, cos)));
      }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int k = 0; k < 4; k += 2)
        gpu::mma_m16n8k16_f16(logits[z],
                              {key[0][j].words[k], key[1][j].words[k], key[0][j].words[k + 1], key[1][j].words[k + 1]},
                              {query[j].words[k], query[j].words[k + 1]});
  }
}

// Of the tokens 8g + 4 half on, row t.
__device__ __forceinline__ void write_logits(Pair& pair, int half, const float (&logits)[2][4]) {
  unsigned const lane = gpu::fresh_lane_id();
  unsigned const at = (lane & 3) * page_tokens * 4 + ((lane & 28) * 8 ^ (lane & 1) * 16 ^ (lane & 2) * 32);
  bool const odd = lane & 4;
  *reinterpret_cast<float4*>(reinterpret_cast<unsigned char*>(pair.logits) + (at ^ half * 16)) = {
      odd ? logits[0][1] : logits[0][0], odd ? logits[0][3] : logits[0][2], odd ? logits[1][1] : logits[1][0],
      odd ? logits[1][3] : logits[1][2]};
}

// The segment's pages of this warp.
__device__ __forceinline__ void take_keys(const Step& step, Shared& shared, const KeyAngles& angles) {
  unsigned count = shared.work.pages_before;
  KeyLane const lane(gpu::fresh_lane_id());
  Pair& pair = shared.pairs[warp_of_role()];
  int left = end_unit(shared.work.segment) - first_unit(shared.work.segment);
  PageWalk walk(shared);
  fetch_codes(pair.key_codes, walk.page(), shared.work.key_offset, step.key_by_code);
  walk.advance();
  gpu::cp_async_wait<0>();
  gpu::barrier_sync(key_barrier, role_threads);  // the table is there
  uint32_t codes[4];
  load_key_codes(pair, 0, codes);
  bool ready = gpu::has_completed(shared.rotated[count % 2], count / 2 % 2);
  for (; left > 0; --left, ++count) {
    if (!ready) gpu::wait(shared.rotated[count % 2], count / 2 % 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const __half* const queries = shared.queries[count % query_buffers][half];
      float logits[2][4] = {};
      multiply_keys(shared, lane, angles, queries, codes, 0, logits);
      if (half == 0) ready = gpu::has_completed(pair.taken, (count & 1) ^ 1);
      multiply_keys(shared, lane, angles, queries, codes, 1, logits);
      if (half == 0) {
        load_key_codes(pair, 1, codes);
        __syncwarp();  // the page's codes are in registers
        if (left > 1) {
          fetch_codes(pair.key_codes, walk.page(), shared.work.key_offset, step.key_by_code);
          walk.advance();
        }
        if (!ready) gpu::wait(pair.taken, (count & 1) ^ 1);
      } else {
        ready = gpu::has_completed(shared.rotated[(count + 1) % 2], (count + 1) / 2 % 2);
        gpu::cp_async_wait<0>();
        __syncwarp();
        load_key_codes(pair, 0, codes);
      }
      write_logits(pair, half, logits);
    }
    __syncwarp();
    if (gpu::fresh_lane_id() == 0) gpu::arrive(pair.written);
  }
}

}  // namespace couplet::cuda::attend::lookup::channels8
