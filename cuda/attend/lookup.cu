// Decode attention on cq-8c8b codes, headDim 128, up to 4 query heads of a kv head at once: both codebooks of the kv head in shared
// memory as float16, looked up without bank conflicts, products by tensor cores. docs/decisions/0001-cuda-attention-tables.md has the
// layout's argument and the ladder that led here.
//
// A block of 8 warps takes 512 positions at a time, a page of 64 tokens each warp. In a warp, with g = lane / 4 and t = lane % 4:
//   keys    are the A operand, rows = tokens. Lane (g, t) looks up groups 4s + t of its tokens; lanes with odd g visit s ^ 1 where the
//           others visit s, so that the 8 lanes of a phase touch 8 groups. The queries are there twice: columns 0-3 in the order
//           of even rows, columns 4-7 in that of odd rows, and each row's logits are read in its own half ("the lane's class").
//   values  are the A operand, rows = groups, one mma for each of the 8 channels of a group. Lanes with odd t swap the two groups of their
//           rows, the table lies there twice for the lanes' other bit, and the halves of the sums are added once, at the end.
//   rotary  keys are rotated by their offset in the 512, by angles that stay in registers; the query by its distance to the 512.
#include "step.h"

namespace couplet::cuda::attend {
namespace {

constexpr int head_dim = 128;
constexpr int pairs = head_dim / 2;
constexpr int rows = lookup_rows;
constexpr int warps = 8;
constexpr int threads = warps * 32;
constexpr int page_tokens = 64;
constexpr int unit_tokens = warps * page_tokens;
static_assert(unit_tokens == rotary_block, "the query's angle is one block step and one offset");
static_assert(threads == rows * pairs, "a thread rotates one pair of one query");

constexpr float nothing = -1e30f;  // the maximum of no logits
constexpr float unseen = -1e38f;   // the logit of a token that is not seen: 2^(unseen - nothing) is 0
constexpr float headroom =
    10;  // powers stay below 2^10, far below the end of float16; smaller rises of the maximum rescale nothing

constexpr int slab_bytes = 32768;  // rows of 8 groups: [256][8][16 bytes]
constexpr int query_part = rows * head_dim;
constexpr int page_bytes = page_tokens * head_dim / 8;  // one side

struct Shared {
  unsigned char keys[2][slab_bytes];    // [groups / 8][256][8 groups]
  unsigned char values[4][slab_bytes];  // [group % 8 / 2][256][group % 2][group / 8][2 copies]
  // [buffer][half of 16 tokens][row][channel]: rotated for tokens 0 to 7 of 16, and back by 8. The halves of each 128 bytes of odd rows
  // change places, so that two rows' 64 bytes lie in different banks.
  __half queries[2][2][query_part];
  unsigned char
      codes[warps]
           [2 * page_bytes];  // keys, values; at the end of a pass the warp's weighted sums, float [rows][head_dim]
  float2 sums[warps][rows];   // maximum, sum
  float plain_queries[rows][head_dim];  // scaled, before rotary
  float weighted[rows][head_dim];       // of the segment so far
  float2 total[rows];
  // In shared memory because registers are what limits the kernel: after a barrier they are read again where they are used.
  int64_t at;  // the next segment's first unit
  int table_head;
  Segment segment;
  const uint8_t* const* pages;
  const uint8_t* next_page[2][warps];  // by parity of the unit they were asked for in
  float4 query
      [threads];  // one pair of one query, scaled, rotated by its offset in its own block; then the angle of 8 tokens
  float2 step[threads];  // the pair's angle for the next unit
};
static_assert(2 * page_bytes == rows * head_dim * sizeof(float));

// ---- device helpers ----------------------------------------------------------------------------------------------------------
struct Row {  // 16 bytes: 8 channels
  uint32_t words[4];
};

__device__ __forceinline__ Row load_row(const void* at) {
  uint4 const row = *static_cast<const uint4*>(at);
  return {{row.x, row.y, row.z, row.w}};
}

// A code of a word of four, times the 128 bytes from one code's rows to the next; `byte` may be 0.
__device__ __forceinline__ unsigned row_offset(uint32_t codes, int byte) {
  return (byte ? codes >> (8 * byte - 7) : codes << 7) & 0x7f80;
}

// Issues the copies of both codebooks. Lanes write values to 8 different
// columns of 16 bytes: bits 0 and 1 of the index choose the group, bit 2 which copy comes first.
__device__ __forceinline__ void load_tables(const Step& step, int kv_head, Shared& shared) {
  const unsigned char* const key_rows =
      reinterpret_cast<const unsigned char*>(step.key_banked) + static_cast<int64_t>(kv_head) * 2 * slab_bytes;
  const unsigned char* const value_rows =
      reinterpret_cast<const unsigned char*>(step.value_banked) + static_cast<int64_t>(kv_head) * 2 * slab_bytes;
  for (int index = threadIdx.x; index < 2 * slab_bytes / 16; index += threads) {
    gpu::cp_async<16>(&shared.keys[0][0] + index * 16, key_rows + index * 16);
    int const odd = index & 1;
    int const slab = index >> 1 & 1;
    int const pair = index >> 2 & 3;
    int const code = index >> 4;
    const unsigned char* const from = value_rows + slab * slab_bytes + code * 128 + (2 * pair + odd) * 16;
    unsigned char* const to = shared.values[pair] + code * 128 + odd * 64 + slab * 32;
    gpu::cp_async<16>(to + pair % 2 * 16, from);
    gpu::cp_async<16>(to + (1 - pair % 2) * 16, from);
  }
  gpu::cp_async_commit();
}

// Cosines and sines of a lane's tokens: [token's bit 2][row g or g + 8][s][pair of channels].
struct KeyAngles {
  __half2 cos[2][2][2][4];
  __half2 sin[2][2][2][4];
};

// Token of the page that a lane's row g + 8 r is in tile b.
__device__ __forceinline__ int token_of(int g, int b, int r) {
  return 16 * (g >> 2 << 1 | (g & 1)) + (g >> 1 & 1) + 2 * r + 4 * b;
}

// A lane's own rows are its first token alone, 32 KB a block and not 256; the four it is added to are the same for all warps.
__device__ __forceinline__ void make_key_angles(const Angles& angles, int warp, int g, int t, KeyAngles& keys) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    __syncwarp();  // keeps the loads of all angles from being under way together, in registers
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int const pair = 8 * (4 * (s ^ (g & 1)) + t) + 2 * c;
      auto const two_angles = [&](int offset) {
        return angles.pairs ? *reinterpret_cast<const float4*>(angles.offsets + offset * pairs + pair)
                            : float4{1, 0, 1, 0};
      };
      float4 const first = two_angles(warp * page_tokens + token_of(g, 0, 0));
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float4 const further = two_angles(token_of(0, b, r));
          float2 const even = add_angles({first.x, first.y}, {further.x, further.y});
          float2 const odd = add_angles({first.z, first.w}, {further.z, further.w});
          keys.cos[b][r][s][c] = __floats2half2_rn(even.x, odd.x);
          keys.sin[b][r][s][c] = __floats2half2_rn(even.y, odd.y);
        }
    }
  }
}

