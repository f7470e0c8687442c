// kmeans: a block learns a problem (problem.h), as many problems side by side as the workspace holds.
//
//   inspect  all problems at once: what is not allowed, and by which power of two each problem is scaled
//   load     rows and weights, scaled, side by side in the workspace
//   seed, improve, write
// State stays in the workspace between launches, so that a call with a control can come back to the host every few steps.
#include <algorithm>
#include <cstddef>
#include <cstdio>

#include "../../native/common/control.h"
#include "../../native/common/not_finite.h"
#include "../backend.h"
#include "problem.h"

namespace couplet::cuda {
namespace kmeans {
namespace {

constexpr size_t most_bytes_side_by_side = size_t{1} << 30;
// Triples of point, centroid and channel between two looks at the control: 10 ms of one SM at 100 a nanosecond.
constexpr double triples_of_a_step = 1e9;

constexpr int32_t weight_channel = 63;  // in the index of a number that is not allowed

// The first bytes of the workspace. Zero before the launches.
struct Verdict {
  couplet_report report;
  unsigned long long not_allowed;  // 2^64 - 1 - (problem, point, channel in 6 bits) of the first number, or 0
  uint32_t blocks_done;
};
static_assert(offsetof(Verdict, report) == 0);

// Of every problem: the units of its scaled rows and weights are 2^exponent.
struct Units {
  int32_t exponent;
  int32_t weight_exponent;
  int32_t uniform;  // all weights are 0, which counts as all 1
  int32_t reserved;
};

struct Layout {
  int64_t rows, weights, distances, nearest, centroids, sums, masses;  // bytes into the memory of a problem
  int64_t problem_bytes;
  int64_t units, problems;  // bytes into the workspace
  int32_t side_by_side;
  int32_t stride;  // channels, padded to a power of two
};

struct Call {
  couplet_kmeans_params params;
  Layout layout;
  unsigned char* workspace;
  int32_t first_problem;  // of this launch
};

__device__ __forceinline__ Verdict& verdict_of(const Call& call) { return *reinterpret_cast<Verdict*>(call.workspace); }
__device__ __forceinline__ Units& units_of(const Call& call, int32_t problem) {
  return reinterpret_cast<Units*>(call.workspace + call.layout.units)[problem];
}
__device__ __forceinline__ Arrays arrays_of(const Call& call) {
  unsigned char* const memory = call.workspace + call.layout.problems + int64_t{blockIdx.x} * call.layout.problem_bytes;
  return {reinterpret_cast<State*>(memory),
          reinterpret_cast<float*>(memory + call.layout.rows),
          reinterpret_cast<float*>(memory + call.layout.weights),
          reinterpret_cast<float*>(memory + call.layout.distances),
          reinterpret_cast<int32_t*>(memory + call.layout.nearest),
          reinterpret_cast<float*>(memory + call.layout.centroids),
          reinterpret_cast<float*>(memory + call.layout.sums),
          reinterpret_cast<float*>(memory + call.layout.masses)};
}
__device__ __forceinline__ int32_t problem_of(const Call& call) {
  return call.first_problem + static_cast<int32_t>(blockIdx.x);
}
__device__ __forceinline__ bool is_refused(const Call& call) { return verdict_of(call).not_allowed != 0; }

__device__ __forceinline__ float point_of(const couplet_kmeans_params& p, int32_t problem, int32_t point,
                                          int32_t channel) {
  return p.points[problem * p.problem_stride + point * p.point_stride + channel];
}
__device__ __forceinline__ float weight_of(const couplet_kmeans_params& p, int32_t problem, int32_t point) {
  return p.weights ? p.weights[problem / p.weight_sharing * p.weight_problem_stride + point * p.weight_point_stride]
                   : 1.0f;
}

// e with 2^e <= value < 2^(e + 1), from the bits of a float; 0 for 0.
__device__ __forceinline__ int32_t exponent_of(unsigned bits) {
  if (bits == 0) return 0;
  return bits >= 0x800000u ? static_cast<int32_t>(bits >> 23) - 127 : -118 - __clz(static_cast<int>(bits));
}

__device__ __forceinline__ void note(const Call& call, int32_t problem, int32_t point, int32_t channel) {
  unsigned long long const index =
      (static_cast<unsigned long long>(problem) * static_cast<unsigned>(call.params.point_count) +
       static_cast<unsigned>(point)) *
          64 +
      static_cast<unsigned>(channel);
  atomicMax(&verdict_of(call).not_allowed, ~index);
}

// The last block of inspect turns the first note into the report.
__device__ void conclude(const Call& call) {
  Verdict& verdict = verdict_of(call);
  unsigned long long const index = ~atomicMax(&verdict.not_allowed, 0ull);
  couplet_report& report = verdict.report;
  bool const found = index != ~0ull;
  unsigned const points = static_cast<unsigned>(call.params.point_count);
  int32_t const channel = static_cast<int32_t>(index % 64);
  report.layer = -1;
  report.native_code = -1;
  report.kv_head = found ? static_cast<int32_t>(index / 64 / points) : -1;
  report.token = found ? static_cast<int64_t>(index / 64 % points) : -1;
  report.channel = found && channel != weight_channel ? channel : -1;
  report.status = found ? COUPLET_NOT_FINITE : COUPLET_OK;
  if (!found || channel != weight_channel) return;
  float const weight = weight_of(call.params, report.kv_head, static_cast<int32_t>(report.token));
  if ((__float_as_uint(weight) & 0x7fffffffu) < 0x7f800000u) report.status = COUPLET_INVALID_ARGUMENT;  // negative
}

__global__ void __launch_bounds__(block_threads) inspect(Call call) {
  GPU_SHARED(largest, unsigned[2]);  // bits of |value| and of a weight
  couplet_kmeans_params const& p = call.params;
  int32_t const problem = static_cast<int32_t>(blockIdx.x);
  if (threadIdx.x < 2) largest[threadIdx.x] = 0;
  __syncthreads();
  unsigned value_bits = 0;
  unsigned weight_bits = 0;
  for (int32_t n = static_cast<int32_t>(threadIdx.x); n < p.point_count; n += block_threads) {
    for (int32_t c = 0; c < p.channels; ++c) {
      unsigned const bits = __float_as_uint(point_of(p, problem, n, c)) & 0x7fffffffu;
      if (bits >= 0x7f800000u) note(call, problem, n, c);
      value_bits = max(value_bits, bits);
    }
    float const weight = weight_of(p, problem, n);
    unsigned const bits = __float_as_uint(weight) & 0x7fffffffu;
    if (bits >= 0x7f800000u || weight < 0) note(call, problem, n, weight_channel);
    weight_bits = max(weight_bits, bits);
  }
  atomicMax(&largest[0], value_bits);
  atomicMax(&largest[1], weight_bits);
  __syncthreads();
  if (threadIdx.x != 0) return;
  units_of(call, problem) = {exponent_of(largest[0]), exponent_of(largest[1]), largest[1] == 0, 0};
  if (gpu::fetch_add_acq_rel(&verdict_of(call).blocks_done, 1) == gridDim.x - 1) conclude(call);
}

__global__ void __launch_bounds__(block_threads) load(Call call) {
  if (is_refused(call)) return;
  couplet_kmeans_params const& p = call.params;
  Arrays const arrays = arrays_of(call);
  int32_t const problem = problem_of(call);
  int32_t const stride = call.layout.stride;
  Units const units = units_of(call, problem);
  for (int32_t n = static_cast<int32_t>(threadIdx.x); n < p.point_count; n += block_threads) {
    for (int32_t c = 0; c < stride; ++c)
      arrays.rows[int64_t{n} * stride + c] =
          c < p.channels ? scalbnf(point_of(p, problem, n, c), -units.exponent) : 0.0f;
    arrays.weights[n] = units.uniform ? 1.0f : scalbnf(weight_of(p, problem, n), -units.weight_exponent);
  }
  if (threadIdx.x == 0) *arrays.state = {p.seed, 0, 0, 0, 0};
}

template <int Stride>
__global__ void __launch_bounds__(block_threads, 1) seed(Call call, int32_t first, int32_t end) {
  GPU_SHARED(shared, Shared);
  if (is_refused(call)) return;
  Problem<Stride>(arrays_of(call), shared, call.params.point_count, call.params.centroid_count).seed(first, end);
}

template <int Stride>
__global__ void __launch_bounds__(block_threads, 1) improve(Call call, int32_t iterations) {
  GPU_SHARED(shared, Shared);
  if (is_refused(call)) return;
  Problem<Stride>(arrays_of(call), shared, call.params.point_count, call.params.centroid_count)
      .improve(iterations, call.params.tolerance);
}

__global__ void __launch_bounds__(block_threads) write(Call call) {
  GPU_SHARED(partial, double[block_warps]);
  if (is_refused(call)) return;
  couplet_kmeans_params const& p = call.params;
  Arrays const arrays = arrays_of(call);
  int32_t const problem = problem_of(call);
  int32_t const stride = call.layout.stride;
  int32_t const thread = static_cast<int32_t>(threadIdx.x);
  Units const units = units_of(call, problem);
  float* const centroids = p.centroids + int64_t{problem} * p.centroid_count * p.channels;
  for (int32_t i = thread; i < p.centroid_count * p.channels; i += block_threads)
    centroids[i] = scalbnf(arrays.centroids[i / p.channels * stride + i % p.channels], units.exponent);
  if (p.assignments)
    for (int32_t n = thread; n < p.point_count; n += block_threads)
      p.assignments[int64_t{problem} * p.point_count + n] = arrays.nearest[n];
  if (thread == 0 && p.iterations) p.iterations[problem] = arrays.state->iterations;
  if (!p.inertia) return;
  __syncthreads();
  double sum = 0;
  for (int32_t n = thread; n < p.point_count; n += block_threads) {
    double distance = 0;
    for (int32_t c = 0; c < p.channels; ++c) {
      double const difference = static_cast<double>(point_of(p, problem, n, c)) -
                                static_cast<double>(centroids[arrays.nearest[n] * p.channels + c]);
      distance += difference * difference;
    }
    sum += (units.uniform ? 1.0 : static_cast<double>(weight_of(p, problem, n))) * distance;
  }
  sum = warp_sum(sum);
  if (thread % warp_lanes == 0) partial[thread / warp_lanes] = sum;
  __syncthreads();
  if (thread != 0) return;
  double total = 0;
  for (int warp = 0; warp < block_warps; ++warp) total += partial[warp];
  p.inertia[problem] = total;
}

// ---- launcher ----------------------------------------------------------------------------------------------------------------
struct Selection {
  void (*seed)(Call, int32_t, int32_t);
  void (*improve)(Call, int32_t);
  int32_t stride;
};

Selection select(const couplet_kmeans_params& p) {
  if (p.channels == 1) return {seed<1>, improve<1>, 1};
  if (p.channels == 2) return {seed<2>, improve<2>, 2};
  if (p.channels <= 4) return {seed<4>, improve<4>, 4};
  if (p.channels <= 8) return {seed<8>, improve<8>, 8};
  if (p.channels <= 16) return {seed<16>, improve<16>, 16};
  return {seed<32>, improve<32>, 32};
}

Layout layout_of(const couplet_kmeans_params& p) {
  auto const round_up = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  int64_t used = 0;
  auto const take = [&](int64_t bytes) {
    int64_t const at = used;
    used += round_up(bytes);
    return at;
  };
  Layout layout{};
  layout.stride = select(p).stride;
  int64_t const points = p.point_count;
  int64_t const centroids = p.centroid_count;
  take(sizeof(State));
  layout.rows = take(points * layout.stride * 4);
  layout.weights = take(points * 4);
  layout.distances = take(points * 4);
  layout.nearest = take(points * 4);
  layout.centroids = take(centroids * layout.stride * 4);
  layout.sums = take(block_warps * centroids * layout.stride * 4);
  layout.masses = take(block_warps * centroids * 4);
  layout.problem_bytes = used;
  used = 0;
  take(sizeof(Verdict));
  layout.units = take(p.problems * static_cast<int64_t>(sizeof(Units)));
  layout.problems = used;
  int64_t const fit = static_cast<int64_t>(most_bytes_side_by_side) / layout.problem_bytes;
  layout.side_by_side = static_cast<int32_t>(std::clamp<int64_t>(fit, 1, p.problems));
  return layout;
}

couplet_status check(const couplet_kmeans_params* params, couplet_report* report) {
  if (couplet_status const status = check_kmeans_params(params, report)) return status;
  if (params->point_count <= INT32_MAX - 4 * block_threads) return COUPLET_OK;
  return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected 1 to %d for `points` but received %d",
              INT32_MAX - 4 * block_threads, params->point_count);
}

size_t workspace_bytes(const couplet_kmeans_params* params) {
  Layout const layout = layout_of(*params);
  return static_cast<size_t>(layout.problems + layout.problem_bytes * layout.side_by_side);
}

// The launches of one call, in order. After the first failure the rest do nothing.
class Run {
 public:
  Run(const couplet_kmeans_params& params, void* workspace, void* stream, couplet_report* report)
      : params_(params),
        selection_(select(params)),
        call_{params, layout_of(params), static_cast<unsigned char*>(workspace), 0},
        stream_(static_cast<cudaStream_t>(stream)),
        report_(report) {
    call_.params.control = nullptr;  // a host pointer
    double const step = static_cast<double>(params.point_count) * params.centroid_count * call_.layout.stride;
    step_iterations_ = static_cast<int32_t>(std::clamp(triples_of_a_step / step, 1.0, 1e6));
    // A centroid costs `candidates` + 1 distances per point.
    step_seeds_ = static_cast<int32_t>(
        std::clamp(step_iterations_ * static_cast<double>(params.centroid_count) / 5, 1.0, 4096.0));
  }

