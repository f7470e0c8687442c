// Tokens in codes: a warp takes a page of 64 of each unit of 512, part by part. Codes of keys are asked for while the values before them are
// added, and those of values while the keys are multiplied, so that all of them stay in registers.
#pragma once

#include "block.h"

namespace couplet::cuda::attend::gather {

// ---- device helpers ----------------------------------------------------------------------------------------------------------
template <int Words>
struct Words32 {
  uint32_t words[Words];
};

// Of global memory that no thread of the launch writes.
template <int Words>
__device__ __forceinline__ Words32<Words> load_global(const void* at) {
  if constexpr (Words == 1) return {{__ldg(static_cast<const uint32_t*>(at))}};
  if constexpr (Words == 2) {
    uint2 const two = __ldg(static_cast<const uint2*>(at));
    return {{two.x, two.y}};
  }
  if constexpr (Words == 4) {
    uint4 const four = __ldg(static_cast<const uint4*>(at));
    return {{four.x, four.y, four.z, four.w}};
  }
}

// Of a table, at a row's address and Offset.
template <int Words, int Offset>
__device__ __forceinline__ Words32<Words> load_row(const void* dynamic, uint32_t at) {
  Words32<Words> row;
  gpu::load_dynamic_shared<Words, Offset>(row.words, dynamic, at);
  return row;
}

// The address of a code's row: its column's, with the code of a word of four as byte 1.
__device__ __forceinline__ uint32_t row_at(uint32_t codes, int code, uint32_t column) {
  return __byte_perm(codes, column, 0x7604 | code << 4);
}

// Cosines and sines of a lane's tokens by which keys are rotated: their offset in the unit.
template <class S>
struct KeyAngles {
  __half2 cos[S::phases][S::steps][S::words];
  __half2 sin[S::phases][S::steps][S::words];

  __device__ __forceinline__ KeyAngles(const Step& step, const Lane<S>& lane, int warp) {
    Places const places(step.params, step.angles);
#pragma unroll
    for (int phase = 0; phase < S::phases; ++phase) {
      __syncwarp();  // keeps the loads of all angles from being under way together, in as many registers more
      int const offset = warp * S::warp_tokens + lane.g * S::tiles + phase;
      const float2* const row = step.angles.offsets + offset * step.angles.pairs;
#pragma unroll
      for (int i = 0; i < S::steps; ++i)
#pragma unroll
        for (int word = 0; word < S::words; ++word) {
          int const pair = (4 * (i ^ lane.step_flip) + lane.t) * S::channels + 2 * word;
          bool const rotated = pair / 8 < places.rotated;
          float2 const first = rotated ? row[pair] : float2{1, 0};
          float2 const second = rotated ? row[pair + 1] : float2{1, 0};
          float const sign = lane.half_flip ? -1 : 1;  // the halves have changed places
          cos[phase][i][word] = __floats2half2_rn(first.x, second.x);
          sin[phase][i][word] = __floats2half2_rn(sign * first.y, sign * second.y);
        }
    }
  }
};

// A part's codes in a lane: of keys, tokens g * tiles on of the groups of its visits; of values, tokens 2t * tiles on of groups 8 slot + g,
// slots in the order of token 2t.
template <class S>
struct Codes {
  Words32<S::tiles / 4> keys[S::steps][2];
  Words32<S::tiles / 2> values[S::slots];

