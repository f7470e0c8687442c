// encode: rows -> the nearest centroid of every group -> codes in pages.
//
// Two bodies, one rule (nearest.h), bytes of an octet written by one thread:
//   tokens     a lane owns 4 neighbouring tokens, whose group it keeps in registers; centroids pass by through shared memory, the
//              same for all lanes. A centroid of 8 channels costs a lane 2 loads, and 4 x (16 + 3) instructions for its tokens.
//   centroids  lanes own centroids, and a warp encodes one octet of one group: for few tokens, and for group sizes without a tile.
// A NaN or an infinity is found by who loads it: the first one, by token, kv head and channel, ends up in the workspace's report.
#include <algorithm>
#include <cstdio>

#include "../backend.h"
#include "../device/not_finite.h"
#include "../device/pages.h"
#include "nearest.h"

namespace couplet::cuda {
namespace {

constexpr int block_threads = 128;
constexpr int warp_lanes = 32;
constexpr int lane_tokens = 4;
constexpr int block_octets = block_threads * lane_tokens / 8;
constexpr int stage_floats = 4096;         // of centroids in shared memory at a time: 512 of 8 channels
constexpr int32_t most_runs = 65535;       // gridDim.y
constexpr int32_t least_tile_tokens = 96;  // fewer leave most lanes of `tokens` without work

// Tokens that follow each other, and where their codes go.
struct Run {
  const void* rows;
  int64_t token_stride;  // elements
  int64_t head_stride;   // elements
  int64_t tokens_before;
  Octets octets;
};

struct Call {
  Run run;                         // the only one
  const couplet_encode_run* runs;  // device, one for each block along y; NULL: `run`
  const float* table;   // float32 [kv_heads][groups][centroids][group_channels], under the metric where there is one
  const float* metric;  // float32 [kv_heads][groups][group_channels][group_channels], or NULL
  NotFinite* not_finite;
  uint32_t row_units;  // units of work of one kv head and group: octets, or tiles of them
  int32_t dtype;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t groups;
  int32_t group_channels;
  int32_t code_bits;
};

// The run of this block, into shared memory: 14 registers fewer while centroids pass by.
__device__ __forceinline__ void take_run(const Call& call, Run& run) {
  if (threadIdx.x == 0) {
    run = call.run;
    if (call.runs) {
      const couplet_encode_run& given = call.runs[blockIdx.y];
      run.rows = given.rows;
      run.token_stride = given.token_stride;
      run.head_stride = given.head_stride;
      run.tokens_before = given.tokens_before;
      run.octets.hold(given.pages, given.first_token, given.tokens);
    }
  }
  __syncthreads();
}

__device__ __forceinline__ const float* table_rows(const Call& call, int32_t kv_head, int32_t group) {
  return call.table + ((int64_t{kv_head} * call.groups + group) * call.group_channels << call.code_bits);
}

__device__ __forceinline__ Point point_of(const Call& call, const Run& run, int32_t token, int32_t kv_head,
                                          int32_t group) {
  return {run.rows, token * run.token_stride + kv_head * run.head_stride + int64_t{group} * call.group_channels,
          call.dtype};
}

__device__ __forceinline__ MeasuredPoint measured_of(const Call& call, const Point& point, int32_t kv_head,
                                                     int32_t group) {
  int64_t const matrix = (int64_t{kv_head} * call.groups + group) * call.group_channels * call.group_channels;
  return {point, call.metric + matrix, call.group_channels};
}

// Floats from global to shared memory by all threads of the block, 16 bytes at a time; both sides are aligned and `count` is a
// multiple of 4 (or, for tables below that, single floats).
__device__ __forceinline__ void stage_centroids(float* to, const float* from, int32_t count) {
  if (count % 4 == 0) {
    for (int32_t i = 4 * static_cast<int32_t>(threadIdx.x); i < count; i += 4 * block_threads)
      gpu::cp_async<16>(to + i, from + i);
  } else {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += block_threads)
      gpu::cp_async<4>(to + i, from + i);
  }
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  __syncthreads();
}

// Of a multiprocessor: as many as leave registers enough that nothing is spilled.
template <int Channels>
inline constexpr int resident_blocks = Channels > 8 ? 4 : (Channels > 4 ? 7 : 8);

// Measured: there is a metric.
template <int Channels, bool Measured>
__global__ void __launch_bounds__(block_threads, resident_blocks<Channels>) encode_tokens(Call const call) {
  GPU_SHARED(run, Run);
  GPU_SHARED(centroid_stage, uint4[stage_floats / 4]);
  float* const stage = reinterpret_cast<float*>(centroid_stage);
  take_run(call, run);
  int32_t const row = static_cast<int32_t>(blockIdx.x / call.row_units);
  int32_t const kv_head = row / call.groups;
  int32_t const group = row % call.groups;
  int32_t const centroids = 1 << call.code_bits;
  const float* const table = table_rows(call, kv_head, group);
  // Neighbouring lanes share an octet: the even one has its first half, and writes it.
  uint32_t const octet = blockIdx.x % call.row_units * block_octets + threadIdx.x / 2;
  int32_t const octet_token = run.octets.token(octet);
  int32_t const first_token = octet_token + static_cast<int32_t>(threadIdx.x % 2) * lane_tokens;

  float values[lane_tokens][Channels];
#pragma unroll
  for (int t = 0; t < lane_tokens; ++t) {
    int32_t const token = first_token + t;
    bool const inside = octet < run.octets.count && token >= 0 && token < run.octets.tokens;
    Point const point = point_of(call, run, token, kv_head, group);
#pragma unroll
    for (int c = 0; c < Channels; ++c) {
      values[t][c] = inside ? point[c] : 0.0f;
      if (!is_finite(values[t][c]))
        note_not_finite(call.not_finite, run.tokens_before + token, kv_head, group * Channels + c, call.kv_heads);
    }
    if constexpr (Measured) {
      MeasuredPoint const measured = measured_of(call, point, kv_head, group);
      for (int c = 0; c < Channels && inside; ++c) values[t][c] = measured[c];
    }
  }

  float best[lane_tokens];
  int32_t code[lane_tokens];
#pragma unroll
  for (int t = 0; t < lane_tokens; ++t) {
    best[t] = __uint_as_float(0x7f800000u);
    code[t] = 0;
  }
  constexpr int32_t stage_centroids_most = stage_floats / Channels;
  for (int32_t first = 0; first < centroids; first += stage_centroids_most) {
    int32_t const count = min(centroids - first, stage_centroids_most);
    if (first > 0) __syncthreads();  // all have read the stage before
    stage_centroids(stage, table + int64_t{first} * Channels, count * Channels);
#pragma unroll 2
    for (int32_t k = 0; k < count; ++k) {
      float centroid[Channels];
      if constexpr (Channels % 4 == 0) {
#pragma unroll
        for (int c = 0; c < Channels; c += 4) {
          float4 const four = *reinterpret_cast<const float4*>(stage + k * Channels + c);
          centroid[c] = four.x;
          centroid[c + 1] = four.y;
          centroid[c + 2] = four.z;
          centroid[c + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int c = 0; c < Channels; ++c) centroid[c] = stage[k * Channels + c];
      }
#pragma unroll
      for (int t = 0; t < lane_tokens; ++t) {
        float distance = 0;
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
          float const difference = __fsub_rn(values[t][c], centroid[c]);
          distance = __fmaf_rn(difference, difference, distance);
        }
        if (distance < best[t]) {
          best[t] = distance;
          code[t] = first + k;
        }
      }
    }
  }

  uint64_t quad = 0;
  uint32_t doubtful = 0;  // a bit for each token
#pragma unroll
  for (int t = 0; t < lane_tokens; ++t) {
    int32_t const token = first_token + t;
    if (octet >= run.octets.count || token < 0 || token >= run.octets.tokens) continue;
    quad |= static_cast<uint64_t>(code[t]) << (t * call.code_bits);
    doubtful |= is_trusted(best[t]) ? 0 : 1u << t;
  }
  for (; doubtful; doubtful &= doubtful - 1) {
    int32_t const t = __ffs(static_cast<int>(doubtful)) - 1;
    int32_t const shift = t * call.code_bits;
    int32_t const found = static_cast<int32_t>(quad >> shift) & (centroids - 1);
    Point const point = point_of(call, run, first_token + t, kv_head, group);
    int32_t nearest;
    if constexpr (Measured)
      nearest = nearest_in_double(measured_of(call, point, kv_head, group), table, Channels, centroids, found);
    else
      nearest = nearest_in_double(point, table, Channels, centroids, found);
    quad ^= static_cast<uint64_t>(found ^ nearest) << shift;
  }
  uint64_t const other = __shfl_xor_sync(~0u, static_cast<unsigned long long>(quad), 1);
  if (threadIdx.x % 2 == 0 && octet < run.octets.count)
    store_octet(run.octets.address(octet, kv_head, group, call.code_bits), call.code_bits, {{quad, other}},
                max(0, -octet_token), min(8, run.octets.tokens - octet_token));
  report_not_finite(call.not_finite, call.kv_heads);
}

// The sum over channels of one token and one centroid, in the order of all bodies.
__device__ __forceinline__ float distance_between(const float* token, const float* centroid, int32_t channels) {
  float distance = 0;
  auto const add = [&](float value, float other) {
    float const difference = __fsub_rn(value, other);
    distance = __fmaf_rn(difference, difference, distance);
  };
  if (channels % 4 == 0) {  // then every centroid is on 16 bytes
    for (int32_t c = 0; c < channels; c += 4) {
      float4 const four = *reinterpret_cast<const float4*>(token + c);
      float4 const others = __ldg(reinterpret_cast<const float4*>(centroid + c));
      add(four.x, others.x);
      add(four.y, others.y);
      add(four.z, others.z);
      add(four.w, others.w);
    }
  } else {
    for (int32_t c = 0; c < channels; ++c) add(token[c], __ldg(centroid + c));
  }
  return distance;
}

__global__ void __launch_bounds__(block_threads, resident_blocks<8>) encode_centroids(Call const call) {
  GPU_SHARED(run, Run);
  GPU_SHARED(points, float4[block_threads / warp_lanes][COUPLET_MAX_HEAD_DIM / 4]);
  take_run(call, run);
  int32_t const lane = gpu::lane_id();
  float* const values = reinterpret_cast<float*>(points[threadIdx.x / warp_lanes]);
  uint32_t const unit = blockIdx.x * (block_threads / warp_lanes) + threadIdx.x / warp_lanes;
  int32_t const row = static_cast<int32_t>(unit / call.row_units);
  if (row < call.kv_heads * call.groups) {  // the whole warp or none of it
    int32_t const kv_head = row / call.groups;
    int32_t const group = row % call.groups;
    int32_t const channels = call.group_channels;
    int32_t const centroids = 1 << call.code_bits;
    const float* const table = table_rows(call, kv_head, group);
    uint32_t const octet = unit % call.row_units;
    int32_t const octet_token = run.octets.token(octet);
    int32_t const first = max(0, -octet_token);
    int32_t const end = min(8, run.octets.tokens - octet_token);
    Octet codes{};
    for (int32_t slot = first; slot < end; ++slot) {
      Point const point = point_of(call, run, octet_token + slot, kv_head, group);
      __syncwarp();  // all lanes have read the token before
      for (int32_t c = lane; c < channels; c += warp_lanes) {
        values[c] = point[c];
        if (!is_finite(values[c]))
          note_not_finite(call.not_finite, run.tokens_before + octet_token + slot, kv_head, group * channels + c,
                          call.kv_heads);
        if (call.metric) values[c] = measured_of(call, point, kv_head, group)[c];
      }
      __syncwarp();
      float best = __uint_as_float(0x7f800000u);
      int32_t code = 0;
      for (int32_t k = lane; k < centroids; k += warp_lanes) {
        float const distance = distance_between(values, table + k * channels, channels);
        if (distance < best) {
          best = distance;
          code = k;
        }
      }
      // Distances are not negative, so their bits are in their order; lanes that found nothing have infinity and centroid 0.
      unsigned const least = __reduce_min_sync(~0u, __float_as_uint(best));
      int32_t found = static_cast<int32_t>(
          __reduce_min_sync(~0u, __float_as_uint(best) == least ? static_cast<unsigned>(code) : ~0u));
      if (!is_trusted(__uint_as_float(least))) {
        if (lane == 0) found = nearest_in_double(values, table, channels, centroids, found);
        found = __shfl_sync(~0u, found, 0);
      }
      codes.quads[0] |= slot < 4 ? static_cast<uint64_t>(found) << (slot * call.code_bits) : 0;
      codes.quads[1] |= slot < 4 ? 0 : static_cast<uint64_t>(found) << ((slot - 4) * call.code_bits);
    }
    if (lane == 0 && first < end)  // or the octet is behind a run that is shorter than others
      store_octet(run.octets.address(octet, kv_head, group, call.code_bits), call.code_bits, codes, first, end);
  }
  report_not_finite(call.not_finite, call.kv_heads);
}

// ---- launcher ----------------------------------------------------------------------------------------------------------------
struct Selection {
  void (*kernel)(Call);
  uint32_t block_octets;  // of one kv head and group; 0: a warp has one
  const char* name;
};

Selection select(const couplet_encode_params& p) {
  bool const measured = p.table && table_of(p.table)->metric;
  auto const tiles = [&](auto plain, auto with_metric) -> Selection {
    return {measured ? with_metric : plain, block_octets, "tokens"};
  };
  if (p.tokens >= least_tile_tokens) switch (p.codec.group_channels) {
      case 1: return tiles(encode_tokens<1, false>, encode_tokens<1, true>);
      case 2: return tiles(encode_tokens<2, false>, encode_tokens<2, true>);
      case 4: return tiles(encode_tokens<4, false>, encode_tokens<4, true>);
      case 8: return tiles(encode_tokens<8, false>, encode_tokens<8, true>);
      case 16: return tiles(encode_tokens<16, false>, encode_tokens<16, true>);
      default: break;
    }
  return {encode_centroids, 0, "centroids"};
}

// Of units of one kv head and group, and of blocks in all.
struct Grid {
  int64_t row_units;
  int64_t blocks;
};

Grid grid_of(const couplet_encode_params& p, const Selection& selection) {
  uint32_t const octets = p.runs ? static_cast<uint32_t>((int64_t{p.tokens} + 14) / 8) : octets_of(p).count;
  int64_t const rows = int64_t{p.kv_heads} * couplet_codec_groups(p.codec, p.head_dim);
  if (selection.block_octets == 0) {
    constexpr int64_t block_warps = block_threads / warp_lanes;
    return {octets, (octets * rows + block_warps - 1) / block_warps};
  }
  int64_t const tiles = (int64_t{octets} + selection.block_octets - 1) / selection.block_octets;
  return {tiles, tiles * rows};
}

couplet_status check(const couplet_encode_params* params, couplet_report* report) {
  if (couplet_status const status = check_pages(params, report, params && params->runs)) return status;
  couplet_encode_params const& p = *params;
  if (p.runs && (p.run_count < 0 || p.run_count > most_runs))
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected 0 to %d runs but received %d", most_runs, p.run_count);
  if (p.tokens == 0 || grid_of(p, select(p)).blocks <= most_blocks / (block_threads / warp_lanes)) return COUPLET_OK;
  return fail(report, COUPLET_INVALID_ARGUMENT, {},
              "Expected fewer than %d tokens for %d kv heads of %d groups in one call", p.tokens, p.kv_heads,
              couplet_codec_groups(p.codec, p.head_dim));
}

size_t workspace_bytes(const couplet_encode_params*) { return not_finite_bytes; }

couplet_status run(const couplet_encode_params* params, void* workspace, void* stream, couplet_report* report) {
  if (couplet_status const status = check(params, report)) return status;
  couplet_encode_params const& p = *params;
  if (!workspace) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected workspace but received NULL");
  auto const handle = static_cast<cudaStream_t>(stream);
  auto* const not_finite = static_cast<NotFinite*>(workspace);
  if (couplet_status const status =
          status_of(cudaMemsetAsync(not_finite, 0, sizeof(NotFinite), handle), report, "encode"))
    return status;
  if (p.tokens == 0 || (p.runs && p.run_count == 0)) return COUPLET_OK;

  Selection const selection = select(p);
  Grid const grid = grid_of(p, selection);
  Call const call = {
      .run = {.rows = p.rows,
              .token_stride = p.token_stride,
              .head_stride = p.head_stride,
              .tokens_before = 0,
              .octets = octets_of(p)},
      .runs = p.runs,
      .table = table_of(p.table)->metric ? table_of(p.table)->measured : table_of(p.table)->rows,
      .metric = table_of(p.table)->metric,
      .not_finite = not_finite,
      .row_units = static_cast<uint32_t>(grid.row_units),
      .dtype = p.dtype,
      .kv_heads = p.kv_heads,
      .head_dim = p.head_dim,
      .groups = couplet_codec_groups(p.codec, p.head_dim),
      .group_channels = p.codec.group_channels,
      .code_bits = p.codec.code_bits,
  };
  dim3 const blocks(static_cast<unsigned>(grid.blocks), p.runs ? static_cast<unsigned>(p.run_count) : 1);
  return status_of(gpu::launch(selection.kernel, blocks, block_threads, 0, handle, call), report, "encode");
}

void describe(const couplet_encode_params* params, char* text, size_t text_bytes) {
  if (!text || text_bytes == 0) return;
  text[0] = 0;
  if (check(params, nullptr) != COUPLET_OK) return;
  std::snprintf(text, text_bytes, "encode gpu %dc%db %s across %s", params->codec.group_channels,
                params->codec.code_bits, dtype_name(params->dtype), select(*params).name);
}

}  // namespace

const couplet_encode_entries encode_entries = {
    .check = check,
    .workspace = workspace_bytes,
    .run = run,
    .describe = describe,
};

}  // namespace couplet::cuda
