// Consumers: a warp has 16 rows, whose queries and weighted sums are in registers, and takes every tile that they see.
//   scores = queries x keys -> powers of two in registers, which are the operand of powers x values as they lie
#pragma once

#include "shape.h"

namespace couplet::cuda::attend::prefill {

// ---- queries -----------------------------------------------------------------------------------------------------------------
// A warp's rows as A operands of 16 channels each, by way of its shared memory: rotated to their positions, times scale, log2(e) and the
// amplitudes of both query and key.
template <int Dim>
__device__ __forceinline__ void load_queries(const Step& step, const Task& task, int warp_row, unsigned char* staged,
                                             uint32_t (&queries)[Dim / 16][4]) {
  constexpr float log2_e = 1.4426950408889634f;
  const Angles& angles = step.angles;
  int const lane = gpu::lane_id();
  int const pairs = angles.pairs;
  bool const half = angles.kind == COUPLET_ROTARY_HALF;
  float const scale = step.params.scale * log2_e;
  const couplet_attend_sequence& sequence = *task.sequence;
  // Of row lane % 16.
  int const own_row = min(warp_row + lane % warp_rows, task.count - 1);
  int const own_token = task.token(step, own_row);
  int64_t const own_query =
      own_token * sequence.query_token_stride + task.head(step, own_row) * sequence.query_head_stride;
  uint32_t beyond = 0;
  auto const store = [&](int row, int channel, float value) {
    uint32_t const bits = gpu::cvt_f16x2(value, 0);
    beyond |= reaches(bits, most_query);
    *reinterpret_cast<uint16_t*>(staged + chunk_at<Dim>(row, channel / 8) + channel % 8 * 2) =
        static_cast<uint16_t>(bits);
  };
  int const dtype = step.params.query_dtype;
  auto const load = [&](int row, int channel) {  // bits, so that nothing waits for them before all are asked for
    int64_t const at = __shfl_sync(~0u, own_query, row) + channel;
    if (channel >= step.params.head_dim) return 0u;
    return dtype == COUPLET_FLOAT32 ? __ldg(static_cast<const unsigned*>(sequence.queries) + at)
                                    : unsigned{__ldg(static_cast<const unsigned short*>(sequence.queries) + at)};
  };
  auto const value_of = [&](unsigned bits) {
    auto const low = static_cast<uint16_t>(bits);
    return (dtype == COUPLET_FLOAT32   ? __uint_as_float(bits)
            : dtype == COUPLET_FLOAT16 ? __half2float(__ushort_as_half(low))
                                       : __bfloat162float(__ushort_as_bfloat16(low))) *
           scale;
  };
  // Some rows at a time, so that their loads are under way together.
  constexpr int some = 8;
#pragma unroll 1
  for (int first = 0; first < warp_rows; first += some) {
#pragma unroll 1
    for (int column = 0; column < Dim - pairs; column += 32) {
      int const pair = column + lane;
      bool const rotated = pair < pairs;
      int const x = !rotated ? pair + pairs : half ? pair : 2 * pair;
      int const y = !rotated ? Dim : half ? pair + pairs : 2 * pair + 1;
      float const amplitude = rotated ? angles.amplitudes[pair] : 1;
      uint2 values[some];
      float2 offsets[some];
      float2 blocks[some];
#pragma unroll
      for (int i = 0; i < some; ++i) {
        int const position = sequence.first_query + __shfl_sync(~0u, own_token, first + i);
        values[i] = {load(first + i, x), load(first + i, y)};
        offsets[i] = rotated ? angles.offsets[position % rotary_block * pairs + pair] : float2{1, 0};
        blocks[i] = rotated ? block_angle(angles, position / rotary_block, pair) : float2{1, 0};
      }
#pragma unroll
      for (int i = 0; i < some; ++i) {
        float2 const turned =
            add_angles({value_of(values[i].x), value_of(values[i].y)}, add_angles(offsets[i], blocks[i]));
        if (x < Dim) store(first + i, x, turned.x * amplitude * amplitude);
        if (y < Dim) store(first + i, y, turned.y * amplitude * amplitude);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < Dim / 16; ++k) gpu::ldmatrix(queries[k], staged + chunk_at<Dim>(lane % 16, 2 * k + lane / 16));
  if (__any_sync(~0u, beyond != 0) && lane == 0) leave_to_wide(step, task);
}

// ---- tiles -------------------------------------------------------------------------------------------------------------------
// Writes what a warp's rows see of a stretch: nothing where there is no row.
__device__ __forceinline__ void find_limits(const Step& step, const Task& task, int warp_row, int part,
                                            Limits& limits) {
  __syncwarp();  // all lanes are done with those before
  if (gpu::lane_id() == 0) {
    limits = {.part = part, .end = task.stretch(part).end, .some = {}, .all = {}};
    if (warp_row < task.count) {
      Interval const first = Task::part_of(task.seen(step, warp_row), part);
      Interval const last = Task::part_of(task.seen(step, min(warp_row + warp_rows, task.count) - 1), part);
      limits.some = {first.begin, last.end};
      limits.all = {last.begin, first.end};
    }
  }
  __syncwarp();
}

constexpr int tile_columns = tile_tokens / 8;

// Where a lane reads the first operand of a tile's keys, and of its values: rows and chunks of the four matrices of an ldmatrix.
template <int Dim>
struct Operands {
  int key = chunk_at<Dim>(gpu::lane_id() % 8 + gpu::lane_id() / 16 * 8, gpu::lane_id() / 8 % 2);
  int value = chunk_at<Dim>(gpu::lane_id() % 16, gpu::lane_id() / 16);
};

// Scores of the warp's rows: [8 tokens][row g or g + 8 (element / 2), token 2t + element % 2].
template <int Dim>
__device__ __forceinline__ void multiply_keys(const uint32_t (&queries)[Dim / 16][4], const unsigned char* keys,
                                              int first, float (&scores)[tile_columns][4]) {
  int const own = gpu::unknown(first);  // or the others would be kept from tile to tile
#pragma unroll
  for (int n = 0; n < tile_columns; ++n)
    for (float& score : scores[n]) score = 0;
#pragma unroll
  for (int k = 0; k < Dim / 16; ++k) {
#pragma unroll
    for (int n = 0; n < tile_columns; n += 2) {
      uint32_t b[4];
      gpu::ldmatrix(b, keys + 8 * n * Shape<Dim>::row_bytes + chunk_behind(own, 2 * k));
      gpu::mma_m16n8k16_f16(scores[n], queries[k], {b[0], b[1]});
      gpu::mma_m16n8k16_f16(scores[n + 1], queries[k], {b[2], b[3]});
    }
  }
}

struct Softmax {  // of a lane's two rows; sums are the lane's own share
  float maxima[2];
  float sums[2];
};

// Scores -> powers in place, of which `powers` are the operands of 16 tokens each.
template <int Dim>
__device__ __forceinline__ void take_powers(float (&scores)[tile_columns][4], Softmax& softmax,
                                            float (&weighted)[Dim / 8][4], uint32_t (&powers)[tile_columns / 2][4]) {
  float maxima[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = softmax.maxima[row];
#pragma unroll
    for (int n = 0; n < tile_columns; ++n) largest = max(largest, max(scores[n][2 * row], scores[n][2 * row + 1]));
    for (int offset = 1; offset < 4; offset *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, offset));
    maxima[row] = largest;
  }
  if (__any_sync(~0u, maxima[0] != softmax.maxima[0] || maxima[1] != softmax.maxima[1])) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float const factor = gpu::ex2_approx(softmax.maxima[row] - maxima[row]);
      softmax.maxima[row] = maxima[row];
      softmax.sums[row] *= factor;
#pragma unroll
      for (int c = 0; c < Dim / 8; ++c) {
        weighted[c][2 * row] *= factor;
        weighted[c][2 * row + 1] *= factor;
      }
    }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float const one = maxima[row] - headroom;
#pragma unroll
    for (int n = 0; n < tile_columns; ++n) {
      float const first = gpu::ex2_approx(scores[n][2 * row] - one);
      float const second = gpu::ex2_approx(scores[n][2 * row + 1] - one);
      softmax.sums[row] += first + second;
      powers[n / 2][n % 2 * 2 + row] = gpu::cvt_f16x2(first, second);
    }
  }
}