  __device__ __forceinline__ void load_keys(const Shared<S>& shared, const Lane<S>& lane, const uint8_t* page) {
#pragma unroll
    for (int i = 0; i < S::steps; ++i) {
      uint32_t const rows = shared.key_rows[i ^ lane.step_flip][lane.t];
      uint32_t const low = rows & 0xffff;
      uint32_t const high = rows >> 16;
      keys[i][0] = load_global<S::tiles / 4>(page + (lane.half_flip ? high : low) + lane.g * S::tiles);
      keys[i][1] = load_global<S::tiles / 4>(page + (lane.half_flip ? low : high) + lane.g * S::tiles);
    }
  }
  __device__ __forceinline__ void load_values(const Lane<S>& lane, int groups, const uint8_t* page) {
#pragma unroll
    for (int i = 0; i < S::slots; ++i) {
      int const group = 8 * (i ^ (lane.t >> 1) * S::slot_flip) + lane.g;
      values[i] = load_global<S::tiles / 2>(page + (group < groups ? group * page_tokens : 0) + 2 * lane.t * S::tiles);
    }
  }
};

// A warp's softmax in progress: maximum and sum of head g % 4 of each quad, over this lane's tokens.
template <class S>
struct Progress {
  float maxima[S::quads];
  float sums[S::quads];
  float weighted[S::quads][S::units][4];  // D operand: rows (word, g), columns (channel of a word, head)

