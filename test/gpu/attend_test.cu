// attend on a GPU, or on the simulator, against the double oracle, on random codes.
//
// Error of an output row (one query head of one token): |out - oracle| / |oracle|, Euclidean. Allowed: 2e-5 for the general body, which is
// float32 throughout, and 4e-3 for prefill and for the bodies that decode by lookup: their tables or keys, queries and probabilities are tf32 or
// float16 (2^-11 each, over logits of a few units).
#include <cstring>
#include <memory>
#include <string>

#include "../../cuda/backend.h"
#include "../../cuda/device/elements.h"
#include "../../cuda/table.h"
#include "../../native/cpu/table.h"
#include "../native/attend_case.h"
#include "device_array.h"

namespace {

using namespace couplet;
using namespace couplet::test;
using Tables = CaseShape::Tables;

void expect(couplet_status status, const couplet_report& report) { CHECK(status == COUPLET_OK, "%s", report.detail); }

std::vector<uint8_t> elements_of(const float* values, size_t count, int32_t dtype) {
  std::vector<uint8_t> bytes(count * static_cast<size_t>(cuda::element_bytes(dtype)));
  for (size_t i = 0; i < count; ++i) {
    if (dtype == COUPLET_FLOAT32) std::memcpy(bytes.data() + 4 * i, values + i, 4);
    __half const half = __float2half_rn(values[i]);
    __nv_bfloat16 const bfloat = __float2bfloat16_rn(values[i]);
    if (dtype == COUPLET_FLOAT16) std::memcpy(bytes.data() + 2 * i, &half, 2);
    if (dtype == COUPLET_BFLOAT16) std::memcpy(bytes.data() + 2 * i, &bfloat, 2);
  }
  return bytes;
}

std::vector<float> floats_of(const std::vector<uint8_t>& bytes, int32_t dtype) {
  std::vector<float> values(bytes.size() / static_cast<size_t>(cuda::element_bytes(dtype)));
  for (size_t i = 0; i < values.size(); ++i) {
    __half half;
    __nv_bfloat16 bfloat;
    if (dtype == COUPLET_FLOAT32) std::memcpy(&values[i], bytes.data() + 4 * i, 4);
    if (dtype == COUPLET_FLOAT16)
      values[i] = __half2float(*static_cast<__half*>(std::memcpy(&half, bytes.data() + 2 * i, 2)));
    if (dtype == COUPLET_BFLOAT16)
      values[i] = __bfloat162float(*static_cast<__nv_bfloat16*>(std::memcpy(&bfloat, bytes.data() + 2 * i, 2)));
  }
  return values;
}

// A case of the CPU's with all that its parameters point to in device memory.
class DeviceCase {
 public:
  explicit DeviceCase(AttendCase& host, int32_t dtype = COUPLET_FLOAT32)
      : host_(host), params_(host.params()), sequences_(static_cast<size_t>(params_.sequence_count)) {
    params_.query_dtype = params_.output_dtype = dtype;
    key_table_ = make_table(params_.key_table, &params_.key_table);
    value_table_ = make_table(params_.value_table, &params_.value_table);
    couplet_report report{};
    couplet_rotary* rotary = nullptr;
    if (host.rotary_params()) expect(cuda::rotary_entries.create(host.rotary_params(), &rotary, &report), report);
    rotary_.reset(rotary);
    params_.rotary = rotary;
    if (params_.head_sinks) params_.head_sinks = copy(params_.head_sinks, static_cast<size_t>(params_.query_heads));
    std::vector<couplet_attend_sequence> sequences;
    for (int32_t index = 0; index < params_.sequence_count; ++index) sequences.push_back(make_sequence(index));
    sequences_.write(sequences);
    params_.sequences = sequences_.data();
  }

  const couplet_attend_params& params() const { return params_; }
  std::string name() const {
    char text[64];
    cuda::attend_entries.describe(&params_, text, sizeof text);
    return text;
  }

