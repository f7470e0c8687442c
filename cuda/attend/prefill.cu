// Attention of sequences with several queries, for every codec, shape and option. A block takes 16 rows a warp, a row being one query head of
// one query token; all rows share a kv head. Tiles of 32 tokens:
//   keys    decoded, or copied where they are in full precision, rotated to their positions, rounded to tf32
//   values  likewise, not rotated
//   scores  = queries x keys by tensor cores -> softmax in registers -> operand of probabilities x values: the columns of an
//           mma's k are permuted (t is token 2t, t + 4 is token 2t + 1), so that no register has to move.
// tf32 has float16's 10 bits and float32's range: nothing that the CPU can attend to overflows here. For 128 channels and 8 warps a tile costs
// a warp 128 mma with 2 to 3 loads from shared memory each, and its share of the decoding 32 loads: loads are what limits.
#include "step.h"
#include "tokens.h"

namespace couplet::cuda::attend {
namespace {

constexpr int warp_rows = 16;
constexpr int tile_tokens = 32;
constexpr int tile_columns = tile_tokens / 8;  // of 8 tokens: n of the scores' mma, k of the values'

// ---- device helpers ----------------------------------------------------------------------------------------------------------
// Rows of 4 floats more than channels: with (channels + 4) / 4 odd, the 8 rows x 4 columns of an operand lie in 32 banks, and so do
// the 4 pairs of rows x 8 columns of a value operand.
__host__ __device__ constexpr int stride_of(int head_dim) { return head_dim + 4; }

struct Shared {
  uint32_t* queries;  // tf32 [rows][stride]
  uint32_t* keys;     // tf32 [tile_tokens][stride]
  uint32_t* values;   // likewise
  Token* tokens;      // [tile_tokens]
};

// Which tokens of an interval of positions each of a lane's two rows, g and g + 8, sees; where a row sees nothing it is empty.
struct Limits {
  Interval rows[2];
};

struct Softmax {  // of a lane's two rows; sums are the lane's own share
  float maxima[2];
  float sums[2];
};

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
    uint32_t* const to = queries + row * stride_of(head_dim);
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

// One side of a tile, not yet rotated or rounded. Neighbouring threads take neighbouring tokens of a group, whose codes are
// neighbours, or neighbouring channels of a row in full precision.
template <bool Coded, bool Keys>
__device__ __forceinline__ void load_side(const Step& step, const Token* tokens, int kv_head, uint32_t* to) {
  int const head_dim = step.params.head_dim;
  int const stride = stride_of(head_dim);
  if constexpr (!Coded) {
    for (int index = threadIdx.x; index < tile_tokens * head_dim; index += static_cast<int>(blockDim.x)) {
      int const token = index / head_dim;
      int const channel = index % head_dim;
      const float* const row = Keys ? tokens[token].dense.key : tokens[token].dense.value;
      to[token * stride + channel] = __float_as_uint(row ? row[channel] : 0);
    }
  } else {
    couplet_codec const codec = Keys ? step.params.key_codec : step.params.value_codec;
    const float* const centroids = Keys ? step.key_rows : step.value_rows;
    int64_t const offset = Keys ? step.params.key_page_offset + kv_head * step.params.key_page_stride
                                : step.params.value_page_offset + kv_head * step.params.value_page_stride;
    int const channels = codec.group_channels;
    int const groups = head_dim / channels;
    int64_t const row_bytes = static_cast<int64_t>(step.params.page_tokens) * codec.code_bits / 8;
    for (int index = threadIdx.x; index < groups * tile_tokens; index += static_cast<int>(blockDim.x)) {
      Token const& token = tokens[index % tile_tokens];
      int const group = index / tile_tokens;
      uint32_t* const row = to + index % tile_tokens * stride + group * channels;
      const float* from = nullptr;
      if (token.page) {
        int const code = read_code(token.page + offset + group * row_bytes, token.slot, codec.code_bits);
        from = centroids + (((static_cast<int64_t>(kv_head) * groups + group) << codec.code_bits) + code) * channels;
      }
      if (channels % 4 == 0) {
        for (int channel = 0; channel < channels; channel += 4) {
          uint4 const four = from ? *reinterpret_cast<const uint4*>(from + channel) : uint4{0, 0, 0, 0};
          *reinterpret_cast<uint4*>(row + channel) = four;
        }
      } else {
        for (int channel = 0; channel < channels; ++channel) row[channel] = __float_as_uint(from ? from[channel] : 0);
      }
    }
  }
}

// Rotates keys and rounds both sides, in place.
__device__ __forceinline__ void finish_tile(const Step& step, const Shared& shared, Interval positions) {
  int const head_dim = step.params.head_dim;
  int const stride = stride_of(head_dim);
  int const pairs = step.angles.pairs;
  bool const half = step.angles.kind == COUPLET_ROTARY_HALF;
  for (int index = threadIdx.x; index < tile_tokens * pairs; index += static_cast<int>(blockDim.x)) {
    int const token = index / pairs;
    int const pair = index % pairs;
    if (positions.begin + token >= positions.end) continue;
    uint32_t& x = shared.keys[token * stride + (half ? pair : 2 * pair)];
    uint32_t& y = shared.keys[token * stride + (half ? pair + pairs : 2 * pair + 1)];
    float2 const turned = add_angles({__uint_as_float(x), __uint_as_float(y)},
                                     position_angle(step.angles, positions.begin + token, pair));
    x = gpu::cvt_tf32(turned.x);
    y = gpu::cvt_tf32(turned.y);
  }
  int const rest = head_dim - 2 * pairs;
  for (int index = threadIdx.x; index < tile_tokens * (rest + head_dim); index += static_cast<int>(blockDim.x)) {
    int const token = index / (rest + head_dim);
    int const column = index % (rest + head_dim);
    uint32_t& value = column < rest ? shared.keys[token * stride + 2 * pairs + column]
                                    : shared.values[token * stride + column - rest];
    value = gpu::cvt_tf32(__uint_as_float(value));
  }
}

// Scores of the warp's rows with the tile's tokens: [8 tokens][row g or g + 8 (element / 2), token 2t + element % 2].
__device__ __forceinline__ void multiply_keys(const uint32_t* queries, const uint32_t* keys, int head_dim,
                                              float (&scores)[tile_columns][4]) {
  int const g = gpu::lane_id() / 4;
  int const t = gpu::lane_id() % 4;
  int const stride = stride_of(head_dim);
#pragma unroll
  for (int n = 0; n < tile_columns; ++n)
    for (float& score : scores[n]) score = 0;
#pragma unroll 4
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

// Scores -> probabilities in tf32, as the operand of multiply_values; `factors` is what the sums so far shrink by.
__device__ __forceinline__ void normalize(const Step& step, const Limits& limits, int begin, uint32_t there,
                                          float (&scores)[tile_columns][4], Softmax& softmax,
                                          uint32_t (&probabilities)[tile_columns][4], float (&factors)[2]) {
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
        uint32_t const power = is_visible ? gpu::cvt_tf32(gpu::ex2_approx(scores[n][2 * row + odd] - maximum)) : 0;
        softmax.sums[row] += __uint_as_float(power);
        probabilities[n][row + 2 * odd] = power;
      }
  }
}

// weighted += probabilities x values. [8 channels][row g or g + 8 (element / 2), channel 2t + element % 2]
template <int MostColumns>
__device__ __forceinline__ void multiply_values(const uint32_t (&probabilities)[tile_columns][4],
                                                const uint32_t* values, int head_dim, const float (&factors)[2],
                                                float (&weighted)[MostColumns][4]) {
  int const g = gpu::lane_id() / 4;
  int const t = gpu::lane_id() % 4;
  int const stride = stride_of(head_dim);
#pragma unroll
  for (int c = 0; c < MostColumns; ++c) {
    if (8 * c >= head_dim) break;
    for (int part = 0; part < 4; ++part) weighted[c][part] *= factors[part / 2];
#pragma unroll
    for (int n = 0; n < tile_columns; ++n) {
      const uint32_t* const value = values + (8 * n + 2 * t) * stride + 8 * c + g;
      uint32_t const b[2] = {value[0], value[stride]};
      gpu::mma_m16n8k8_tf32(weighted[c], probabilities[n], b);
    }
  }
}

// Places the tile's tokens; returns a bit for each that is there. Comes with a barrier before and behind.
template <bool Coded>
__device__ __forceinline__ uint32_t find_tokens(const Step& step, const Rows& rows, Interval positions, Token* tokens) {
  __syncthreads();  // the tile before is done
  if (threadIdx.x < tile_tokens) {
    int const position = positions.begin + static_cast<int>(threadIdx.x);
    tokens[threadIdx.x] =
        position < positions.end ? token_at<Coded>(step.params, *rows.sequence, position, rows.kv_head) : Token{};
  }
  __syncthreads();
  Token const& own = tokens[gpu::lane_id()];
  return __ballot_sync(~0u, own.page || own.dense.key);
}

template <bool Coded, int MostColumns>
__device__ __forceinline__ void take_positions(const Step& step, const Shared& shared, const Rows& rows, int warp_row,
                                               Interval positions, const Limits& limits, Softmax& softmax,
                                               float (&weighted)[MostColumns][4]) {
  int const head_dim = step.params.head_dim;
  for (int begin = positions.begin; begin < positions.end; begin += tile_tokens) {
    Interval const tile{begin, min(begin + tile_tokens, positions.end)};
    uint32_t const there = find_tokens<Coded>(step, rows, tile, shared.tokens);
    load_side<Coded, true>(step, shared.tokens, rows.kv_head, shared.keys);
    load_side<Coded, false>(step, shared.tokens, rows.kv_head, shared.values);
    __syncthreads();
    finish_tile(step, shared, tile);
    __syncthreads();
    if (warp_row >= rows.count) continue;
    float scores[tile_columns][4];
    uint32_t probabilities[tile_columns][4];
    float factors[2];
    multiply_keys(shared.queries + warp_row * stride_of(head_dim), shared.keys, head_dim, scores);
    normalize(step, limits, begin, there, scores, softmax, probabilities, factors);
    multiply_values(probabilities, shared.values, head_dim, factors, weighted);
  }
}

template <int MostColumns>
__device__ __forceinline__ void write_rows(const Step& step, const Rows& rows, int warp_row, Softmax& softmax,
                                           const float (&weighted)[MostColumns][4]) {
  int const g = gpu::lane_id() / 4;
  int const t = gpu::lane_id() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& sum = softmax.sums[half];
    for (int offset = 1; offset < 4; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    int const row = warp_row + g + 8 * half;
    if (row >= rows.count) continue;
    int64_t const at = rows.first_row + row;
    int const head = rows.kv_head * step.group_heads + static_cast<int>(at % step.group_heads);
    int64_t const to =
        at / step.group_heads * rows.sequence->output_token_stride + head * rows.sequence->output_head_stride;
    float const factor = output_factor(step.params, head, softmax.maxima[half], sum);
#pragma unroll
    for (int c = 0; c < MostColumns; ++c) {
      if (8 * c >= step.params.head_dim) break;
      for (int odd = 0; odd < 2; ++odd)
        store_element(rows.sequence->outputs, step.params.output_dtype, to + 8 * c + 2 * t + odd,
                      weighted[c][2 * half + odd] * factor);
    }
  }
}

// ---- kernel --------------------------------------------------------------------------------------------------------------------
// A block of rows after the other, each over all that its rows see.
template <int Warps, int MostDim>
__global__ void __launch_bounds__(Warps * 32) prefill(Step const step) {
  GPU_DYNAMIC_SHARED(uint32_t, dynamic);
  GPU_SHARED(tokens, Token[tile_tokens]);
  constexpr int most_rows = Warps * warp_rows;
  int const stride = stride_of(step.params.head_dim);
  Shared const shared{dynamic, dynamic + most_rows * stride, dynamic + (most_rows + tile_tokens) * stride, tokens};
  int const warp_row = static_cast<int>(threadIdx.x) / 32 * warp_rows;
  int const sequences = step.params.sequence_count;
  int const row_blocks = step.row_begin[sequences];
  int64_t const tasks = static_cast<int64_t>(row_blocks) * step.params.kv_heads;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    // The last rows first: they see most.
    int const row_block = row_blocks - 1 - static_cast<int>(task / step.params.kv_heads);
    int const index = find_begin(step.row_begin, sequences, row_block);
    const couplet_attend_sequence& sequence = step.params.sequences[index];
    int64_t const first_row = static_cast<int64_t>(row_block - step.row_begin[index]) * most_rows;
    int64_t const left = static_cast<int64_t>(sequence.query_tokens) * step.group_heads - first_row;
    Rows const rows{&sequence, first_row, left < most_rows ? static_cast<int>(left) : most_rows,
                    static_cast<int>(task % step.params.kv_heads)};
    __syncthreads();  // the rows before are done
    load_queries(step, rows, most_rows, shared.queries);

    Seen own[2];  // of the lane's rows; of none where there is no row
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = warp_row + gpu::lane_id() / 4 + 8 * half;
      own[half] = row < rows.count ? seen_by(step.params, sequence, position_of(step, rows, row)) : Seen{};
    }
    Softmax softmax{{-INFINITY, -INFINITY}, {0, 0}};
    float weighted[MostDim / 8][4];
#pragma unroll
    for (int c = 0; c < MostDim / 8; ++c)
      for (float& value : weighted[c]) value = 0;
    // From the first position that the first row sees to the last that the last one sees.
    Seen const first = seen_by(step.params, sequence, position_of(step, rows, 0));
    Seen const last = seen_by(step.params, sequence, position_of(step, rows, rows.count - 1));
    take_positions<false>(step, shared, rows, warp_row, {first.below.begin, last.below.end},
                          {{own[0].below, own[1].below}}, softmax, weighted);
    take_positions<true>(step, shared, rows, warp_row, {first.codes.begin, last.codes.end},
                         {{own[0].codes, own[1].codes}}, softmax, weighted);
    take_positions<false>(step, shared, rows, warp_row, {first.above.begin, last.above.end},
                          {{own[0].above, own[1].above}}, softmax, weighted);
    if (warp_row < rows.count) write_rows(step, rows, warp_row, softmax, weighted);
  }
}

