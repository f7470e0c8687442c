// reorder on a GPU, or on the simulator, and on the CPU: every element is the bits that it came with, of every type, runs of any size and
// strides; nothing between rows is written.
#include "../../cuda/backend.h"
#include "../../cuda/device/elements.h"
#include "../../native/cpu/backend.h"
#include "device_array.h"

namespace {

using namespace couplet;
using test::DeviceArray;
using test::Random;

// Element: what has as many bits as those of `dtype`.
template <class Element>
void reorders(const std::vector<int32_t>& run_tokens, int32_t head_dim, int32_t dtype, Random& random) {
  std::vector<int32_t> order;
  for (int32_t channel = 0; channel < head_dim; ++channel)
    order.insert(order.begin() + random.below(channel + 1), channel);
  std::vector<couplet_reorder_run> runs;
  std::vector<size_t> from, to;  // first element of each run
  size_t given = 0, placed = 0;
  couplet_reorder_params params{};
  for (int32_t const tokens : run_tokens) {
    int32_t const heads = static_cast<int32_t>(1 + random.below(5));
    int64_t const head_stride = head_dim + random.below(3), token_stride = head_stride * heads + random.below(3);
    int64_t const placed_head = head_dim + random.below(3), placed_token = placed_head * heads + random.below(3);
    from.push_back(given);
    to.push_back(placed);
    runs.push_back({nullptr, nullptr, token_stride, head_stride, placed_token, placed_head, tokens, heads});
    given += static_cast<size_t>(token_stride * tokens);
    placed += static_cast<size_t>(placed_token * tokens);
    params.most_rows = std::max(params.most_rows, tokens * heads);
  }
  std::vector<Element> rows(given), expected(placed, Element{7});
  for (Element& row : rows) row = static_cast<Element>(random.below(int64_t{1} << 32));  // NaN and infinities too
  for (size_t run = 0; run < runs.size(); ++run)
    for (int64_t token = 0; token < runs[run].tokens; ++token)
      for (int64_t head = 0; head < runs[run].heads; ++head)
        for (int32_t c = 0; c < head_dim; ++c)
          expected[to[run] + static_cast<size_t>(token * runs[run].reordered_token_stride +
                                                 head * runs[run].reordered_head_stride + c)] =
              rows[from[run] + static_cast<size_t>(token * runs[run].token_stride + head * runs[run].head_stride +
                                                   order[static_cast<size_t>(c)])];
  auto const place = [&](const Element* in, Element* out) {
    std::vector<couplet_reorder_run> all = runs;
    for (size_t run = 0; run < all.size(); ++run) {
      all[run].rows = in + from[run];
      all[run].reordered = out + to[run];
    }
    return all;
  };
  params.run_count = static_cast<int32_t>(runs.size());
  params.head_dim = head_dim;
  params.dtype = dtype;
  couplet_report report{};

  std::vector<Element> on_host(placed, Element{7});
  std::vector<couplet_reorder_run> const host_runs = place(rows.data(), on_host.data());
  params.runs = host_runs.data();
  params.order = order.data();
  CHECK(cpu::reorder_entries.run(&params, nullptr, nullptr, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(on_host == expected, "cpu, %s, headDim %d", cuda::dtype_name(dtype), head_dim);

  DeviceArray<Element> const in(rows), out(std::vector<Element>(placed, Element{7}));
  DeviceArray<int32_t> const device_order(order);
  DeviceArray<couplet_reorder_run> const device_runs(place(in.data(), out.data()));
  params.runs = device_runs.data();
  params.order = device_order.data();
  CHECK(cuda::reorder_entries.check(&params, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(cuda::reorder_entries.workspace(&params) == 0, "workspace");
  CHECK(cuda::reorder_entries.run(&params, nullptr, nullptr, &report) == COUPLET_OK, "%s", report.detail);
  CHECK(out.read() == expected, "gpu, %s, headDim %d", cuda::dtype_name(dtype), head_dim);
}

void refusals() {
  std::vector<int32_t> order(32);
  float row[32] = {}, moved[32] = {};
  couplet_reorder_run const run = {row, moved, 32, 32, 32, 32, 1, 1};
  auto const refused = [&](const char* what, bool by_gpu, auto change) {
    couplet_reorder_params p = {&run, order.data(), 1, 1, 32, COUPLET_FLOAT32};
    change(p);
    couplet_report report{};
    CHECK(cpu::reorder_entries.check(&p, &report) == COUPLET_INVALID_ARGUMENT && report.detail[0], "%s", what);
    CHECK(!by_gpu || cuda::reorder_entries.check(&p, &report) == COUPLET_INVALID_ARGUMENT, "%s, gpu", what);
  };
  refused("dtype", true, [](auto& p) { p.dtype = 3; });
  refused("headDim", true, [](auto& p) { p.head_dim = COUPLET_MAX_HEAD_DIM + 1; });
  refused("no order", true, [](auto& p) { p.order = nullptr; });
  refused("no runs", true, [](auto& p) { p.runs = nullptr; });
  order[3] = 32;
  refused("a channel beyond the head", false, [](auto&) {});
}

}  // namespace

int main() {
  Random random(23);
  for (const std::vector<int32_t>& tokens : {std::vector<int32_t>{}, {0}, {1}, {1, 1, 1}, {8, 0, 5}, {300}})
    for (int32_t const head_dim : {32, 40, 128}) {
      reorders<uint32_t>(tokens, head_dim, COUPLET_FLOAT32, random);
      for (int32_t const dtype : {COUPLET_FLOAT16, COUPLET_BFLOAT16})
        reorders<uint16_t>(tokens, head_dim, dtype, random);
    }
  reorders<uint32_t>({3}, 256, COUPLET_FLOAT32, random);
  refusals();
  return couplet::test::finish();
}
