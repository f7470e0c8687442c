// Each wrapper of gpu.h, and each built-in that cuda/sim/device.h defines, against a plain computation. The simulator passes it in
// CI; compiled by nvcc and run on a GPU, it says whether the simulator tells the truth.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "../../cuda/gpu.h"
#include "../native/check.h"
#include "device_array.h"

namespace {

using couplet::test::DeviceArray;
using couplet::test::Random;

constexpr int lanes = 32;

void expect(cudaError_t error, const char* what) {
  CHECK(error == cudaSuccess, "%s: %s", what, cudaGetErrorName(error));
}

std::vector<uint32_t> random_words(size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<uint32_t> words(count);
  for (uint32_t& word : words) word = static_cast<uint32_t>(random.next());
  return words;
}

// ---- matrices --------------------------------------------------------------------------------------------------------
template <bool Bfloat>
__global__ void __launch_bounds__(lanes)
    multiply(const uint16_t* a /*[16][16]*/, const uint16_t* b /*[16][8]*/, float* d /*[16][8]*/) {
  GPU_SHARED(a_rows, uint16_t[16][24]);  // rows of 48 bytes: 16-byte aligned
  GPU_SHARED(b_rows, uint16_t[16][8]);
  int const lane = static_cast<int>(threadIdx.x);
  for (int index = lane; index < 256; index += lanes) a_rows[index / 16][index % 16] = a[index];
  for (int index = lane; index < 128; index += lanes) b_rows[index / 8][index % 8] = b[index];
  __syncwarp();
  uint32_t a_part[4];
  uint32_t b_part[2];
  gpu::ldmatrix(a_part, &a_rows[lane % 16][lane / 16 * 8]);
  gpu::ldmatrix<true>(b_part, b_rows[lane % 16]);
  float d_part[4];
  for (int part = 0; part < 4; ++part) d_part[part] = d[(lane / 4 + part / 2 * 8) * 8 + lane % 4 * 2 + part % 2];
  if constexpr (Bfloat)
    gpu::mma_m16n8k16_bf16(d_part, a_part, b_part);
  else
    gpu::mma_m16n8k16_f16(d_part, a_part, b_part);
  for (int part = 0; part < 4; ++part) d[(lane / 4 + part / 2 * 8) * 8 + lane % 4 * 2 + part % 2] = d_part[part];
}

uint16_t bits_of(float value, bool bfloat) {
  return bfloat ? __bfloat16_as_ushort(__float2bfloat16_rn(value)) : __half_as_ushort(__float2half_rn(value));
}
float value_of(uint16_t bits, bool bfloat) {
  return bfloat ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

void test_multiply(bool bfloat) {
  Random random(7);
  std::vector<uint16_t> a(256);
  std::vector<uint16_t> b(128);
  std::vector<float> const c = random.normals(128);
  for (auto& bits : a) bits = bits_of(static_cast<float>(random.normal()), bfloat);
  for (auto& bits : b) bits = bits_of(static_cast<float>(random.normal()), bfloat);
  DeviceArray<uint16_t> const device_a(a);
  DeviceArray<uint16_t> const device_b(b);
  DeviceArray<float> const d(c);
  auto* const kernel = bfloat ? multiply<true> : multiply<false>;
  expect(gpu::launch(kernel, 1, lanes, 0, nullptr, device_a.data(), device_b.data(), d.data()), "multiply");
  std::vector<float> const result = d.read();
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      double sum = c[row * 8 + column];
      for (int inner = 0; inner < 16; ++inner)
        sum += double{value_of(a[row * 16 + inner], bfloat)} * value_of(b[inner * 8 + column], bfloat);
      float const got = result[row * 8 + column];
      CHECK(std::abs(got - sum) < 1e-5, "[%d][%d] is %g and not %g", row, column, got, sum);
    }
}

__global__ void __launch_bounds__(lanes)
    multiply_tf32(const float* a /*[16][8]*/, const float* b /*[8][8]*/, float* d /*[16][8]*/) {
  int const g = static_cast<int>(threadIdx.x) / 4;
  int const t = static_cast<int>(threadIdx.x) % 4;
  uint32_t a_part[4];
  uint32_t b_part[2];
  float d_part[4];
  for (int part = 0; part < 4; ++part) a_part[part] = gpu::cvt_tf32(a[(g + part % 2 * 8) * 8 + t + part / 2 * 4]);
  for (int part = 0; part < 2; ++part) b_part[part] = __float_as_uint(b[(t + part * 4) * 8 + g]);  // truncated
  for (int part = 0; part < 4; ++part) d_part[part] = d[(g + part / 2 * 8) * 8 + t * 2 + part % 2];
  gpu::mma_m16n8k8_tf32(d_part, a_part, b_part);
  for (int part = 0; part < 4; ++part) d[(g + part / 2 * 8) * 8 + t * 2 + part % 2] = d_part[part];
}

void test_multiply_tf32() {
  Random random(8);
  auto const truncated = [](float value) { return std::bit_cast<float>(std::bit_cast<uint32_t>(value) & ~0x1fffu); };
  auto const rounded = [&](float value) {
    return truncated(std::bit_cast<float>(std::bit_cast<uint32_t>(value) + 0x1000u));
  };
  std::vector<float> const a = random.normals(128);
  std::vector<float> const b = random.normals(64);
  std::vector<float> const c = random.normals(128);
  DeviceArray<float> const device_a(a);
  DeviceArray<float> const device_b(b);
  DeviceArray<float> const d(c);
  expect(gpu::launch(multiply_tf32, 1, lanes, 0, nullptr, device_a.data(), device_b.data(), d.data()), "tf32");
  std::vector<float> const result = d.read();
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      double sum = c[row * 8 + column];
      for (int inner = 0; inner < 8; ++inner)
        sum += double{rounded(a[row * 8 + inner])} * truncated(b[inner * 8 + column]);
      CHECK(std::abs(result[row * 8 + column] - sum) < 1e-5, "[%d][%d] is %g and not %g", row, column,
            result[row * 8 + column], sum);
    }
}