// ---- launcher ------------------------------------------------------------------------------------------------------------------
struct Choice {
  void (*kernel)(Step);
  int warps;
};

// As many rows as shared memory has room for: each more halves the decoding. 101 KB at headDim 128 and 8 warps, so that an sm_90 has two
// blocks; 98 KB at 256 and 2 warps, the least.
size_t shared_bytes(int warps, int head_dim) {
  return static_cast<size_t>(warps * warp_rows + 2 * tile_tokens) * static_cast<size_t>(stride_of(head_dim)) *
         sizeof(uint32_t);
}

Choice choose(int head_dim) {
  constexpr Choice narrow[] = {{prefill<8, 128>, 8}, {prefill<4, 128>, 4}};
  constexpr Choice wide[] = {{prefill<4, 256>, 4}, {prefill<2, 256>, 2}};
  const Choice* const both = head_dim <= 128 ? narrow : wide;
  size_t const room =
      static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) - sizeof(Token) * tile_tokens;
  return shared_bytes(both[0].warps, head_dim) <= room ? both[0] : both[1];
}

}  // namespace

int prefill_rows(int head_dim) { return choose(head_dim).warps * warp_rows; }

cudaError_t launch_prefill(const Step& step, cudaStream_t stream) {
  Choice const choice = choose(step.params.head_dim);
  return gpu::launch(choice.kernel, step.prefill_blocks, choice.warps * 32,
                     shared_bytes(choice.warps, step.params.head_dim), stream, step);
}

}  // namespace couplet::cuda::attend
