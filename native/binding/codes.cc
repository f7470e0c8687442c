// encode and decode: options objects to their parameters; tables prepared for them. lib/native/operations.ts types what this exports.
#include "../call/codes.h"

#include "device.h"
#include "exports.h"
#include "handles.h"

namespace couplet::binding {
namespace {

// ---- tables -------------------------------------------------------------------------------------------------------

struct TablesHandle {
  static constexpr napi_type_tag tag{0x31c9f05a7be8462d, 0xd84e2690c1fb735a};
  static constexpr const char* noun = "PreparedTables";
  std::shared_ptr<PreparedTables> tables;  // NULL after dispose
};

// `groupChannels`, `codeBits`, `kvHeads`, `headDim`, and the centroids themselves.
couplet_table_params read_shape(const Options& options) {
  couplet_table_params params = {};
  params.codec = read_codec(options);
  params.kv_heads = options.integer("kvHeads", 1);
  params.head_dim = options.integer("headDim", COUPLET_MIN_HEAD_DIM, COUPLET_MAX_HEAD_DIM);
  if (!couplet_codec_valid(params.codec, params.head_dim))
    throw range_error(options.env(), "Expected a divisor of " + std::to_string(params.head_dim) +
                                         " (`headDim`) for `groupChannels` but received " +
                                         std::to_string(params.codec.group_channels));
  return params;
}

size_t floats_of(const couplet_table_params& params) {
  return product({params.kv_heads, params.head_dim, couplet_codec_centroids(params.codec)});
}

size_t metric_floats_of(const couplet_table_params& params) {
  return product({params.kv_heads, params.head_dim, params.codec.group_channels});
}

class PrepareWorker : public DeviceWorker {
 public:
  explicit PrepareWorker(const Options& options) : DeviceWorker(options), params_(read_shape(options)) {
    params_.centroids = pin(options.array<float>("tables", floats_of(params_)));
    if (options.has("metric")) params_.metric = pin(options.array<float>("metric", metric_floats_of(params_)));
  }

 protected:
  couplet_status run(const Device& device, couplet_report* report) override {
    return tables_->create(device, params_, report);
  }
  Napi::Value result(Napi::Env env) override {
    return make_handle(env, std::make_unique<TablesHandle>(std::move(tables_)));
  }

 private:
  couplet_table_params params_;
  std::shared_ptr<PreparedTables> tables_ = std::make_shared<PreparedTables>();
};

std::shared_ptr<PreparedTables> read_tables(Napi::Value value, const char* name) {
  std::shared_ptr<PreparedTables> tables = read_handle<TablesHandle>(value, name).tables;
  if (!tables) throw disposed_error(value.Env(), "PreparedTables");
  return tables;
}

Napi::Value describe_tables(const Napi::CallbackInfo& info) {
  auto const tables = read_tables(info[0], "tables");
  Napi::Object const result = Napi::Object::New(info.Env());
  result.Set("bytes", Napi::Number::New(info.Env(), static_cast<double>(tables->bytes())));
  result.Set("device", Napi::String::New(info.Env(), tables->device().backend->name));
  result.Set("deviceIndex", Napi::Number::New(info.Env(), tables->device().index));
  return result;
}

Napi::Value dispose_tables(const Napi::CallbackInfo& info) {
  read_handle<TablesHandle>(info[0], "tables").tables.reset();
  return info.Env().Undefined();
}

// ---- encode and decode --------------------------------------------------------------------------------------------

template <class Params>
class CodesWorker : public DeviceWorker {
 public:
  explicit CodesWorker(const Options& options) : DeviceWorker(options), shape_(read_shape(options)) {
    only_enqueue();
    Params& p = call_.params;
    p.codec = shape_.codec;
    p.kv_heads = shape_.kv_heads;
    p.head_dim = shape_.head_dim;
    p.tokens = options.integer("tokens", 0);
    p.page_tokens = options.integer_or("pageTokens", COUPLET_PAGE_TOKENS, 8, 1 << 20);
    p.first_token = options.integer_or<int64_t>("firstToken", 0, 0, int64_t{1} << 40);
    p.token_stride = options.integer<int64_t>("tokenStride", 0, most_stride);
    p.head_stride = options.integer<int64_t>("headStride", 0, most_stride);
    p.threads = read_threads(options);
    p.dtype = read_dtype(options, "dtype");
    if (p.page_tokens % 8 != 0)
      throw range_error(env(),
                        "Expected a multiple of 8 for `pageTokens` but received " + std::to_string(p.page_tokens));
    read_tables_of(options);

    // float16 and bfloat16 come as the uint16 of their bits.
    size_t const elements = extent({{p.tokens, p.token_stride}, {p.kv_heads, p.head_stride}, {p.head_dim, 1}});
    if (p.dtype == COUPLET_FLOAT32)
      set_rows(place<float>(options, "rows", elements));
    else
      set_rows(place<uint16_t>(options, "rows", elements));

    p.page_stride = couplet_page_bytes(p.codec, p.head_dim, p.page_tokens);
    int64_t const page_count = p.tokens == 0 ? 0 : (p.first_token + p.tokens - 1) / p.page_tokens + 1;
    Place<uint8_t> const codes = place<uint8_t>(options, "codes", product({page_count, p.kv_heads, p.page_stride}));
    call_.codes = codes.data;
    call_.codes_on_host = codes.on_host;
    read_control(options);
    call_.control = control();
  }