__global__ void __launch_bounds__(lanes) round_tf32(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = gpu::cvt_tf32(__uint_as_float(in[threadIdx.x]));
}

void test_round_tf32() {
  std::vector<uint32_t> in = random_words(lanes, 9);
  std::vector<uint32_t> const edges = {0,           0x80000000u, 0x00001000u, 0x00000fffu, 0x3f801000u,
                                       0x3f800fffu, 0xbf801000u, 0x7f7fffffu, 0x7f800000u, 0xff800000u};
  std::copy(edges.begin(), edges.end(), in.begin());
  DeviceArray<uint32_t> const device_in(in);
  DeviceArray<uint32_t> const out(in.size());
  expect(gpu::launch(round_tf32, 1, lanes, 0, nullptr, device_in.data(), out.data()), "cvt.rna.tf32");
  std::vector<uint32_t> const result = out.read();
  for (size_t i = 0; i < in.size(); ++i) {
    if (std::isnan(std::bit_cast<float>(in[i]))) {
      CHECK(std::isnan(std::bit_cast<float>(result[i] & ~0x1fffu)), "%08x becomes %08x", in[i], result[i]);
      continue;
    }
    bool const finite = (in[i] & 0x7f800000u) != 0x7f800000u;
    uint32_t const expected = finite ? (in[i] + 0x1000u) & ~0x1fffu : in[i];
    CHECK((result[i] & ~0x1fffu) == expected, "%08x becomes %08x and not %08x", in[i], result[i], expected);
  }
}

template <int Count, bool Transposed>
__global__ void __launch_bounds__(lanes)
    load_matrices(const uint16_t* in /*[Count][8][8]*/, uint32_t* out /*[Count][32]*/) {
  GPU_SHARED(matrices, uint4[8 * Count]);  // a row each
  int const lane = static_cast<int>(threadIdx.x);
  if (lane < 8 * Count) matrices[lane] = reinterpret_cast<const uint4*>(in)[lane];
  __syncwarp();
  uint32_t registers[Count];
  gpu::ldmatrix<Transposed>(registers, &matrices[lane % (8 * Count)]);
  for (int matrix = 0; matrix < Count; ++matrix) out[matrix * lanes + lane] = registers[matrix];
}