  __device__ __forceinline__ Progress() {
#pragma unroll
    for (int quad = 0; quad < S::quads; ++quad) {
      maxima[quad] = nothing;
      sums[quad] = 0;
#pragma unroll
      for (auto& unit : weighted[quad])
#pragma unroll
        for (float& sum : unit) sum = 0;
    }
  }
};

template <class S>
using Logits = float[S::quads][S::tiles];

// The quads of four heads' operands.
template <class S>
__device__ __forceinline__ void load_operands(const uint32_t* operands, const Lane<S>& lane,
                                              uint32_t (&query)[S::operand_quads][4]) {
#pragma unroll
  for (int quad = 0; quad < S::operand_quads; ++quad) {
    uint4 const four = *reinterpret_cast<const uint4*>(operands + ((lane.operand + quad * 64) ^ lane.operand_flip));
    query[quad][0] = four.x;
    query[quad][1] = four.y;
    query[quad][2] = four.z;
    query[quad][3] = four.w;
  }
}

// Calls visit.operator()<i>() for i from 0 to Count - 1.
template <int Count, class Visit>
__device__ __forceinline__ void each(Visit visit) {
  [&]<int... i>(std::integer_sequence<int, i...>) { (visit.template operator()<i>(), ...); }
  (std::make_integer_sequence<int, Count>());
}

// Keys of a tile, rotated by their offset in the unit.
template <class S>
__device__ __forceinline__ void look_up_keys(const Shared<S>& shared, const Lane<S>& lane, const KeyAngles<S>& angles,
                                             const Codes<S>& codes, int tile, uint32_t (&key)[S::key_words]) {
  each<2 * S::steps>([&]<int visit>() {
    constexpr int i = visit / 2;
    constexpr int half = visit % 2;
    constexpr int column = S::column_of(i, half);
    uint32_t const at = row_at(codes.keys[i][half].words[tile / 4], tile % 4, lane.key_column[S::class_index(column)]);
    constexpr int offset = static_cast<int>(offsetof(Shared<S>, keys)) + (column & ~S::class_mask);
    auto const row = load_row<S::words, offset>(&shared, at);
#pragma unroll
    for (int word = 0; word < S::words; ++word) key[S::word_of(i, half, word)] = row.words[word];
  });
#pragma unroll
  for (int i = 0; i < S::steps; ++i)
#pragma unroll
    for (int word = 0; word < S::words; ++word) {
      uint32_t& low = key[S::word_of(i, 0, word)];
      uint32_t& high = key[S::word_of(i, 1, word)];
      __half2 const x = half2_of(low);
      __half2 const y = half2_of(high);
      __half2 const cos = angles.cos[tile % S::phases][i][word];
      __half2 const sin = angles.sin[tile % S::phases][i][word];
      low = bits_of(__hfma2(__hneg2(y), sin, __hmul2(x, cos)));
      high = bits_of(__hfma2(x, sin, __hmul2(y, cos)));
    }
}

// Logits of a part: each lane's own token of each tile.
template <class S>
__device__ __forceinline__ void multiply_keys(const Shared<S>& shared, const Lane<S>& lane, const KeyAngles<S>& angles,
                                              const uint32_t (&operands)[S::sets][S::quads][S::operand_words], int part,
                                              const Codes<S>& codes, Logits<S>& logits) {
  constexpr int sets_of_part = S::tiles / S::phases;
  constexpr int together = 2 / S::quads;  // tiles, so that there are four chains of mma
  uint32_t query[S::quads][S::operand_quads][4];
#pragma unroll
  for (int tile = 0; tile < S::tiles; tile += together) {
    if (tile % S::phases == 0)
#pragma unroll
      for (int quad = 0; quad < S::quads; ++quad)
        load_operands(operands[part * sets_of_part + tile / S::phases][quad], lane, query[quad]);
    uint32_t key[together][S::key_words];
#pragma unroll
    for (int i = 0; i < together; ++i) look_up_keys(shared, lane, angles, codes, tile + i, key[i]);
    float products[S::quads][together][2][4] = {};
#pragma unroll
    for (int k = 0; k < S::operand_quads; ++k)
#pragma unroll
      for (int swapped = 0; swapped < 2; ++swapped)
#pragma unroll
        for (int quad = 0; quad < S::quads; ++quad)
#pragma unroll
          for (int i = 0; i < together; ++i) {
            int const word = S::word_in_quad(k) ^ swapped * S::partner;
            gpu::mma_m16n8k16_f16(products[quad][i][swapped], query[quad][k], {key[i][word], key[i][word + 1]});
          }
#pragma unroll
    for (int quad = 0; quad < S::quads; ++quad)
#pragma unroll
      for (int i = 0; i < together; ++i) {
        auto const& d = products[quad][i];
        auto const row = [&](int swapped, int upper) {
          return lane.first ? d[swapped][2 * upper] : d[swapped][2 * upper + 1];
        };
        logits[quad][tile + i] = lane.bit1 ? row(0, 1) + row(1, 0) : row(0, 0) + row(1, 1);
      }
  }
}

// Raises the maxima where a logit lies more than `headroom` above them.
template <class S>
__device__ __forceinline__ void raise_maxima(const Lane<S>& lane, const Logits<S>& logits, Progress<S>& progress) {
#pragma unroll
  for (int quad = 0; quad < S::quads; ++quad) {
    float largest = unseen;
#pragma unroll
    for (float const logit : logits[quad]) largest = max(largest, logit);
    if (!__any_sync(~0u, largest > progress.maxima[quad] + headroom)) continue;
    for (int const offset : {1, 2, 16}) largest = max(largest, __shfl_xor_sync(~0u, largest, offset));
    largest = max(largest, progress.maxima[quad]);
    float const factor = gpu::ex2_approx(progress.maxima[quad] - largest);
    progress.maxima[quad] = largest;
    progress.sums[quad] *= factor;
    float const even = __shfl_sync(~0u, factor, lane.t % 2 * 8);  // of heads 2t % 4 and the next
    float const odd = __shfl_sync(~0u, factor, lane.t % 2 * 8 + 4);
#pragma unroll
    for (auto& unit : progress.weighted[quad])
#pragma unroll
      for (int i = 0; i < 4; ++i) unit[i] *= i % 2 ? odd : even;
  }
}

// Adds a part's values, times their powers.
template <class S>
__device__ __forceinline__ void add_values(const Shared<S>& shared, const Lane<S>& lane, const Codes<S>& codes,
                                           const Logits<S>& logits, Progress<S>& progress) {
#pragma unroll
  for (int tile = 0; tile < S::tiles; ++tile) {
    uint32_t powers[S::quads][2][2];  // [quad][bit 0 of a token]
#pragma unroll
    for (int quad = 0; quad < S::quads; ++quad) {
      float const power = gpu::ex2_approx(logits[quad][tile] - progress.maxima[quad]);
      progress.sums[quad] += power;
      uint32_t const own = gpu::cvt_f16x2(power, 0);
      uint32_t const other = __shfl_xor_sync(~0u, own, 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) powers[quad][i / 2][i % 2] = __byte_perm(own, other, lane.power_bytes[i]);
    }
    each<S::units>([&]<int unit>() {
      uint32_t value[4];  // words of token 2t, of token 2t + 1
      each<4 / S::unit_words>([&]<int load>() {
        constexpr int i = load * S::unit_words / 2;
        constexpr int word = load * S::unit_words % 2;
        constexpr int slot = S::slot_of(unit, word) ^ i * S::slot_flip;
        uint32_t const at =
            row_at(codes.values[slot].words[(i * S::tiles + tile) / 4], tile % 4, lane.value_column[(unit ^ i) % 2]);
        constexpr int offset =
            static_cast<int>(offsetof(Shared<S>, values)) + S::value_offset(unit / 2 * 2, word, 0, 0);
        auto const row = load_row<S::unit_words, offset>(&shared, at);
#pragma unroll
        for (int k = 0; k < S::unit_words; ++k) value[2 * i + word + k] = row.words[k];
      });
#pragma unroll
      for (int bit0 = 0; bit0 < 2; ++bit0)
#pragma unroll
        for (int quad = 0; quad < S::quads; ++quad)
          gpu::mma_m16n8k16_f16(progress.weighted[quad][unit ^ bit0], value, powers[quad][bit0]);
    });
  }
}

template <class S>
__device__ __forceinline__ void leave_weighted(const Lane<S>& lane, int groups, const Progress<S>& progress,
                                               float* result) {
#pragma unroll
  for (int quad = 0; quad < S::quads; ++quad)
#pragma unroll
    for (int unit = 0; unit < S::units; ++unit)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const group = 8 * S::slot_of(unit, i / 2) + lane.g;
        int const channel = group * S::channels + S::channel_of(unit, i / 2) + (lane.t >> 1);
        if (group < groups)
          result[(4 * quad + lane.t % 2 * 2 + i % 2) * S::dim + channel] = progress.weighted[quad][unit][i];
      }
}