  std::vector<std::vector<float>> run(cudaStream_t stream = nullptr) {
    spoil_outputs();
    couplet_report report{};
    expect(cuda::attend_entries.check(&params_, &report), report);
    DeviceArray<uint8_t> const workspace(std::vector<uint8_t>(cuda::attend_entries.workspace(&params_), 0xff));
    expect(cuda::attend_entries.run(&params_, workspace.data(), stream, &report), report);
    CHECK(cudaDeviceSynchronize() == cudaSuccess, "%s; %s", cudaGetErrorName(cudaGetLastError()), name().c_str());
    return outputs();
  }

  // Captured, then replayed after the outputs were spoiled.
  std::vector<std::vector<float>> replay() {
    DeviceArray<uint8_t> const workspace(std::vector<uint8_t>(cuda::attend_entries.workspace(&params_), 0xff));
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    couplet_report report{};
    CHECK(cudaStreamCreate(&stream) == cudaSuccess, "no stream");
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "no capture");
    expect(cuda::attend_entries.run(&params_, workspace.data(), stream, &report), report);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess, "capture: %s", cudaGetErrorName(cudaGetLastError()));
    CHECK(cudaGraphInstantiate(&replay, graph, 0) == cudaSuccess, "no graph");
    spoil_outputs();
    CHECK(cudaGraphLaunch(replay, stream) == cudaSuccess, "no launch");
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess, "replay: %s", cudaGetErrorName(cudaGetLastError()));
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    return outputs();
  }

 private:
  struct Free {
    void operator()(couplet_table* table) const { cuda::table_entries.destroy(table); }
    void operator()(couplet_rotary* rotary) const { cuda::rotary_entries.destroy(rotary); }
  };
  using TableOwner = std::unique_ptr<couplet_table, Free>;

  // From the CPU's table, which keeps the centroids as given.
  TableOwner make_table(const couplet_table* host, const couplet_table** place) {
    if (!host) return nullptr;
    couplet_table_params const params{host->rows, host->kv_heads, host->head_dim, host->codec, nullptr};
    couplet_table* table = nullptr;
    couplet_report report{};
    expect(cuda::table_entries.create(&params, &table, &report), report);
    *place = table;
    return TableOwner(table);
  }

  template <class T>
  T* copy(const T* values, size_t count) {
    if (count == 0) return nullptr;
    auto array = std::make_unique<DeviceArray<uint8_t>>(count * sizeof(T));
    auto const* const bytes = reinterpret_cast<const uint8_t*>(values);
    array->write(std::vector<uint8_t>(bytes, bytes + count * sizeof(T)));
    arrays_.push_back(std::move(array));
    return reinterpret_cast<T*>(arrays_.back()->data());
  }

  couplet_attend_sequence make_sequence(int32_t index) {
    couplet_attend_sequence sequence = host_.params().sequences[index];
    std::vector<uint8_t> const queries =
        elements_of(static_cast<const float*>(sequence.queries),
                    static_cast<size_t>(sequence.query_tokens * sequence.query_token_stride), params_.query_dtype);
    sequence.queries = copy(queries.data(), queries.size());
    outputs_.push_back(
        std::make_unique<DeviceArray<uint8_t>>(host_.outputs(static_cast<size_t>(index)).size() *
                                               static_cast<size_t>(cuda::element_bytes(params_.output_dtype))));
    sequence.outputs = outputs_.back()->data();

    auto const page_bytes =
        static_cast<size_t>(params_.value_page_offset + params_.kv_heads * params_.value_page_stride);
    std::vector<const uint8_t*> pages;
    if (sequence.coded_begin < sequence.coded_end)
      for (int32_t page = 0; page * params_.page_tokens < sequence.coded_end; ++page)
        pages.push_back(sequence.pages[page] ? copy(sequence.pages[page], page_bytes) : nullptr);
    sequence.pages = copy(pages.data(), pages.size());

    std::vector<couplet_dense_rows> runs(sequence.dense, sequence.dense + sequence.dense_count);
    for (couplet_dense_rows& run : runs) {
      run.keys = copy(run.keys, static_cast<size_t>(run.tokens * run.key_token_stride));
      run.values = copy(run.values, static_cast<size_t>(run.tokens * run.value_token_stride));
    }
    sequence.dense = copy(runs.data(), runs.size());
    return sequence;
  }

  std::vector<std::vector<float>> outputs() const {
    std::vector<std::vector<float>> all;
    for (const auto& output : outputs_) all.push_back(floats_of(output->read(), params_.output_dtype));
    return all;
  }

  void spoil_outputs() {  // a NaN in each type
    for (const auto& output : outputs_) output->write(std::vector<uint8_t>(output->size(), 0xff));
  }

  AttendCase& host_;
  couplet_attend_params params_;
  TableOwner key_table_, value_table_;
  std::unique_ptr<couplet_rotary, Free> rotary_;
  DeviceArray<couplet_attend_sequence> sequences_;
  std::vector<std::unique_ptr<DeviceArray<uint8_t>>> arrays_;
  std::vector<std::unique_ptr<DeviceArray<uint8_t>>> outputs_;
};

