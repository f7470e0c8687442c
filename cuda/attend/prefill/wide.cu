// Attention of sequences with several queries, for every codec, shape and option, and numbers of any size. A block takes 16 rows a warp, a row being one query head of
// one query token; all rows share a kv head. Tiles of 32 tokens:
//   keys    decoded, or copied where they are in full precision, rotated to their positions, rounded to tf32
//   values  likewise, not rotated
//   scores  = queries x keys by tensor cores -> softmax in registers -> operand of probabilities x values: the columns of an
//           mma's k are permuted (t is token 2t, t + 4 is token 2t + 1), so that no register has to move.
// tf32 has float16's 10 bits and float32's range: nothing that the CPU can attend to overflows here. For 128 channels and 8 warps a tile costs
// a warp 128 mma with 2 to 3 loads from shared memory each, and its share of the decoding 32 loads: loads are what limits.
#include "../step.h"
#include "../tokens.h"
#include "launch.h"

namespace couplet::cuda::attend::prefill {
namespace {

constexpr int warp_rows = 16;
constexpr int tile_tokens = 32;
constexpr int tile_columns = tile_tokens / 8;  // of 8 tokens: n of the scores' mma, k of the values'

// ---- device helpers ----------------------------------------------------------------------------------------------------------
// Rows of 4 floats more than channels: with (channels + 4) / 4 odd, the 8 rows x 4 columns of an operand lie in 32 banks, and so do
// the 4 pairs of rows x 8 columns of a value operand.
// A constant, so that the places of an operand are one register and offsets.
__host__ __device__ constexpr int stride_of(int most_dim) { return most_dim + 4; }

struct Shared {
  uint32_t* queries;  // tf32 [rows][stride]
  uint32_t* keys;     // tf32 [tile_tokens][stride]
  uint32_t* values;   // likewise
};

// Which tokens of an interval of positions each of a lane's two rows, g and g + 8, sees; where a row sees nothing it is empty.
struct Limits {
  Interval rows[2];
};

struct Softmax {  // of a lane's two rows; sums are the lane's own share
  float maxima[2];
  float sums[2];
};

template <int MostDim>
__device__ __forceinline__ void load_queries(const Step& step, const Rows& rows, int most_rows, uint32_t* queries) {
  int const head_dim = step.params.head_dim;
  int const pairs = step.angles.pairs;
  bool const half = step.angles.kind == COUPLET_ROTARY_HALF;
  auto const element = [&](int row, int channel) {
    int64_t const at = rows.first_row + row;
    int64_t const head = rows.kv_head * step.group_heads + at % step.group_heads;
    int64_t const query =
        at / step.group_heads * rows.sequence->query_token_stride + head * rows.sequence->query_head_stride;
    return load_element(rows.sequence->queries, step.params.query_dtype, query + channel) * step.params.scale;
  };
  int const rest = head_dim - 2 * pairs;
  for (int index = threadIdx.x; index < most_rows * (pairs + rest); index += static_cast<int>(blockDim.x)) {
    int const row = index / (pairs + rest);
    int const column = index % (pairs + rest);
    uint32_t* const to = queries + row * stride_of(MostDim);
    bool const there = row < rows.count;
    if (column < pairs) {
      int const x = half ? column : 2 * column;
      int const y = half ? column + pairs : 2 * column + 1;
      float2 turned{0, 0};
      if (there)
        turned = add_angles({element(row, x), element(row, y)},
                            position_angle(step.angles, position_of(step, rows, row), column));
      to[x] = gpu::cvt_tf32(turned.x);
      to[y] = gpu::cvt_tf32(turned.y);
    } else {
      int const channel = pairs + column;
      to[channel] = gpu::cvt_tf32(there ? element(row, channel) : 0);
    }
  }
}

// Codes of one side of a tile: a lane has a token, a warp every `Warps`th group. Values, and keys that no rotation waits for, are rounded.
template <bool Keys, int Warps, int MostDim>
__device__ __forceinline__ void load_codes(const Step& step, Token const& own, int kv_head, uint32_t* side) {
  int const head_dim = step.params.head_dim;
  couplet_codec const codec = Keys ? step.params.key_codec : step.params.value_codec;
  int const channels = codec.group_channels;
  int const groups = head_dim / channels;
  bool const round = !Keys || step.angles.pairs == 0;
  int64_t const row_bytes = static_cast<int64_t>(step.params.page_tokens) * codec.code_bits / 8;
  int64_t const group_stride = static_cast<int64_t>(channels) << codec.code_bits;
  const uint8_t* const codes =
      own.page + (Keys ? step.params.key_page_offset + kv_head * step.params.key_page_stride
                       : step.params.value_page_offset + kv_head * step.params.value_page_stride);
  const float* const centroids = (Keys ? step.key_rows : step.value_rows) + kv_head * groups * group_stride;
  uint32_t* const row = side + gpu::lane_id() * stride_of(MostDim);
#pragma unroll 2
  for (int group = static_cast<int>(threadIdx.x) / 32; group < groups; group += Warps) {
    const float* from = nullptr;
    if (own.page)
      from =
          centroids + group * group_stride + read_code(codes + group * row_bytes, own.slot, codec.code_bits) * channels;
    uint32_t* const to = row + group * channels;
    auto const bits = [&](float value) { return round ? gpu::cvt_tf32(value) : __float_as_uint(value); };
    if (channels % 4 == 0) {
      for (int channel = 0; channel < channels; channel += 4) {
        float4 const four = from ? *reinterpret_cast<const float4*>(from + channel) : float4{0, 0, 0, 0};
        *reinterpret_cast<uint4*>(to + channel) = {bits(four.x), bits(four.y), bits(four.z), bits(four.w)};
      }
    } else {
      for (int channel = 0; channel < channels; ++channel) to[channel] = bits(from ? from[channel] : 0);
    }
  }
}

// Rows in full precision: a warp has every `Warps`th token.
template <int Warps, int MostDim>
__device__ __forceinline__ void load_dense(const Step& step, DenseToken own, const Shared& shared) {
  int const head_dim = step.params.head_dim;
  bool const round = step.angles.pairs == 0;
  auto const row_of = [](const float* row, int token) {
    return reinterpret_cast<const float*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(row), token));
  };
  for (int token = static_cast<int>(threadIdx.x) / 32; token < tile_tokens; token += Warps) {
    const float* const key = row_of(own.key, token);
    const float* const value = row_of(own.value, token);
    int const at = token * stride_of(MostDim);
    for (int channel = gpu::lane_id(); channel < head_dim; channel += 32) {
      float const k = key ? key[channel] : 0;
      shared.keys[at + channel] = round ? gpu::cvt_tf32(k) : __float_as_uint(k);
      shared.values[at + channel] = gpu::cvt_tf32(value ? value[channel] : 0);
    }
  }
}

