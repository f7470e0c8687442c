// Each wrapper of gpu.h against a plain computation. The simulator passes it in CI; compiled by nvcc and run on a GPU, it says
// whether the simulator tells the truth.
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

// ---- matrices --------------------------------------------------------------------------------------------------------------
template <bool Bfloat>
__global__ void __launch_bounds__(32)
    multiply(const uint16_t* a /*[16][16]*/, const uint16_t* b /*[16][8]*/, float* d /*[16][8]*/) {
  GPU_SHARED(a_rows, uint16_t[16][24]);  // rows of 48 bytes: 16-byte aligned
  GPU_SHARED(b_rows, uint16_t[16][8]);
  int const lane = threadIdx.x;
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
  std::vector<float> d = random.normals(128);
  for (auto& bits : a) bits = bits_of(static_cast<float>(random.normal()), bfloat);
  for (auto& bits : b) bits = bits_of(static_cast<float>(random.normal()), bfloat);
  DeviceArray<uint16_t> const device_a(a);
  DeviceArray<uint16_t> const device_b(b);
  DeviceArray<float> device_d(d);
  expect(gpu::launch(bfloat ? multiply<true> : multiply<false>, 1, lanes, 0, nullptr, device_a.data(), device_b.data(),
                     device_d.data()),
         "multiply");
  std::vector<float> const result = device_d.read();
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      double sum = d[row * 8 + column];
      for (int inner = 0; inner < 16; ++inner)
        sum += double{value_of(a[row * 16 + inner], bfloat)} * value_of(b[inner * 8 + column], bfloat);
      CHECK(std::abs(result[row * 8 + column] - sum) < 1e-5, "[%d][%d] is %g and not %g", row, column,
            result[row * 8 + column], sum);
    }
}

}  // namespace

int main() {
  test_multiply(false);
  test_multiply(true);
  return couplet::test::finish();
}