double worst[2] = {};  // error over allowance of the general body and of the others

void compare(AttendCase& host, const CaseShape& shape, const std::string& name,
             const std::vector<std::vector<float>>& oracle, const std::vector<std::vector<float>>& got, double factor) {
  for (size_t s = 0; s < oracle.size(); ++s)
    for (int32_t token = 0; token < shape.sequences[s].queries; ++token)
      for (int32_t head = 0; head < host.query_heads(); ++head) {
        bool const rounded = name.find("general") == std::string::npos || shape.sequences[s].queries != 1;
        double const allowed = (rounded ? 4e-3 : 2e-5) * factor;
        auto const at = static_cast<size_t>(token * host.output_token_stride() + head * host.output_head_stride());
        double difference = 0;
        double norm = 0;
        for (size_t c = 0; c < static_cast<size_t>(shape.head_dim); ++c) {
          double const e = oracle[s][at + c];
          difference += (got[s][at + c] - e) * (got[s][at + c] - e);
          norm += e * e;
        }
        double const error = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
        if (error / allowed > worst[rounded]) worst[rounded] = error / allowed;
        if (!CHECK(error <= allowed,
                   "%s: error %.2g of sequence %zu (%d + %d tokens), token %d, head %d; d %d, %d x %d heads",
                   name.c_str(), error, s, shape.sequences[s].before, shape.sequences[s].queries, token, head,
                   shape.head_dim, shape.kv_heads, shape.group_heads))
          return;
        for (int64_t gap = shape.head_dim; gap < host.output_head_stride(); ++gap)
          if (!CHECK(std::isnan(got[s][at + static_cast<size_t>(gap)]), "%s wrote between output rows", name.c_str()))
            return;
      }
}

void check_case(const CaseShape& shape, uint64_t seed, const char* body, double factor = 1) {
  AttendCase host(shape, seed);
  auto const oracle = host.run_reference();
  DeviceCase device(host);
  std::string const name = device.name();
  int shared = 0;
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (shared >= 227 << 10 && shape.sequences.size()) CHECK(name.ends_with(body), "%s is not %s", name.c_str(), body);
  auto const first = device.run();
  compare(host, shape, name, oracle, first, factor);
  auto const again = device.run();
  for (size_t s = 0; s < first.size(); ++s)
    CHECK(first[s].empty() || std::memcmp(first[s].data(), again[s].data(), first[s].size() * sizeof(float)) == 0,
          "%s: two runs differ", name.c_str());
}