__global__ void __launch_bounds__(lanes) transpose_matrix(uint32_t* registers /*[32]*/) {
  registers[threadIdx.x] = gpu::movmatrix_trans(registers[threadIdx.x]);
}

template <int Count, bool Transposed>
void test_load_matrices() {
  std::vector<uint16_t> values(64 * Count);
  for (size_t index = 0; index < values.size(); ++index) values[index] = static_cast<uint16_t>(index * 257 + 1);
  DeviceArray<uint16_t> const in(values);
  DeviceArray<uint32_t> const out(lanes * Count);
  expect(gpu::launch(load_matrices<Count, Transposed>, 1, lanes, 0, nullptr, in.data(), out.data()), "ldmatrix");
  auto const expected = [&](int matrix, int lane, bool transposed) {
    auto const at = [&](int row, int column) -> uint32_t {
      return values[matrix * 64 + (transposed ? column * 8 + row : row * 8 + column)];
    };
    return at(lane / 4, lane % 4 * 2) | at(lane / 4, lane % 4 * 2 + 1) << 16;
  };
  std::vector<uint32_t> const result = out.read();
  for (int matrix = 0; matrix < Count; ++matrix)
    for (int lane = 0; lane < lanes; ++lane)
      CHECK(result[matrix * lanes + lane] == expected(matrix, lane, Transposed),
            "x%d, transposed %d, matrix %d, lane %d", Count, Transposed, matrix, lane);
  expect(gpu::launch(transpose_matrix, 1, lanes, 0, nullptr, out.data()), "movmatrix");
  std::vector<uint32_t> const turned = out.read();
  for (int lane = 0; lane < lanes; ++lane)
    CHECK(turned[lane] == expected(0, lane, !Transposed), "movmatrix, lane %d", lane);
}

// ---- asynchronous copies ---------------------------------------------------------------------------------------------
// Each thread copies 4, 8 and 16 bytes, of the last one only as many as its number says.
__global__ void __launch_bounds__(lanes) copy(const uint32_t* in /*[32][8]*/, uint32_t* out /*[32][8]*/) {
  GPU_DYNAMIC_SHARED(uint32_t, words);  // [32][8]
  uint32_t* const own = words + threadIdx.x * 8;
  const uint32_t* const from = in + threadIdx.x * 8;
  gpu::cp_async<16>(own, from, static_cast<int>(threadIdx.x % 17));
  gpu::cp_async_commit();
  gpu::cp_async<8>(own + 4, from + 4);
  gpu::cp_async<4>(own + 6, from + 6);
  gpu::cp_async_commit();
  own[7] = 0;
  gpu::cp_async_wait<1>();
  for (int word = 0; word < 4; ++word) out[threadIdx.x * 8 + word] = own[word];
  gpu::cp_async_wait<0>();
  __syncwarp();
  uint32_t const* const next = words + (threadIdx.x + 1) % 32 * 8;
  for (int word = 4; word < 8; ++word) out[threadIdx.x * 8 + word] = next[word];
}

void test_copy() {
  std::vector<uint32_t> const words = random_words(lanes * 8, 11);
  DeviceArray<uint32_t> const in(words);
  DeviceArray<uint32_t> const out(lanes * 8);
  // More than a kernel gets without asking, so that launch() has to ask.
  expect(gpu::launch(copy, 1, lanes, 60 << 10, nullptr, in.data(), out.data()), "cp.async");
  std::vector<uint32_t> const result = out.read();
  for (int lane = 0; lane < lanes; ++lane) {
    uint32_t expected[4] = {};
    std::memcpy(expected, &words[lane * 8], lane % 17);
    CHECK(std::memcmp(&result[lane * 8], expected, 16) == 0, "lane %d: 16 bytes", lane);
    int const next = (lane + 1) % lanes;
    for (int word = 4; word < 7; ++word)
      CHECK(result[lane * 8 + word] == words[next * 8 + word], "lane %d, word %d", lane, word);
  }
}

