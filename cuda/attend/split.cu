// Before and after decoding: the plan that cuts a step's work into equal ranges, and the merge of what the ranges came to.
#include "step.h"

namespace couplet::cuda::attend {
namespace {

constexpr int plan_threads = 256;
constexpr int merge_threads = 256;

// ---- device helpers --------------------------------------------------------------------------------------------------------
// How many blocks share the units, none with an empty range. Where all sequences have as many, fewer blocks may have ranges that begin with
// an item, or items that begin with a range, and so fewer segments.
__device__ __forceinline__ int active_blocks(int blocks, int items, int item_units, int segment_cost) {
  int const all = items * item_units;
  int const most = min(all, blocks);
  if (all == 0) return 0;
  int const of_block = blocks_of(items, blocks);                // items, where a block has whole ones
  int const of_item = max(1, min(blocks / items, item_units));  // blocks, where an item has whole ones
  if (items > blocks && items % of_block != 0) return most;
  int const aligned = items > blocks ? items / of_block : items * of_item;
  int const units = blocks_of(all, most);
  int const segments = (units + item_units - 2) / item_units + 1;
  bool const pays =
      blocks_of(all, aligned) + segment_cost * (items > blocks ? of_block : 1) < units + segment_cost * segments;
  return pays ? aligned : most;
}

// ---- kernels ---------------------------------------------------------------------------------------------------------------
// [sequence_count] sequences -> running sums of their units and row blocks, how many blocks share the units, and no mark of prefill's.
__global__ void __launch_bounds__(plan_threads) plan(Step const step, int const segment_cost) {
  GPU_SHARED(warp_sums, int2[plan_threads / 32]);
  GPU_SHARED(warp_alike, int[plan_threads / 32]);
  gpu::let_next_start();
  int const lane = threadIdx.x % 32;
  int const warp = threadIdx.x / 32;
  int2 total{0, 0};  // of the sequences before this round
  int const marks = step.wide ? step.params.sequence_count * step.params.kv_heads : 0;
  for (int mark = static_cast<int>(threadIdx.x); mark < marks; mark += plan_threads) step.wide[mark] = 0;
  for (int first = 0; first < step.params.sequence_count; first += plan_threads) {
    int const index = first + static_cast<int>(threadIdx.x);
    int2 sum{0, 0};
    if (index < step.params.sequence_count) {
      const couplet_attend_sequence& sequence = step.params.sequences[index];
      if (sequence.query_tokens == 1) {
        Seen const seen = seen_by(step.params, sequence, sequence.first_query);
        sum.x = dense_units(step, seen) + coded_units(step, seen.codes);
      } else {
        int64_t const rows = static_cast<int64_t>(sequence.query_tokens) * step.group_heads;
        sum.y = static_cast<int>((rows + step.prefill_rows - 1) / step.prefill_rows);
      }
    }
    int2 const own = sum;
    for (int offset = 1; offset < 32; offset *= 2) {
      int2 const before{__shfl_up_sync(~0u, sum.x, offset), __shfl_up_sync(~0u, sum.y, offset)};
      if (lane >= offset) sum = {sum.x + before.x, sum.y + before.y};
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int2 round{0, 0};
    for (int other = 0; other < plan_threads / 32; ++other) {
      if (other == warp) sum = {sum.x + round.x, sum.y + round.y};
      round = {round.x + warp_sums[other].x, round.y + warp_sums[other].y};
    }
    if (index < step.params.sequence_count) {
      step.unit_begin[index] = total.x + sum.x - own.x;
      step.row_begin[index] = total.y + sum.y - own.y;
    }
    total = {total.x + round.x, total.y + round.y};
    __syncthreads();
  }
  int const count = step.params.sequence_count;
  if (threadIdx.x == 0) {
    step.unit_begin[count] = total.x;
    step.row_begin[count] = total.y;
  }
  __syncthreads();
  bool alike = true;  // all sequences have as many units
  for (int index = static_cast<int>(threadIdx.x); index < count; index += plan_threads)
    alike = alike && step.unit_begin[index + 1] - step.unit_begin[index] == total.x / count;
  alike = __all_sync(~0u, alike);
  if (lane == 0) warp_alike[warp] = alike;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int other = 0; other < plan_threads / 32; ++other) alike = alike && warp_alike[other];
  step.unit_begin[count + 1] = alike
                                   ? active_blocks(step.blocks, count * step.head_blocks, total.x / count, segment_cost)
                                   : min(total.x * step.head_blocks, step.blocks);
}

// One item a block. Slots of item i are those of the blocks whose ranges meet its units; added in their order.
__global__ void __launch_bounds__(merge_threads) merge(Step const step) {
  gpu::wait_for_last();
  int const sequences = step.params.sequence_count;
  int const index = static_cast<int>(blockIdx.x) % sequences;
  int const head_block = static_cast<int>(blockIdx.x) / sequences;
  Ranges const ranges(step);
  int const begin = ranges.units * head_block + step.unit_begin[index];
  int const end = ranges.units * head_block + step.unit_begin[index + 1];
  if (begin == end) return;  // not a sequence with one query
  int64_t const first_slot = ranges.owner(begin) + blockIdx.x;
  int64_t const last_slot = ranges.owner(end - 1) + blockIdx.x;

  const couplet_attend_sequence& sequence = step.params.sequences[index];
  int const head_blocks_of_kv = step.head_blocks / step.params.kv_heads;
  int const first_row = head_block % head_blocks_of_kv * step.block_rows;
  int const rows = min(step.block_rows, step.group_heads - first_row);
  int const head_dim = step.params.head_dim;
  for (int element = threadIdx.x; element < rows * head_dim; element += merge_threads) {
    int const row = element / head_dim;
    int const channel = element % head_dim;
    int const head = head_block / head_blocks_of_kv * step.group_heads + first_row + row;
    float maximum = -INFINITY;
    for (int64_t slot = first_slot; slot <= last_slot; ++slot)
      maximum = max(maximum, step.sums[slot * step.block_rows + row].x);
    float sum = 0;
    float weighted = 0;
    for (int64_t slot = first_slot; slot <= last_slot; ++slot) {
      float2 const part = step.sums[slot * step.block_rows + row];
      if (part.y == 0) continue;
      float const factor = gpu::ex2_approx(part.x - maximum);
      sum += part.y * factor;
      weighted += step.weighted[(slot * step.block_rows + row) * head_dim + channel] * factor;
    }
    store_element(sequence.outputs, step.params.output_dtype, head * sequence.output_head_stride + channel,
                  weighted * output_factor(step.params, head, maximum, sum));
  }
}

}  // namespace

// ---- launchers -------------------------------------------------------------------------------------------------------------
cudaError_t launch_plan(const Step& step, int segment_cost, cudaStream_t stream) {
  return gpu::launch(plan, 1, plan_threads, 0, stream, step, segment_cost);
}

cudaError_t launch_merge(const Step& step, cudaStream_t stream) {
  return gpu::launch_early(merge, step.head_blocks * step.params.sequence_count, merge_threads, 0, stream, step);
}

}  // namespace couplet::cuda::attend
