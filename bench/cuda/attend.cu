#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>

#include "../../cuda/attend/body.h"
#include "kernels.h"
#include "operations.h"
#include "tables.h"

namespace couplet::bench {
namespace {

constexpr int32_t sinks = 4;
constexpr int32_t window = 32;
constexpr double theta = 500000;
// Of |out - expected| / |expected| of a query head, the largest: tables, queries and probabilities of the fast bodies are float16.
constexpr double most_error = 4e-3;

struct FreeOnDevice {
  void operator()(couplet_rotary* rotary) const { cuda::rotary_entries.destroy(rotary); }
};
struct FreeOnHost {
  void operator()(couplet_rotary* rotary) const { cpu::rotary_entries.destroy(rotary); }
};

// All sequences of a call; every array has the same part for each of them.
class Sequences {
 public:
  Sequences(const Case& what, cudaStream_t stream)
      : what_(what),
        before_(what.context - what.queries),
        coded_end_(std::max(sinks, before_ - window)),
        pages_((coded_end_ + COUPLET_PAGE_TOKENS - 1) / COUPLET_PAGE_TOKENS),
        dense_tokens_(sinks + what.context - coded_end_),
        page_bytes_(static_cast<size_t>(2 * side_bytes())),
        codes_(count(what.batch) * count(pages_) * page_bytes_),
        dense_(count(what.batch) * 2 * dense_floats()),
        queries_(count(what.batch) * query_elements()),
        outputs_(count(what.batch) * query_elements()),
        page_table_(count(what.batch) * count(pages_)),
        runs_(count(what.batch) * 2),
        sequences_(count(what.batch)) {
    must(fill_bytes(codes_.data(), codes_.size(), 1, stream), "filling pages");
    must(fill_normals(dense_.data(), dense_.size(), 2, stream), "filling rows");
    must(fill_normals(queries_.data(), queries_.size(), 3, stream), "filling queries");
    if (what.operation == "attend wide") widen();
    std::vector<const uint8_t*> page_table;
    std::vector<couplet_dense_rows> runs;
    std::vector<couplet_attend_sequence> sequences;
    for (int32_t index = 0; index < what.batch; ++index) {
      Memory const memory = device_memory(index);
      add_pages(memory, page_table);
      add_runs(memory, runs);
      sequences.push_back(sequence_in(memory));
    }
    page_table_.write(page_table);
    runs_.write(runs);
    sequences_.write(sequences);
    must(cudaStreamSynchronize(stream), "filling memory");
  }

  couplet_attend_params params() const {
    return {
        .sequences = sequences_.data(),
        .key_table = nullptr,
        .value_table = nullptr,
        .rotary = nullptr,
        .head_sinks = nullptr,
        .key_page_offset = 0,
        .key_page_stride = side_bytes() / what_.kv_heads,
        .value_page_offset = side_bytes(),
        .value_page_stride = side_bytes() / what_.kv_heads,
        .sequence_count = what_.batch,
        .query_heads = what_.query_heads,
        .kv_heads = what_.kv_heads,
        .head_dim = what_.head_dim,
        .page_tokens = COUPLET_PAGE_TOKENS,
        .local_window = 0,
        .scale = 1 / std::sqrt(static_cast<float>(what_.head_dim)),
        .softcap = 0,
        .key_codec = what_.codec,
        .value_codec = what_.codec,
        .threads = 0,
        .most_query_tokens = what_.queries,
        .query_dtype = COUPLET_FLOAT16,
        .output_dtype = COUPLET_FLOAT16,
    };
  }

  void spoil_outputs(cudaStream_t stream) const {
    must(cudaMemsetAsync(outputs_.data(), 0xff, outputs_.size() * sizeof(__half), stream), "spoiling outputs");
  }

  // The largest error of a row of the last sequence, against the CPU on a copy of what that sequence reads.
  double error_of_last(const couplet_attend_params& device_params, const Tables& keys, const Tables& values,
                       const couplet_rotary* rotary) const {
    int32_t const last = what_.batch - 1;
    Memory const device = device_memory(last);
    std::vector<CacheLine> codes = read<CacheLine>(device.codes, count(pages_) * page_bytes_ / sizeof(CacheLine));
    std::vector<float> rows = read<float>(device.dense, 2 * dense_floats());
    std::vector<float> const queries = widened(read<__half>(device.queries, query_elements()));
    std::vector<float> const got = widened(read<__half>(device.outputs, query_elements()));
    std::vector<float> expected(query_elements());
    Memory host{codes.data()->bytes, rows.data(), queries.data(), expected.data(), nullptr, nullptr};
    std::vector<const uint8_t*> page_table;
    std::vector<couplet_dense_rows> runs;
    add_pages(host, page_table);
    add_runs(host, runs);
    host.page_table = page_table.data();
    host.runs = runs.data();
    couplet_attend_sequence const sequence = sequence_in(host);
    couplet_attend_params params = device_params;
    params.query_dtype = COUPLET_FLOAT32;
    params.output_dtype = COUPLET_FLOAT32;
    params.sequences = &sequence;
    params.sequence_count = 1;
    params.key_table = keys.host.get();
    params.value_table = values.host.get();
    params.rotary = rotary;
    couplet_report report{};
    std::vector<uint8_t> workspace(cpu::attend_entries.workspace(&params));
    must(cpu::attend_entries.run(&params, workspace.data(), nullptr, &report), report);
    return largest_row_error(got, expected);
  }