// ---- dynamic shared memory, its begin in the instruction ---------------------------------------------------------------------
__global__ void __launch_bounds__(lanes) load_behind(const uint32_t* in, uint32_t* out /*[7][lanes]*/) {
  GPU_DYNAMIC_SHARED(uint32_t, words);
  int const lane = static_cast<int>(threadIdx.x);
  for (int index = lane; index < 6 * lanes; index += lanes) words[index] = in[index];
  __syncthreads();
  uint32_t one[1];
  uint32_t two[2];
  uint32_t four[4];
  auto const at = static_cast<uint32_t>(lanes - 1 - lane);
  gpu::load_dynamic_shared<1, 4>(one, words, 4 * at);
  gpu::load_dynamic_shared<2, 0>(two, words, 8 * at);
  gpu::load_dynamic_shared<4, 4 * lanes>(four, words, 16 * at);
  out[lane] = one[0];
  for (int i = 0; i < 2; ++i) out[(1 + i) * lanes + lane] = two[i];
  for (int i = 0; i < 4; ++i) out[(3 + i) * lanes + lane] = four[i];
}

void test_load_behind() {
  if (!gpu::has_dynamic_shared_begin()) return;
  std::vector<uint32_t> const in = random_words(6 * lanes, 14);
  DeviceArray<uint32_t> const device_in(in);
  DeviceArray<uint32_t> const out(7 * lanes);
  expect(gpu::launch(load_behind, 1, lanes, 6 * lanes * sizeof(uint32_t), nullptr, device_in.data(), out.data()),
         "load_dynamic_shared");
  std::vector<uint32_t> const got = out.read();
  for (size_t lane = 0; lane < lanes; ++lane) {
    size_t const at = lanes - 1 - lane;
    bool same = got[lane] == in[at + 1];
    for (size_t i = 0; i < 2; ++i) same = same && got[(1 + i) * lanes + lane] == in[2 * at + i];
    for (size_t i = 0; i < 4; ++i) same = same && got[(3 + i) * lanes + lane] == in[lanes + 4 * at + i];
    CHECK(same, "load_dynamic_shared of lane %zu", lane);
  }
}

// ---- warps -----------------------------------------------------------------------------------------------------------
constexpr int exchanges = 16;

__global__ void __launch_bounds__(lanes) exchange(const uint32_t* in /*[32]*/, uint32_t* out /*[exchanges][32]*/) {
  uint32_t const own = in[threadIdx.x];
  uint32_t const results[exchanges] = {
      __shfl_sync(~0u, own, 5),
      __shfl_sync(~0u, own, static_cast<int>(threadIdx.x) + 3, 8),
      __shfl_xor_sync(~0u, own, 6),
      __shfl_down_sync(~0u, own, 5),
      __shfl_down_sync(~0u, own, 3, 8),
      __shfl_up_sync(~0u, own, 2),
      __shfl_up_sync(~0u, own, 3, 16),
      __ballot_sync(~0u, own & 1),
      static_cast<uint32_t>(__any_sync(~0u, own == in[3])) * 2 + static_cast<uint32_t>(__all_sync(~0u, own == in[3])),
      __reduce_add_sync(~0u, own),
      __reduce_min_sync(~0u, own),
      static_cast<uint32_t>(__reduce_max_sync(~0u, static_cast<int>(own))),
      __reduce_xor_sync(~0u, own),
      __reduce_or_sync(~0u, own & 0xff00u),
      __match_any_sync(~0u, own % 3),
      static_cast<uint32_t>(gpu::lane_id()),
  };
  for (int index = 0; index < exchanges; ++index) out[index * lanes + threadIdx.x] = results[index];
}

