// Decode attention for every codec, shape and option, in float32. A block takes up to 16 rows (query heads of one kv head) through
// tiles of 32 tokens:
//   queries [rows][head_dim], rotated to their positions and scaled
//   tile    keys [32][head_dim], decoded or copied, rotated to their positions -> scores [rows][32] -> softmax
//           values [32][head_dim] in the same place -> weighted [rows][head_dim] in registers
#include "step.h"
#include "tokens.h"

namespace couplet::cuda::attend {
namespace {

constexpr int threads = 256;
constexpr int warps = threads / 32;
constexpr int tile_tokens = 32;  // lanes of a warp: a token each
constexpr int most_elements = general_rows * COUPLET_MAX_HEAD_DIM / threads;

// ---- device helpers ----------------------------------------------------------------------------------------------------------
struct Fixed {
  Token tokens[tile_tokens];
  float scores[general_rows][tile_tokens];
  float maxima[general_rows];
  float sums[general_rows];
  float factors[general_rows];
  int positions[general_rows];  // of the row's query
};

struct Shared {
  Fixed* fixed;
  float* queries;  // [general_rows][head_dim]
  float* tile;     // [tile_tokens][head_dim + 1]: odd, so that 32 tokens' channels lie in 32 banks
};

__device__ __forceinline__ Shared shared_of(float* dynamic, Fixed* fixed, int head_dim) {
  return {fixed, dynamic, dynamic + general_rows * head_dim};
}

__device__ __forceinline__ void load_codes(const Step& step, const Shared& shared, couplet_codec codec,
                                           const float* centroids, int64_t page_offset, int kv_head) {
  int const head_dim = step.params.head_dim;
  int const channels = codec.group_channels;
  int const groups = head_dim / channels;
  int64_t const row_bytes = static_cast<int64_t>(step.params.page_tokens) * codec.code_bits / 8;
  int64_t const group_stride = static_cast<int64_t>(channels) << codec.code_bits;
  for (int index = threadIdx.x; index < groups * tile_tokens; index += threads) {
    Token const& token = shared.fixed->tokens[index % tile_tokens];
    int const group = index / tile_tokens;
    float* const to = shared.tile + index % tile_tokens * (head_dim + 1) + group * channels;
    if (token.page) {
      int const code = read_code(token.page + page_offset + group * row_bytes, token.slot, codec.code_bits);
      const float* const from = centroids + (static_cast<int64_t>(kv_head) * groups + group) * group_stride +
                                static_cast<int64_t>(code) * channels;
      for (int channel = 0; channel < channels; ++channel) to[channel] = from[channel];
    } else {
      for (int channel = 0; channel < channels; ++channel) to[channel] = 0;
    }
  }
}

template <bool Keys>
__device__ __forceinline__ void load_dense(const Shared& shared, int head_dim) {
  for (int index = threadIdx.x; index < tile_tokens * head_dim; index += threads) {
    int const token = index / head_dim;
    int const channel = index % head_dim;
    const float* const row = Keys ? shared.fixed->tokens[token].dense.key : shared.fixed->tokens[token].dense.value;
    shared.tile[token * (head_dim + 1) + channel] = row ? row[channel] : 0;
  }
}

__device__ __forceinline__ void rotate(const Angles& angles, int position, int pair, float* row) {
  bool const half = angles.kind == COUPLET_ROTARY_HALF;
  float& x = row[half ? pair : 2 * pair];
  float& y = row[half ? pair + angles.pairs : 2 * pair + 1];
  float2 const turned = add_angles({x, y}, position_angle(angles, position, pair));
  x = turned.x;
  y = turned.y;
}

__device__ __forceinline__ void start(const Step& step, const Shared& shared, const Rows& rows) {
  int const head_dim = step.params.head_dim;
  __syncthreads();  // the rows before these are done
  for (int index = threadIdx.x; index < general_rows * head_dim; index += threads) {
    int const row = index / head_dim;
    int const channel = index % head_dim;
    int64_t const at = rows.first_row + row;
    int64_t const head = rows.kv_head * step.group_heads + at % step.group_heads;
    int64_t const query =
        at / step.group_heads * rows.sequence->query_token_stride + head * rows.sequence->query_head_stride;
    shared.queries[index] =
        row < rows.count
            ? load_element(rows.sequence->queries, step.params.query_dtype, query + channel) * step.params.scale
            : 0;
  }
  if (threadIdx.x < general_rows) {
    int const row = threadIdx.x;
    shared.fixed->maxima[row] = -INFINITY;
    shared.fixed->sums[row] = 0;
    shared.fixed->positions[row] = row < rows.count ? position_of(step, rows, row) : -1;
  }
  __syncthreads();
  for (int index = threadIdx.x; index < rows.count * step.angles.pairs; index += threads) {
    int const row = index / step.angles.pairs;
    rotate(step.angles, shared.fixed->positions[row], index % step.angles.pairs, shared.queries + row * head_dim);
  }
}

// Each thread holds elements threadIdx.x + 256 i of weighted [general_rows][head_dim].
struct Weighted {
  float values[most_elements];
};

// One tile of at most 32 positions, all in codes or all in full precision.
template <bool Coded>
__device__ __forceinline__ void take_tile(const Step& step, const Shared& shared, const Rows& rows, Interval positions,
                                          Weighted& weighted) {
  const couplet_attend_sequence& sequence = *rows.sequence;
  const couplet_attend_params& params = step.params;
  int const head_dim = params.head_dim;
  __syncthreads();  // queries are there; the tile before is done
  if (threadIdx.x < tile_tokens) {
    int const position = positions.begin + static_cast<int>(threadIdx.x);
    shared.fixed->tokens[threadIdx.x] =
        position < positions.end ? token_at<Coded>(params, sequence, position, rows.kv_head) : Token{};
  }
  __syncthreads();
  if constexpr (Coded)
    load_codes(step, shared, params.key_codec, step.key_rows,
               params.key_page_offset + rows.kv_head * params.key_page_stride, rows.kv_head);
  else
    load_dense<true>(shared, head_dim);
  __syncthreads();
  for (int index = threadIdx.x; index < tile_tokens * step.angles.pairs; index += threads) {
    int const token = index / step.angles.pairs;
    if (positions.begin + token < positions.end)
      rotate(step.angles, positions.begin + token, index % step.angles.pairs, shared.tile + token * (head_dim + 1));
  }
  __syncthreads();

  int const warp = threadIdx.x / 32;
  int const lane = threadIdx.x % 32;
  int const position = positions.begin + lane;
  bool const there =
      position < positions.end && (shared.fixed->tokens[lane].page || shared.fixed->tokens[lane].dense.key);
  for (int row = warp; row < rows.count; row += warps) {
    const float* const query = shared.queries + row * head_dim;
    const float* const key = shared.tile + lane * (head_dim + 1);
    float product = 0;
    for (int channel = 0; channel < head_dim; ++channel) product += query[channel] * key[channel];
    Seen const seen = seen_by(params, sequence, shared.fixed->positions[row]);
    auto const within = [&](Interval interval) { return position >= interval.begin && position < interval.end; };
    bool const visible = there && (Coded ? within(seen.codes) : within(seen.below) || within(seen.above));
    float const logit = visible ? capped_logit(params, product) : -INFINITY;

    float largest = logit;
    for (int offset = 16; offset > 0; offset /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, offset));
    float const before = shared.fixed->maxima[row];
    float const maximum = max(before, largest);
    float const power = visible ? gpu::ex2_approx(logit - maximum) : 0;
    float sum = power;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    shared.fixed->scores[row][lane] = power;
    __syncwarp();  // all lanes have read the row's maximum
    if (lane == 0) {
      float const factor = before == maximum ? 1 : gpu::ex2_approx(before - maximum);  // both may be -infinity
      shared.fixed->factors[row] = factor;
      shared.fixed->maxima[row] = maximum;
      shared.fixed->sums[row] = shared.fixed->sums[row] * factor + sum;
    }
    __syncwarp();
  }
  __syncthreads();
  if constexpr (Coded)
    load_codes(step, shared, params.value_codec, step.value_rows,
               params.value_page_offset + rows.kv_head * params.value_page_stride, rows.kv_head);
  else
    load_dense<false>(shared, head_dim);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < most_elements; ++i) {
    int const element = static_cast<int>(threadIdx.x) + i * threads;
    if (element >= rows.count * head_dim) break;
    int const row = element / head_dim;
    int const channel = element % head_dim;
    float sum = weighted.values[i] * shared.fixed->factors[row];
    for (int token = 0; token < tile_tokens; ++token)
      sum += shared.fixed->scores[row][token] * shared.tile[token * (head_dim + 1) + channel];
    weighted.values[i] = sum;
  }
}