// A thread rotates one pair of one query for all units.
__device__ __forceinline__ int query_row() { return static_cast<int>(threadIdx.x) / pairs; }
__device__ __forceinline__ int query_pair() { return static_cast<int>(threadIdx.x) % pairs; }

__device__ __forceinline__ void load_query(const Step& step, Shared& shared) {
  constexpr float log2_e = 1.4426950408889634f;
  const Segment& segment = shared.segment;
  int const row = query_row();
  int const pair = query_pair();
  float2 value{0, 0};
  float2 back{1, 0};
  if (row < segment.rows) {
    const couplet_attend_sequence& sequence = step.params.sequences[segment.sequence];
    int64_t const query = (segment.first_head + row) * sequence.query_head_stride + pair;
    float const factor = step.params.scale * log2_e;
    value = {load_element(sequence.queries, step.params.query_dtype, query) * factor,
             load_element(sequence.queries, step.params.query_dtype, query + pairs) * factor};
  }
  shared.plain_queries[row][pair] = value.x;
  shared.plain_queries[row][pair + pairs] = value.y;
  if (step.angles.pairs) {
    float const amplitude = step.angles.amplitudes[pair];  // the query carries the key's as well
    float2 const offset = step.angles.offsets[segment.position % unit_tokens * pairs + pair];
    value = add_angles(value, {offset.x * amplitude * amplitude, offset.y * amplitude * amplitude});
    back = step.angles.offsets[8 * pairs + pair];
  }
  shared.query[threadIdx.x] = {value.x, value.y, back.x, back.y};
  shared.step[threadIdx.x] = {1, 0};
}