void test_exchange() {
  std::vector<uint32_t> const words = random_words(lanes, 13);
  DeviceArray<uint32_t> const in(words);
  DeviceArray<uint32_t> const out(exchanges * lanes);
  expect(gpu::launch(exchange, 1, lanes, 0, nullptr, in.data(), out.data()), "exchange");
  uint32_t ballot = 0;
  uint32_t sum = 0;
  uint32_t least = ~0u;
  auto greatest = static_cast<int32_t>(0x80000000);
  uint32_t odd = 0;
  uint32_t any = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    ballot |= (words[lane] & 1) << lane;
    sum += words[lane];
    least = std::min(least, words[lane]);
    greatest = std::max(greatest, static_cast<int32_t>(words[lane]));
    odd ^= words[lane];
    any |= words[lane] & 0xff00u;
  }
  std::vector<uint32_t> const result = out.read();
  for (int lane = 0; lane < lanes; ++lane) {
    uint32_t equal = 0;
    for (int other = 0; other < lanes; ++other) equal |= uint32_t{words[other] % 3 == words[lane] % 3} << other;
    uint32_t const expected[exchanges] = {
        words[5],
        words[lane / 8 * 8 + (lane + 3) % 8],
        words[lane ^ 6],
        words[lane + 5 < 32 ? lane + 5 : lane],
        words[lane % 8 + 3 < 8 ? lane + 3 : lane],
        words[lane >= 2 ? lane - 2 : lane],
        words[lane % 16 >= 3 ? lane - 3 : lane],
        ballot,
        2,
        sum,
        least,
        static_cast<uint32_t>(greatest),
        odd,
        any,
        equal,
        static_cast<uint32_t>(lane),
    };
    for (int index = 0; index < exchanges; ++index)
      CHECK(result[index * lanes + lane] == expected[index], "exchange %d, lane %d: %08x and not %08x", index, lane,
            result[index * lanes + lane], expected[index]);
  }
}

// ---- barriers, atomics, order ----------------------------------------------------------------------------------------
// Warp 0 fills a box for warp 1, which gives it back, five times.
__global__ void __launch_bounds__(64) hand_over(const int* in /*[5][32]*/, int* out /*[5][32]*/) {
  GPU_SHARED(box, int[32]);
  int const lane = static_cast<int>(threadIdx.x % 32);
  for (int round = 0; round < 5; ++round) {
    if (threadIdx.x < 32) {
      if (round > 0) gpu::barrier_sync(2, 64);
      box[lane] = in[round * 32 + lane];
      gpu::barrier_arrive(1, 64);
    } else {
      gpu::barrier_sync(1, 64);
      out[round * 32 + lane] = box[31 - lane];
      if (round < 4) gpu::barrier_arrive(2, 64);
    }
  }
}

// The same by barriers that count phases: the first warp fills a box while the second one may still be waiting for it.
__global__ void __launch_bounds__(64) hand_over_by_phases(const int* in /*[5][32]*/, int* out /*[5][32]*/) {
  GPU_SHARED(box, int[32]);
  GPU_SHARED(filled, gpu::PhaseBarrier);
  GPU_SHARED(emptied, gpu::PhaseBarrier);
  int const lane = static_cast<int>(threadIdx.x % 32);
  if (threadIdx.x == 0) {
    gpu::initialize(filled, 1);
    gpu::initialize(emptied, 32);
  }
  __syncthreads();
  for (uint32_t round = 0; round < 5; ++round) {
    if (threadIdx.x < 32) {
      if (!gpu::has_completed(emptied, (round & 1) ^ 1)) gpu::wait(emptied, (round & 1) ^ 1);
      box[lane] = in[round * 32 + static_cast<uint32_t>(lane)];
      __syncwarp();
      if (lane == 0) gpu::arrive(filled);
    } else {
      gpu::wait(filled, round & 1);
      out[round * 32 + static_cast<uint32_t>(lane)] = box[31 - lane];
      gpu::arrive(emptied);
    }
  }
}

void test_hand_over() {
  std::vector<int> values(160);
  for (int index = 0; index < 160; ++index) values[index] = index * 3;
  DeviceArray<int> const in(values);
  for (auto const kernel : {hand_over, hand_over_by_phases}) {
    DeviceArray<int> const out(160);
    expect(gpu::launch(kernel, 1, 64, 0, nullptr, in.data(), out.data()), "barriers of some warps");
    std::vector<int> const result = out.read();
    for (int index = 0; index < 160; ++index)
      CHECK(result[index] == values[index / 32 * 32 + 31 - index % 32], "value %d is %d", index, result[index]);
  }
}