// float16 and bfloat16 queries, rounded before the oracle sees them, and outputs, which are rounded once.
void check_dtypes(const CaseShape& shape, const char* body) {
  for (int32_t const dtype : {COUPLET_FLOAT16, COUPLET_BFLOAT16}) {
    AttendCase host(shape, 11);
    for (int32_t s = 0; s < host.params().sequence_count; ++s) {
      const couplet_attend_sequence& sequence = host.params().sequences[s];
      auto* const queries = static_cast<float*>(const_cast<void*>(sequence.queries));
      size_t const count = static_cast<size_t>(sequence.query_tokens * sequence.query_token_stride);
      std::vector<float> const rounded = floats_of(elements_of(queries, count, dtype), dtype);
      std::copy(rounded.begin(), rounded.end(), queries);
    }
    auto const oracle = host.run_reference();
    DeviceCase device(host, dtype);
    CHECK(device.name().ends_with(body), "%s is not %s", device.name().c_str(), body);
    double const rounding = dtype == COUPLET_FLOAT16 ? 0x1p-11 : 0x1p-8;
    bool const rounded = std::strcmp(body, "general") != 0;
    compare(host, shape, device.name(), oracle, device.run(), 1 + rounding / (rounded ? 4e-3 : 2e-5));
  }
}

// Two kv heads, all channels rotated.
CaseShape decode_shape(couplet_codec keys, couplet_codec values, int32_t head_dim, int32_t group_heads,
                       std::vector<SequenceShape> sequences) {
  return {.kv_heads = 2,
          .group_heads = group_heads,
          .head_dim = head_dim,
          .key_codec = keys,
          .value_codec = values,
          .rotary_kind = COUPLET_ROTARY_HALF,
          .rotary_dim = head_dim,
          .sequences = std::move(sequences)};
}

CaseShape llama(int32_t kv_heads, int32_t group_heads, std::vector<SequenceShape> sequences, int32_t channels = 8) {
  CaseShape shape = decode_shape({channels, 8}, {channels, 8}, 128, group_heads, std::move(sequences));
  shape.kv_heads = kv_heads;
  return shape;
}

void lookup_shapes_of(int32_t channels, bool levels, const char* body) {
  auto const shape_of = [&](int32_t kv_heads, int32_t group_heads, std::vector<SequenceShape> sequences) {
    CaseShape shape = llama(kv_heads, group_heads, std::move(sequences), channels);
    shape.value_levels = levels;
    return shape;
  };
  for (int32_t heads : {1, 2, 3, 4, 7, 12})
    check_case(shape_of(1, heads, {{.before = 700, .sinks = 4, .window = 32}}), 1, body);
  // Ragged ends, no codes at all, one token, codes without sinks or window, and an idle sequence beside longer ones.
  check_case(shape_of(2, 4,
                      {{.before = 1600, .sinks = 4, .window = 33},
                       {.before = 0},
                       {.before = 100, .uncoded = true},
                       {.before = 65, .queries = 0},
                       {.before = 520, .sinks = 70, .window = 1},
                       {.before = 1030, .window = 0, .coded_prefill = true}}),
             2, body);
  CaseShape shape =
      shape_of(2, 4, {{.before = 900, .sinks = 4, .window = 32}, {.before = 300, .sinks = 4, .window = 200}});
  shape.local_window = 600;
  check_case(shape, 3, body);
  shape.softcap = 5;
  shape.head_sinks = true;
  check_case(shape, 4, body);
  shape.tables = Tables::scaled;
  shape.query_scale = 3;
  check_case(shape, 5, body, 3);
  shape.rotary_kind = 0;
  check_case(shape, 6, body, 3);
  // A prompt and a step together.
  check_case(
      shape_of(1, 4,
               {{.before = 300, .sinks = 4, .window = 32}, {.before = 20, .queries = 9, .sinks = 4, .window = 8}}),
      7, body);
  // As many units in each: ranges begin with items.
  check_case(shape_of(2, 4, std::vector<SequenceShape>(5, {.before = 600, .sinks = 4, .window = 32})), 8, body);
}

void lookup_shapes() {
  lookup_shapes_of(4, false, "lookup");
  lookup_shapes_of(8, false, "lookup");
  lookup_shapes_of(8, true, "lookup by levels");
  CaseShape shape = llama(1, 4, {{.before = 300, .sinks = 4, .window = 32}});
  shape.value_levels = true;
  check_dtypes(shape, "lookup by levels");
}

