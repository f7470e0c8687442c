// mix on a GPU, or on the simulator, beside sums in double, and the CPU's: runs of few and of many tokens, strides, heads that share a
// matrix, every element type; nothing between rows is written.
#include <cmath>
#include <cstring>

#include "../../cuda/backend.h"
#include "../../cuda/device/elements.h"
#include "../../native/cpu/backend.h"
#include "../../native/cpu/half.h"
#include "device_array.h"

namespace {

using namespace couplet;
using test::DeviceArray;
using test::Random;

constexpr float gap = -7;

uint16_t narrow(float value, int32_t dtype) {
  return dtype == COUPLET_FLOAT16 ? cpu::float_to_half(value) : __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
float widen(uint16_t bits, int32_t dtype) {
  return dtype == COUPLET_FLOAT16 ? cpu::half_to_float(bits) : __bfloat162float(__ushort_as_bfloat16(bits));
}

struct Case {
  Case(std::vector<int32_t> run_tokens, int32_t heads, int32_t matrix_heads, int32_t head_dim, Random& random)
      : tokens(std::move(run_tokens)),
        matrices(random.normals(static_cast<size_t>(matrix_heads * head_dim * head_dim))) {
    params.run_count = static_cast<int32_t>(tokens.size());
    params.heads = heads;
    params.matrix_heads = matrix_heads;
    params.head_dim = head_dim;
    params.threads = 2;
    for (int32_t const count : tokens) {
      int64_t const head_stride = head_dim + random.below(3), token_stride = head_stride * heads + random.below(3);
      offsets.push_back(elements);
      runs.push_back(
          {.rows = nullptr, .token_stride = token_stride, .head_stride = head_stride, .tokens = count, .reserved = 0});
      elements += static_cast<size_t>(token_stride * count);
      params.most_tokens = std::max(params.most_tokens, count);
    }
    rows.assign(elements, gap);
    each([&](size_t at, int64_t, int32_t) { rows[at] = static_cast<float>(random.normal()); });
  }

  // visit(place, of a row's first channel; head; channel)
  template <class Visit>
  void each(const Visit& visit) const {
    for (size_t run = 0; run < runs.size(); ++run)
      for (int64_t token = 0; token < tokens[run]; ++token)
        for (int32_t head = 0; head < params.heads; ++head)
          for (int32_t channel = 0; channel < params.head_dim; ++channel) {
            auto const first =
                static_cast<int64_t>(offsets[run]) + token * runs[run].token_stride + head * runs[run].head_stride;
            visit(static_cast<size_t>(first + channel), first, head);
          }
  }

  template <class T>
  std::vector<couplet_mix_run> placed(T* from) const {
    std::vector<couplet_mix_run> all = runs;
    for (size_t run = 0; run < all.size(); ++run) all[run].rows = from + offsets[run];
    return all;
  }

  // What `got` may be of `given` rows: sums of headDim products, and a rounding to an element.
  void check(const std::vector<float>& given, const std::vector<float>& got, double rounding, const char* what) const {
    std::vector<bool> is_row(elements);
    double worst = 0;
    each([&](size_t at, int64_t first, int32_t head) {
      is_row[at] = true;
      const float* const matrix =
          matrices.data() + int64_t{head / (params.heads / params.matrix_heads)} * params.head_dim * params.head_dim;
      double sum = 0, size = 0;
      for (int32_t from = 0; from < params.head_dim; ++from) {
        double const product = double{given[static_cast<size_t>(first + from)]} *
                               double{matrix[from * params.head_dim + (static_cast<int64_t>(at) - first)]};
        sum += product;
        size += std::fabs(product);
      }
      double const bound = size * params.head_dim * 0x1p-23 + std::fabs(sum) * rounding + 1e-30;
      worst = std::max(worst, std::fabs(double{got[at]} - sum) / bound);
    });
    CHECK(worst <= 1, "%s: %g times the bound", what, worst);
    for (size_t at = 0; at < elements; ++at) CHECK(is_row[at] || got[at] == gap, "%s: wrote between rows", what);
  }

  void on_cpu() const {
    std::vector<float> mixed = rows;
    auto const all = placed(mixed.data());
    couplet_mix_params p = params;
    p.runs = all.data();
    p.matrices = matrices.data();
    p.dtype = COUPLET_FLOAT32;
    couplet_report report{};
    CHECK(cpu::mix_entries.run(&p, nullptr, nullptr, &report) == COUPLET_OK, "%s", report.detail);
    check(rows, mixed, 0, "cpu");
  }

  void on_device(int32_t dtype) const {
    bool const wide = dtype == COUPLET_FLOAT32;
    std::vector<uint16_t> bits(wide ? 0 : elements);
    std::vector<float> given = rows;
    for (size_t i = 0; i < bits.size(); ++i) given[i] = widen(bits[i] = narrow(rows[i], dtype), dtype);
    DeviceArray<float> const floats(given);
    DeviceArray<uint16_t> const halves(bits);
    DeviceArray<float> const device_matrices(matrices);
    DeviceArray<couplet_mix_run> const all(wide ? placed(floats.data()) : placed(halves.data()));
    couplet_mix_params p = params;
    p.runs = all.data();
    p.matrices = device_matrices.data();
    p.dtype = dtype;
    couplet_report report{};
    CHECK(cuda::mix_entries.check(&p, &report) == COUPLET_OK, "%s", report.detail);
    CHECK(cuda::mix_entries.workspace(&p) == 0, "workspace");
    CHECK(cuda::mix_entries.run(&p, nullptr, nullptr, &report) == COUPLET_OK, "%s", report.detail);
    std::vector<float> got = floats.read();
    std::vector<uint16_t> const narrowed = halves.read();
    for (size_t i = 0; i < bits.size(); ++i) got[i] = widen(narrowed[i], dtype);
    check(given, got, wide ? 0 : dtype == COUPLET_FLOAT16 ? 0x1p-11 : 0x1p-8, cuda::dtype_name(dtype));
  }

  std::vector<int32_t> tokens;
  std::vector<float> matrices, rows;
  couplet_mix_params params{};
  std::vector<couplet_mix_run> runs;
  std::vector<size_t> offsets;
  size_t elements = 0;
};

void refusals() {
  Random random(5);
  Case const test({4}, 4, 2, 32, random);
  auto const refused = [&](const char* what, auto change) {
    couplet_mix_params p = test.params;
    p.runs = test.runs.data();
    p.matrices = test.matrices.data();
    change(p);
    couplet_report report{};
    for (auto const check : {cpu::mix_entries.check, cuda::mix_entries.check})
      CHECK(check(&p, &report) == COUPLET_INVALID_ARGUMENT && report.detail[0], "%s was not refused", what);
  };
  refused("dtype", [](auto& p) { p.dtype = 3; });
  refused("heads", [](auto& p) { p.heads = 5; });
  refused("no matrix", [](auto& p) { p.matrices = nullptr; });
  refused("headDim", [](auto& p) { p.head_dim = COUPLET_MAX_HEAD_DIM + 1; });
  refused("no runs", [](auto& p) { p.runs = nullptr; });
  couplet_mix_params p = test.params;
  p.runs = test.runs.data();
  p.matrices = test.matrices.data();
  p.dtype = COUPLET_FLOAT16;
  couplet_report report{};
  CHECK(cpu::mix_entries.check(&p, &report) == COUPLET_UNSUPPORTED, "the CPU has float32 alone");
}

}  // namespace

int main() {
  Random random(11);
  for (const std::vector<int32_t>& tokens : {std::vector<int32_t>{}, {0}, {1}, {1, 1, 1}, {8, 0, 5}, {37}})
    for (int32_t const head_dim : {32, 40, 128}) {
      Case const test(tokens, 4, static_cast<int32_t>(1 << random.below(3)), head_dim, random);
      test.on_cpu();
      for (int32_t const dtype : {COUPLET_FLOAT32, COUPLET_FLOAT16, COUPLET_BFLOAT16}) test.on_device(dtype);
    }
  Case(std::vector<int32_t>(3, 1), 2, 2, 256, random).on_device(COUPLET_FLOAT32);
  refusals();
  return couplet::test::finish();
}