// Rotates and rounds keys, in place; a warp has every `Warps`th token.
template <int Warps, int MostDim>
__device__ __forceinline__ void rotate_keys(const Step& step, Interval positions, uint32_t* keys) {
  int const head_dim = step.params.head_dim;
  int const pairs = step.angles.pairs;
  bool const half = step.angles.kind == COUPLET_ROTARY_HALF;
#pragma unroll 2
  for (int token = static_cast<int>(threadIdx.x) / 32; token < tile_tokens; token += Warps) {
    uint32_t* const row = keys + token * stride_of(MostDim);
    int const position = min(positions.begin + token, positions.end - 1);
#pragma unroll 2
    for (int pair = gpu::lane_id(); pair < pairs; pair += 32) {
      uint32_t& x = row[half ? pair : 2 * pair];
      uint32_t& y = row[half ? pair + pairs : 2 * pair + 1];
      float2 const turned =
          add_angles({__uint_as_float(x), __uint_as_float(y)}, position_angle(step.angles, position, pair));
      x = gpu::cvt_tf32(turned.x);
      y = gpu::cvt_tf32(turned.y);
    }
    for (int channel = 2 * pairs + gpu::lane_id(); channel < head_dim; channel += 32)
      row[channel] = gpu::cvt_tf32(__uint_as_float(row[channel]));
  }
}