// Which tables of values attend/lookup may keep as levels.
void level_tables() {
  constexpr couplet_codec codec{8, 8};
  constexpr int32_t head_dim = 128;
  auto const has_levels = [&](const std::vector<float>& centroids) {
    couplet_table_params const params{centroids.data(), 1, head_dim, codec, nullptr};
    couplet_table* table = nullptr;
    couplet_report report{};
    expect(cuda::table_entries.create(&params, &table, &report), report);
    bool const has = cuda::table_of(table)->levels && cuda::table_of(table)->level_scales;
    cuda::table_entries.destroy(table);
    return has;
  };
  std::vector<float> const drawn = Random(3).normals(256 * head_dim);
  CHECK(!has_levels(drawn), "levels of centroids that lie on none");
  std::vector<float> on_levels = drawn;
  put_on_levels(codec, on_levels);
  CHECK(has_levels(on_levels), "no levels");
  std::vector<float> saved = on_levels;
  for (float& channel : saved) channel = __half2float(__float2half_rn(channel));
  CHECK(has_levels(saved), "no levels after float16");
  for (float const shift : {1000.0f, -30000.0f}) {
    std::vector<float> shifted = drawn;
    for (float& channel : shifted) channel = channel * (shift > 0 ? 1 : 100) + shift;
    put_on_levels(codec, shifted);
    CHECK(has_levels(shifted), "no levels around %g", double{shift});
  }
  std::vector<float> constant = on_levels;
  for (size_t code = 0; code < 256; ++code) constant[code * 8 + 3] = 0.3f;
  CHECK(has_levels(constant), "no levels where a channel is constant");
  std::vector<float> moved = on_levels;
  moved[17] += (moved[17] > 0 ? -0.01f : 0.01f);
  CHECK(!has_levels(moved), "levels of a centroid between two");
}

CaseShape gathered(int32_t channels, int32_t head_dim, int32_t group_heads, std::vector<SequenceShape> sequences) {
  return decode_shape({channels, 8}, {channels, 8}, head_dim, group_heads, std::move(sequences));
}

void gather_shapes() {
  for (int32_t channels : {2, 4, 8})
    for (int32_t head_dim : {64, 128})
      for (int32_t heads : {1, 4, 7}) {
        if (channels >= 4 && head_dim == 128) continue;  // lookup's
        check_case(gathered(channels, head_dim, heads, {{.before = 700, .sinks = 4, .window = 32}}), 1, "gather");
      }
  // headDims that are rounded up; 8 and 16 heads; some channels that are rotated.
  for (auto const& [head_dim, channels] : {std::pair{32, 2}, {80, 4}, {80, 8}, {96, 8}, {112, 2}, {112, 4}}) {
    CaseShape shape = gathered(channels, head_dim, 2, {{.before = 200, .sinks = 4, .window = 32}});
    check_case(shape, 2, "gather");
    shape.rotary_dim = 16;
    shape.group_heads = 8;
    check_case(shape, 3, "gather");
  }
  for (int32_t channels : {4, 8})
    for (auto const& [rotary_dim, heads] : {std::pair{32, 16}, {96, 3}, {96, 7}}) {
      CaseShape shape = gathered(channels, 128, heads, {{.before = 200, .sinks = 4, .window = 32}});
      shape.rotary_dim = rotary_dim;
      check_case(shape, 4, "gather");
    }
  // Ragged ends, no codes at all, one token, codes without sinks or window, and an idle sequence beside longer ones.
  CaseShape shape = gathered(4, 112, 4,
                             {{.before = 1600, .sinks = 4, .window = 33},
                              {.before = 0},
                              {.before = 100, .uncoded = true},
                              {.before = 65, .queries = 0},
                              {.before = 520, .sinks = 70, .window = 1},
                              {.before = 1030, .window = 0, .coded_prefill = true}});
  check_case(shape, 5, "gather");
  shape.sequences = {{.before = 900, .sinks = 4, .window = 32},
                     {.before = 300, .sinks = 4, .window = 200},
                     {.before = 20, .queries = 9, .sinks = 4, .window = 8}};
  for (int32_t channels : {2, 4}) {
    shape.key_codec = shape.value_codec = {channels, 8};
    shape.local_window = 600;
    check_case(shape, 6, "gather");
    shape.softcap = 5;
    shape.head_sinks = true;
    check_case(shape, 7, "gather");
    shape.tables = Tables::scaled;
    shape.query_scale = 3;
    check_case(shape, 8, "gather", 3);
  }
  check_dtypes(gathered(4, 64, 4, {{.before = 300, .sinks = 4, .window = 32}}), "gather");
}