template <bool Coded>
__device__ __forceinline__ void take_positions(const Step& step, const Shared& shared, const Rows& rows,
                                               Interval positions, Weighted& weighted) {
  for (int begin = positions.begin; begin < positions.end; begin += tile_tokens)
    take_tile<Coded>(step, shared, rows, {begin, min(begin + tile_tokens, positions.end)}, weighted);
}

__device__ __forceinline__ void take_seen(const Step& step, const Shared& shared, const Rows& rows, const Seen& seen,
                                          Weighted& weighted) {
  for (float& value : weighted.values) value = 0;
  start(step, shared, rows);
  take_positions<false>(step, shared, rows, seen.below, weighted);
  take_positions<true>(step, shared, rows, seen.codes, weighted);
  take_positions<false>(step, shared, rows, seen.above, weighted);
  __syncthreads();
}

// Calls visit(row, channel, value) for this thread's elements.
template <class Visit>
__device__ __forceinline__ void each_element(const Rows& rows, int head_dim, const Weighted& weighted, Visit visit) {
#pragma unroll
  for (int i = 0; i < most_elements; ++i) {
    int const element = static_cast<int>(threadIdx.x) + i * threads;
    if (element < rows.count * head_dim) visit(element / head_dim, element % head_dim, weighted.values[i]);
  }
}