// weighted += powers x values: [8 channels][row g or g + 8 (element / 2), channel 2t + element % 2]
template <int Dim>
__device__ __forceinline__ void multiply_values(const uint32_t (&powers)[tile_columns / 2][4],
                                                const unsigned char* values, int first, float (&weighted)[Dim / 8][4]) {
  int const own = gpu::unknown(first);
#pragma unroll
  for (int k = 0; k < tile_tokens / 16; ++k) {
#pragma unroll
    for (int c = 0; c < Dim / 8; c += 2) {
      uint32_t b[4];
      gpu::ldmatrix<true>(b, values + 16 * k * Shape<Dim>::row_bytes + chunk_behind(own, c));
      gpu::mma_m16n8k16_f16(weighted[c], powers[k], {b[0], b[1]});
      gpu::mma_m16n8k16_f16(weighted[c + 1], powers[k], {b[2], b[3]});
    }
  }
}

// Bits first to end - 1 of those of 64 tokens.
__device__ __forceinline__ uint64_t bits_between(int first, int end) {
  if (first >= tile_tokens || end <= 0 || first >= end) return 0;
  uint64_t const from_first = ~uint64_t{0} << max(first, 0);
  return end >= tile_tokens ? from_first : from_first & ((uint64_t{1} << end) - 1);
}