// Scores of the warp's rows with the tile's tokens: [8 tokens][row g or g + 8 (element / 2), token 2t + element % 2].
template <int MostDim>
__device__ __forceinline__ void multiply_keys(const uint32_t* queries, const uint32_t* keys, int head_dim,
                                              float (&scores)[tile_columns][4]) {
  int const g = gpu::lane_id() / 4;
  int const t = gpu::lane_id() % 4;
  constexpr int stride = stride_of(MostDim);
#pragma unroll
  for (int n = 0; n < tile_columns; ++n)
    for (float& score : scores[n]) score = 0;
#pragma unroll 2
  for (int k = 0; k < head_dim; k += 8) {
    const uint32_t* const query = queries + g * stride + k + t;
    uint32_t const a[4] = {query[0], query[8 * stride], query[4], query[8 * stride + 4]};
#pragma unroll
    for (int n = 0; n < tile_columns; ++n) {
      const uint32_t* const key = keys + (8 * n + g) * stride + k + t;
      uint32_t const b[2] = {key[0], key[4]};
      gpu::mma_m16n8k8_tf32(scores[n], a, b);
    }
  }
}

// Scores -> probabilities, in place and rounded to tf32; `factors` is what the sums so far shrink by.
__device__ __forceinline__ void normalize(const Step& step, const Limits& limits, int begin, uint32_t there,
                                          float (&scores)[tile_columns][4], Softmax& softmax, float (&factors)[2]) {
  int const t = gpu::lane_id() % 4;
  uint32_t visible = 0;  // a bit for each score
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < tile_columns; ++n)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        int const token = 8 * n + 2 * t + odd;
        int const position = begin + token;
        float& score = scores[n][2 * row + odd];
        if (!(there >> token & 1) || position < limits.rows[row].begin || position >= limits.rows[row].end) continue;
        visible |= 1u << (8 * row + 2 * n + odd);
        score = capped_logit(step.params, score);
        largest = max(largest, score);
      }
    for (int offset = 1; offset < 4; offset *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, offset));
    float const before = softmax.maxima[row];
    float const maximum = max(before, largest);
    factors[row] = before == maximum ? 1 : gpu::ex2_approx(before - maximum);  // both may be -infinity
    softmax.maxima[row] = maximum;
    softmax.sums[row] *= factors[row];
#pragma unroll
    for (int n = 0; n < tile_columns; ++n)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        bool const is_visible = visible >> (8 * row + 2 * n + odd) & 1;
        float& score = scores[n][2 * row + odd];
        score = is_visible ? __uint_as_float(gpu::cvt_tf32(gpu::ex2_approx(score - maximum))) : 0;
        softmax.sums[row] += score;
      }
  }
}

// weighted += probabilities x values. [8 channels][row g or g + 8 (element / 2), channel 2t + element % 2]
template <int MostDim>
__device__ __forceinline__ void multiply_values(const float (&probabilities)[tile_columns][4], const uint32_t* values,
                                                int head_dim, const float (&factors)[2],
                                                float (&weighted)[MostDim / 8][4]) {
  int const g = gpu::lane_id() / 4;
  int const t = gpu::lane_id() % 4;
  constexpr int stride = stride_of(MostDim);
#pragma unroll
  for (int c = 0; c < MostDim / 8; ++c) {
    if (8 * c >= head_dim) break;
    for (int part = 0; part < 4; ++part) weighted[c][part] *= factors[part / 2];
#pragma unroll
    for (int n = 0; n < tile_columns; ++n) {
      const uint32_t* const value = values + (8 * n + 2 * t) * stride + 8 * c + g;
      uint32_t const b[2] = {value[0], value[stride]};
      uint32_t const a[4] = {__float_as_uint(probabilities[n][0]), __float_as_uint(probabilities[n][2]),
                             __float_as_uint(probabilities[n][1]), __float_as_uint(probabilities[n][3])};
      gpu::mma_m16n8k8_tf32(weighted[c], a, b);
    }
  }
}