  // Codes of all tokens and both sides, queries and outputs.
  double bytes() const {
    double const code_bytes = 2.0 * couplet_codec_groups(what_.codec, what_.head_dim) * what_.codec.code_bits / 8;
    return static_cast<double>(what_.batch) * (coded_end_ - sinks) * what_.kv_heads * code_bytes +
           static_cast<double>(what_.batch) * static_cast<double>(2 * query_elements() + 2 * dense_floats()) *
               sizeof(float);
  }
  double lookup_bytes() const {
    return 2.0 * sizeof(__half) * what_.batch * (coded_end_ - sinks) * what_.kv_heads * what_.head_dim;
  }

 private:
  // Where the parts of one sequence lie.
  struct Memory {
    uint8_t* codes;       // [pages_][page_bytes_], in the order that page_at() gives
    float* dense;         // keys, then values: [dense_tokens_][kv_heads][head_dim]
    const void* queries;  // [queries][query_heads][head_dim], float16 on the device and float32 on the host
    void* outputs;        // likewise
    const uint8_t** page_table;
    couplet_dense_rows* runs;
  };

  // A value that float16 does not hold, in the first token of each kv head.
  void widen() const {
    float const beyond = 1e5f;
    for (int32_t index = 0; index < what_.batch; ++index)
      for (int32_t head = 0; head < what_.kv_heads; ++head)
        must(cudaMemcpy(device_memory(index).dense + dense_floats() + count(head) * count(what_.head_dim), &beyond,
                        sizeof beyond, cudaMemcpyHostToDevice),
             "writing a value");
  }

  static size_t count(int64_t value) { return static_cast<size_t>(value); }
  int64_t side_bytes() const {
    return what_.kv_heads * couplet_page_bytes(what_.codec, what_.head_dim, COUPLET_PAGE_TOKENS);
  }
  size_t dense_floats() const { return count(dense_tokens_) * count(what_.kv_heads) * count(what_.head_dim); }
  size_t query_elements() const { return count(what_.queries) * count(what_.query_heads) * count(what_.head_dim); }

  Memory device_memory(int32_t index) const {
    size_t const at = count(index);
    return {codes_.data() + at * count(pages_) * page_bytes_, dense_.data() + at * 2 * dense_floats(),
            queries_.data() + at * query_elements(),          outputs_.data() + at * query_elements(),
            page_table_.data() + at * count(pages_),          runs_.data() + at * 2};
  }

  // Pages are not in the order of their tokens, as in a cache that has lived.
  size_t page_at(int32_t page) const {
    size_t const step = 7;
    return pages_ % 7 == 0 ? count(page) : count(page) * step % count(pages_);
  }

  void add_pages(const Memory& memory, std::vector<const uint8_t*>& table) const {
    for (int32_t page = 0; page < pages_; ++page) table.push_back(memory.codes + page_at(page) * page_bytes_);
  }

  void add_runs(const Memory& memory, std::vector<couplet_dense_rows>& runs) const {
    int64_t const token = int64_t{what_.kv_heads} * what_.head_dim;
    float* const values = memory.dense + dense_floats();
    runs.push_back({memory.dense, values, token, what_.head_dim, token, what_.head_dim, 0, sinks});
    runs.push_back({memory.dense + sinks * token, values + sinks * token, token, what_.head_dim, token, what_.head_dim,
                    coded_end_, what_.context - coded_end_});
  }

  couplet_attend_sequence sequence_in(const Memory& memory) const {
    int64_t const token = int64_t{what_.query_heads} * what_.head_dim;
    return {
        .queries = memory.queries,
        .outputs = memory.outputs,
        .pages = memory.page_table,
        .dense = memory.runs,
        .query_token_stride = token,
        .query_head_stride = what_.head_dim,
        .output_token_stride = token,
        .output_head_stride = what_.head_dim,
        .dense_count = 2,
        .first_query = before_,
        .query_tokens = what_.queries,
        .coded_begin = sinks,
        .coded_end = coded_end_,
        .window = window,
    };
  }

  struct alignas(COUPLET_PAGE_ALIGNMENT) CacheLine {
    uint8_t bytes[COUPLET_PAGE_ALIGNMENT];
  };

  template <class T>
  static std::vector<T> read(const void* device, size_t elements) {
    std::vector<T> values(elements);
    must(cudaMemcpy(values.data(), device, elements * sizeof(T), cudaMemcpyDeviceToHost), "reading back");
    return values;
  }

  static std::vector<float> widened(const std::vector<__half>& values) {
    std::vector<float> wide;
    for (__half value : values) wide.push_back(__half2float(value));
    return wide;
  }