// ---- kernels ---------------------------------------------------------------------------------------------------------------
// Sequences with one query: a range of units a block.
__global__ void __launch_bounds__(threads, 2) general_decode(Step const step) {
  GPU_DYNAMIC_SHARED(float, dynamic);
  GPU_SHARED(fixed, Fixed);
  Shared const shared = shared_of(dynamic, &fixed, step.params.head_dim);
  gpu::let_next_start();
  gpu::wait_for_last();
  Ranges const ranges(step);
  int const end = ranges.end(blockIdx.x);
  for (int at = ranges.begin(blockIdx.x); at < end;) {
    Segment const segment = segment_at(step, at);
    Rows const rows{&step.params.sequences[segment.sequence], segment.first_head - segment.kv_head * step.group_heads,
                    segment.rows, segment.kv_head};
    Weighted weighted;
    take_seen(step, shared, rows, segment.seen, weighted);
    int64_t const slot = static_cast<int64_t>(segment.slot) * step.block_rows;
    each_element(rows, step.params.head_dim, weighted, [&](int row, int channel, float value) {
      step.weighted[(slot + row) * step.params.head_dim + channel] = value;
    });
    if (static_cast<int>(threadIdx.x) < rows.count)
      step.sums[slot + threadIdx.x] = {fixed.maxima[threadIdx.x], fixed.sums[threadIdx.x]};
    at += segment.units;
  }
}

// Queries and the tile; 49 KB at headDim 256.
size_t shared_bytes(const Step& step) {
  return (static_cast<size_t>(general_rows) * step.params.head_dim +
          static_cast<size_t>(tile_tokens) * (step.params.head_dim + 1)) *
         sizeof(float);
}

}  // namespace

// ---- launchers -------------------------------------------------------------------------------------------------------------
cudaError_t launch_general_decode(const Step& step, cudaStream_t stream) {
  return gpu::launch_early(general_decode, step.blocks, threads, shared_bytes(step), stream, step);
}

}  // namespace couplet::cuda::attend
