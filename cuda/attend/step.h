// What every kernel of attend shares: which tokens a query sees, and how the decoding of one step is cut into equal ranges.
//
//   head block   up to `block_rows` query heads that share a kv head; head_blocks = kv_heads * ceil(group_heads / block_rows)
//   item         one head block of one sequence whose step has one query
//   unit         what costs about the same: `dense_unit` tokens in full precision, or a block of `coded_unit` positions in codes;
//                a sequence has its dense units first
//   range        [all * b / active, all * (b + 1) / active) of the units of all items, head block by head block: the work of block b,
//                of which the plan says how many are active
//   segment      the part of one item in one range; slot  b + item  of the partial results is its own, because from one segment to
//                the next b or item grows
#pragma once

#include "../../native/abi/operations.h"
#include "../device/elements.h"
#include "../gpu.h"
#include "../rotary.h"

namespace couplet::cuda::attend {

// The argument of all kernels. Pointers are the device's, but for params.key_table, value_table and rotary: handles of the host.
struct Step {
  couplet_attend_params params;
  Angles angles;
  const float* key_rows;  // float32 centroids, see Table
  const float* value_rows;
  const __half* key_by_code;
  const __half* value_by_code;
  const uint8_t* value_levels;  // NULL where centroids of values lie on no levels
  const float2* value_scales;
  int32_t*
      unit_begin;  // [sequence_count + 2]: units of one head block before a sequence; behind the last, the active blocks
  int32_t*
      row_begin;  // [sequence_count + 1]: row blocks of one kv head before a sequence; of sequences with other than one query
  int32_t*
      wide;  // [sequence_count][kv_heads]: 1 where prefill met what float16 does not hold; NULL where no body uses it
  float* weighted;  // [slots][block_rows][head_dim]: sum of 2^(logit - maximum) * value
  float2* sums;     // [slots][block_rows]: maximum, sum of 2^(logit - maximum); logits in powers of two
  int32_t group_heads;
  int32_t block_rows;
  int32_t head_blocks;
  int32_t blocks;  // that share the units
  int32_t prefill_blocks;
  int32_t prefill_rows;  // of a row block
  int32_t coded_unit;    // tokens
  int32_t dense_unit;    // tokens
};

struct Interval {
  int begin;
  int end;
};

__device__ __forceinline__ int size_of(Interval interval) { return max(0, interval.end - interval.begin); }
__device__ __forceinline__ Interval both_of(Interval a, Interval b) {
  return {max(a.begin, b.begin), min(a.end, b.end)};
}
__host__ __device__ constexpr int blocks_of(int count, int block) { return (count + block - 1) / block; }

// The positions that a query sees, by where it reads them: dense runs before coded_begin, codes, dense runs behind. The ends of
// each never fall from one query to the next.
struct Seen {
  Interval below;
  Interval codes;
  Interval above;
};

__device__ __forceinline__ Seen seen_by(const couplet_attend_params& params, const couplet_attend_sequence& sequence,
                                        int position) {
  int const oldest = params.local_window ? max(0, position - params.local_window + 1) : 0;
  int const coded_end = min(sequence.coded_end, position - sequence.window + 1);
  int const oldest_above = max(oldest, sequence.coded_begin);
  return {{oldest, min(sequence.coded_begin, position + 1)},
          {oldest_above, coded_end},
          {max(oldest_above, coded_end), position + 1}};
}

__device__ __forceinline__ int dense_units(const Step& step, const Seen& seen) {
  return blocks_of(size_of(seen.below) + size_of(seen.above), step.dense_unit);
}
__device__ __forceinline__ int coded_units(const Step& step, Interval codes) {
  return codes.begin < codes.end ? blocks_of(codes.end, step.coded_unit) - codes.begin / step.coded_unit : 0;
}

// Keys and values of one token in full precision; NULL where no run has it.
struct DenseToken {
  const float* key;
  const float* value;
};

__device__ __forceinline__ DenseToken dense_token(const couplet_attend_sequence& sequence, int position, int kv_head) {
  for (int run = 0; run < sequence.dense_count; ++run) {
    const couplet_dense_rows& rows = sequence.dense[run];
    int64_t const i = position - rows.first_token;
    if (i >= 0 && i < rows.tokens)
      return {rows.keys + i * rows.key_token_stride + kv_head * rows.key_head_stride,
              rows.values + i * rows.value_token_stride + kv_head * rows.value_head_stride};
  }
  return {nullptr, nullptr};
}

// The last index with begins[index] <= value, of `count` ascending begins; begins[0] is 0. All lanes of the warp ask the same.
__device__ __forceinline__ int find_begin(const int32_t* begins, int count, int value) {
  int low = 0;
  for (int width = count; width > 1;) {
    int const stride = blocks_of(width, 32);
    int const probe = low + stride * gpu::lane_id();
    unsigned const reached = __ballot_sync(~0u, probe < count && begins[probe] <= value);
    low += stride * (__popc(reached) - 1);
    width = stride;
  }
  return low;
}

// Units of all items, and the blocks that have some: none of their ranges is empty. 2^31 units would be more tokens than any device holds.
struct Ranges {
  int units;  // of one head block
  int all;
  int active;