struct Counters {
  unsigned sum;
  int least;
  int greatest;
  unsigned both;
  unsigned either;
  unsigned long long wide;
  unsigned swapped;
};

__global__ void __launch_bounds__(64) count(Counters* counters) {
  int const own = static_cast<int>(blockIdx.x * 64 + threadIdx.x) - 100;
  atomicAdd(&counters->sum, 3u);
  atomicMin(&counters->least, own);
  atomicMax(&counters->greatest, own);
  atomicAnd(&counters->both, ~(1u << threadIdx.x % 20));
  atomicOr(&counters->either, 1u << threadIdx.x % 20);
  atomicAdd(&counters->wide, 1ull << 33);
  if (atomicCAS(&counters->swapped, 0u, 7u) == 0) atomicExch(&counters->swapped, 9u);
}

void test_count() {
  DeviceArray<Counters> const counters(std::vector<Counters>{{0, 0, 0, ~0u, 0, 0, 0}});
  expect(gpu::launch(count, 4, 64, 0, nullptr, counters.data()), "atomics");
  Counters const result = counters.read()[0];
  CHECK(result.sum == 768, "sum %u", result.sum);
  CHECK(result.least == -100 && result.greatest == 155, "%d to %d", result.least, result.greatest);
  CHECK(result.both == 0xfff00000 && result.either == 0xfffff, "%08x, %08x", result.both, result.either);
  CHECK(result.wide == 256ull << 33, "wide %llu", result.wide);
  CHECK(result.swapped == 9, "swapped %u", result.swapped);
}

// Each block adds up its part; the last one to finish adds up the parts. Block 0 also waits for a flag that it has set itself.
__global__ void __launch_bounds__(32)
    merge(const int* in /*[gridDim.x][32]*/, int* parts /*[gridDim.x]*/, uint32_t* finished, uint32_t* flag, int* sum) {
  GPU_SHARED(is_last, bool);
  int const part = __reduce_add_sync(~0u, in[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = part;
    is_last = gpu::fetch_add_acq_rel(finished, 1) + 1 == gridDim.x;
    gpu::store_release(flag + blockIdx.x, blockIdx.x + 1);
    while (gpu::load_acquire(flag + blockIdx.x) != blockIdx.x + 1) continue;
  }
  __syncthreads();
  if (!is_last) return;
  int const total = __reduce_add_sync(~0u, threadIdx.x < gridDim.x ? parts[threadIdx.x] : 0);
  if (threadIdx.x == 0) *sum = total;
}

void test_merge() {
  std::vector<int> values(32 * 20);
  int total = 0;
  for (int index = 0; index < 640; ++index) total += values[index] = index * index % 101 - 40;
  DeviceArray<int> const in(values);
  DeviceArray<int> const parts(20);
  DeviceArray<int> const sum(1);
  DeviceArray<uint32_t> const finished(std::vector<uint32_t>(1));
  DeviceArray<uint32_t> const flags(std::vector<uint32_t>(20));
  expect(gpu::launch(merge, 20, 32, 0, nullptr, in.data(), parts.data(), finished.data(), flags.data(), sum.data()),
         "merge");
  CHECK(sum.read()[0] == total, "%d and not %d", sum.read()[0], total);
}

// ---- arithmetic ------------------------------------------------------------------------------------------------------
constexpr int integers = 16;

__global__ void __launch_bounds__(64) integer(const uint32_t* in /*[64][3]*/, uint32_t* out /*[64][integers]*/) {
  uint32_t const a = in[threadIdx.x * 3];
  uint32_t const b = in[threadIdx.x * 3 + 1];
  uint32_t const c = in[threadIdx.x * 3 + 2];
  uint32_t const results[integers] = {
      gpu::lop3<0xea>(a, b, c),  // (a & b) | c
      gpu::lop3<0x96>(a, b, c),  // a ^ b ^ c
      __byte_perm(a, b, c),
      __funnelshift_r(a, b, c),
      __funnelshift_l(a, b, c),
      __brev(a),
      static_cast<uint32_t>(__popc(a)),
      static_cast<uint32_t>(__clz(static_cast<int>(a >> c % 32))),
      static_cast<uint32_t>(__ffs(static_cast<int>(a << c % 32))),
      __umulhi(a, b),
      static_cast<uint32_t>(__dp4a(static_cast<int>(a), static_cast<int>(b), static_cast<int>(c))),
      min(a, b),
      static_cast<uint32_t>(max(static_cast<int>(a), static_cast<int>(b))),
      __ldg(in + threadIdx.x * 3) ^ __ldcs(in + threadIdx.x * 3 + 1) ^ __ldcg(in + threadIdx.x * 3 + 2),
      __float_as_uint(__uint_as_float(a)),
      gpu::load_once_16(in + threadIdx.x / 4 * 4).z,
  };
  gpu::prefetch_l2(in);
  for (int index = 0; index < integers; ++index) out[threadIdx.x * integers + index] = results[index];
}

// As on a GPU: three bits of each nibble choose, the fourth and the upper half of the selector do nothing.
uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result = 0;
  for (int byte = 3; byte >= 0; --byte) {
    uint32_t const which = selector >> byte * 4 & 7;
    result = result << 8 | (((which & 4) ? b : a) >> (which & 3) * 8 & 255);
  }
  return result;
}