// Issues the copy of the angle by which the query is rotated for keys of a unit: its distance in blocks, below 4096 (see select).
__device__ __forceinline__ void fetch_step(const Step& step, Shared& shared, int unit) {
  if (!step.angles.pairs) return;
  int const blocks = shared.segment.position / unit_tokens - unit;
  gpu::cp_async<8>(&shared.step[threadIdx.x], step.angles.steps + blocks * pairs + query_pair());
}

__device__ __forceinline__ void write_query(Shared& shared, int buffer) {
  float4 const query = shared.query[threadIdx.x];
  float2 turned = add_angles({query.x, query.y}, shared.step[threadIdx.x]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __half* const to = shared.queries[buffer][half] + query_row() * head_dim + (query_pair() ^ query_row() % 2 * 32);
    to[0] = __float2half_rn(turned.x);
    to[pairs] = __float2half_rn(turned.y);
    turned = add_angles(turned, {query.z, -query.w});
  }
}

// Adds what the warps left in shared.codes and shared.sums to the segment's total. Comes with a barrier before and behind.
__device__ __forceinline__ void fold_warps(Shared& shared) {
  constexpr int elements = rows * head_dim / threads;
  __syncthreads();
  float weighted[elements];
  float2 total[elements];
#pragma unroll
  for (int i = 0; i < elements; ++i) {
    int const element = static_cast<int>(threadIdx.x) + i * threads;
    int const row = element / head_dim;
    float maximum = shared.total[row].x;
    for (int warp = 0; warp < warps; ++warp) maximum = max(maximum, shared.sums[warp][row].x);
    float const own = gpu::ex2_approx(shared.total[row].x - maximum);
    total[i] = {maximum, shared.total[row].y * own};
    weighted[i] = shared.weighted[row][element % head_dim] * own;
    for (int warp = 0; warp < warps; ++warp) {
      float const factor = gpu::ex2_approx(shared.sums[warp][row].x - maximum);
      total[i].y += shared.sums[warp][row].y * factor;
      weighted[i] += reinterpret_cast<const float*>(shared.codes[warp])[element] * factor;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < elements; ++i) {
    int const element = static_cast<int>(threadIdx.x) + i * threads;
    shared.weighted[element / head_dim][element % head_dim] = weighted[i];
    if (element % head_dim == 0) shared.total[element / head_dim] = total[i];
  }
  __syncthreads();
}

// ---- tokens in full precision ------------------------------------------------------------------------------------------------
// A warp takes 4 of each 32 tokens; a lane holds channels lane + 32 k, of which k and k + 2 are a pair. Keys are rotated to
// the query, which is the plain one.
template <bool Softcap>
__device__ __forceinline__ void take_dense(const Step& step, Shared& shared) {
  constexpr int chunk = 4;  // tokens whose loads are under way together
  constexpr int parts = head_dim / 32;
  int const warp = threadIdx.x / 32;
  int const lane = threadIdx.x % 32;
  const Segment& segment = shared.segment;
  const couplet_attend_sequence& sequence = step.params.sequences[segment.sequence];
  int const below = size_of(segment.seen.below);
  int const count = below + size_of(segment.seen.above);
  float2 away[2] = {{1, 0}, {1, 0}};  // the query's angle, backwards
  if (step.angles.pairs)
    for (int k = 0; k < 2; ++k) {
      float2 const angle = position_angle(step.angles, segment.position, lane + 32 * k);
      away[k] = {angle.x, -angle.y};
    }
  float maxima[rows];
  float sums[rows];
  float weighted[rows][parts];
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    maxima[row] = nothing;
    sums[row] = 0;
    for (int k = 0; k < parts; ++k) weighted[row][k] = 0;
  }
  for (int first = warp * chunk; first < count; first += warps * chunk) {
    int const index = first + lane;
    int const own = index < below ? segment.seen.below.begin + index : segment.seen.above.begin + index - below;
    DenseToken mine{nullptr, nullptr};
    if (lane < chunk && index < count) mine = dense_token(sequence, own, segment.kv_head);
    float keys[chunk][parts];
    float values[chunk][parts];
    bool there[chunk];
#pragma unroll
    for (int i = 0; i < chunk; ++i) {
      auto const from = [&](const float* row) {
        return reinterpret_cast<const float*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(row), i));
      };
      const float* const key = from(mine.key);
      const float* const value = from(mine.value);
      int const position = __shfl_sync(~0u, own, i);
      there[i] = key != nullptr;
#pragma unroll
      for (int k = 0; k < parts; ++k) {
        keys[i][k] = there[i] ? key[lane + 32 * k] : 0;
        values[i][k] = there[i] ? value[lane + 32 * k] : 0;
      }
      if (step.angles.pairs && there[i])
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float2 const angle = add_angles(position_angle(step.angles, position, lane + 32 * k), away[k]);
          float2 const turned = add_angles({keys[i][k], keys[i][k + 2]}, angle);
          keys[i][k] = turned.x;
          keys[i][k + 2] = turned.y;
        }
    }
