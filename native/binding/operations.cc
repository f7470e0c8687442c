// kmeans, encode, decode: options objects to parameter structs. lib/native/operations.ts types what this exports.
#include <algorithm>
#include <memory>
#include <vector>

#include "../common/report.h"
#include "../dispatch/dispatch.h"
#include "error.h"
#include "exports.h"
#include "shared_options.h"
#include "values.h"
#include "worker.h"

namespace couplet::binding {
namespace {

constexpr int64_t most_stride = int64_t{1} << 48;  // of elements; the product with a count is checked where it is used

// Scratch memory of one run; NULL when it needs none.
class Workspace {
 public:
  Workspace(const couplet_backend* backend, size_t bytes)
      : backend_(backend), bytes_(bytes), memory_(bytes ? backend->memory.allocate(bytes) : nullptr) {}
  ~Workspace() {
    if (memory_) backend_->memory.release(memory_, bytes_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* get() const { return memory_; }
  bool failed() const { return bytes_ && !memory_; }

 private:
  const couplet_backend* backend_;
  size_t bytes_;
  void* memory_;
};

template <class Entries, class Params>
couplet_status run_entries(const couplet_backend* backend, const Entries& entries, const Params& params,
                           couplet_report* report) {
  if (couplet_status const status = entries.check(&params, report)) return status;
  size_t const bytes = entries.workspace(&params);
  Workspace const workspace(backend, bytes);
  if (workspace.failed())
    return fail(report, COUPLET_OUT_OF_MEMORY, {}, "There is no memory for a workspace of %zu bytes", bytes);
  return entries.run(&params, workspace.get(), nullptr, report);
}

// ---- kmeans ----

class KmeansWorker : public Worker {
 public:
  explicit KmeansWorker(const Options& options) : Worker(options.env()), backend_(read_backend(options)) {
    couplet_kmeans_params& p = params_;
    p.problems = options.integer("problems", 1);
    p.point_count = options.integer("pointCount", 1);
    p.channels = options.integer("channels", 1);
    p.centroid_count = options.integer("centroidCount", 1);
    p.problem_stride = options.integer<int64_t>("problemStride", 0, most_stride);
    p.point_stride = options.integer<int64_t>("pointStride", 0, most_stride);
    p.weight_problem_stride = options.integer_or<int64_t>("weightProblemStride", 0, 0, most_stride);
    p.weight_point_stride = options.integer_or<int64_t>("weightPointStride", 1, 0, most_stride);
    p.weight_sharing = options.integer_or("weightSharing", 1, 1);
    p.max_iterations = options.integer("maxIterations", 0);
    p.tolerance = options.number("tolerance", 0, 1);
    p.seed = options.seed_or("seed", 0);
    p.threads = read_threads(options);

    int64_t const weight_rows = (int64_t{p.problems} + p.weight_sharing - 1) / p.weight_sharing;
    p.points = pin(options.array<float>(
        "points", extent({{p.problems, p.problem_stride}, {p.point_count, p.point_stride}, {p.channels, 1}})));
    p.weights = pin(options.array_or_none<float>(
        "weights", extent({{weight_rows, p.weight_problem_stride}, {p.point_count, p.weight_point_stride}})));
    p.centroids = pin(options.array<float>("centroids", product({p.problems, p.centroid_count, p.channels})));
    p.inertia = pin(options.array<double>("inertia", product({p.problems})));
    p.iterations = pin(options.array<int32_t>("iterations", product({p.problems})));
    p.assignments = pin(options.array_or_none<int32_t>("assignments", product({p.problems, p.point_count})));
    read_control(options);
    p.control = control();
  }

 protected:
  couplet_status execute(couplet_report* report) override {
    return run_entries(backend_, backend_->kmeans, params_, report);
  }
  PlaceNames places() const override { return {.kv_head = "problem", .token = "point"}; }

 private:
  const couplet_backend* backend_;
  couplet_kmeans_params params_{};
};

// ---- encode and decode ----

using TableHandle = std::unique_ptr<couplet_table, void (*)(couplet_table*)>;

// What both read; Params is couplet_encode_params or couplet_decode_params.
template <class Params, class PageByte>
class CodesWorker : public Worker {
 protected:
  explicit CodesWorker(const Options& options) : Worker(options.env()), backend_(read_backend(options)) {
    Params& p = params_;
    p.codec = read_codec(options);
    p.tokens = options.integer("tokens", 0);
    p.kv_heads = options.integer("kvHeads", 1);
    p.head_dim = options.integer("headDim", COUPLET_MIN_HEAD_DIM, COUPLET_MAX_HEAD_DIM);
    p.page_tokens = options.integer_or("pageTokens", COUPLET_PAGE_TOKENS, 8, 1 << 20);
    p.first_token = options.integer_or<int64_t>("firstToken", 0, 0, int64_t{1} << 40);
    p.token_stride = options.integer<int64_t>("tokenStride", 0, most_stride);
    p.head_stride = options.integer<int64_t>("headStride", 0, most_stride);
    p.threads = read_threads(options);
    if (!couplet_codec_valid(p.codec, p.head_dim))
      throw range_error(env(), "Expected a divisor of " + std::to_string(p.head_dim) +
                                   " (`headDim`) for `groupChannels` but received " +
                                   std::to_string(p.codec.group_channels));
    if (p.page_tokens % 8 != 0)
      throw range_error(env(),
                        "Expected a multiple of 8 for `pageTokens` but received " + std::to_string(p.page_tokens));

    table_params_ = {.centroids = nullptr, .kv_heads = p.kv_heads, .head_dim = p.head_dim, .codec = p.codec};
    table_params_.centroids =
        pin(options.array<float>("tables", product({p.kv_heads, p.head_dim, couplet_codec_centroids(p.codec)})));
    // Which of the two: the facade hands float16 over as the uint16 of its bits.
    size_t const elements = extent({{p.tokens, p.token_stride}, {p.kv_heads, p.head_stride}, {p.head_dim, 1}});
    bool const half = options.get("rows").IsTypedArray() &&
                      options.get("rows").As<Napi::TypedArray>().TypedArrayType() == napi_uint16_array;
    p.dtype = half ? COUPLET_FLOAT16 : COUPLET_FLOAT32;
    p.rows = half ? static_cast<void*>(pin(options.array<uint16_t>("rows", elements)))
                  : pin(options.array<float>("rows", elements));

    p.page_stride = couplet_page_bytes(p.codec, p.head_dim, p.page_tokens);
    int64_t const page_count = p.tokens == 0 ? 0 : (p.first_token + p.tokens - 1) / p.page_tokens + 1;
    View<uint8_t> const codes = options.array<uint8_t>("codes", product({page_count, p.kv_heads, p.page_stride}));
    uint8_t* const first = pin(codes);
    pages_.resize(static_cast<size_t>(page_count));
    for (size_t page = 0; page < pages_.size(); ++page)
      pages_[page] = first + static_cast<int64_t>(page) * p.kv_heads * p.page_stride;
    p.pages = pages_.data();
    read_control(options);
  }

  // In slices, each a few milliseconds of work, so that cancel is seen in time.
  template <class Entries>
  couplet_status run_slices(const Entries& entries, int64_t slice_tokens, couplet_report* report) {
    couplet_table* raw = nullptr;
    if (couplet_status const status = backend_->table.create(&table_params_, &raw, report)) return status;
    TableHandle const table(raw, backend_->table.destroy);
    Params slice = params_;
    slice.table = table.get();
    int64_t const element_bytes = params_.dtype == COUPLET_FLOAT16 ? 2 : 4;
    for (int64_t done = 0; done < params_.tokens || done == 0; done += slice.tokens) {
      if (cancelled()) return fail(report, COUPLET_CANCELLED, {}, "The operation was aborted");
      slice.first_token = params_.first_token + done;
      slice.tokens = static_cast<int32_t>(std::min(slice_tokens, params_.tokens - done));
      slice.rows =
          const_cast<char*>(static_cast<const char*>(params_.rows)) + done * params_.token_stride * element_bytes;
      if (couplet_status const status = run_entries(backend_, entries, slice, report))
        return in_call(status, done, report);
      if (slice.tokens == 0) break;
    }
    return COUPLET_OK;
  }

  const Params& params() const { return params_; }
  const couplet_backend* backend() const { return backend_; }

 private:
  // A slice counts tokens from its own start; the caller knows only those of the whole call.
  static couplet_status in_call(couplet_status status, int64_t first, couplet_report* report) {
    if (status != COUPLET_NOT_FINITE || first == 0 || report->token < 0) return status;
    return fail(
        report, status, {.kv_head = report->kv_head, .token = report->token + first, .channel = report->channel},
        "Expected finite numbers for `rows` but received a NaN or an infinity at token %lld, kv head %d, channel %d",
        static_cast<long long>(report->token + first), report->kv_head, report->channel);
  }

  const couplet_backend* backend_;
  couplet_table_params table_params_{};
  std::vector<PageByte*> pages_;
  Params params_{};
};

class EncodeWorker : public CodesWorker<couplet_encode_params, uint8_t> {
 public:
  explicit EncodeWorker(const Options& options) : CodesWorker(options) {}

 protected:
  couplet_status execute(couplet_report* report) override {
    // Distances are 30 pairs of channels a nanosecond at best and 1 at worst: slices of 2 to 70 ms on one thread.
    const couplet_encode_params& p = params();
    int64_t const pairs_of_a_token = int64_t{p.kv_heads} * p.head_dim * couplet_codec_centroids(p.codec);
    return run_slices(backend()->encode, round_to_slots((int64_t{1} << 26) / pairs_of_a_token), report);
  }

 private:
  static int64_t round_to_slots(int64_t tokens) {
    return std::max<int64_t>(tokens / COUPLET_PAGE_TOKENS * COUPLET_PAGE_TOKENS, 8);
  }
};

class DecodeWorker : public CodesWorker<couplet_decode_params, const uint8_t> {
 public:
  explicit DecodeWorker(const Options& options) : CodesWorker(options) {
    const couplet_decode_params& p = params();
    if (rows_overlap(p))
      throw range_error(env(), "Expected strides under which no two rows of " + std::to_string(p.head_dim) +
                                   " channels overlap but received " + std::to_string(p.token_stride) +
                                   " for `tokenStride` and " + std::to_string(p.head_stride) + " for `headStride`");
  }

 protected:
  couplet_status execute(couplet_report* report) override {
    const couplet_decode_params& p = params();
    int64_t const channels_of_a_token = int64_t{p.kv_heads} * p.head_dim;  // about 1 ns each at worst
    return run_slices(backend()->decode, std::max<int64_t>((int64_t{1} << 24) / channels_of_a_token, 1), report);
  }

 private:
  static bool rows_overlap(const couplet_decode_params& p) {
    int64_t const tokens = p.tokens, heads = p.kv_heads;
    bool const tokens_outside = p.token_stride >= p.head_stride;
    int64_t const inner = tokens_outside ? heads : tokens,
                  inner_stride = tokens_outside ? p.head_stride : p.token_stride;
    int64_t const outer = tokens_outside ? tokens : heads,
                  outer_stride = tokens_outside ? p.token_stride : p.head_stride;
    if (tokens == 0) return false;
    if (inner > 1 && inner_stride < p.head_dim) return true;
    return outer > 1 && outer_stride < (inner - 1) * inner_stride + p.head_dim;
  }
};

// ---- exports ----

template <class Call>
Napi::Value promise_form(const Napi::CallbackInfo& info) {
  return run_async(info.Env(), std::make_unique<Call>(Options(info[0])));
}

template <class Call>
Napi::Value sync_form(const Napi::CallbackInfo& info) {
  return run_sync(info.Env(), std::make_unique<Call>(Options(info[0])));
}

Napi::Value capabilities(const Napi::CallbackInfo& info) {
  Napi::Env const env = info.Env();
  Napi::Object backends = Napi::Object::New(env);
  for (const char* name : backend_names()) {
    couplet_report report{};
    const couplet_backend* const backend = find_backend(name, &report);
    Napi::Object entry = Napi::Object::New(env);
    entry.Set("available", Napi::Boolean::New(env, backend != nullptr));
    entry.Set(backend ? "variant" : "reason", Napi::String::New(env, backend ? backend->variant() : report.detail));
    backends.Set(name, entry);
  }
  Napi::Object result = Napi::Object::New(env);
  result.Set("version", Napi::String::New(env, COUPLET_VERSION));
  result.Set("abi", Napi::Number::New(env, COUPLET_ABI_VERSION));
  result.Set("layout", Napi::Number::New(env, COUPLET_LAYOUT_VERSION));
  result.Set("isa", Napi::String::New(env, find_backend("cpu", nullptr)->variant()));
  result.Set("cores", Napi::Number::New(env, core_count()));
  result.Set("backends", backends);
  return result;
}

// Bytes that codes of (groupChannels, codeBits, headDim, kvHeads, tokens, pageTokens) take.
Napi::Value codes_bytes(const Napi::CallbackInfo& info) {
  Options const options(info[0]);
  couplet_codec const codec = read_codec(options);
  int32_t const head_dim = options.integer("headDim", COUPLET_MIN_HEAD_DIM, COUPLET_MAX_HEAD_DIM);
  int32_t const page_tokens = options.integer_or("pageTokens", COUPLET_PAGE_TOKENS, 8, 1 << 20);
  int64_t const tokens = options.integer<int64_t>("tokens", 0, int64_t{1} << 41);
  int64_t const pages = (tokens + page_tokens - 1) / page_tokens;
  size_t const bytes =
      product({pages, options.integer("kvHeads", 1), couplet_page_bytes(codec, head_dim, page_tokens)});
  return Napi::Number::New(info.Env(), static_cast<double>(bytes));
}

}  // namespace

void export_operations(Napi::Env env, Napi::Object exports) {
  exports.Set("version", Napi::String::New(env, COUPLET_VERSION));
  exports.Set("capabilities", Napi::Function::New(env, capabilities, "capabilities"));
  exports.Set("codesBytes", Napi::Function::New(env, codes_bytes, "codesBytes"));
  exports.Set("kmeans", Napi::Function::New(env, promise_form<KmeansWorker>, "kmeans"));
  exports.Set("kmeansSync", Napi::Function::New(env, sync_form<KmeansWorker>, "kmeansSync"));
  exports.Set("encode", Napi::Function::New(env, promise_form<EncodeWorker>, "encode"));
  exports.Set("encodeSync", Napi::Function::New(env, sync_form<EncodeWorker>, "encodeSync"));
  exports.Set("decode", Napi::Function::New(env, promise_form<DecodeWorker>, "decode"));
  exports.Set("decodeSync", Napi::Function::New(env, sync_form<DecodeWorker>, "decodeSync"));
}

}  // namespace couplet::binding