void staged_shapes() {
  couplet_codec const wide{8, 10};
  for (int32_t head_dim : {64, 80, 96, 128, 256})
    check_case(decode_shape(wide, wide, head_dim, 4, {{.before = 300, .sinks = 4, .window = 32}}), 1, "staged");
  // headDim 256, keys and values of different codecs, interleaved pairs, some channels, or none, that are rotated.
  for (int32_t channels : {2, 4, 8}) {
    couplet_codec const narrow{channels, 8};
    CaseShape shape = decode_shape(narrow, narrow, 256, 3, {{.before = 200, .sinks = 4, .window = 32}});
    check_case(shape, 2, "staged");
    shape.head_dim = 112;
    shape.rotary_kind = COUPLET_ROTARY_INTERLEAVED;
    for (int32_t rotary_dim : {112, 56, 16}) {
      shape.rotary_dim = rotary_dim;
      check_case(shape, 3, "staged");
    }
    check_case(decode_shape(narrow, wide, 96, 4, {{.before = 200, .sinks = 4, .window = 32}}), 4, "staged");
    shape = decode_shape(wide, narrow, 64, 7, {{.before = 200, .sinks = 4, .window = 32}});
    shape.rotary_kind = channels == 2 ? COUPLET_ROTARY_INTERLEAVED : channels == 4 ? COUPLET_ROTARY_HALF : 0;
    shape.rotary_dim = 32;
    check_case(shape, 5, "staged");
  }
  // Several chapters and segments, ragged ends, no codes at all, a prompt between; 12 heads are two blocks.
  CaseShape shape = decode_shape(wide, wide, 64, 12,
                                 {{.before = 2300, .sinks = 4, .window = 33},
                                  {.before = 0},
                                  {.before = 100, .uncoded = true},
                                  {.before = 65, .queries = 0},
                                  {.before = 520, .sinks = 70, .window = 1},
                                  {.before = 20, .queries = 9, .sinks = 4, .window = 8},
                                  {.before = 1030, .window = 0, .coded_prefill = true}});
  check_case(shape, 6, "staged");
  shape.key_codec = {4, 8};
  shape.local_window = 600;
  shape.softcap = 5;
  shape.head_sinks = true;
  check_case(shape, 7, "staged");
  shape.tables = Tables::scaled;
  shape.query_scale = 3;
  check_case(shape, 8, "staged", 3);
  shape = decode_shape(wide, wide, 64, 8, {{.before = 9400, .sinks = 4, .window = 32}});
  shape.kv_heads = 1;
  check_case(shape, 9, "staged");
  check_dtypes(decode_shape(wide, wide, 128, 4, {{.before = 300, .sinks = 4, .window = 32}}), "staged");
}