#pragma unroll
    for (int i = 0; i < chunk; ++i)
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        float product = 0;
        for (int k = 0; k < parts; ++k) product += shared.plain_queries[row][lane + 32 * k] * keys[i][k];
        for (int offset = 16; offset > 0; offset /= 2) product += __shfl_xor_sync(~0u, product, offset);
        float const logit = !there[i] ? unseen : Softcap ? capped(step, product) : product;
        float const maximum = max(maxima[row], logit);
        float const factor = gpu::ex2_approx(maxima[row] - maximum);
        float const power = gpu::ex2_approx(logit - maximum);
        maxima[row] = maximum;
        sums[row] = sums[row] * factor + power;
        for (int k = 0; k < parts; ++k) weighted[row][k] = weighted[row][k] * factor + power * values[i][k];
      }
  }
  auto* const out = reinterpret_cast<float*>(shared.codes[warp]);
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < parts; ++k) out[row * head_dim + lane + 32 * k] = weighted[row][k];
    if (lane == 0) shared.sums[warp][row] = {maxima[row], sums[row]};
  }
  fold_warps(shared);
}

// ---- codes -------------------------------------------------------------------------------------------------------------------
// Where a lane looks: bytes from the start of shared.keys or values to its group's column, by s or by row.
struct Lane {
  int g;
  int t;
  unsigned key_column[2];
  unsigned value_column[2];
  unsigned query_column;  // bytes from the start of a half of shared.queries, s = 0; with bit 6 changed, s = 1
  int key_shift;          // the token's bit 0, in bits of a word of codes
  bool mine;              // this lane's columns of the logits are of its rows' class
  int turn;               // the lane whose logits become this lane's rows of the operand