  double largest_row_error(const std::vector<float>& got, const std::vector<float>& expected) const {
    double largest = 0;
    size_t const channels = count(what_.head_dim);
    for (size_t row = 0; row < got.size(); row += channels) {
      double difference = 0;
      double norm = 0;
      for (size_t c = row; c < row + channels; ++c) {
        double const e = static_cast<double>(expected[c]);
        difference += (static_cast<double>(got[c]) - e) * (static_cast<double>(got[c]) - e);
        norm += e * e;
      }
      double const error = std::sqrt(difference / norm);
      if (!(error <= largest)) largest = error;  // NaN stays
    }
    return largest;
  }

  Case const what_;
  int32_t const before_;     // tokens before the first query
  int32_t const coded_end_;  // codes from `sinks` to here
  int32_t const pages_;
  int32_t const dense_tokens_;
  size_t const page_bytes_;
  DeviceArray<uint8_t> const codes_;
  DeviceArray<float> const dense_;
  DeviceArray<__half> const queries_, outputs_;
  DeviceArray<const uint8_t*> page_table_;
  DeviceArray<couplet_dense_rows> runs_;
  DeviceArray<couplet_attend_sequence> sequences_;
};

// One step with all that it needs, on both sides.
class Step {
 public:
  Step(const Case& what, cudaStream_t stream)
      : what_(what),
        keys_(what.codec, what.kv_heads, what.head_dim, 4),
        values_(what.codec, what.kv_heads, what.head_dim, 5, what.levels),
        sequences_(what, stream),
        params_(sequences_.params()) {
    couplet_report failure{};
    couplet_rotary_params const rotary_params{nullptr,       nullptr,      theta,        COUPLET_ROTARY_HALF,
                                              what.head_dim, what.context, what.head_dim};
    couplet_rotary* handle = nullptr;
    must(cuda::rotary_entries.create(&rotary_params, &handle, &failure), failure);
    rotary_.reset(handle);
    must(cpu::rotary_entries.create(&rotary_params, &handle, &failure), failure);
    host_rotary_.reset(handle);
    params_.key_table = keys_.device.get();
    params_.value_table = values_.device.get();
    params_.rotary = rotary_.get();
    must(cuda::attend_entries.check(&params_, &failure), failure);
  }

  const couplet_attend_params& params() const { return params_; }

  // Checked, then timed; false when the answer is wrong, and then there are no times.
  bool measure(cuda::attend::Body body, Meter& meter, Result* result) const {
    DeviceArray<uint8_t> const workspace(cuda::attend::workspace(body, params_));
    couplet_report failure{};
    auto const run = [&](cudaStream_t stream) {
      must(cuda::attend::run(body, params_, workspace.data(), stream, &failure), failure);
    };
    sequences_.spoil_outputs(meter.stream());
    run(meter.stream());
    meter.wait();
    result->body = "attend cuda " + name_of(what_.codec) + " " + cuda::attend::name_of(body, params_);
    result->check = "largest relative error of a row of the last sequence, against the CPU backend";
    result->error = sequences_.error_of_last(params_, keys_, values_, host_rotary_.get());
    result->bytes = sequences_.bytes() + keys_.float16_bytes + values_.float16_bytes;
    result->lookup_bytes = sequences_.lookup_bytes();
    if (!(result->error < most_error)) return false;
    result->timing = meter.time(run);
    return true;
  }

 private:
  Case const what_;
  Tables const keys_, values_;
  Sequences const sequences_;
  couplet_attend_params params_;
  std::unique_ptr<couplet_rotary, FreeOnDevice> rotary_;
  std::unique_ptr<couplet_rotary, FreeOnHost> host_rotary_;
};

}  // namespace

void attend(const Case& what, Meter& meter, Report& report) {
  Step const step(what, meter.stream());
  cuda::attend::Body const* body = cuda::attend::bodies;
  while (!can_take(*body, step.params())) ++body;  // as attend's entries do
  Result result{};
  step.measure(*body, meter, &result) ? report.add(what, result) : report.refuse(what, result);
}

// Body by body from the one that takes any call, on the same data; on top, where the codec has levels, values on levels.
void ladder(const Case& what, Meter& meter, Report& report) {
  Result below{};
  auto const climb = [&](const Case& rung_case, cuda::attend::Body body, const Step& step) {
    Result rung{};
    if (!step.measure(body, meter, &rung)) return report.refuse(rung_case, rung);
    if (!below.body.empty()) {
      char text[64];
      std::snprintf(text, sizeof text, "%.2f x the rung below", below.timing.microseconds / rung.timing.microseconds);
      rung.note = text;
    }
    report.add(rung_case, rung);
    below = rung;
  };
  Case plain = what;
  plain.levels = false;
  {
    Step const step(plain, meter.stream());
    for (auto body = std::rbegin(cuda::attend::bodies); body != std::rend(cuda::attend::bodies); ++body)
      if (can_take(*body, step.params())) climb(plain, *body, step);
  }
  if (!what.levels) return;
  Step const step(what, meter.stream());
  if (can_take(cuda::attend::Body::lookup, step.params())) climb(what, cuda::attend::Body::lookup, step);
}

}  // namespace couplet::bench
