#include <algorithm>
#include <bit>
#include <cmath>

#include "../../native/cpu/backend.h"
#include "kernels.h"
#include "operations.h"

namespace couplet::bench {
namespace {

constexpr int64_t checked_tokens = 1024;  // the last ones
// Of |out - expected| / |expected| of a row, the largest: a result is rounded to float16.
constexpr double most_error = 1e-3;

// float16 rows of all sequences on the device, [batch][context][query_heads][head_dim].
class HeadRows {
 public:
  HeadRows(const Case& what, cudaStream_t stream)
      : what_(what),
        row_elements_(int64_t{what.query_heads} * what.head_dim),
        elements_(int64_t{what.batch} * what.context * row_elements_),
        rows_(static_cast<size_t>(elements_)) {
    must(fill_normals(rows_.data(), rows_.size(), 10, stream), "filling rows");
    must(cudaStreamSynchronize(stream), "filling rows");
  }

  int64_t row_elements() const { return row_elements_; }  // of a token
  int64_t elements() const { return elements_; }
  int32_t last_tokens() const {
    return static_cast<int32_t>(std::min<int64_t>(int64_t{what_.batch} * what_.context, checked_tokens));
  }
  __half* of_sequence(int32_t index) const { return rows_.data() + int64_t{index} * what_.context * row_elements_; }
  // The last tokens of all.
  std::vector<__half> read_last() const {
    std::vector<__half> last(static_cast<size_t>(last_tokens() * row_elements_));
    must(cudaMemcpy(last.data(), rows_.data() + elements_ - static_cast<int64_t>(last.size()),
                    last.size() * sizeof(__half), cudaMemcpyDeviceToHost),
         "reading back");
    return last;
  }