  __device__ __forceinline__ explicit Lane(int lane) : g(lane / 4), t(lane % 4) {
    for (int i = 0; i < 2; ++i) {
      key_column[i] = static_cast<unsigned>(4 * (i ^ (g & 1)) + t) * 16;
      value_column[i] =
          static_cast<unsigned>((g >> 1) * slab_bytes + ((g & 1) * 4 + (i ^ (t & 1)) * 2 + (t >> 1)) * 16);
    }
    query_column = static_cast<unsigned>((g & 3) * head_dim * 2 + (4 * (g >> 2 ^ (g & 1)) + t) * 16);
    key_shift = 8 * (g >> 1 & 1);
    mine = t >> 1 == (g & 1);
    turn = ((g & 4) | (g & 1) << 1 | (g >> 1 & 1)) * 4 + t;
  }
};

// A warp's softmax in progress over its pages, for columns 2t and 2t + 1 of the products.
struct Progress {
  float maxima[2];
  float sums[2];
  float weighted[8][4];  // [channel of a group]: D operand, rows g and g + 8 are groups

  __device__ __forceinline__ Progress() : maxima{nothing, nothing}, sums{0, 0} {
#pragma unroll
    for (auto& channel : weighted)
      for (float& sum : channel) sum = 0;
  }
};

// logits[b][r * 2 + column] of tile b: products of 16 tokens with the queries.
__device__ __forceinline__ void multiply_keys(const Shared& shared, const Lane& lane, const KeyAngles& angles,
                                              const __half (&queries)[2][query_part], const Row (&codes)[4],
                                              float (&logits)[4][4]) {
  const unsigned char* const keys = &shared.keys[0][0];
  Row query[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    Row key[2][4];  // [row g or g + 8][s]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned const pair = codes[i].words[b] >> lane.key_shift;
      const unsigned char* const column = keys + i / 2 * slab_bytes;
      key[0][i] = load_row(column + (row_offset(pair, 0) | lane.key_column[i % 2]));
      key[1][i] = load_row(column + (row_offset(pair, 2) | lane.key_column[i % 2]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) {  // channels and those 64 further on
          __half2 const x = half2_of(key[r][i].words[c]);
          __half2 const y = half2_of(key[r][i + 2].words[c]);
          __half2 const cos = angles.cos[b % 2][r][i][c];
          __half2 const sin = angles.sin[b % 2][r][i][c];
          key[r][i].words[c] = bits_of(__hfma2(__hneg2(y), sin, __hmul2(x, cos)));
          key[r][i + 2].words[c] = bits_of(__hfma2(x, sin, __hmul2(y, cos)));
        }
    float second[4] = {};  // two chains of mma are shorter than one
#pragma unroll
    for (float& logit : logits[b]) logit = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (b % 2 == 0)
        query[i] = load_row(reinterpret_cast<const unsigned char*>(queries[b / 2]) + (lane.query_column ^ i % 2 * 64) +
                            i / 2 * 128);
      gpu::mma_m16n8k16_f16(logits[b], {key[0][i].words[0], key[1][i].words[0], key[0][i].words[1], key[1][i].words[1]},
                            {query[i].words[0], query[i].words[1]});
      gpu::mma_m16n8k16_f16(second, {key[0][i].words[2], key[1][i].words[2], key[0][i].words[3], key[1][i].words[3]},
                            {query[i].words[2], query[i].words[3]});
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) logits[b][c] += second[c];
  }
}

// Raises the maxima where a logit lies more than `headroom` above them.
__device__ __forceinline__ void raise_maxima(const Lane& lane, const float (&logits)[4][4], Progress& progress) {
  float largest[2] = {unseen, unseen};
#pragma unroll
  for (int b = 0; b < 4; ++b)
#pragma unroll
    for (int c = 0; c < 4; ++c) largest[c % 2] = max(largest[c % 2], logits[b][c]);
  bool const above = largest[0] > progress.maxima[0] + headroom || largest[1] > progress.maxima[1] + headroom;
  if (!__any_sync(~0u, lane.mine && above)) return;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float maximum = lane.mine ? largest[c] : unseen;
    for (int offset = 2; offset < 32; offset *= 2) maximum = max(maximum, __shfl_xor_sync(~0u, maximum, offset));
    maximum = max(maximum, progress.maxima[c]);
    float const factor = gpu::ex2_approx(progress.maxima[c] - maximum);
    progress.maxima[c] = maximum;
    progress.sums[c] *= factor;
#pragma unroll
    for (auto& channel : progress.weighted) {
      channel[c] *= factor;
      channel[c + 2] *= factor;
    }
  }
}

