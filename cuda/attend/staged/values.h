// Powers of a chapter's logits, and the values weighted by them.
#pragma once

#include "codes.h"

namespace couplet::cuda::attend::staged {

// ---- powers --------------------------------------------------------------------------------------------------------------------
// A warp has one head, and a thread runs of 8 tokens.
template <int Quads>
struct Runs {
  static constexpr int heads = 4 * Quads;
  static constexpr int warps_of_head = warps / heads;
  int head;
  int first;
  int count;

  __device__ __forceinline__ explicit Runs(const Chapter& chapter)
      : head(static_cast<int>(threadIdx.x) / 32 % heads),
        first(static_cast<int>(threadIdx.x) / 32 / heads * 32 + gpu::lane_id()),
        count(chapter.pages * page_tokens / 8) {}
};

// Logits -> 2^(logit - maximum) in float16, 8 in the first half of where their 8 logits were; maximum, sum and factor of each head.
template <int Quads>
__device__ __forceinline__ void take_powers(const Step& step, const Shared<Quads>& shared, const Chapter& chapter) {
  Fixed<Quads>& fixed = *shared.fixed;
  Runs<Quads> const runs(chapter);
  float* const logits = shared.logits_of(runs.head);
  int const warp = static_cast<int>(threadIdx.x) / 32;
  int const begin = chapter.first * page_tokens;
  __syncthreads();  // all logits are there
  float largest = unseen;
  for (int run = runs.first; run < runs.count; run += 32 * Runs<Quads>::warps_of_head) {
    float4* const at = reinterpret_cast<float4*>(logits + 8 * run);
    float4 const low = at[0];
    float4 const high = at[1];
    float own[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int const position = begin + 8 * run + i;
      if (step.params.softcap > 0) own[i] = capped(step, own[i]);
      if (position < chapter.seen.begin || position >= chapter.seen.end) own[i] = unseen;
      largest = max(largest, own[i]);
    }
    at[0] = {own[0], own[1], own[2], own[3]};
    at[1] = {own[4], own[5], own[6], own[7]};
  }
  for (int offset = 16; offset > 0; offset /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, offset));
  if (gpu::lane_id() == 0) fixed.sums[warp][0].x = largest;
  __syncthreads();
  float maximum = fixed.total[runs.head].x;
  for (int other = runs.head; other < warps; other += Runs<Quads>::heads)
    maximum = max(maximum, fixed.sums[other][0].x - headroom);
  float sum = 0;
  for (int run = runs.first; run < runs.count; run += 32 * Runs<Quads>::warps_of_head) {
    float4* const at = reinterpret_cast<float4*>(logits + 8 * run);
    float4 const low = at[0];
    float4 const high = at[1];
    float const own[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    uint32_t powers[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      powers[i] = gpu::cvt_f16x2(gpu::ex2_approx(own[2 * i] - maximum), gpu::ex2_approx(own[2 * i + 1] - maximum));
      float2 const rounded = __half22float2(half2_of(powers[i]));
      sum += rounded.x + rounded.y;
    }
    *reinterpret_cast<uint4*>(at) = {powers[0], powers[1], powers[2], powers[3]};
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (gpu::lane_id() == 0) fixed.sums[warp][0].y = sum;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < Runs<Quads>::heads) {  // a head's first warp is the one of its number
    int const head = static_cast<int>(threadIdx.x);
    float2 const before = fixed.total[head];
    float largest_of_head = before.x;
    for (int other = head; other < warps; other += Runs<Quads>::heads)
      largest_of_head = max(largest_of_head, fixed.sums[other][0].x - headroom);
    float const factor = gpu::ex2_approx(before.x - largest_of_head);
    float all = before.y * factor;
    for (int other = head; other < warps; other += Runs<Quads>::heads) all += fixed.sums[other][0].y;
    fixed.total[head] = {largest_of_head, all};
    fixed.factors[head] = factor;
  }
}

// ---- tables ----------------------------------------------------------------------------------------------------------------------
// Slabs from `first` on, [slab][code] 8 chunks and 16 bytes; zeros where there is no chunk.
template <class C, int Slabs>
__device__ __forceinline__ void load_value_tables(const Step& step, int kv_head, int first, unsigned char* tables) {
  constexpr int codes = threads / 8;  // whose rows of a slab are loaded together
  int const chunks = step.params.head_dim / 8;
  int const column = thread_here() % 8;
  int const code = thread_here() / 8;
  for (int slab = 0; slab < Slabs; ++slab) {
    int const chunk = (first + slab) * 8 + column;
    bool const there = chunk < chunks;
    const uint4* from = reinterpret_cast<const uint4*>(step.value_by_code) +
                        (static_cast<int64_t>(kv_head) * C::centroids + code) * chunks + (there ? chunk : 0);
    unsigned char* const to = tables + (slab * C::centroids + code) * value_stride + column * 16;
#pragma unroll 4
    for (int i = 0; i < C::centroids / codes; ++i) {
      *reinterpret_cast<uint4*>(to + i * (codes * value_stride)) = there ? __ldg(from) : uint4{};
      from += codes * chunks;
    }
  }
}

// ---- values ----------------------------------------------------------------------------------------------------------------------
// Codes of a lane's 16 tokens of a page in its chunk.
template <class C>
struct ValueCodes {
  Codes<C, 16> codes[C::groups];