  __device__ __forceinline__ explicit Ranges(const Step& step)
      : units(step.unit_begin[step.params.sequence_count]),
        all(units * step.head_blocks),
        active(step.unit_begin[step.params.sequence_count + 1]) {}
  // all * block / active, without a division of 64 bits.
  __device__ __forceinline__ int begin(unsigned block) const {
    int const b = static_cast<int>(block);
    return b < active ? all / active * b + all % active * b / active : all;
  }
  __device__ __forceinline__ int end(unsigned block) const { return begin(block + 1); }
  // The last block with begin(block) <= unit.
  __device__ __forceinline__ int owner(int unit) const {
    return static_cast<int>(((static_cast<int64_t>(unit) + 1) * active - 1) / all);
  }
};

struct Segment {
  int slot;
  int kv_head;
  int first_head;  // query head of row 0
  int rows;        // query heads
  int sequence;
  int position;  // of the query
  int units;
  Seen seen;  // the part of what the query sees that lies in the segment
};

// The segment that starts at unit `at` of all; all lanes of a warp ask the same.
__device__ __forceinline__ Segment segment_at(const Step& step, int at) {
  Ranges const ranges(step);
  int const sequences = step.params.sequence_count;
  int const head_block = at / ranges.units;
  int const unit = at % ranges.units;
  int const index = find_begin(step.unit_begin, sequences, unit);
  int const first = unit - step.unit_begin[index];
  int const count = min(ranges.end(blockIdx.x) - at, step.unit_begin[index + 1] - unit);
  const couplet_attend_sequence& sequence = step.params.sequences[index];
  int const head_blocks_of_kv = step.head_blocks / step.params.kv_heads;
  int const kv_head = head_block / head_blocks_of_kv;
  int const first_row = head_block % head_blocks_of_kv * step.block_rows;

  Seen const whole = seen_by(step.params, sequence, sequence.first_query);
  int const dense = dense_units(step, whole);
  int const below = size_of(whole.below);
  Interval const tokens{first * step.dense_unit,
                        min(first + count, dense) * step.dense_unit};  // of below and above in a row
  int const block = size_of(whole.codes) ? whole.codes.begin / step.coded_unit - dense : 0;
  Interval const codes{max(first, dense) + block, first + count + block};
  return {
      .slot = static_cast<int>(blockIdx.x) + head_block * sequences + index,
      .kv_head = kv_head,
      .first_head = kv_head * step.group_heads + first_row,
      .rows = min(step.block_rows, step.group_heads - first_row),
      .sequence = index,
      .position = sequence.first_query,
      .units = count,
      .seen = {.below = both_of(whole.below, {whole.below.begin + tokens.begin, whole.below.begin + tokens.end}),
               .codes = codes.begin < codes.end
                            ? both_of(whole.codes, {codes.begin * step.coded_unit, codes.end * step.coded_unit})
                            : Interval{0, 0},
               .above = both_of(whole.above, {whole.above.begin + max(0, tokens.begin - below),
                                              whole.above.begin + tokens.end - below})},
  };
}

// What a row's sum of weighted values is multiplied by: 1 / sum, with the head's sink as one more logit that has no value.
__device__ __forceinline__ float output_factor(const couplet_attend_params& params, int head, float maximum,
                                               float sum) {
  if (sum == 0) return 0;
  if (!params.head_sinks) return 1 / sum;
  constexpr float log2_e = 1.4426950408889634f;
  float const sink = params.head_sinks[head] * log2_e;
  float const largest = max(maximum, sink);
  float const own = gpu::ex2_approx(maximum - largest);
  return own / (sum * own + gpu::ex2_approx(sink - largest));
}

// A logit in powers of two, from the product with its scale: softcap(scale * product) * log2(e).
__device__ __forceinline__ float capped_logit(const couplet_attend_params& params, float scaled) {
  constexpr float log2_e = 1.4426950408889634f;
  return (params.softcap > 0 ? params.softcap * tanhf(scaled / params.softcap) : scaled) * log2_e;
}

// softcap * tanh(logit / softcap), both in powers of two; tanh(x) = 1 - 2 / (e^2x + 1) costs fewer registers than tanhf.
__device__ __forceinline__ float capped(const Step& step, float logit) {
  constexpr float log2_e = 1.4426950408889634f;
  float const cap = step.params.softcap;
  return cap * log2_e * (1 - 2 * gpu::rcp_approx(gpu::ex2_approx(2 * logit * gpu::rcp_approx(cap)) + 1));
}

// ---- launchers -------------------------------------------------------------------------------------------------------------
// Writes unit_begin and row_begin. `segment_cost`: of a segment besides its units, in units.
cudaError_t launch_plan(const Step& step, int segment_cost, cudaStream_t stream);
cudaError_t launch_merge(const Step& step, cudaStream_t stream);  // partial results -> outputs
cudaError_t launch_general_decode(const Step& step, cudaStream_t stream);
cudaError_t launch_prefill(const Step& step, cudaStream_t stream);
cudaError_t launch_lookup(const Step& step, cudaStream_t stream);
cudaError_t launch_gather(const Step& step, cudaStream_t stream);
cudaError_t launch_staged(const Step& step, cudaStream_t stream);

int device_attribute(cudaDeviceAttr attribute);              // of the calling thread's device
bool has_half_prefill(const couplet_attend_params& params);  // whether prefill may run on tiles of float16
int prefill_rows(const couplet_attend_params& params);       // of a row block, on this device
inline constexpr int general_rows = 16;
inline constexpr int general_unit = 256;  // tokens, coded or dense
inline constexpr int lookup_rows = 4;
inline constexpr int lookup_dense_unit = 64;  // costs about what 512 coded tokens cost: 64 KB from memory
bool has_gather(const couplet_attend_params& params);
int gather_rows(const couplet_attend_params& params);
bool has_staged(const couplet_attend_params& params);
int staged_rows(const couplet_attend_params& params);
bool has_lookup(
    int channels);  // whether this device has the shared memory, and this library a body for groups of so many channels

}  // namespace couplet::cuda::attend