void general_shapes() {
  check_case({.head_dim = 32, .sequences = {}}, 1, "general");
  for (couplet_codec codec : {couplet_codec{2, 7}, couplet_codec{4, 9}, couplet_codec{4, 10}, couplet_codec{16, 12},
                              couplet_codec{1, 1}, couplet_codec{8, 5}})
    check_case({.kv_heads = 2,
                .group_heads = 4,
                .head_dim = 64,
                .key_codec = codec,
                .value_codec = codec,
                .rotary_kind = COUPLET_ROTARY_HALF,
                .rotary_dim = 64,
                .sequences = {{.before = 300, .sinks = 4, .window = 32}}},
               2, "general");
  check_case({.group_heads = 20, .head_dim = 40, .sequences = {{.before = 90, .sinks = 4, .window = 3}}}, 3, "general");
  check_case({.kv_heads = 2,
              .group_heads = 3,
              .head_dim = 40,
              .page_tokens = 24,
              .key_codec = {4, 8},
              .value_codec = {8, 8},
              .rotary_kind = COUPLET_ROTARY_HALF,
              .rotary_dim = 40,
              .sequences = {{.before = 70, .queries = 65, .sinks = 3, .window = 32, .coded_prefill = true}}},
             4, "general");
}

// Queries, keys and values that float16 does not hold, each in a prompt of its own beside one that is as it was.
void beyond_float16() {
  struct Scales {
    float queries, keys, values;
  };
  for (Scales const scales :
       {Scales{1, 1, 1e5f}, {1, 1, 1e-8f}, {1e-4f, 1e4f, 1}, {1e4f, 1e-4f, 1}, {1e-6f, 1e6f, 1e30f}}) {
    CaseShape shape = llama(2, 4,
                            {{.before = 0, .queries = 40, .uncoded = true},
                             {.before = 0, .queries = 150, .uncoded = true},
                             {.before = 100, .queries = 9, .sinks = 4, .window = 32}});
    AttendCase host(shape, 31);
    const couplet_attend_sequence& sequence = host.sequence(1);
    auto const scale = [](const void* values, int64_t count, float factor) {
      auto* const all = static_cast<float*>(const_cast<void*>(values));
      for (int64_t i = 0; i < count; ++i) all[i] *= factor;
    };
    scale(sequence.queries, sequence.query_tokens * sequence.query_token_stride, scales.queries);
    for (int32_t run = 0; run < sequence.dense_count; ++run) {
      const couplet_dense_rows& rows = sequence.dense[run];
      scale(rows.keys, rows.tokens * rows.key_token_stride, scales.keys);
      scale(rows.values, rows.tokens * rows.value_token_stride, scales.values);
    }
    auto const oracle = host.run_reference();
    DeviceCase device(host);
    compare(host, shape, device.name(), oracle, device.run(), 1);
  }
}

// More rows than a block has, rows of several blocks, wide heads, more query heads than rows of a warp; sequences of one query between.
void prefill_shapes() {
  check_case(llama(2, 4,
                   {{.before = 100, .queries = 50, .sinks = 4, .window = 32},
                    {.before = 333, .sinks = 4, .window = 32},
                    {.before = 0, .queries = 70, .sinks = 4, .window = 8, .coded_prefill = true}}),
             21, "lookup");
  for (int32_t const head_dim : {96, 256}) {
    CaseShape shape{.group_heads = 3,
                    .head_dim = head_dim,
                    .key_codec = {4, 8},
                    .value_codec = {8, 10},
                    .rotary_kind = COUPLET_ROTARY_INTERLEAVED,
                    .rotary_dim = head_dim / 2,
                    .local_window = 60,
                    .softcap = 20,
                    .head_sinks = true,
                    .sequences = {{.before = 90, .queries = 40, .sinks = 4, .window = 16}}};
    check_case(shape, 22, "staged");
  }
  check_case({.group_heads = 20, .head_dim = 32, .sequences = {{.before = 40, .queries = 9, .window = 4}}}, 23,
             "gather");
  // Each codec of either side, both kinds of rotary embedding over some channels, and rounded-up widths.
  int32_t head_dim = 64;
  for (couplet_codec const keys : {couplet_codec{2, 8}, {4, 8}, {8, 8}, {8, 10}})
    for (couplet_codec const values : {couplet_codec{8, 10}, {2, 8}, {8, 8}, {4, 8}}) {
      CaseShape shape =
          decode_shape(keys, values, head_dim, 3, {{.before = 150, .queries = 45, .sinks = 4, .window = 16}});
      if (head_dim == 96) shape.rotary_kind = COUPLET_ROTARY_INTERLEAVED, shape.rotary_dim = 36;
      if (head_dim == 80) shape.rotary_dim = 48;
      if (head_dim == 112) shape.rotary_kind = 0;
      check_case(shape, 24, "");
      head_dim = head_dim == 128 ? 64 : head_dim + 16;
    }
  // A first prompt: more tokens than angles are kept for.
  check_case(llama(1, 2, {{.before = 0, .queries = 700, .uncoded = true}}), 25, "general");
  beyond_float16();
}