  __device__ __forceinline__ void load(const Step& step, const uint8_t* page, int kv_head, int slab, int lane) {
    int const chunk = slab * 8 + lane / 4;
    const uint8_t* const rows = page + step.params.value_page_offset + kv_head * step.params.value_page_stride;
#pragma unroll
    for (int group = 0; group < C::groups; ++group) {
      int const row = chunk * 8 < step.params.head_dim ? chunk * C::groups + group : 0;
      codes[group].load(rows + row * (page_tokens * C::bits / 8), lane % 4);
    }
  }
};

template <class C, int Slab>
__device__ __forceinline__ void look_up_value(const unsigned char* tables, uint32_t column, const ValueCodes<C>& codes,
                                              int token, uint32_t (&words)[4]) {
  auto const row = [&]<int Group>() {
    uint32_t loaded[C::words];
    gpu::load_dynamic_shared<C::words, Slab * C::centroids * value_stride + Group * 4 * C::words>(
        loaded, tables, codes.codes[Group].template scaled<0>(token) * value_stride + column);
#pragma unroll
    for (int word = 0; word < C::words; ++word) words[Group * C::words + word] = loaded[word];
  };
  row.template operator()<0>();
  if constexpr (C::groups > 1) row.template operator()<1>();
  if constexpr (C::groups > 2) {
    row.template operator()<2>();
    row.template operator()<3>();
  }
}

// One slab of a page. weighted: [quad][pair of words] rows g: its first word, rows g + 8: its second.
template <class C, int Quads, int Slab>
__device__ __forceinline__ void multiply_values(const Shared<Quads>& shared, const ValueCodes<C>& codes, int page,
                                                int lane, float (&weighted)[Quads][2][4]) {
  int const g = lane / 4;
  int const t = lane % 4;
  auto const column = static_cast<uint32_t>(g * 16);
  // A power goes to the low half for channel 0 of a word, columns 0-3, to the high half for channel 1; the other half is 0.
  unsigned const first = g < 4 ? 0x4410 : 0x1044;
  unsigned const second = g < 4 ? 0x4432 : 0x3244;
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    uint32_t powers[Quads][4];
#pragma unroll
    for (int quad = 0; quad < Quads; ++quad) {
      uint4 const eight =
          *reinterpret_cast<const uint4*>(shared.logits_of(quad * 4 + g % 4) + page * page_tokens + 16 * t + 8 * run);
      powers[quad][0] = eight.x;
      powers[quad][1] = eight.y;
      powers[quad][2] = eight.z;
      powers[quad][3] = eight.w;
    }
#pragma unroll
    for (int two = 0; two < 4; ++two) {
      uint32_t words[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) look_up_value<C, Slab>(shared.tables, column, codes, run * 8 + two * 2 + i, words[i]);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t const values[4] = {words[0][2 * pair], words[0][2 * pair + 1], words[1][2 * pair],
                                    words[1][2 * pair + 1]};
#pragma unroll
        for (int quad = 0; quad < Quads; ++quad) {
          uint32_t const own[2] = {__byte_perm(powers[quad][two], 0, first), __byte_perm(powers[quad][two], 0, second)};
          gpu::mma_m16n8k16_f16(weighted[quad][pair], values, own);
        }
      }
    }
  }
}