template <int Warps, int MostDim>
__device__ __forceinline__ void take_positions(const Step& step, const Shared& shared, const Rows& rows, int warp_row,
                                               bool coded, Interval positions, const Limits& limits, Softmax& softmax,
                                               float (&weighted)[MostDim / 8][4]) {
  int const head_dim = step.params.head_dim;
  for (int begin = positions.begin; begin < positions.end; begin += tile_tokens) {
    Interval const tile{begin, min(begin + tile_tokens, positions.end)};
    int const position = begin + gpu::lane_id();
    Token own{};
    if (position < tile.end)
      own = coded ? token_at<true>(step.params, *rows.sequence, position, rows.kv_head)
                  : token_at<false>(step.params, *rows.sequence, position, rows.kv_head);
    uint32_t const there = __ballot_sync(~0u, own.page || own.dense.key);
    __syncthreads();  // queries are there; the tile before is done
    if (coded) {
      load_codes<true, Warps, MostDim>(step, own, rows.kv_head, shared.keys);
      load_codes<false, Warps, MostDim>(step, own, rows.kv_head, shared.values);
    } else {
      load_dense<Warps, MostDim>(step, own.dense, shared);
    }
    __syncthreads();
    if (step.angles.pairs) {
      rotate_keys<Warps, MostDim>(step, tile, shared.keys);
      __syncthreads();
    }
    if (warp_row >= rows.count) continue;
    float scores[tile_columns][4];
    float factors[2];
    multiply_keys<MostDim>(shared.queries + warp_row * stride_of(MostDim), shared.keys, head_dim, scores);
    normalize(step, limits, begin, there, scores, softmax, factors);
    multiply_values<MostDim>(scores, shared.values, head_dim, factors, weighted);
  }
}

// By way of shared memory, where the warp's own queries were, so that neighbouring lanes write neighbouring channels.
template <int MostDim>
__device__ __forceinline__ void write_rows(const Step& step, const Rows& rows, int warp_row, Softmax& softmax,
                                           const float (&weighted)[MostDim / 8][4], uint32_t* staged) {
  int const g = gpu::lane_id() / 4;
  int const t = gpu::lane_id() % 4;
  int const head_dim = step.params.head_dim;
  __syncwarp();  // all lanes have read the queries
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = softmax.sums[half];
    for (int offset = 1; offset < 4; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    int64_t const at = rows.first_row + warp_row + g + 8 * half;
    int const head = rows.kv_head * step.group_heads + static_cast<int>(at % step.group_heads);
    float const factor = output_factor(step.params, head, softmax.maxima[half], sum);
    uint32_t* const to = staged + (g + 8 * half) * stride_of(MostDim) + 2 * t;
#pragma unroll
    for (int c = 0; c < MostDim / 8; ++c) {
      if (8 * c >= head_dim) break;
      *reinterpret_cast<uint2*>(to + 8 * c) = {__float_as_uint(weighted[c][2 * half] * factor),
                                               __float_as_uint(weighted[c][2 * half + 1] * factor)};
    }
  }
  __syncwarp();
  for (int row = 0; row < min(warp_rows, rows.count - warp_row); ++row) {
    int64_t const at = rows.first_row + warp_row + row;
    int64_t const head = rows.kv_head * step.group_heads + at % step.group_heads;
    int64_t const to =
        at / step.group_heads * rows.sequence->output_token_stride + head * rows.sequence->output_head_stride;
    for (int channel = gpu::lane_id(); channel < head_dim; channel += 32)
      store_element(rows.sequence->outputs, step.params.output_dtype, to + channel,
                    __uint_as_float(staged[row * stride_of(MostDim) + channel]));
  }
}

// ---- kernel --------------------------------------------------------------------------------------------------------------------
__host__ __device__ constexpr int blocks_together(int warps, int most_dim) {
  return warps * most_dim <= 6 * 128 ? 2 : 1;
}

