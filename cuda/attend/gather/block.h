// What the warps of a block do together: tables, query operands, tokens in full precision, and the sum of what the warps came to.
#pragma once

#include "../../device/elements.h"
#include "shape.h"

namespace couplet::cuda::attend::gather {

// ---- tables --------------------------------------------------------------------------------------------------------------------
// From [256][groups][channels], see Table, of one kv head. Chunks of 8 channels keep their 16 bytes.
template <class S>
__device__ __forceinline__ void load_tables(const Step& step, int kv_head, Shared<S>& shared) {
  constexpr int chunk_rows = 8 / S::channels;
  Places const places(step.params, step.angles);
  int const chunks = step.params.head_dim / 8;
  int64_t const head = static_cast<int64_t>(kv_head) * 256 * chunks;
  const uint4* const keys = reinterpret_cast<const uint4*>(step.key_by_code) + head;
  const uint4* const values = reinterpret_cast<const uint4*>(step.value_by_code) + head;
#pragma unroll 4
  for (int index = threadIdx.x; index < 256 * (S::dim / 8); index += S::threads) {
    int const code = index / (S::dim / 8);
    int const half = index / (S::dim / 16) % 2;
    int const place = index % (S::dim / 16);
    uint4 const row = place < places.count ? __ldg(keys + code * chunks + places.chunk(place, half)) : uint4{};
    *reinterpret_cast<uint4*>(shared.keys + code * code_bytes + half * S::dim + place * 16) = row;
  }
#pragma unroll 4
  for (int index = threadIdx.x; index < 256 * (S::dim / 8); index += S::threads) {
    int const code = index / (S::dim / 8);
    int const chunk = index % (S::dim / 8);
    // Zeros where there is no group: a row of the product passes over two units, with powers of 0 in one of them.
    uint4 const row = chunk < chunks ? __ldg(values + code * chunks + chunk) : uint4{};
    uint32_t const words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int i = 0; i < 4; i += S::unit_words) {
      int const group = chunk * chunk_rows + 2 * i / S::channels;
      int const slot = group / 8;
      int const unit = S::channels == 2 ? slot / 2 : S::channels == 4 ? slot : slot + i / 2 * S::slots;
      for (int copy = 0; copy < 2; ++copy) {
        unsigned char* const to =
            shared.values + code * code_bytes + S::value_offset(unit, S::channels == 2 ? slot % 2 : 0, group % 8, copy);
        if constexpr (S::unit_words == 2) *reinterpret_cast<uint2*>(to) = {words[i], words[i + 1]};
        if constexpr (S::unit_words == 1) *reinterpret_cast<uint32_t*>(to) = words[i];
      }
    }
  }
}

// Where a page has the codes of the groups that a lane looks up; those that are none read group 0, and rows that are 0.
template <class S>
__device__ __forceinline__ void make_key_rows(const Step& step, Shared<S>& shared) {
  constexpr int chunk_rows = 8 / S::channels;
  if (static_cast<int>(threadIdx.x) >= 4 * S::steps) return;
  Places const places(step.params, step.angles);
  int const group = threadIdx.x;  // of a half
  auto const row = [&](int half) {
    int const place = group / chunk_rows;
    return place < places.count
               ? static_cast<uint32_t>((places.chunk(place, half) * chunk_rows + group % chunk_rows) * page_tokens)
               : 0;
  };
  shared.key_rows[group / 4][group % 4] = row(0) | row(1) << 16;
}

// ---- queries -------------------------------------------------------------------------------------------------------------------
// Tokens of a page by which the query's angle of a set lies behind that of set 0.
template <class S>
__device__ __forceinline__ int shift_of(int set) {
  constexpr int sets_of_part = S::tiles / S::phases;
  return set / sets_of_part * S::part_tokens + set % sets_of_part * S::phases;
}

__device__ __forceinline__ float4 rotate_two(float4 pairs, float4 angles) {
  float2 const first = add_angles({pairs.x, pairs.y}, {angles.x, angles.y});
  float2 const second = add_angles({pairs.z, pairs.w}, {angles.z, angles.w});
  return {first.x, first.y, second.x, second.y};
}