void random_shapes() {
  Random random(7);
  for (int i = 0; i < 24; ++i) {
    int32_t const head_dim = 32 + 8 * static_cast<int32_t>(random.below(i % 8 ? 10 : 29));
    check_case(random_shape(random, head_dim, 300, 20), 1000 + static_cast<uint64_t>(i), "");  // general, or staged
  }
}

void graphs() {
  AttendCase host(llama(2, 2, {{.before = 600, .sinks = 4, .window = 32}, {.before = 10, .queries = 3}}), 8);
  DeviceCase device(host);
  auto const plain = device.run();
  auto const replayed = device.replay();
  for (size_t s = 0; s < plain.size(); ++s)
    CHECK(std::memcmp(plain[s].data(), replayed[s].data(), plain[s].size() * sizeof(float)) == 0,
          "a graph's replay differs from a run");
}

void refusals() {
  AttendCase host(llama(2, 2, {{.before = 200, .sinks = 4, .window = 32}}), 9);
  DeviceCase const device(host);
  auto const refuses = [&](const char* word, auto&& change) {
    couplet_attend_params params = device.params();
    change(params);
    couplet_report report{};
    CHECK(cuda::attend_entries.check(&params, &report) == COUPLET_INVALID_ARGUMENT && std::strstr(report.detail, word),
          "%s: \"%s\"", word, report.detail);
  };
  refuses("headDim", [](couplet_attend_params& p) { p.head_dim = 60; });
  refuses("headDim", [](couplet_attend_params& p) { p.head_dim = 64; });  // of the rotary embedding
  refuses("queryHeads", [](couplet_attend_params& p) { p.query_heads = 5; });
  refuses("kvHeads", [](couplet_attend_params& p) { p.kv_heads = 0; });
  refuses("pageTokens", [](couplet_attend_params& p) { p.page_tokens = 12; });
  refuses("scale", [](couplet_attend_params& p) { p.scale = NAN; });
  refuses("softcap", [](couplet_attend_params& p) { p.softcap = -1; });
  refuses("localWindow", [](couplet_attend_params& p) { p.local_window = -1; });
  refuses("keyTable", [](couplet_attend_params& p) { p.key_table = nullptr; });
  refuses("valueTable", [](couplet_attend_params& p) { p.value_codec = {8, 10}; });
  refuses("keyPageStride", [](couplet_attend_params& p) { p.key_page_stride = 8; });
}

}  // namespace

int main(int count, char** arguments) {
  // One part alone, for tools that slow a program down a hundredfold.
  std::string const only = count > 1 ? arguments[1] : "";
  auto const part = [&](const char* name, void (*test)()) {
    if (only.empty() || only == name) test();
  };
  part("general", general_shapes);
  part("prefill", prefill_shapes);
  part("random", random_shapes);
  part("lookup", lookup_shapes);
  part("tables", level_tables);
  part("dtypes", [] {
    check_dtypes(llama(2, 4, {{.before = 700, .sinks = 4, .window = 32}}), "lookup");
    check_dtypes({.head_dim = 40, .sequences = {{.before = 70, .queries = 3, .sinks = 4, .window = 3}}}, "general");
  });
  part("gather", gather_shapes);
  part("staged", staged_shapes);
  part("graphs", graphs);
  part("refusals", refusals);
  std::printf("largest error over what is allowed: general %.3f, others %.3f\n", worst[0], worst[1]);
  return couplet::test::finish();
}
