// Key warps of 4c8b: codes and queries -> logits. Codes go from memory into registers, a page ahead.
#pragma once

#include "shared.h"

namespace couplet::cuda::attend::lookup::channels4 {

struct KeyLane : Lane {
  unsigned codes;          // bytes into half a page, step 0
  unsigned column[steps];  // address of a row of code 0
  unsigned query[2];       // word of quads 0 and 2
  bool bit1;               // of the token that the lane has logits of

  __device__ __forceinline__ explicit KeyLane(int lane) : Lane(lane) {
    auto const t_bytes = [&](unsigned i, unsigned bytes) {
      return ((i ^ flip()) * 4 + static_cast<unsigned>(t)) * bytes;
    };
    codes = t_bytes(0, page_tokens) + static_cast<unsigned>(g) * tiles;
    for (unsigned i = 0; i < steps; ++i) column[i] = t_bytes(i, row_bytes);
    // Where bit 0 of the row is set, step 0 has changed places with step 1.
    for (int i = 0; i < 2; ++i) query[i] = static_cast<unsigned>((g % 4 * 4 + t) * 4 + (i ^ g / 4) * 2 * quad_words);
    bit1 = t & 1;
  }
  // What the class of token g changes in a step.
  __device__ __forceinline__ unsigned flip() const { return static_cast<unsigned>(((g ^ g >> 2) & 1) | (g & 2)); }
};

// Cosines and sines of token g of a tile, by its offset in the unit.
struct KeyAngles {
  __half2 cos[phases][steps][2];
  __half2 sin[phases][steps][2];
};

__device__ __forceinline__ void make_key_angles(const Angles& angles, int index, KeyAngles& keys) {
  KeyLane const lane(index);
#pragma unroll
  for (int i = 0; i < steps; ++i)
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      int const pair = 4 * (4 * (i ^ static_cast<int>(lane.flip())) + lane.t) + 2 * word;
      auto const two_angles = [&](int offset) {
        return *reinterpret_cast<const float4*>(angles.offsets + offset * pairs + pair);
      };
      // The lane's own rows are its first token alone: 32 KB a block and not 128.
      float4 const first = two_angles(warp_of_role() * page_tokens + lane.g * tiles);
#pragma unroll
      for (int phase = 0; phase < phases; ++phase) {
        float4 const further = two_angles(phase);
        float2 const even = add_angles({first.x, first.y}, {further.x, further.y});
        float2 const odd = add_angles({first.z, first.w}, {further.z, further.w});
        keys.cos[phase][i][word] = __floats2half2_rn(even.x, odd.x);
        keys.sin[phase][i][word] = __floats2half2_rn(even.y, odd.y);
      }
      __syncwarp();  // keeps the loads of all angles from being under way together, in registers
    }
}

// Angles of 0.
__device__ __forceinline__ void clear_key_angles(KeyAngles& keys) {
#pragma unroll
  for (int phase = 0; phase < phases; ++phase)
#pragma unroll
    for (int i = 0; i < steps; ++i)
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        keys.cos[phase][i][word] = __floats2half2_rn(1, 1);
        keys.sin[phase][i][word] = __floats2half2_rn(0, 0);
      }
}

// Codes of tokens 4g to 4g + 3 of half a page: [step][channels 64 further on or not].
struct KeyCodes {
  uint32_t words[steps][2];
};

__device__ __forceinline__ void load_key_codes(const KeyLane& lane, const uint8_t* page, int half, KeyCodes& codes) {
#pragma unroll
  for (unsigned i = 0; i < steps; ++i) {
    const uint8_t* const from = page + (lane.codes ^ i * 4 * page_tokens) + half * half_tokens;
#pragma unroll
    for (int far = 0; far < 2; ++far)
      codes.words[i][far] = __ldg(reinterpret_cast<const uint32_t*>(from + far * 16 * page_tokens));
  }
}

__device__ __forceinline__ void load_query_set(const uint32_t* set, const KeyLane& lane, uint32_t (&query)[quads][4]) {
#pragma unroll
  for (int quad = 0; quad < quads; ++quad) {
    uint4 const four = *reinterpret_cast<const uint4*>(set + lane.query[quad / 2] + quad % 2 * quad_words);
    query[quad][0] = four.x;
    query[quad][1] = four.y;
    query[quad][2] = four.z;
    query[quad][3] = four.w;
  }
}