// powers[b]: B operand of 16 tokens and the columns of the logits; 0 in the columns of the other class.
__device__ __forceinline__ void take_powers(const Lane& lane, const float (&logits)[4][4], Progress& progress,
                                            uint32_t (&powers)[4][2]) {
  float const first = lane.mine ? progress.maxima[0] : -unseen;
  float const second = lane.mine ? progress.maxima[1] : -unseen;
#pragma unroll
  for (int b = 0; b < 4; ++b)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float const left = gpu::ex2_approx(logits[b][2 * r] - first);
      float const right = gpu::ex2_approx(logits[b][2 * r + 1] - second);
      progress.sums[0] += left;
      progress.sums[1] += right;
      powers[b][r] = gpu::movmatrix_trans(__shfl_sync(~0u, gpu::cvt_f16x2(left, right), lane.turn));
    }
}

__device__ __forceinline__ void add_values(const Shared& shared, const Lane& lane, const Row (&codes)[2],
                                           const uint32_t (&powers)[4][2], Progress& progress) {
  const unsigned char* const values = &shared.values[0][0];
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    Row value[4][2];  // [token][row g or g + 8]
#pragma unroll
    for (int token = 0; token < 4; ++token)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        value[token][r] = load_row(values + (row_offset(codes[r].words[b], token) | lane.value_column[r]));
#pragma unroll
    for (int channel = 0; channel < 8; ++channel) {
      unsigned const halves = channel % 2 ? 0x7632 : 0x5410;
      int const word = channel / 2;
      gpu::mma_m16n8k16_f16(progress.weighted[channel],
                            {__byte_perm(value[0][0].words[word], value[1][0].words[word], halves),
                             __byte_perm(value[0][1].words[word], value[1][1].words[word], halves),
                             __byte_perm(value[2][0].words[word], value[3][0].words[word], halves),
                             __byte_perm(value[2][1].words[word], value[3][1].words[word], halves)},
                            powers[b]);
    }
  }
}

// Both classes' sums of a warp into shared.codes and shared.sums. Class 1 has its rows swapped: lane t ^ 2, rows g and g + 8.
__device__ __forceinline__ void leave_progress(const Lane& lane, int warp, Progress& progress, Shared& shared) {
  int const row = 2 * lane.t & 3;
  auto* const out = reinterpret_cast<float*>(shared.codes[warp]);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    for (int offset = 2; offset < 32; offset *= 2) progress.sums[c] += __shfl_xor_sync(~0u, progress.sums[c], offset);
    if (lane.g == 0 && lane.t < 2) shared.sums[warp][row + c] = {progress.maxima[c], progress.sums[c]};
#pragma unroll
    for (int channel = 0; channel < 8; ++channel) {
      float const low = progress.weighted[channel][c] + __shfl_xor_sync(~0u, progress.weighted[channel][c + 2], 2);
      float const high = progress.weighted[channel][c + 2] + __shfl_xor_sync(~0u, progress.weighted[channel][c], 2);
      if (lane.t < 2) {
        out[(row + c) * head_dim + lane.g * 8 + channel] = low;
        out[(row + c) * head_dim + (lane.g + 8) * 8 + channel] = high;
      }
    }
  }
}