  couplet_status all() {
    attempt(cudaMemsetAsync(call_.workspace, 0, sizeof(Verdict), stream_));
    attempt(gpu::launch(inspect, static_cast<unsigned>(params_.problems), block_threads, 0, stream_, call_));
    if (params_.control) judge();
    for (int32_t first = 0; first < params_.problems && status_ == COUPLET_OK; first += blocks_) {
      call_.first_problem = first;
      blocks_ = std::min(call_.layout.side_by_side, params_.problems - first);
      learn();
    }
    return status_;
  }

 private:
  void attempt(cudaError_t error) {
    if (status_ == COUPLET_OK) status_ = status_of(error, report_, "kmeans");
  }

  template <class Kernel, class... Arguments>
  void launch(Kernel kernel, Arguments... arguments) {
    if (status_ == COUPLET_OK)
      attempt(gpu::launch(kernel, static_cast<unsigned>(blocks_), block_threads, 0, stream_, call_, arguments...));
  }

  void learn() {
    int32_t const seeds = params_.control ? step_seeds_ : params_.centroid_count;
    int32_t const iterations = params_.control ? step_iterations_ : params_.max_iterations;
    launch(load);
    for (int32_t done = 0; done < params_.centroid_count && status_ == COUPLET_OK;) {
      int32_t const end = done + std::min(seeds, params_.centroid_count - done);
      launch(selection_.seed, done, end);
      come_back(0);
      done = end;
    }
    for (int32_t done = 0; done < params_.max_iterations && status_ == COUPLET_OK;) {
      int32_t const count = std::min(iterations, params_.max_iterations - done);
      launch(selection_.improve, count);
      done += count;
      come_back(done);
    }
    launch(write);
    come_back(params_.max_iterations + 1);
  }