// Keys of a tile, rotated by their offset in the unit.
template <int Tile>
__device__ __forceinline__ void look_up_keys(const Shared& shared, const KeyLane& lane, const KeyAngles& angles,
                                             const KeyCodes& codes, uint32_t (&key)[key_words]) {
  constexpr int keys = static_cast<int>(offsetof(Block, keys));
  constexpr int phase = Tile % phases;
#pragma unroll
  for (int i = 0; i < steps; ++i) {
    uint2 const low = load_row<keys>(shared, row_offset(codes.words[i][0], Tile, lane.column[i]));
    uint2 const high = load_row<keys + head_dim>(shared, row_offset(codes.words[i][1], Tile, lane.column[i]));
    uint32_t const words[2][2] = {{low.x, low.y}, {high.x, high.y}};
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      __half2 const x = half2_of(words[0][word]);
      __half2 const y = half2_of(words[1][word]);
      __half2 const cos = angles.cos[phase][i][word];
      __half2 const sin = angles.sin[phase][i][word];
      key[4 * i + word] = bits_of(__hfma2(__hneg2(y), sin, __hmul2(x, cos)));
      key[4 * i + 2 + word] = bits_of(__hfma2(x, sin, __hmul2(y, cos)));
    }
  }
}

// The lane's logit of a tile.
__device__ __forceinline__ float multiply_keys(const KeyLane& lane, const uint32_t (&query)[quads][4],
                                               const uint32_t (&key)[key_words]) {
  float products[2][4] = {};
#pragma unroll
  for (int quad = 0; quad < quads; ++quad)
#pragma unroll
    for (int swapped = 0; swapped < 2; ++swapped) {
      int const word = 2 * quad ^ swapped * 8;
      gpu::mma_m16n8k16_f16(products[swapped], query[quad], {key[word], key[word + 1]});
    }
  auto const row = [&](int swapped, int upper) {
    return lane.first ? products[swapped][2 * upper] : products[swapped][2 * upper + 1];
  };
  return lane.bit1 ? row(0, 1) + row(1, 0) : row(0, 0) + row(1, 1);
}

// The segment's pages of this warp.
__device__ __forceinline__ void take_keys(const Step& step, Shared& shared, const KeyAngles& angles) {
  unsigned count = shared.work.pages_before;
  KeyLane const lane(gpu::lane_id());
  int const warp = warp_of_role();
  Pair& pair = shared.pairs[warp];
  int left = end_unit(shared.work.segment) - first_unit(shared.work.segment);
  PageWalk walk(shared);
  int64_t const offset = shared.work.key_offset;
  auto const page_codes = [&] { return codes_of(walk.page(), offset, step.key_by_code); };
  KeyCodes codes[2];
  for (int half = 0; half < 2; ++half) load_key_codes(lane, page_codes(), half, codes[half]);
  walk.advance();
  gpu::cp_async_wait<0>();
  gpu::barrier_sync(key_barrier, role_threads);  // the table is there
  bool ready = gpu::has_completed(shared.rotated[count % 2], count / 2 % 2);
  for (; left > 0; --left, ++count) {
    if (!ready) gpu::wait(shared.rotated[count % 2], count / 2 % 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float logits[tiles];
      uint32_t query[quads][4];
      [&]<int... tile>(std::integer_sequence<int, tile...>) {
        (([&] {
           if (tile % phases == 0)
             load_query_set(shared.queries[count % query_buffers][half][tile / phases], lane, query);
           uint32_t key[key_words];
           look_up_keys<tile>(shared, lane, angles, codes[half], key);
           logits[tile] = multiply_keys(lane, query, key);
           if (tile == 1 && half == 0) ready = gpu::has_completed(pair.taken, (count & 1) ^ 1);
         }()),
         ...);
      }
      (std::make_integer_sequence<int, tiles>());
      load_key_codes(lane, page_codes(), half, codes[half]);
      if (half == 0) {
        if (!ready) gpu::wait(pair.taken, (count & 1) ^ 1);
      } else {
        walk.advance();
        ready = gpu::has_completed(shared.rotated[(count + 1) % 2], (count + 1) / 2 % 2);
      }
      shared.logits[warp][half][lane.g * 4 + lane.t] = {logits[0], logits[1], logits[2], logits[3]};
    }
    __syncwarp();
    if (gpu::fresh_lane_id() == 0) gpu::arrive(pair.written);
  }
}

}  // namespace couplet::cuda::attend::lookup::channels4