// A block of rows after the other, each over all that its rows see.
template <int Warps, int MostDim>
__global__ void __launch_bounds__(Warps * 32, blocks_together(Warps, MostDim)) wide(Step const step) {
  GPU_DYNAMIC_SHARED(uint32_t, dynamic);
  constexpr int most_rows = Warps * warp_rows;
  constexpr int stride = stride_of(MostDim);
  Shared const shared{dynamic, dynamic + most_rows * stride, dynamic + (most_rows + tile_tokens) * stride};
  int const warp_row = static_cast<int>(threadIdx.x) / 32 * warp_rows;
  int const sequences = step.params.sequence_count;
  int const row_blocks = step.row_begin[sequences];
  int64_t const tasks = static_cast<int64_t>(row_blocks) * step.params.kv_heads;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    // The last rows first: they see most.
    int const row_block = row_blocks - 1 - static_cast<int>(task / step.params.kv_heads);
    int const index = find_begin(step.row_begin, sequences, row_block);
    if (step.wide && step.wide[index * step.params.kv_heads + static_cast<int>(task % step.params.kv_heads)] == 0)
      continue;  // done on tiles of float16
    const couplet_attend_sequence& sequence = step.params.sequences[index];
    int64_t const first_row = static_cast<int64_t>(row_block - step.row_begin[index]) * most_rows;
    int64_t const left = static_cast<int64_t>(sequence.query_tokens) * step.group_heads - first_row;
    Rows const rows{&sequence, first_row, left < most_rows ? static_cast<int>(left) : most_rows,
                    static_cast<int>(task % step.params.kv_heads)};
    __syncthreads();  // the rows before are done
    load_queries<MostDim>(step, rows, most_rows, shared.queries);

    Softmax softmax{{-INFINITY, -INFINITY}, {0, 0}};
    float weighted[MostDim / 8][4];
#pragma unroll
    for (int c = 0; c < MostDim / 8; ++c)
      for (float& value : weighted[c]) value = 0;
    Seen const first = seen_by(step.params, sequence, position_of(step, rows, 0));
    Seen const last = seen_by(step.params, sequence, position_of(step, rows, rows.count - 1));
#pragma unroll 1
    for (int part = 0; part < 3; ++part) {  // below, codes, above: in the order of positions
      auto const interval = [&](Seen const& seen) {
        return part == 0 ? seen.below : part == 1 ? seen.codes : seen.above;
      };
      Limits limits{};  // nothing where there is no row
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const row = warp_row + gpu::lane_id() / 4 + 8 * half;
        if (row < rows.count)
          limits.rows[half] = interval(seen_by(step.params, sequence, position_of(step, rows, row)));
      }
      // From the first position that the first row sees to the last that the last one sees.
      take_positions<Warps, MostDim>(step, shared, rows, warp_row, part == 1,
                                     {interval(first).begin, interval(last).end}, limits, softmax, weighted);
    }
    if (warp_row < rows.count)
      write_rows<MostDim>(step, rows, warp_row, softmax, weighted, shared.queries + warp_row * stride);
  }
}

// ---- launcher ------------------------------------------------------------------------------------------------------------------
struct Choice {
  void (*kernel)(Step);
  int warps;
  size_t shared_bytes;
};

template <int Warps, int MostDim>
constexpr Choice choice_of() {
  return {wide<Warps, MostDim>, Warps,
          static_cast<size_t>(Warps * warp_rows + 2 * tile_tokens) * stride_of(MostDim) * sizeof(uint32_t)};
}

// Many rows share a tile's decoding; two blocks of a multiprocessor hide each other's waits. At headDim 128 that is 6 warps of 168 registers and
// 85 KB (8 warps would have to do with 128 registers, and spill). At 256 as many rows as shared memory has room for: 133 KB, or the 98 KB that
// every device has.
Choice choose(int head_dim) {
  if (head_dim <= 64) return choice_of<8, 64>();
  if (head_dim <= 128) return choice_of<6, 128>();
  auto const room = static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  return choice_of<4, 256>().shared_bytes <= room ? choice_of<4, 256>() : choice_of<2, 256>();
}

// The rows of the half body's tasks: one block a multiprocessor, 8 warps of 168 registers and 99 KB at headDim 128.
Choice choose_beside_half(int head_dim) { return head_dim <= 64 ? choice_of<8, 64>() : choice_of<8, 128>(); }

}  // namespace

int wide_rows(int head_dim) { return choose(head_dim).warps * warp_rows; }

cudaError_t launch_wide(const Step& step, cudaStream_t stream) {
  Choice const choice = step.wide ? choose_beside_half(step.params.head_dim) : choose(step.params.head_dim);
  return gpu::launch(choice.kernel, step.prefill_blocks, choice.warps * 32, choice.shared_bytes, stream, step);
}

}  // namespace couplet::cuda::attend::prefill