 protected:
  couplet_status run(const Device& device, couplet_report* report) override {
    PreparedTables own;
    PreparedTables* tables = prepared_.get();
    if (!tables) {
      if (couplet_status const status = own.create(device, shape_, report)) return status;
      tables = &own;
    }
    call_.params.table = tables->table();
    return has_stream() ? enqueue_codes(*tables, call_, stream(), report) : run_codes(device, call_, report);
  }

  const Params& params() const { return call_.params; }

 private:
  void read_tables_of(const Options& options) {
    Napi::Value const value = options.get("tables");
    if (!is_memory(value)) {
      if (has_stream()) throw_expected(env(), "PreparedTables, as the call has a `stream`,", "tables", value);
      shape_.centroids = pin(options.array<float>("tables", floats_of(shape_)));
      if (options.has("metric")) shape_.metric = pin(options.array<float>("metric", metric_floats_of(shape_)));
      return;
    }
    prepared_ = read_tables(value, "tables");
    expect_device("tables", prepared_->device());
  }

  template <class T>
  void set_rows(Place<T> rows) {
    call_.params.rows = rows.data;
    call_.rows_on_host = rows.on_host;
  }

  couplet_table_params shape_;
  std::shared_ptr<PreparedTables> prepared_;
  CodesCall<Params> call_;
};

using EncodeWorker = CodesWorker<couplet_encode_params>;

class DecodeWorker : public CodesWorker<couplet_decode_params> {
 public:
  explicit DecodeWorker(const Options& options) : CodesWorker(options) {
    const couplet_decode_params& p = params();
    if (rows_overlap(p))
      throw range_error(env(), "Expected strides under which no two rows of " + std::to_string(p.head_dim) +
                                   " channels overlap but received " + std::to_string(p.token_stride) +
                                   " for `tokenStride` and " + std::to_string(p.head_stride) + " for `headStride`");
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

void export_codes(Napi::Env env, Napi::Object exports) {
  exports.Set("codesBytes", Napi::Function::New(env, codes_bytes, "codesBytes"));
  exports.Set("encode", Napi::Function::New(env, promise_form<EncodeWorker>, "encode"));
  exports.Set("encodeSync", Napi::Function::New(env, sync_form<EncodeWorker>, "encodeSync"));
  exports.Set("decode", Napi::Function::New(env, promise_form<DecodeWorker>, "decode"));
  exports.Set("decodeSync", Napi::Function::New(env, sync_form<DecodeWorker>, "decodeSync"));
  exports.Set("prepareTables", Napi::Function::New(env, promise_form<PrepareWorker>, "prepareTables"));
  exports.Set("prepareTablesSync", Napi::Function::New(env, sync_form<PrepareWorker>, "prepareTablesSync"));
  exports.Set("describeTables", Napi::Function::New(env, describe_tables, "describeTables"));
  exports.Set("disposeTables", Napi::Function::New(env, dispose_tables, "disposeTables"));
}

}  // namespace couplet::binding