// Writes what the warp has of a slab to `result`, [head][slabs of a stage * 64 channels].
template <int Slabs, int Quads>
__device__ __forceinline__ void leave_values(const float (&weighted)[Quads][2][4], int slab, int lane, float* result) {
  int const g = lane / 4;
  int const t = lane % 4;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad)
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const head = quad * 4 + t % 2 * 2 + i % 2;
        result[head * (Slabs * 64) + slab * 64 + g * 8 + pair * 4 + i / 2 * 2 + t / 2] = weighted[quad][pair][i];
      }
}

template <class C, int Quads>
__device__ __forceinline__ void take_values(const Step& step, const Shared<Quads>& shared, const Chapter& chapter) {
  constexpr int heads = 4 * Quads;
  constexpr int slabs_together =
      Quads == 1 && C::channels > 2 ? C::slabs : 1;  // more would need more than 128 registers
  constexpr int channels = slabs_together * 64;
  Fixed<Quads>& fixed = *shared.fixed;
  int const warp = static_cast<int>(threadIdx.x) / 32;
  int const slabs = slabs_of(step.params.head_dim);
  int const kv_head = fixed.segment.kv_head;
  for (int first = 0; first < slabs; first += slabs_together) {
    __syncthreads();  // the powers are there, and nobody reads the tables before, or the results
    load_value_tables<C, slabs_together>(step, kv_head, first, shared.tables);
    __syncthreads();
    float weighted[slabs_together][Quads][2][4] = {};
    int page = warp;
    int const stage_lane = gpu::unknown(gpu::lane_id());
    ValueCodes<C> next;
    if (page < chapter.pages) next.load(step, fixed.pages[page], kv_head, first, stage_lane);
    for (; page < chapter.pages; page += warps) {
      int const lane = C::channels == 2 || Quads == 2 ? gpu::unknown(stage_lane) : stage_lane;  // registers are few
      ValueCodes<C> codes = next;
      bool const more = slabs_together > 1 && first + 1 < slabs;
      if (more)
        next.load(step, fixed.pages[page], kv_head, first + 1, lane);
      else if (page + warps < chapter.pages)
        next.load(step, fixed.pages[page + warps], kv_head, first, lane);
      multiply_values<C, Quads, 0>(shared, codes, page, lane, weighted[0]);
      if constexpr (slabs_together > 1)
        if (more) {
          codes = next;
          if (page + warps < chapter.pages) next.load(step, fixed.pages[page + warps], kv_head, first, lane);
          multiply_values<C, Quads, 1>(shared, codes, page, lane, weighted[1]);
        }
    }
    __syncthreads();  // the tables make room for what the warps have
    for (int slab = 0; slab < slabs_together; ++slab)
      leave_values<slabs_together>(weighted[slab], slab, gpu::unknown(gpu::lane_id()),
                                   shared.results() + warp * heads * channels);
    __syncthreads();
    for (int element = thread_here(); element < heads * channels; element += threads) {
      int const channel = first * 64 + element % channels;
      if (channel >= step.params.head_dim) continue;
      float& sum = fixed.weighted[element / channels][channel];
      float all = sum * fixed.factors[element / channels];
#pragma unroll
      for (int other = 0; other < warps; ++other) all += shared.results()[other * heads * channels + element];
      sum = all;
    }
  }
}

}  // namespace couplet::cuda::attend::staged