  // Where there is a control: waits for the device, tells progress, sees whether to go on. Progress counts as on the CPU, with the
  // problems of a launch done together: their iterations and one more for being written.
  void come_back(int32_t iteration) {
    if (!params_.control || status_ != COUPLET_OK) return;
    attempt(cudaStreamSynchronize(stream_));
    if (status_ != COUPLET_OK) return;
    if (cancelled(params_.control)) {
      status_ = fail(report_, COUPLET_CANCELLED, {}, "kmeans was cancelled");
      return;
    }
    int64_t const of_each = int64_t{params_.max_iterations} + 1;
    if (params_.control->progress)
      params_.control->progress(params_.control->user, call_.first_problem * of_each + int64_t{blocks_} * iteration,
                                params_.problems * of_each, call_.first_problem,
                                std::min(iteration, params_.max_iterations));
  }

  // With a control the call waits anyway, so that a number that is not allowed is its own failure.
  void judge() {
    couplet_report found{};
    attempt(cudaMemcpyAsync(&found, call_.workspace, sizeof found, cudaMemcpyDeviceToHost, stream_));
    attempt(cudaStreamSynchronize(stream_));
    if (status_ != COUPLET_OK || found.status == COUPLET_OK) return;
    int32_t const problem = found.kv_head;
    bool const is_weight = found.channel < 0;
    const float* const number =
        is_weight
            ? params_.weights + problem / params_.weight_sharing * params_.weight_problem_stride +
                  found.token * params_.weight_point_stride
            : params_.points + problem * params_.problem_stride + found.token * params_.point_stride + found.channel;
    float value = 0;
    attempt(cudaMemcpyAsync(&value, number, sizeof value, cudaMemcpyDeviceToHost, stream_));
    attempt(cudaStreamSynchronize(stream_));
    if (status_ != COUPLET_OK) return;
    status_ = is_weight ? weight_not_allowed(report_, value, problem, found.token)
                        : point_not_finite(report_, value, problem, found.token, found.channel);
  }

  couplet_kmeans_params const& params_;
  Selection const selection_;
  Call call_;
  cudaStream_t const stream_;
  couplet_report* const report_;
  couplet_status status_ = COUPLET_OK;
  int32_t blocks_ = 0;
  int32_t step_iterations_;
  int32_t step_seeds_;
};

couplet_status run(const couplet_kmeans_params* params, void* workspace, void* stream, couplet_report* report) {
  if (couplet_status const status = check(params, report)) return status;
  if (!workspace) return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected workspace but received NULL");
  return Run(*params, workspace, stream, report).all();
}

void describe(const couplet_kmeans_params* params, char* text, size_t text_bytes) {
  if (!text || text_bytes == 0) return;
  text[0] = 0;
  if (check(params, nullptr) != COUPLET_OK) return;
  std::snprintf(text, text_bytes, "kmeans gpu block per problem, %d channels", select(*params).stride);
}

}  // namespace
}  // namespace kmeans

const couplet_kmeans_entries kmeans_entries = {
    .check = kmeans::check,
    .workspace = kmeans::workspace_bytes,
    .run = kmeans::run,
    .describe = kmeans::describe,
};

}  // namespace couplet::cuda