// The first of this warp's codes of a unit in the first row of a page; NULL where the segment has none of its tokens.
template <class S>
__device__ __forceinline__ const uint8_t* page_of(const Shared<S>& shared, int unit) {
  Interval const codes = shared.segment.seen.codes;
  int const begin = unit * unit_tokens + static_cast<int>(threadIdx.x) / 32 * S::warp_tokens;
  return begin < codes.end && begin + S::warp_tokens > codes.begin
             ? shared.pages[begin / page_tokens] + begin % page_tokens
             : nullptr;
}

template <class S>
__device__ __forceinline__ void take_codes(const Step& step, Shared<S>& shared) {
  int const warp = threadIdx.x / 32;
  Lane<S> const lane(static_cast<int>(threadIdx.x) % 32);
  Interval const seen = shared.segment.seen.codes;
  int const first_unit = seen.begin / unit_tokens;
  int const end_unit = blocks_of(seen.end, unit_tokens);
  int const groups = step.params.head_dim / S::channels;
  int64_t const key_codes = step.params.key_page_offset + shared.segment.kv_head * step.params.key_page_stride;
  int64_t const value_codes = step.params.value_page_offset + shared.segment.kv_head * step.params.value_page_stride;

  Codes<S> codes{};
  const uint8_t* page = page_of(shared, first_unit);
  if (page) codes.load_keys(shared, lane, page + key_codes);
  fetch_step(step, shared, first_unit);
  if (first_unit + 1 < end_unit) fetch_step(step, shared, first_unit + 1);
  gpu::cp_async_commit();
  KeyAngles<S> const angles(step, lane, warp);
  gpu::cp_async_wait<0>();
  __syncthreads();
  write_operands(shared, first_unit);
  __syncthreads();
  Progress<S> progress;
  for (int unit = first_unit; unit < end_unit; ++unit) {
    const uint8_t* const next = unit + 1 < end_unit ? page_of(shared, unit + 1) : nullptr;
    if (unit + 1 < end_unit) write_operands(shared, unit + 1);
    if (unit + 2 < end_unit) fetch_step(step, shared, unit + 2);
    gpu::cp_async_commit();
#pragma unroll 1
    for (int part = 0; part < S::parts; ++part) {
      Logits<S> logits;
      if (page) {
        codes.load_values(lane, groups, page + value_codes + part * S::part_tokens);
        multiply_keys(shared, lane, angles, shared.operands[unit % 2], part, codes, logits);
      }
      bool const last = part + 1 == S::parts;
      if (last ? next : page)
        codes.load_keys(shared, lane, last ? next + key_codes : page + key_codes + (part + 1) * S::part_tokens);
      if (!page) continue;
      if (step.params.softcap > 0)
#pragma unroll
        for (auto& quad : logits)
#pragma unroll
          for (float& logit : quad) logit = capped(step, logit);
      int const begin = unit * unit_tokens + warp * S::warp_tokens + part * S::part_tokens;
      if (begin < seen.begin || begin + S::part_tokens > seen.end) {
#pragma unroll
        for (int tile = 0; tile < S::tiles; ++tile) {
          int const position = begin + lane.token() + tile;
          if (position < seen.begin || position >= seen.end)
#pragma unroll
            for (auto& quad : logits) quad[tile] = unseen;
        }
      }
      raise_maxima<S>(lane, logits, progress);
      add_values(shared, lane, codes, logits, progress);
    }
    page = next;
    gpu::cp_async_wait<0>();
    __syncthreads();  // both buffers of operands change their part
  }
#pragma unroll
  for (int quad = 0; quad < S::quads; ++quad) {
    float sum = progress.sums[quad];
    for (int const offset : {1, 2, 16}) sum += __shfl_xor_sync(~0u, sum, offset);
    if (lane.g < 4 && lane.t == 0) shared.sums[warp][4 * quad + lane.g] = {progress.maxima[quad], sum};
  }
  fold_warps(shared, [&](float* result) { leave_weighted(lane, groups, progress, result); });
}

