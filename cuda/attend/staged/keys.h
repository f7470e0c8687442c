// Logits of a chapter: slabs of keys against the queries.
#pragma once

#include "codes.h"

namespace couplet::cuda::attend::staged {

// ---- tables and angles ---------------------------------------------------------------------------------------------------------
// Words of two pairs (x, y) each -> both x in the first, both y in the second.
__device__ __forceinline__ void part_pairs(uint32_t& first, uint32_t& second) {
  uint32_t const x = __byte_perm(first, second, 0x5410);
  second = __byte_perm(first, second, 0x7632);
  first = x;
}

// Slabs from `first` on, [slab][code][8 chunks]: lower chunks of 4 places, then upper ones; zeros where there is none. Interleaved pairs are
// parted here where a group has two of them.
template <class C, bool Interleaved>
__device__ __forceinline__ void load_key_tables(const Step& step, int kv_head, int first, unsigned char* tables) {
  constexpr int codes = threads / 8;  // whose rows of a slab are loaded together
  Places const places(step);
  int const chunks = step.params.head_dim / 8;
  int const column = thread_here() % 8;
  int const code = thread_here() / 8;
  for (int slab = 0; slab < C::slabs; ++slab) {
    int const place = (first + slab) * 4 + column % 4;
    bool const there = place < places.count;
    const uint4* from = reinterpret_cast<const uint4*>(step.key_by_code) +
                        (static_cast<int64_t>(kv_head) * C::centroids + code) * chunks +
                        (there ? places.chunk(place, column / 4) : 0);
    unsigned char* const to = tables + (slab * C::centroids + code) * key_stride + column * 16;
#pragma unroll(C::channels == 2 ? 2 : 4)
    for (int i = 0; i < C::centroids / codes; ++i) {
      uint4 row = there ? __ldg(from) : uint4{};
      if constexpr (Interleaved && C::channels == 8) {
        part_pairs(row.x, row.y);
        part_pairs(row.z, row.w);
        row = {row.x, row.z, row.y, row.w};
      }
      if constexpr (Interleaved && C::channels == 4) {
        part_pairs(row.x, row.y);
        part_pairs(row.z, row.w);
      }
      *reinterpret_cast<uint4*>(to + i * (codes * key_stride)) = row;
      from += codes * chunks;
    }
  }
}

// Angles of a page's tokens: [token % 8][cosines, sines][token / 8][place] 4 words of 2 pairs. A lane with odd token / 8 has its chunks the
// other way round: pairs of the kind half are then (y, x), interleaved ones come from the upper chunk first.
template <class C, bool Interleaved>
__device__ __forceinline__ void load_angles(const Step& step, int first, unsigned char* to) {
  int const pairs = step.angles.pairs;
  for (unsigned index = static_cast<unsigned>(thread_here()); index < C::slabs * page_tokens * 16; index += threads) {
    int const word = static_cast<int>(index % 4);
    int const t = static_cast<int>(index / 4 % 4);
    int const token = static_cast<int>(index / 16 % page_tokens);
    int const slab = static_cast<int>(index / (16 * page_tokens));
    bool const odd = token / 8 % 2;
    int const pair = 8 * (4 * (first + slab) + t) + (Interleaved && odd ? 2 * word ^ 4 : 2 * word);
    float4 angles{1, 0, 1, 0};
    if (pair < pairs) angles = __ldg(reinterpret_cast<const float4*>(step.angles.offsets + token * pairs + pair));
    float const sign = !Interleaved && odd ? -1.0f : 1.0f;
    unsigned char* const at =
        to + slab * slab_angle_bytes + token % 8 * angle_row_bytes + (token / 8 * 4 + t) * 16 + word * 4;
    *reinterpret_cast<uint32_t*>(at) = gpu::cvt_f16x2(angles.x, angles.z);
    *reinterpret_cast<uint32_t*>(at + angle_row_bytes / 2) = gpu::cvt_f16x2(sign * angles.y, sign * angles.w);
  }
}

// ---- queries -------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float4 rotate_two(float4 pairs, float4 angles) {
  float2 const first = add_angles({pairs.x, pairs.y}, {angles.x, angles.y});
  float2 const second = add_angles({pairs.z, pairs.w}, {angles.z, angles.w});
  return {first.x, first.y, second.x, second.y};
}