// Where this warp's page of a unit is written; NULL where the segment has no token of it.
__device__ __forceinline__ const uint8_t* const* page_of(const Shared& shared, int unit) {
  Interval const codes = shared.segment.seen.codes;
  int const begin = unit * unit_tokens + static_cast<int>(threadIdx.x) / 32 * page_tokens;
  return begin < codes.end && begin + page_tokens > codes.begin ? shared.pages + begin / page_tokens : nullptr;
}

// Issues the copies of this warp's codes, zeros for a page that is not there, and of where the page of the unit after lies.
__device__ __forceinline__ void fetch_codes(const Step& step, Shared& shared, const uint8_t* page, int next_unit) {
  int const warp = threadIdx.x / 32;
  int const at = static_cast<int>(threadIdx.x) % 32 * 16;
  int const kv_head = shared.segment.kv_head;
  unsigned char* const staged = shared.codes[warp] + at;
  const uint8_t* const nowhere = reinterpret_cast<const uint8_t*>(step.key_banked);
  const uint8_t* const key =
      page ? page + step.params.key_page_offset + kv_head * step.params.key_page_stride + at : nowhere;
  const uint8_t* const value =
      page ? page + step.params.value_page_offset + kv_head * step.params.value_page_stride + at : nowhere;
  for (int part = 0; part < page_bytes; part += 512) {
    gpu::cp_async<16>(staged + part, key + part, page ? 16 : 0);
    gpu::cp_async<16>(staged + page_bytes + part, value + part, page ? 16 : 0);
  }
  if (at == 0) {
    const uint8_t* const* const next = page_of(shared, next_unit);
    gpu::cp_async<8>(&shared.next_page[next_unit % 2][warp], next ? static_cast<const void*>(next) : nowhere,
                     next ? 8 : 0);
  }
}

template <bool Softcap>
__device__ __forceinline__ void take_codes(const Step& step, Shared& shared) {
  int const warp = threadIdx.x / 32;
  Lane const lane(static_cast<int>(threadIdx.x) % 32);
  int const first_unit = shared.segment.seen.codes.begin / unit_tokens;
  auto const end_unit = [&] { return blocks_of(shared.segment.seen.codes.end, unit_tokens); };
  unsigned char* const staged = shared.codes[warp];

  const uint8_t* const* const first_page = page_of(shared, first_unit);
  fetch_step(step, shared, first_unit);
  fetch_codes(step, shared, first_page ? *first_page : nullptr, first_unit + 1);
  gpu::cp_async_commit();
  KeyAngles angles;
  make_key_angles(step.angles, warp, lane.g, lane.t, angles);
  gpu::cp_async_wait<0>();
  write_query(shared, first_unit % 2);
  if (first_unit + 1 < end_unit()) fetch_step(step, shared, first_unit + 1);
  gpu::cp_async_commit();
  __syncthreads();  // the tables and the queries are there
  Progress progress;
  for (int unit = first_unit; unit < end_unit(); ++unit) {
    gpu::cp_async_wait<0>();
    __syncwarp();
    if (unit + 1 < end_unit()) write_query(shared, (unit + 1) % 2);
    Row key_codes[4];  // of groups 4 s + t, 16 tokens
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const group = (i / 2 * 2 + (i % 2 ^ (lane.g & 1))) * 4 + lane.t;
      key_codes[i] = load_row(staged + group * page_tokens + token_of(lane.g, 0, 0) / 16 * 16);
    }
    float logits[4][4];
    multiply_keys(shared, lane, angles, shared.queries[unit % 2], key_codes, logits);
    if constexpr (Softcap)
#pragma unroll
      for (auto& tile : logits)
#pragma unroll
        for (float& logit : tile) logit = capped(step, logit);
    int const page_begin = unit * unit_tokens + warp * page_tokens;
    Interval const codes = shared.segment.seen.codes;
    if (page_begin < codes.begin || page_begin + page_tokens > codes.end) {
#pragma unroll
      for (int b = 0; b < 4; ++b)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          int const position = page_begin + token_of(lane.g, b, c / 2);
          if (position < codes.begin || position >= codes.end) logits[b][c] = unseen;
        }
    }
    raise_maxima(lane, logits, progress);
    Row value_codes[2];  // of groups g and g + 8, tokens 16 t on