// The segment's queries, as they are and rotated by the position's offset in its block; a thread takes two pairs of a head.
template <class S>
__device__ __forceinline__ void load_query(const Step& step, Shared<S>& shared) {
  constexpr float log2_e = 1.4426950408889634f;
  constexpr float4 still{1, 0, 1, 0};
  const Segment& segment = shared.segment;
  const couplet_attend_sequence& sequence = step.params.sequences[segment.sequence];
  const Angles& angles = step.angles;
  Places const places(step.params, angles);
  float const factor = step.params.scale * log2_e;
  for (int index = threadIdx.x; index < S::heads * S::dim / 4; index += S::threads) {
    int const head = index / (S::dim / 4);
    int const pair = index % (S::dim / 4) * 2;  // slot channel
    float4 value{};
    if (pair / 8 < places.count) {
      int const low = places.channel(pair, 0);
      int const high = places.channel(pair, 1);
      if (head < segment.rows) {
        int64_t const query = (segment.first_head + head) * sequence.query_head_stride;
        auto const at = [&](int channel) {
          return load_element(sequence.queries, step.params.query_dtype, query + channel) * factor;
        };
        value = {at(low), at(high), at(low + 1), at(high + 1)};
      }
      shared.plain_queries[head][low] = value.x;
      shared.plain_queries[head][high] = value.y;
      shared.plain_queries[head][low + 1] = value.z;
      shared.plain_queries[head][high + 1] = value.w;
      if (pair / 8 < places.rotated) {  // by a query that carries the key's amplitude as well
        const float2* const offset = angles.offsets + segment.position % unit_tokens * angles.pairs + pair;
        auto const squared = [&](int i) { return angles.amplitudes[pair + i] * angles.amplitudes[pair + i]; };
        value = rotate_two(value, {offset[0].x * squared(0), offset[0].y * squared(0), offset[1].x * squared(1),
                                   offset[1].y * squared(1)});
      }
    }
    shared.query[head][pair / 2] = value;
  }
  for (int index = threadIdx.x; index < S::sets * S::dim / 4; index += S::threads) {
    int const set = index / (S::dim / 4);
    int const pair = index % (S::dim / 4) * 2;
    bool const rotated = pair / 8 < places.rotated;
    const float2* const offset = angles.offsets + shift_of<S>(set) * angles.pairs + pair;
    shared.shift[set][pair / 2] = rotated ? float4{offset[0].x, -offset[0].y, offset[1].x, -offset[1].y} : still;
    if (set < 2 && !rotated) shared.step[set][pair / 2] = still;  // fetch_step writes the others
  }
}

// Issues the copies of the angles by which the query is rotated for keys of a unit: its distance in blocks, below 4096 (see select).
template <class S>
__device__ __forceinline__ void fetch_step(const Step& step, Shared<S>& shared, int unit) {
  int const pair = 2 * threadIdx.x;
  if (pair >= step.angles.pairs) return;
  int const blocks = shared.segment.position / unit_tokens - unit;
  gpu::cp_async<16>(&shared.step[unit % 2][threadIdx.x], step.angles.steps + blocks * step.angles.pairs + pair);
}

// Operands of all sets for a unit whose step is there.
template <class S>
__device__ __forceinline__ void write_operands(Shared<S>& shared, int unit) {
  constexpr unsigned quarter = S::dim / 4;
#pragma unroll
  for (unsigned first = 0; first < S::sets * S::heads * quarter; first += S::threads) {
    unsigned const index = first + threadIdx.x;  // unsigned: division by powers of two is then a shift
    if (S::sets * S::heads * quarter % S::threads && index >= S::sets * S::heads * quarter) break;
    unsigned const set = index / (S::heads * quarter);
    unsigned const head = index / quarter % S::heads;
    unsigned const place = index % quarter;
    float4 const value =
        rotate_two(rotate_two(shared.query[head][place], shared.step[unit & 1][place]), shared.shift[set][place]);
    unsigned const group = 2 * place / S::channels;  // of a half
    unsigned const word = S::word_of(group / 4, 0, place % S::words);
    uint32_t* const to = shared.operands[unit & 1][set][head / 4] + (head % 4 * 4 + group % 4) * 4;
    to[S::quad_of(word) * 64 + S::place_in_quad(word)] = gpu::cvt_f16x2(value.x, value.z);
    to[S::quad_of(word + S::words) * 64 + S::place_in_quad(word + S::words)] = gpu::cvt_f16x2(value.y, value.w);
  }
}

// ---- sums of all warps -----------------------------------------------------------------------------------------------------------
// Adds what the warps have to the segment's total. shared.sums is theirs before; leave(result) writes a warp's weighted sums.
template <class S, class Leave>
__device__ __forceinline__ void fold_warps(Shared<S>& shared, Leave leave) {
  int const warp = threadIdx.x / 32;
  __syncthreads();  // all sums are there, and the operands are no longer read
  for (int first = 0; first < S::warps; first += Shared<S>::results) {
    if (warp >= first && warp < first + Shared<S>::results) leave(shared.results_of[warp - first]);
    __syncthreads();
    for (int element = threadIdx.x; element < S::heads * S::dim; element += S::threads) {
      int const head = element / S::dim;
      float maximum = shared.total[head].x;
      for (int other = 0; other < S::warps; ++other) maximum = max(maximum, shared.sums[other][head].x);
      float& weighted = shared.weighted[head][element % S::dim];
      float sum = first == 0 ? weighted * gpu::ex2_approx(shared.total[head].x - maximum) : weighted;
      for (int other = 0; other < Shared<S>::results; ++other)
        sum += shared.results_of[other][element] * gpu::ex2_approx(shared.sums[first + other][head].x - maximum);
      weighted = sum;
    }
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) < S::heads) {
    float2& total = shared.total[threadIdx.x];
    float maximum = total.x;
    for (int other = 0; other < S::warps; ++other) maximum = max(maximum, shared.sums[other][threadIdx.x].x);
    float sum = total.y * gpu::ex2_approx(total.x - maximum);
    for (int other = 0; other < S::warps; ++other)
      sum += shared.sums[other][threadIdx.x].y * gpu::ex2_approx(shared.sums[other][threadIdx.x].x - maximum);
    total = {maximum, sum};
  }
  __syncthreads();
}