// Two pairs' angle from a page's begin to the query: blocks of 512 less the page's place in its block.
__device__ __forceinline__ float4 angles_to_query(const Angles& angles, int pair, int position, int page) {
  if (pair >= angles.pairs) return {1, 0, 1, 0};
  constexpr int pages = rotary_block / page_tokens;
  int const blocks = position / rotary_block - page / pages;
  float4 const block = __ldg(reinterpret_cast<const float4*>(angles.steps + blocks * angles.pairs + pair));
  float4 const back =
      __ldg(reinterpret_cast<const float4*>(angles.offsets + page % pages * page_tokens * angles.pairs + pair));
  return rotate_two(block, {back.x, -back.y, back.z, -back.w});
}

// The warp's operands for the keys of a page and slab: [head][place][lower or upper chunk][word]. A lane has two pairs of a place, of each
// second head.
template <class C, bool Interleaved, int Quads>
__device__ __forceinline__ void make_operands(const Step& step, const Fixed<Quads>& fixed, int page, int slab,
                                              uint32_t* operands, int lane) {
  int const i = lane % 4;  // pairs 2i and 2i + 1
  int const t = lane / 4 % 4;
  Places const places(step);
  int const place = slab * 4 + t;
  bool const there = place < places.count;  // else the keys are zeros
  int const lower = there ? places.chunk(place, 0) * 8 : 0;
  int const upper = there ? places.chunk(place, 1) * 8 : 0;
  float4 const angles = angles_to_query(step.angles, 8 * place + 2 * i, fixed.segment.position, page);
  // Interleaved pairs of a group lie as load_key_tables puts them: x, then y.
  int const x_word = !Interleaved ? i : i / 2 * 4 + (C::channels == 8 ? i % 2 : i % 2 * 2);
  int const y_word = !Interleaved ? i + 4 : x_word + (C::channels == 8 ? 2 : 1);
  __syncwarp();  // the operands before are read
#pragma unroll
  for (int two = 0; two < 2 * Quads; ++two) {
    int const head = 2 * two + lane / 16;
    const float* const query = fixed.queries[head];
    float4 pairs;
    if constexpr (Interleaved) {
      pairs = *reinterpret_cast<const float4*>(query + (i < 2 ? lower + 4 * i : upper + 4 * i - 8));
    } else {
      float2 const x = *reinterpret_cast<const float2*>(query + lower + 2 * i);
      float2 const y = *reinterpret_cast<const float2*>(query + upper + 2 * i);
      pairs = {x.x, y.x, x.y, y.y};
    }
    pairs = rotate_two(pairs, angles);
    operands[(head * 4 + t) * 8 + x_word] = gpu::cvt_f16x2(pairs.x, pairs.z);
    operands[(head * 4 + t) * 8 + y_word] = gpu::cvt_f16x2(pairs.y, pairs.w);
  }
  __syncwarp();
}

// The lane's share of them: columns 0-3 take the chunks in order, columns 4-7 the other way round.
template <int Quads>
__device__ __forceinline__ void read_operands(const uint32_t* operands, int lane, uint32_t (&own)[Quads][4][2]) {
  int const g = lane / 4;
  int const t = lane % 4;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad)
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      uint4 const words =
          *reinterpret_cast<const uint4*>(operands + ((quad * 4 + g % 4) * 4 + t) * 8 + (chunk ^ g / 4) * 4);
      own[quad][0][chunk] = words.x;
      own[quad][1][chunk] = words.y;
      own[quad][2][chunk] = words.z;
      own[quad][3][chunk] = words.w;
    }
}