// The segments of this block's range, one after the other.
template <class S>
__device__ __forceinline__ void run_segments(const Step& step) {
  GPU_DYNAMIC_SHARED(Shared<S>, memory);
  Shared<S>& shared = *memory;
  gpu::let_next_start();
  make_key_rows(step, shared);
  gpu::wait_for_last();
  Ranges const ranges(step);
  int const begin = ranges.begin(blockIdx.x);
  if (begin == ranges.end(blockIdx.x)) return;
  if (threadIdx.x == 0) {
    shared.at = begin;
    shared.table_head = -1;
  }
  for (;;) {
    __syncthreads();  // the segment before is done
    int const at = shared.at;
    if (at == Ranges(step).end(blockIdx.x)) break;
    Segment const segment = segment_at(step, at);
    bool const other_head = segment.kv_head != shared.table_head;
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.at = at + segment.units;
      shared.table_head = segment.kv_head;
      shared.segment = segment;
      shared.pages = step.params.sequences[segment.sequence].pages;
    }
    if (other_head) load_tables(step, segment.kv_head, shared);
    for (int element = threadIdx.x; element < S::heads * S::dim; element += S::threads)
      shared.weighted[element / S::dim][element % S::dim] = 0;
    if (static_cast<int>(threadIdx.x) < S::heads) shared.total[threadIdx.x] = {nothing, 0};
    __syncthreads();
    load_query(step, shared);
    __syncthreads();
    if (size_of(shared.segment.seen.below) + size_of(shared.segment.seen.above) > 0) take_dense(step, shared);
    if (size_of(shared.segment.seen.codes) > 0) take_codes(step, shared);
    int const head_dim = step.params.head_dim;
    int64_t const slot = static_cast<int64_t>(shared.segment.slot) * S::heads;
    for (int element = threadIdx.x; element < shared.segment.rows * head_dim; element += S::threads)
      step.weighted[slot * head_dim + element] = shared.weighted[element / head_dim][element % head_dim];
    if (static_cast<int>(threadIdx.x) < shared.segment.rows) step.sums[slot + threadIdx.x] = shared.total[threadIdx.x];
  }
}

}  // namespace couplet::cuda::attend::gather