template <int Dim>
__device__ __forceinline__ void take_tile(const Step& step, const typename Shared<Dim>::Tile& tile,
                                          const Operands<Dim>& operands, uint64_t there, const Task& task, int warp_row,
                                          int begin, const Limits& limits, const uint32_t (&queries)[Dim / 16][4],
                                          Softmax& softmax, float (&weighted)[Dim / 8][4]) {
  float scores[tile_columns][4];
  multiply_keys<Dim>(queries, tile.keys, operands.key, scores);
  if (step.params.softcap > 0) {
#pragma unroll
    for (int n = 0; n < tile_columns; ++n)
      for (float& score : scores[n]) score = capped(step, score);
  }
  bool const whole = there == ~uint64_t{0} && begin >= limits.all.begin && begin + tile_tokens <= limits.all.end;
  if (!whole) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      int const own = gpu::unknown(warp_row) + gpu::lane_id() / 4 + 8 * row;
      Interval const seen = Task::part_of(task.seen(step, min(own, task.count - 1)), limits.part);
      uint64_t const visible =
          (there & bits_between(seen.begin - begin, seen.end - begin)) >> (2 * (gpu::lane_id() % 4));
#pragma unroll
      for (int n = 0; n < tile_columns; ++n)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd)
          if (!(visible >> (8 * n + odd) & 1)) scores[n][2 * row + odd] = unseen;
    }
  }
  uint32_t powers[tile_columns / 2][4];
  take_powers<Dim>(scores, softmax, weighted, powers);
  multiply_values<Dim>(powers, tile.values, operands.value, weighted);
}

// ---- outputs -------------------------------------------------------------------------------------------------------------------
// Two neighbouring channels, in one access where they lie so.
__device__ __forceinline__ void store_pair(void* outputs, int32_t dtype, int64_t at, float first, float second) {
  if (at % 2 == 0 && reinterpret_cast<uintptr_t>(outputs) % 8 == 0) {
    if (dtype == COUPLET_FLOAT32)
      *reinterpret_cast<float2*>(static_cast<float*>(outputs) + at) = {first, second};
    else
      *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(outputs) + at) =
          dtype == COUPLET_FLOAT16 ? gpu::cvt_f16x2(first, second) : gpu::cvt_bf16x2(first, second);
  } else {
    store_element(outputs, dtype, at, first);
    store_element(outputs, dtype, at + 1, second);
  }
}

template <int Dim>
__device__ __forceinline__ void write_rows(const Step& step, const Task& task, int warp_row, const Softmax& softmax,
                                           const float (&weighted)[Dim / 8][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = softmax.sums[half];
    for (int offset = 1; offset < 4; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    int const row = warp_row + gpu::lane_id() / 4 + 8 * half;
    if (row >= task.count) continue;
    const couplet_attend_sequence& sequence = *task.sequence;
    int const head = task.head(step, row);
    int64_t const to = task.token(step, row) * sequence.output_token_stride + head * sequence.output_head_stride;
    float const factor = output_factor(step.params, head, softmax.maxima[half] - headroom, sum);
#pragma unroll
    for (int c = 0; c < Dim / 8; ++c) {
      int const channel = 8 * c + gpu::lane_id() % 4 * 2;
      if (channel < step.params.head_dim)
        store_pair(sequence.outputs, step.params.output_dtype, to + channel, weighted[c][2 * half] * factor,
                   weighted[c][2 * half + 1] * factor);
    }
  }
}

template <int Dim>
__device__ __forceinline__ void run_consumer(const Step& step, Shared<Dim>& shared) {
  int const warp = static_cast<int>(threadIdx.x) / 32;
  int const warp_row = warp * warp_rows;
  Task& task = shared.tasks[warp];
  Operands<Dim> const operands;
  unsigned count = 0;  // tiles so far
  Limits& limits = shared.limits[warp];
  for_each_task(step, task, [&] {
    uint32_t queries[Dim / 16][4];
    load_queries<Dim>(step, task, warp_row, shared.queries[warp], queries);
    Softmax softmax{{nothing, nothing}, {0, 0}};
    float weighted[Dim / 8][4];
#pragma unroll
    for (int c = 0; c < Dim / 8; ++c)
      for (float& value : weighted[c]) value = 0;
#pragma unroll 1
    for (int part = 0; part < 3; part = limits.part + 1) {  // in the order of positions
      find_limits(step, task, warp_row, part, limits);
#pragma unroll 1
      for (int begin = task.stretch(part).begin; begin < limits.end; begin += tile_tokens, ++count) {
        unsigned const stage = count % stages;
        gpu::wait(shared.filled[stage], count / stages & 1);
        if (begin < limits.some.end && begin + tile_tokens > limits.some.begin) {
          uint64_t there;
          memcpy(&there, shared.there[stage], sizeof there);
          take_tile<Dim>(step, shared.tiles[stage], operands, there, task, warp_row, begin, limits, queries, softmax,
                         weighted);
        }
        __syncwarp();  // all lanes have read it
        if (gpu::lane_id() == 0) gpu::arrive(shared.emptied[stage]);
      }
    }
    write_rows<Dim>(step, task, warp_row, softmax, weighted);
  });
}

}  // namespace couplet::cuda::attend::prefill