// ---- keys ----------------------------------------------------------------------------------------------------------------------
// Codes of a lane's tokens: [first or second chunk of its order][group].
template <class C>
struct KeyCodes {
  Codes<C, 8> codes[2][C::groups];

  __device__ __forceinline__ void load(const Step& step, const uint8_t* page, int kv_head, int slab, int lane) {
    int const g = lane / 4;
    int const t = lane % 4;
    Places const places(step);
    int const place = slab * 4 + t;
    const uint8_t* const rows = page + step.params.key_page_offset + kv_head * step.params.key_page_stride;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      int const chunk = place < places.count ? places.chunk(place, side ^ (g & 1)) : 0;
#pragma unroll
      for (int group = 0; group < C::groups; ++group)
        codes[side][group].load(rows + (chunk * C::groups + group) * (page_tokens * C::bits / 8), g);
    }
  }
  __device__ __forceinline__ void align(int lane) {
#pragma unroll
    for (auto& side : codes)
#pragma unroll
      for (auto& group : side) group.align(lane / 4);
  }
  __device__ __forceinline__ void advance_two() {
#pragma unroll
    for (auto& side : codes)
#pragma unroll
      for (auto& group : side) group.advance_two();
  }
};

// x and y of two pairs by their angles; rotated words replace them.
__device__ __forceinline__ void rotate_words(uint32_t& x, uint32_t& y, uint32_t cosines, uint32_t sines) {
  __half2 const c = half2_of(cosines);
  __half2 const s = half2_of(sines);
  __half2 const turned = __hfma2(half2_of(x), c, __hneg2(__hmul2(half2_of(y), s)));
  y = bits_of(__hfma2(half2_of(y), c, __hmul2(half2_of(x), s)));
  x = bits_of(turned);
}

// Keys of token 0 or 1 of `codes` in the lane's place: both chunks, rotated.
template <class C, bool Interleaved>
__device__ __forceinline__ void look_up_key(const unsigned char* tables, uint32_t column, const KeyCodes<C>& codes,
                                            int token, const unsigned char* at, uint32_t (&words)[2][4]) {
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    uint32_t const own = column ^ (side * 64);
    auto const row = [&]<int Group>() {
      uint32_t loaded[C::words];
      gpu::load_dynamic_shared<C::words, Group * 4 * C::words>(
          loaded, tables, codes.codes[side][Group].template scaled<7>(token) | own);
#pragma unroll
      for (int word = 0; word < C::words; ++word) words[side][Group * C::words + word] = loaded[word];
    };
    row.template operator()<0>();
    if constexpr (C::groups > 1) row.template operator()<1>();
    if constexpr (C::groups > 2) {
      row.template operator()<2>();
      row.template operator()<3>();
    }
  }
  uint4 const c = *reinterpret_cast<const uint4*>(at);
  uint4 const s = *reinterpret_cast<const uint4*>(at + angle_row_bytes / 2);
  uint32_t const cosines[4] = {c.x, c.y, c.z, c.w};
  uint32_t const sines[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (!Interleaved) {
      rotate_words(words[0][i], words[1][i], cosines[i], sines[i]);
    } else if constexpr (C::channels == 8) {
      rotate_words(words[i / 2][i % 2], words[i / 2][i % 2 + 2], cosines[i], sines[i]);
    } else {
      uint32_t& x = words[i / 2][i % 2 * 2];
      uint32_t& y = words[i / 2][i % 2 * 2 + 1];
      if constexpr (C::channels == 2) part_pairs(x, y);
      rotate_words(x, y, cosines[i], sines[i]);
    }
  }
}