// ---- tokens in full precision ------------------------------------------------------------------------------------------------
// A warp takes 8 of each 64 tokens; a lane holds slot channels lane + 32 k of both halves. Keys are rotated to the query, which is the
// plain one.
template <class S>
__device__ __forceinline__ void take_dense(const Step& step, Shared<S>& shared) {
  constexpr int chunk = 4;  // tokens whose loads are under way together
  constexpr int parts = S::dim / 64;
  int const warp = threadIdx.x / 32;
  int const lane = threadIdx.x % 32;
  const Segment& segment = shared.segment;
  const couplet_attend_sequence& sequence = step.params.sequences[segment.sequence];
  int const below = size_of(segment.seen.below);
  int const count = below + size_of(segment.seen.above);
  Places const places(step.params, step.angles);
  bool used[parts];
  bool rotated[parts];
  int channels[parts][2];
  float2 away[parts];  // the query's angle, backwards
  for (int k = 0; k < parts; ++k) {
    int const pair = lane + 32 * k;
    used[k] = pair / 8 < places.count;
    rotated[k] = pair / 8 < places.rotated;
    for (int half = 0; half < 2; ++half) channels[k][half] = used[k] ? places.channel(pair, half) : 0;
    float2 const angle = rotated[k] ? position_angle(step.angles, segment.position, pair) : float2{1, 0};
    away[k] = {angle.x, -angle.y};
  }
  float maxima[S::heads];
  float sums[S::heads];
  float weighted[S::heads][parts][2];
#pragma unroll
  for (int head = 0; head < S::heads; ++head) {
    maxima[head] = nothing;
    sums[head] = 0;
    for (auto& pair : weighted[head]) pair[0] = pair[1] = 0;
  }
  for (int first = warp * 8; first < count; first += S::warps * 8) {
    int const index = first + lane;
    int const own = index < below ? segment.seen.below.begin + index : segment.seen.above.begin + index - below;
    DenseToken mine{nullptr, nullptr};
    if (lane < 8 && index < count) mine = dense_token(sequence, own, segment.kv_head);
    for (int begin = 0; begin < 8; begin += chunk) {
      float2 keys[chunk][parts];
      float2 values[chunk][parts];
      bool there[chunk];
#pragma unroll
      for (int i = 0; i < chunk; ++i) {
        auto const from = [&](const float* row) {
          return reinterpret_cast<const float*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(row), begin + i));
        };
        const float* const key = from(mine.key);
        const float* const value = from(mine.value);
        int const position = __shfl_sync(~0u, own, begin + i);
        there[i] = key != nullptr;
#pragma unroll
        for (int k = 0; k < parts; ++k) {
          bool const read = there[i] && used[k];
          keys[i][k] = read ? float2{key[channels[k][0]], key[channels[k][1]]} : float2{0, 0};
          values[i][k] = read ? float2{value[channels[k][0]], value[channels[k][1]]} : float2{0, 0};
          if (there[i] && rotated[k])
            keys[i][k] =
                add_angles(keys[i][k], add_angles(position_angle(step.angles, position, lane + 32 * k), away[k]));
        }
      }
#pragma unroll
      for (int i = 0; i < chunk; ++i)
#pragma unroll
        for (int head = 0; head < S::heads; ++head) {
          float product = 0;
#pragma unroll
          for (int k = 0; k < parts; ++k)
            if (used[k])
              product += shared.plain_queries[head][channels[k][0]] * keys[i][k].x +
                         shared.plain_queries[head][channels[k][1]] * keys[i][k].y;
          for (int offset = 16; offset > 0; offset /= 2) product += __shfl_xor_sync(~0u, product, offset);
          if (step.params.softcap > 0) product = capped(step, product);
          float const logit = there[i] ? product : unseen;
          float const maximum = max(maxima[head], logit);
          float const factor = gpu::ex2_approx(maxima[head] - maximum);
          float const power = gpu::ex2_approx(logit - maximum);
          maxima[head] = maximum;
          sums[head] = sums[head] * factor + power;
#pragma unroll
          for (int k = 0; k < parts; ++k) {
            weighted[head][k][0] = weighted[head][k][0] * factor + power * values[i][k].x;
            weighted[head][k][1] = weighted[head][k][1] * factor + power * values[i][k].y;
          }
        }
    }
  }
#pragma unroll
  for (int head = 0; head < S::heads; ++head)
    if (lane == 0) shared.sums[warp][head] = {maxima[head], sums[head]};
  fold_warps(shared, [&](float* result) {
#pragma unroll
    for (int head = 0; head < S::heads; ++head)
      for (int k = 0; k < parts; ++k)
        for (int half = 0; half < 2; ++half)
          if (used[k]) result[head * S::dim + channels[k][half]] = weighted[head][k][half];
  });
}

}  // namespace couplet::cuda::attend::gather