void test_integer() {
  std::vector<uint32_t> const words = random_words(64 * 3, 17);
  DeviceArray<uint32_t> const in(words);
  DeviceArray<uint32_t> const out(64 * integers);
  expect(gpu::launch(integer, 1, 64, 0, nullptr, in.data(), out.data()), "integer");
  std::vector<uint32_t> const result = out.read();
  for (int thread = 0; thread < 64; ++thread) {
    uint32_t const a = words[thread * 3];
    uint32_t const b = words[thread * 3 + 1];
    uint32_t const c = words[thread * 3 + 2];
    uint64_t const pair = uint64_t{b} << 32 | a;
    int dot = static_cast<int>(c);
    uint32_t reversed = 0;
    for (int byte = 0; byte < 4; ++byte) dot += static_cast<int8_t>(a >> byte * 8) * static_cast<int8_t>(b >> byte * 8);
    for (int bit = 0; bit < 32; ++bit) reversed |= (a >> bit & 1) << (31 - bit);
    uint32_t const right = a >> c % 32;
    uint32_t const left = a << c % 32;
    uint32_t const expected[integers] = {
        (a & b) | c,
        a ^ b ^ c,
        byte_perm(a, b, c),
        static_cast<uint32_t>(pair >> c % 32),
        static_cast<uint32_t>(pair << c % 32 >> 32),
        reversed,
        static_cast<uint32_t>(__builtin_popcount(a)),
        right ? static_cast<uint32_t>(__builtin_clz(right)) : 32,
        static_cast<uint32_t>(__builtin_ffs(static_cast<int>(left))),
        static_cast<uint32_t>(uint64_t{a} * b >> 32),
        static_cast<uint32_t>(dot),
        std::min(a, b),
        static_cast<uint32_t>(std::max(static_cast<int>(a), static_cast<int>(b))),
        a ^ b ^ c,
        a,
        words[thread / 4 * 4 + 2],
    };
    for (int index = 0; index < integers; ++index)
      CHECK(result[thread * integers + index] == expected[index], "integer %d of %08x %08x %08x: %08x and not %08x",
            index, a, b, c, result[thread * integers + index], expected[index]);
  }
}

constexpr int floats = 14;