// One slab of a page: adds its share of the logits of the lane's tokens, or writes it where `first` is set.
template <class C, bool Interleaved, int Quads>
__device__ __forceinline__ void multiply_keys(const Shared<Quads>& shared, KeyCodes<C>& codes, int page, int stage_slab,
                                              bool first, const uint32_t (&operands)[Quads][4][2], int lane) {
  int const g = lane / 4;
  int const t = lane % 4;
  // Bits above those of a code's rows: which of the slabs in shared memory.
  auto const column = static_cast<uint32_t>(stage_slab * C::centroids * key_stride + t * 16 + g % 2 * 64);
  const unsigned char* angles =
      shared.tables + C::slabs * C::centroids * key_stride + stage_slab * slab_angle_bytes + lane * 16;
  // Columns 0-3 are for rows with even g, 4-7 for odd ones: half of the lanes have something.
  bool const has_logits = t / 2 == g % 2;
  float* logits = shared.logits_of(t % 2 * 2) + page * page_tokens + 8 * g;
  codes.align(lane);
#pragma unroll(C::channels == 2 || Quads == 2 ? 1 : 2)
  for (int tile = 0; tile < 4; ++tile) {
    uint32_t words[2][2][4];  // [token][chunk][word]
#pragma unroll
    for (int i = 0; i < 2; ++i)
      look_up_key<C, Interleaved>(shared.tables, column, codes, i, angles + i * angle_row_bytes, words[i]);
    codes.advance_two();
    float scores[Quads][4] = {};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      uint32_t const keys[4] = {words[0][0][word], words[1][0][word], words[0][1][word], words[1][1][word]};
#pragma unroll
      for (int quad = 0; quad < Quads; ++quad) gpu::mma_m16n8k16_f16(scores[quad], keys, operands[quad][word]);
    }
    if (has_logits) {
#pragma unroll
      for (int quad = 0; quad < Quads; ++quad)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          float2* const to = reinterpret_cast<float2*>(logits + (quad * 4 + odd * 2) * shared.plane);
          float2 const own{scores[quad][odd], scores[quad][odd + 2]};
          *to = first ? own : float2{to->x + own.x, to->y + own.y};
        }
    }
    angles += 2 * angle_row_bytes;
    logits += 2;
  }
}

template <class C, bool Interleaved, int Quads>
__device__ __forceinline__ void take_keys(const Step& step, const Shared<Quads>& shared, const Chapter& chapter) {
  Fixed<Quads>& fixed = *shared.fixed;
  int const warp = static_cast<int>(threadIdx.x) / 32;
  int const slabs = slabs_of(step.params.head_dim);
  int const kv_head = fixed.segment.kv_head;
  uint32_t* const warp_operands =
      reinterpret_cast<uint32_t*>(shared.tables + key_bytes(C::bits)) + warp * (Quads * operand_words);
  for (int slab = 0; slab < slabs; ++slab) {
    int const stage_slab = slab % C::slabs;
    if (stage_slab == 0) {
      __syncthreads();  // nobody reads the tables before
      load_key_tables<C, Interleaved>(step, kv_head, slab, shared.tables);
      load_angles<C, Interleaved>(step, slab, shared.tables + C::slabs * C::centroids * key_stride);
      __syncthreads();
    }
    int const stage_lane = gpu::unknown(gpu::lane_id());
    KeyCodes<C> next;
    if (warp < chapter.pages) next.load(step, fixed.pages[warp], kv_head, slab, stage_lane);
    for (int page = warp; page < chapter.pages; page += warps) {
      int const lane = C::channels == 2 || Quads == 2 ? gpu::unknown(stage_lane) : stage_lane;  // registers are few
      KeyCodes<C> codes = next;
      if (page + warps < chapter.pages) next.load(step, fixed.pages[page + warps], kv_head, slab, lane);
      make_operands<C, Interleaved, Quads>(step, fixed, chapter.first + page, slab, warp_operands, lane);
      uint32_t operands[Quads][4][2];
      read_operands(warp_operands, lane, operands);
      multiply_keys<C, Interleaved>(shared, codes, page, stage_slab, slab == 0, operands, lane);
    }
  }
}

}  // namespace couplet::cuda::attend::staged