#pragma unroll
    for (int r = 0; r < 2; ++r)
      value_codes[r] = load_row(staged + page_bytes + (lane.g + 8 * (r ^ (lane.t & 1))) * page_tokens + lane.t * 16);
    __syncwarp();  // the codes are in registers
    if (unit + 1 < end_unit()) {
      fetch_codes(step, shared, shared.next_page[(unit + 1) % 2][warp], unit + 2);
      if (unit + 2 < end_unit()) fetch_step(step, shared, unit + 2);
      gpu::cp_async_commit();
    }
    uint32_t powers[4][2];
    take_powers(lane, logits, progress, powers);
    add_values(shared, lane, value_codes, powers, progress);
    __syncthreads();  // both buffers of queries change their part
  }
  leave_progress(lane, warp, progress, shared);
  fold_warps(shared);
}

// The segments of this block's range, one after the other.
template <bool Softcap>
__device__ __forceinline__ void run_segments(const Step& step) {
  GPU_DYNAMIC_SHARED(Shared, memory);
  Shared& shared = *memory;
  Ranges const ranges(step);
  int64_t const begin = ranges.begin(blockIdx.x);
  if (begin == ranges.begin(blockIdx.x + 1)) return;
  int const first_head = static_cast<int>(begin / ranges.units) / (step.head_blocks / step.params.kv_heads);
  load_tables(step, first_head, shared);  // under way while the first segment is found
  if (threadIdx.x == 0) {
    shared.at = begin;
    shared.table_head = first_head;
  }
  for (;;) {
    __syncthreads();  // the segment before is done
    int64_t const at = shared.at;
    if (at == Ranges(step).begin(blockIdx.x + 1)) break;
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
    for (int element = threadIdx.x; element < rows * head_dim; element += threads)
      shared.weighted[element / head_dim][element % head_dim] = 0;
    if (threadIdx.x < rows) shared.total[threadIdx.x] = {nothing, 0};
    __syncthreads();
    load_query(step, shared);
    __syncthreads();
    if (size_of(shared.segment.seen.below) + size_of(shared.segment.seen.above) > 0) take_dense<Softcap>(step, shared);
    if (size_of(shared.segment.seen.codes) > 0) take_codes<Softcap>(step, shared);
    int64_t const slot = static_cast<int64_t>(shared.segment.slot) * rows;
    for (int element = threadIdx.x; element < shared.segment.rows * head_dim; element += threads)
      step.weighted[slot * head_dim + element] = shared.weighted[element / head_dim][element % head_dim];
    if (static_cast<int>(threadIdx.x) < shared.segment.rows) step.sums[slot + threadIdx.x] = shared.total[threadIdx.x];
  }
  gpu::cp_async_wait<0>();  // a block of dense units alone has never waited for its tables
}

// ---- kernel ------------------------------------------------------------------------------------------------------------------
// 8 warps of 249 registers, one block a multiprocessor: independent chains inside a warp hide what more warps would, and those spill.
template <bool Softcap>
__global__ void __launch_bounds__(threads, 1) lookup([[maybe_unused]] Step const step) {
  if (gpu::large_shared) run_segments<Softcap>(step);
}

}  // namespace

// ---- launcher ----------------------------------------------------------------------------------------------------------------
bool has_lookup() {
  int const shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return static_cast<size_t>(shared_bytes) >= sizeof(Shared) && gpu::has_large_shared_body(lookup<false>);
}

cudaError_t launch_lookup(const Step& step, cudaStream_t stream) {
  return gpu::launch(step.params.softcap > 0 ? lookup<true> : lookup<false>, step.blocks, threads, sizeof(Shared),
                     stream, step);
}

}  // namespace couplet::cuda::attend