__global__ void __launch_bounds__(64) floating(const float* in /*[64][3]*/, float* out /*[64][floats]*/) {
  float const a = in[threadIdx.x * 3];
  float const b = in[threadIdx.x * 3 + 1];
  float const c = in[threadIdx.x * 3 + 2];
  uint32_t const half_pair = gpu::cvt_f16x2(a, b);
  uint32_t const bfloat_pair = gpu::cvt_bf16x2(a, b);
  __half2 const half_sum = __hfma2(__floats2half2_rn(a, b), __floats2half2_rn(b, c), __floats2half2_rn(c, a));
  __nv_bfloat162 const bfloat_sum =
      __hfma2(__floats2bfloat162_rn(a, b), __floats2bfloat162_rn(b, c), __floats2bfloat162_rn(c, a));
  float const results[floats] = {
      gpu::ex2_approx(a),
      gpu::lg2_approx(b * b + 0.5f),
      gpu::rcp_approx(c),
      gpu::tanh_approx(a),
      __fmaf_rn(a, b, c),
      __frcp_rn(c),
      __saturatef(a),
      __half2float(__ushort_as_half(static_cast<unsigned short>(half_pair))) +
          2 * __half2float(__ushort_as_half(static_cast<unsigned short>(half_pair >> 16))),
      __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bfloat_pair))) +
          2 * __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bfloat_pair >> 16))),
      __half22float2(half_sum).x,
      __half22float2(half_sum).y,
      __bfloat1622float2(bfloat_sum).x,
      fminf(a, fmaxf(b, c)),
      static_cast<float>(__float2int_rn(100 * a)),
  };
  for (int index = 0; index < floats; ++index) out[threadIdx.x * floats + index] = results[index];
}

void test_floating() {
  std::vector<float> const values = Random(19).normals(64 * 3);
  DeviceArray<float> const in(values);
  DeviceArray<float> const out(64 * floats);
  expect(gpu::launch(floating, 1, 64, 0, nullptr, in.data(), out.data()), "floating");
  auto const half = [](float value) { return double{__half2float(__float2half_rn(value))}; };
  auto const bfloat = [](float value) { return double{__bfloat162float(__float2bfloat16_rn(value))}; };
  std::vector<float> const result = out.read();
  for (int thread = 0; thread < 64; ++thread) {
    float const a = values[thread * 3];
    float const b = values[thread * 3 + 1];
    float const c = values[thread * 3 + 2];
    struct {
      double value;
      double tolerance;  // relative; an exact result where it is 0
    } const expected[floats] = {
        {std::exp2(double{a}), 0x1p-21},
        {std::log2(double{b} * b + 0.5), 0x1p-18},
        {1 / double{c}, 0x1p-22},
        {std::tanh(double{a}), 0x1p-10},
        {std::fma(a, b, c), 0},
        {1 / c, 0},
        {std::min(1.0f, std::max(0.0f, a)), 0},
        {static_cast<float>(half(a) + 2 * half(b)), 0},
        {static_cast<float>(bfloat(a) + 2 * bfloat(b)), 0},
        {__half2float(__double2half(half(a) * half(b) + half(c))), 0},
        {__half2float(__double2half(half(b) * half(c) + half(a))), 0},
        {__bfloat162float(__double2bfloat16(bfloat(a) * bfloat(b) + bfloat(c))), 0},
        {std::min(a, std::max(b, c)), 0},
        {std::nearbyint(100 * a), 0},
    };
    for (int index = 0; index < floats; ++index) {
      float const got = result[thread * floats + index];
      double const error = std::abs(got - expected[index].value);
      CHECK(error <= expected[index].tolerance * std::max(1.0, std::abs(expected[index].value)),
            "floating %d of %a %a %a: %a and not %a", index, a, b, c, got, expected[index].value);
    }
  }
}

}  // namespace

int main() {
  test_multiply(false);
  test_multiply(true);
  test_multiply_tf32();
  test_round_tf32();
  test_load_matrices<1, false>();
  test_load_matrices<1, true>();
  test_load_matrices<2, false>();
  test_load_matrices<2, true>();
  test_load_matrices<4, false>();
  test_load_matrices<4, true>();
  test_copy();
  test_load_behind();
  test_exchange();
  test_hand_over();
  test_count();
  test_merge();
  test_integer();
  test_floating();
  return couplet::test::finish();
}