 private:
  Case const what_;
  int64_t const row_elements_, elements_;
  DeviceArray<__half> const rows_;
};

std::vector<float> widened(const std::vector<__half>& values) {
  std::vector<float> wide;
  for (__half value : values) wide.push_back(__half2float(value));
  return wide;
}

double largest_row_error(const std::vector<float>& got, const std::vector<float>& expected, int32_t head_dim) {
  double largest = 0;
  for (size_t row = 0; row < got.size(); row += static_cast<size_t>(head_dim)) {
    double difference = 0;
    double norm = 0;
    for (size_t c = row; c < row + static_cast<size_t>(head_dim); ++c) {
      double const e = static_cast<double>(expected[c]);
      difference += (static_cast<double>(got[c]) - e) * (static_cast<double>(got[c]) - e);
      norm += e * e;
    }
    double const error = std::sqrt(difference / norm);
    if (!(error <= largest)) largest = error;  // NaN stays
  }
  return largest;
}

// Times `run` when the check has passed; rows are read once and written once.
template <class Run>
void finish(const Case& what, const HeadRows& rows, double most, double other_bytes, const Run& run, Meter& meter,
            Report& report, Result result) {
  if (!(result.error <= most)) return report.refuse(what, result);
  result.timing = meter.time(run);
  result.bytes = 2.0 * static_cast<double>(rows.elements()) * sizeof(__half) + other_bytes;
  report.add(what, result);
}

}  // namespace

void mix(const Case& what, Meter& meter, Report& report) {
  HeadRows const rows(what, meter.stream());
  auto const channels = static_cast<uint32_t>(what.head_dim);
  std::vector<float> matrices;
  for (int32_t head = 0; head < what.kv_heads; ++head)
    for (uint32_t from = 0; from < channels; ++from)
      for (uint32_t to = 0; to < channels; ++to)
        matrices.push_back((std::popcount(from & to) % 2 ? -1.0f : 1.0f) / std::sqrt(static_cast<float>(channels)));
  DeviceArray<float> const device_matrices(matrices);
  std::vector<couplet_mix_run> runs;
  for (int32_t index = 0; index < what.batch; ++index)
    runs.push_back({.rows = rows.of_sequence(index),
                    .token_stride = rows.row_elements(),
                    .head_stride = what.head_dim,
                    .tokens = what.context,
                    .reserved = 0});
  DeviceArray<couplet_mix_run> const device_runs(runs);
  couplet_mix_params params{};
  params.runs = device_runs.data();
  params.matrices = device_matrices.data();
  params.run_count = what.batch;
  params.most_tokens = what.context;
  params.heads = what.query_heads;
  params.matrix_heads = what.kv_heads;
  params.head_dim = what.head_dim;
  params.dtype = COUPLET_FLOAT16;
  couplet_report failure{};
  auto const run = [&](cudaStream_t stream) {
    must(cuda::mix_entries.run(&params, nullptr, stream, &failure), failure);
  };

  std::vector<float> expected = widened(rows.read_last());
  run(meter.stream());
  meter.wait();
  couplet_mix_run const last{.rows = expected.data(),
                             .token_stride = rows.row_elements(),
                             .head_stride = what.head_dim,
                             .tokens = rows.last_tokens(),
                             .reserved = 0};
  couplet_mix_params host = params;
  host.runs = &last;
  host.matrices = matrices.data();
  host.run_count = 1;
  host.most_tokens = last.tokens;
  host.dtype = COUPLET_FLOAT32;
  must(cpu::mix_entries.run(&host, nullptr, nullptr, &failure), failure);
  Result result{};
  char body[128] = "";
  cuda::mix_entries.describe(&params, body, sizeof body);
  result.body = body;
  result.check = "largest relative error of a row of the last 1024 tokens, against the CPU backend";
  result.error = largest_row_error(widened(rows.read_last()), expected, what.head_dim);
  finish(what, rows, most_error, static_cast<double>(matrices.size() * sizeof(float)), run, meter, report, result);
}

void reorder(const Case& what, Meter& meter, Report& report) {
  HeadRows const rows(what, meter.stream()), reordered(what, meter.stream());
  std::vector<int32_t> order;
  test::Random random(11);
  for (int32_t channel = 0; channel < what.head_dim; ++channel)
    order.insert(order.begin() + random.below(channel + 1), channel);
  DeviceArray<int32_t> const device_order(order);
  int64_t const token = rows.row_elements();
  std::vector<couplet_reorder_run> runs;
  for (int32_t index = 0; index < what.batch; ++index)
    runs.push_back({rows.of_sequence(index), reordered.of_sequence(index), token, what.head_dim, token, what.head_dim,
                    what.context, what.query_heads});
  DeviceArray<couplet_reorder_run> const device_runs(runs);
  couplet_reorder_params const params{device_runs.data(), device_order.data(),
                                      what.batch,         what.context * what.query_heads,
                                      what.head_dim,      COUPLET_FLOAT16};
  couplet_report failure{};
  auto const run = [&](cudaStream_t stream) {
    must(cuda::reorder_entries.run(&params, nullptr, stream, &failure), failure);
  };
  run(meter.stream());
  meter.wait();
  std::vector<__half> const given = rows.read_last(), got = reordered.read_last();
  std::vector<__half> expected(given.size());
  couplet_reorder_run const last{given.data(),  expected.data(),    token,           what.head_dim, token,
                                 what.head_dim, rows.last_tokens(), what.query_heads};
  couplet_reorder_params const host{&last, order.data(), 1, last.tokens * last.heads, what.head_dim, COUPLET_FLOAT16};
  must(cpu::reorder_entries.run(&host, nullptr, nullptr, &failure), failure);
  Result result{};
  char body[128] = "";
  cuda::reorder_entries.describe(&params, body, sizeof body);
  result.body = body;
  result.check = "elements that differ from the CPU backend's, of the last 1024 tokens";
  for (size_t i = 0; i < got.size(); ++i) result.error += __half_as_ushort(got[i]) != __half_as_ushort(expected[i]);
  finish(what, rows, 0, 0, run, meter, report, result);
}

}  // namespace couplet::bench
