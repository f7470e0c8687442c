// Codebooks, caches, sequences and steps as handles. lib/native/cache.ts types what this exports.
#include "cache.h"

#include <algorithm>
#include <functional>

#include "device.h"
#include "error.h"
#include "exports.h"
#include "handles.h"
#include "shared_options.h"
#include "values.h"
#include "worker.h"

namespace couplet::binding {

// ---- layer options and owners -------------------------------------------------------------------------------------

LayerOptions::LayerOptions(Device device, const CacheConfig& config, const Napi::Object& object) : device_(device) {
  Options const options(object);
  try {
    Napi::Array const rotaries = options.list("rotaries");
    for (uint32_t i = 0; i < rotaries.Length(); ++i) add_rotary(Options(rotaries.Get(i), "rotary"), config.head_dim);
    Napi::Array const layers = options.list("layers");
    if (layers.Length() != static_cast<uint32_t>(config.layers)) {
      throw_expected(object.Env(), std::to_string(config.layers) + " entries", "layers", options.get("layers"));
    }
    for (uint32_t i = 0; i < layers.Length(); ++i) {
      Options const given(layers.Get(i), "layerOptions");
      float const most = std::numeric_limits<float>::max();
      AttendOptions& layer = layers_.emplace_back();
      layer.scale = static_cast<float>(given.number_or("scale", 0, -most, most));
      layer.softcap = static_cast<float>(given.number_or("softcap", 0, 0, most));
      layer.local_window = given.integer_or("localWindow", 0, 0);
      auto const rotary_index = [&](const char* name) {
        return static_cast<size_t>(given.integer(name, 0, static_cast<int32_t>(rotaries_.size()) - 1));
      };
      if (given.has("rotary")) {
        const Rotary& rotary = rotaries_[rotary_index("rotary")];
        layer.rotary = rotary.angles;
        layer.positions = rotary.positions;
      }
      if (given.has("orderedRotary")) layer.ordered_rotary = rotaries_[rotary_index("orderedRotary")].angles;
      if (!given.has("headSinks")) continue;
      View<float> const sinks = given.array<float>("headSinks", static_cast<size_t>(config.query_heads));
      DeviceMemory& memory = head_sinks_.emplace_back();
      size_t const bytes = static_cast<size_t>(config.query_heads) * sizeof(float);
      couplet_report report{};
      throw_unless_ok(object.Env(), memory.allocate(device, bytes, &report), report);
      throw_unless_ok(object.Env(), device.backend->memory.copy(memory.get(), sinks.data, bytes, nullptr, &report),
                      report);
      layer.head_sinks = memory.get<float>();
    }
  } catch (...) {
    release();
    throw;
  }
}

// Angles of their own, or those of an entry before in another order.
void LayerOptions::add_rotary(const Options& given, int32_t head_dim) {
  const couplet_rotary_entries& entries = device_.backend->rotary;
  couplet_report report{};
  if (given.has("of")) {
    auto const last = static_cast<int32_t>(rotaries_.size()) - 1;
    Rotary const of = rotaries_[static_cast<size_t>(given.integer("of", 0, last))];
    View<int32_t> const order = given.array<int32_t>("order", static_cast<size_t>(of.pairs));
    Rotary& made = rotaries_.emplace_back(Rotary{nullptr, of.positions, of.pairs});
    throw_unless_ok(given.env(), entries.reorder(of.angles, order.data, &made.angles, &report), report);
    return;
  }
  couplet_rotary_params params = {};
  params.kind = given.string("kind") == "interleaved" ? COUPLET_ROTARY_INTERLEAVED : COUPLET_ROTARY_HALF;
  params.rotary_dim = given.integer("dim", 2, head_dim);
  params.positions = given.integer("positions", 1);
  params.head_dim = head_dim;
  params.theta = given.number_or("theta", 0, 0, std::numeric_limits<double>::max());
  size_t const angles = product({params.positions, params.rotary_dim / 2});
  params.cos = given.array_or_none<float>("cos", angles).data;
  params.sin = given.array_or_none<float>("sin", angles).data;
  Rotary& made = rotaries_.emplace_back(Rotary{nullptr, params.positions, params.rotary_dim / 2});
  throw_unless_ok(given.env(), entries.create(&params, &made.angles, &report), report);
}

LayerOptions::~LayerOptions() { release(); }

void LayerOptions::release() {
  for (const Rotary& rotary : rotaries_) device_.backend->rotary.destroy(rotary.angles);
  rotaries_.clear();
}

CacheOwner::~CacheOwner() { report(0); }

void CacheOwner::report_memory() {
  if (cache_->device().is_host()) report(cache_->memory_bytes());
}

void CacheOwner::report(int64_t bytes) {
  if (bytes != reported_bytes_) Napi::MemoryManagement::AdjustExternalMemory(env_, bytes - reported_bytes_);
  reported_bytes_ = bytes;
}

namespace {

// ---- codebooks ----------------------------------------------------------------------------------------------------

struct CodebookHandle {
  static constexpr napi_type_tag tag{0xc3b85e07f14d42a9, 0xa60e94d17b2c3f85};
  static constexpr const char* noun = "a codebook";
  Napi::Env env;
  std::shared_ptr<const Codebook> codebook;

  CodebookHandle(Napi::Env owner, std::shared_ptr<const Codebook> made) : env(owner), codebook(std::move(made)) {
    Napi::MemoryManagement::AdjustExternalMemory(env, host_bytes());
  }
  ~CodebookHandle() { Napi::MemoryManagement::AdjustExternalMemory(env, -host_bytes()); }
  int64_t host_bytes() const { return codebook->device().is_host() ? static_cast<int64_t>(codebook->bytes()) : 0; }
};

Codebook::Shape read_shape(const Options& options) {
  Codebook::Shape shape = {.layers = options.integer("layers", 1),
                           .kv_heads = options.integer("kvHeads", 1),
                           .head_dim = options.integer("headDim", COUPLET_MIN_HEAD_DIM, COUPLET_MAX_HEAD_DIM),
                           .codecs = {}};
  Napi::Array const layers = options.list("codecs");
  for (uint32_t layer = 0; layer < layers.Length(); ++layer) {
    std::vector<HeadCodecs>& codecs = shape.codecs.emplace_back();
    if (!layers.Get(layer).IsArray()) throw_expected(options.env(), "an array", "codecs", layers.Get(layer));
    Napi::Array const parts = layers.Get(layer).As<Napi::Array>();
    for (uint32_t index = 0; index < parts.Length(); ++index) {
      Options const part(parts.Get(index), "codecs");
      codecs.push_back(
          {part.integer("heads", 1), read_codec(part.object("keyCodec")), read_codec(part.object("valueCodec"))});
    }
  }
  return shape;
}

// One array a layer, of as many floats as elements_of(part) says for its parts together, by `pin` to where `place` points; none at all
// where the option is absent.
template <class Pin, class Elements, class PlaceOf>
void read_layers(const Options& options, const char* name, const Codebook::Shape& shape, const Pin& pin,
                 const Elements& elements_of, std::vector<Codebook::Source>* sources, const PlaceOf& place_of) {
  Napi::Array const list = options.list(name);
  if (list.Length() != sources->size())
    throw_expected(options.env(), std::to_string(sources->size()) + " entries", name, options.get(name));
  for (uint32_t layer = 0; layer < list.Length(); ++layer) {
    size_t elements = 0;
    if (layer < shape.codecs.size())
      for (const HeadCodecs& part : shape.codecs[layer]) elements += elements_of(part);
    place_of((*sources)[layer]) = pin(read_array<float>(list.Get(layer), name, elements));
  }
}

template <class Pin>
std::vector<Codebook::Source> read_sources(const Options& options, const Codebook::Shape& shape, const Pin& pin) {
  std::vector<Codebook::Source> sources(static_cast<size_t>(shape.layers));
  struct Side {
    couplet_codec HeadCodecs::*codec;
    const char *tables, *metrics;
  };
  for (size_t index = 0; const Side& side : {Side{&HeadCodecs::key, "keyTables", "keyMetrics"},
                                             Side{&HeadCodecs::value, "valueTables", "valueMetrics"}}) {
    size_t const at = index++;
    auto const centroids = [&](const HeadCodecs& part) {
      return product({part.heads, shape.head_dim, couplet_codec_centroids(part.*side.codec)});
    };
    read_layers(options, side.tables, shape, pin, centroids, &sources,
                [&](Codebook::Source& source) -> const float*& { return source.tables[at]; });
    if (!options.has(side.metrics)) continue;
    auto const matrices = [&](const HeadCodecs& part) {
      return product({part.heads, shape.head_dim, (part.*side.codec).group_channels});
    };
    read_layers(options, side.metrics, shape, pin, matrices, &sources,
                [&](Codebook::Source& source) -> const float*& { return source.metrics[at]; });
  }
  if (options.has("keyOrders")) {
    Napi::Array const list = options.list("keyOrders");
    if (list.Length() != sources.size())
      throw_expected(options.env(), std::to_string(sources.size()) + " entries", "keyOrders", options.get("keyOrders"));
    for (uint32_t layer = 0; layer < list.Length(); ++layer)
      sources[layer].key_order =
          pin(read_array<int32_t>(list.Get(layer), "keyOrders", static_cast<size_t>(shape.head_dim)));
  }
  if (!options.has("valueMixes")) return sources;
  auto const square = [&](const HeadCodecs& part) { return product({part.heads, shape.head_dim, shape.head_dim}); };
  read_layers(options, "valueMixes", shape, pin, square, &sources,
              [](Codebook::Source& source) -> const float*& { return source.value_mix; });
  read_layers(options, "valueUnmixes", shape, pin, square, &sources,
              [](Codebook::Source& source) -> const float*& { return source.value_unmix; });
  return sources;
}

class CodebookWorker : public DeviceWorker {
 public:
  explicit CodebookWorker(const Options& options)
      : DeviceWorker(options),
        shape_(read_shape(options)),
        sources_(read_sources(options, shape_, [this](const auto& array) { return pin(array); })) {}

 protected:
  couplet_status run(const Device& device, couplet_report* report) override {
    return Codebook::create(device, shape_, sources_, &codebook_, report);
  }
  Napi::Value result(Napi::Env env) override {
    return make_handle(env, std::make_unique<CodebookHandle>(env, std::move(codebook_)));
  }

 private:
  Codebook::Shape const shape_;
  std::vector<Codebook::Source> const sources_;
  std::shared_ptr<const Codebook> codebook_;
};

// ---- caches -------------------------------------------------------------------------------------------------------

// The device that `device` and `deviceIndex` mean, which has to be there.
Napi::Value find_device(const Napi::CallbackInfo& info) {
  Device const device = read_device(Options(info[0]));
  Napi::Object const object = Napi::Object::New(info.Env());
  object.Set("device", Napi::String::New(info.Env(), device.backend->name));
  object.Set("deviceIndex", Napi::Number::New(info.Env(), device.index));
  return object;
}

Napi::Value create_cache(const Napi::CallbackInfo& info) {
  Options const options(info[0]);
  Options const given = options.object("config");
  CacheConfig const config = {.layers = given.integer("layers", 1),
                              .query_heads = given.integer("queryHeads", 1),
                              .kv_heads = given.integer("kvHeads", 1),
                              .head_dim = given.integer("headDim", 1),
                              .sinks = given.integer("sinks", 0),
                              .window = given.integer("window", -1),
                              .threads = read_threads(given),
                              .budget_bytes = given.integer_or<int64_t>("memory", 0, 1, int64_t{1} << 53)};
  Device const device = read_device(options);
  std::shared_ptr<const Codebook> codebook;
  if (options.has("codebook")) codebook = read_handle<CodebookHandle>(options.get("codebook"), "codebook").codebook;
  std::shared_ptr<Cache> cache;
  couplet_report report{};
  throw_unless_ok(info.Env(), Cache::create(device, config, std::move(codebook), &cache, &report), report);
  auto layers = std::make_shared<LayerOptions>(device, config, info[0].As<Napi::Object>());
  auto handle = std::make_unique<CacheHandle>();
  handle->owner = std::make_shared<CacheOwner>(info.Env(), std::move(cache), std::move(layers));
  return make_handle(info.Env(), std::move(handle));
}

Napi::Value cache_statistics(const Napi::CallbackInfo& info) {
  CacheStatistics const statistics = read_handle<CacheHandle>(info[0], "cache").owner->cache()->statistics();
  Napi::Object const object = Napi::Object::New(info.Env());
  auto const set = [&](const char* name, auto value) {
    object.Set(name, Napi::Number::New(info.Env(), static_cast<double>(value)));
  };
  set("sequences", statistics.sequences);
  set("tokens", statistics.tokens);
  set("codedTokens", statistics.coded_tokens);
  set("rawTokens", statistics.raw_tokens);
  set("pageBytes", statistics.page_bytes);
  set("rawBytes", statistics.raw_bytes);
  set("codebookBytes", statistics.codebook_bytes);
  set("bookkeepingBytes", statistics.bookkeeping_bytes);
  set("budgetBytes", statistics.budget_bytes);
  set("peakBytes", statistics.peak_bytes);
  set("bitsPerChannel", statistics.bits_per_channel);
  return object;
}

Napi::Value dispose_cache(const Napi::CallbackInfo& info) {
  CacheOwner& owner = *read_handle<CacheHandle>(info[0], "cache").owner;
  owner.cache()->dispose();
  owner.report_memory();
  return info.Env().Undefined();
}

// ---- sequences ----------------------------------------------------------------------------------------------------

struct SequenceHandle {
  static constexpr napi_type_tag tag{0x5e19c7d2a8f0436b, 0xb4720f6e3d9c81a5};
  static constexpr const char* noun = "a sequence";
  std::shared_ptr<CacheOwner> owner;
  SequenceId id = 0;

  SequenceHandle(std::shared_ptr<CacheOwner> cache, SequenceId sequence) : owner(std::move(cache)), id(sequence) {}
  ~SequenceHandle() {
    owner->cache()->abandon(id);
    owner->report_memory();
  }
};

Napi::Value create_sequence(const Napi::CallbackInfo& info) {
  const std::shared_ptr<CacheOwner>& owner = read_handle<CacheHandle>(info[0], "cache").owner;
  SequenceId id = 0;
  couplet_report report{};
  throw_unless_ok(info.Env(), owner->cache()->create_sequence(&id, &report), report);
  return make_handle(info.Env(), std::make_unique<SequenceHandle>(owner, id));
}

Napi::Value fork_sequence(const Napi::CallbackInfo& info) {
  SequenceHandle const& from = read_handle<SequenceHandle>(info[0], "sequence");
  SequenceId id = 0;
  couplet_report report{};
  throw_unless_ok(info.Env(), from.owner->cache()->fork(from.id, &id, &report), report);
  return make_handle(info.Env(), std::make_unique<SequenceHandle>(from.owner, id));
}

Napi::Value sequence_length(const Napi::CallbackInfo& info) {
  SequenceHandle const& sequence = read_handle<SequenceHandle>(info[0], "sequence");
  int64_t tokens = 0;
  couplet_report report{};
  throw_unless_ok(info.Env(), sequence.owner->cache()->length(sequence.id, &tokens, &report), report);
  return Napi::Number::New(info.Env(), static_cast<double>(tokens));
}

Napi::Value truncate_sequence(const Napi::CallbackInfo& info) {
  SequenceHandle const& sequence = read_handle<SequenceHandle>(info[0], "sequence");
  int64_t const tokens = read_integer(info[1], "tokens", 0, std::numeric_limits<int32_t>::max());
  couplet_report report{};
  throw_unless_ok(info.Env(), sequence.owner->cache()->truncate(sequence.id, tokens, &report), report);
  sequence.owner->report_memory();
  return info.Env().Undefined();
}

class CopyWorker : public Worker {
 public:
  explicit CopyWorker(const Options& options)
      : Worker(options.env()),
        from_(read_handle<SequenceHandle>(options.get("sequence"), "sequence").owner),
        to_(read_handle<CacheHandle>(options.get("cache"), "cache").owner),
        id_(read_handle<SequenceHandle>(options.get("sequence"), "sequence").id) {}

 protected:
  couplet_status execute(couplet_report* report) override {
    return from_->cache()->copy_to(id_, to_->cache().get(), &copy_, report);
  }
  Napi::Value result(Napi::Env env) override {
    to_->report_memory();
    return make_handle(env, std::make_unique<SequenceHandle>(to_, copy_));
  }

 private:
  std::shared_ptr<CacheOwner> from_, to_;
  SequenceId id_, copy_ = 0;
};

// Idempotent: a sequence that is gone, with its cache or alone, stays gone.
Napi::Value dispose_sequence(const Napi::CallbackInfo& info) {
  SequenceHandle const& sequence = read_handle<SequenceHandle>(info[0], "sequence");
  couplet_report report{};
  couplet_status const status = sequence.owner->cache()->drop(sequence.id, &report);
  if (status != COUPLET_DISPOSED) throw_unless_ok(info.Env(), status, report);
  sequence.owner->report_memory();
  return info.Env().Undefined();
}

// ---- steps --------------------------------------------------------------------------------------------------------

Napi::Value begin_step(const Napi::CallbackInfo& info) {
  Options const options(info[0]);
  const std::shared_ptr<CacheOwner>& owner = read_handle<CacheHandle>(options.get("cache"), "cache").owner;
  Napi::Array const list = options.list("rows");
  std::vector<StepRow> rows;
  for (uint32_t i = 0; i < list.Length(); ++i) {
    Options const row(list.Get(i), "rows");
    SequenceHandle const& sequence = read_handle<SequenceHandle>(row.get("sequence"), "sequence");
    if (sequence.owner->cache() != owner->cache()) {
      throw range_error(info.Env(),
                        "Expected a sequence of this cache for `sequence` but received one of another cache");
    }
    rows.push_back({.sequence = sequence.id, .tokens = row.integer("tokens", 0)});
  }
  Prefill const prefill = options.string("prefill") == "coded" ? Prefill::coded : Prefill::exact;
  auto opened = std::make_shared<OpenStep>();
  opened->layers = {owner->options(), &owner->options()->layers()};
  couplet_report report{};
  throw_unless_ok(info.Env(), owner->cache()->begin(rows, prefill, &opened->step, &report), report);
  owner->report_memory();
  auto handle = std::make_unique<StepHandle>();
  handle->owner = owner;
  handle->step = std::move(opened);
  return make_handle(info.Env(), std::move(handle));
}

class AttendWorker : public Worker {
 public:
  explicit AttendWorker(const Options& options) : Worker(options.env()) {
    StepHandle const& handle = read_handle<StepHandle>(options.get("step"), "step");
    owner_ = handle.owner;
    step_ = handle.step;
    const CacheConfig& config = owner_->cache()->config();
    layer_ = options.integer("layer", 0, config.layers - 1);
    options_ = (*step_->layers)[static_cast<size_t>(layer_)];
    options_.inputs.dtype = read_dtype(options, "dtype");
    options_.outputs.dtype = read_dtype(options, "outDtype");
    if (options.has("stream")) options_.stream = read_stream(options.get("stream"), "stream");
    if (options.has("stream") && owner_->cache()->device().is_host())
      throw range_error(env(), "Expected no `stream` for a cache on the CPU but received one");
    Napi::Array const list = options.list("rows");
    std::span<const StepRow> const rows = step_->step->rows();
    if (list.Length() != rows.size()) {
      throw range_error(env(), "Expected one entry for each of the step's " + std::to_string(rows.size()) +
                                   " sequences for `rows` but received " + std::to_string(list.Length()));
    }
    for (uint32_t i = 0; i < list.Length(); ++i) read_row(Options(list.Get(i), "rows"), rows[i].tokens, config);
    read_control(options);
    options_.cancel = control()->cancel;
  }
  // An abort or a dispose that came meanwhile took effect at the end of the call.
  ~AttendWorker() override {
    step_.reset();
    owner_->report_memory();
  }

 protected:
  couplet_status execute(couplet_report* report) override {
    return step_->step->attend(layer_, data_, options_, report);
  }

 private:
  struct Elements {
    uint8_t* data = nullptr;
    size_t bytes = 0;
    bool overlaps(const Elements& other) const {
      std::less<const uint8_t*> const before;
      return bytes > 0 && other.bytes > 0 && before(data, other.data + other.bytes) && before(other.data, data + bytes);
    }
  };

  void read_row(const Options& row, int32_t tokens, const CacheConfig& config) {
    int64_t const kv_stride = int64_t{config.kv_heads} * config.head_dim,
                  query_stride = int64_t{config.query_heads} * config.head_dim;
    Elements const keys = read_elements(row, "keys", product({tokens, kv_stride}), options_.inputs, &inputs_place_);
    Elements const values = read_elements(row, "values", product({tokens, kv_stride}), options_.inputs, &inputs_place_);
    StepData& data = data_.emplace_back();
    data.keys = keys.data;
    data.values = values.data;
    data.key_token_stride = data.value_token_stride = kv_stride;
    data.key_head_stride = data.value_head_stride = data.query_head_stride = data.output_head_stride = config.head_dim;
    data.query_token_stride = data.output_token_stride = query_stride;
    if (!row.has("queries")) return;
    size_t const elements = product({tokens, query_stride});
    Elements const queries = read_elements(row, "queries", elements, options_.inputs, &inputs_place_);
    Elements const out = read_elements(row, "out", elements, options_.outputs, &outputs_place_);
    if (out.overlaps(queries) || out.overlaps(keys) || out.overlaps(values)) {
      throw range_error(env(),
                        "Expected an array that shares no memory with the inputs for `out` but received one that does");
    }
    data.queries = queries.data;
    data.outputs = out.data;
  }

  // All inputs of a call lie in one place, and all outputs in one.
  Elements read_elements(const Options& row, const char* name, size_t count, RowFormat& format,
                         const char** place_name) {
    Napi::Value const value = row.get(name);
    size_t const bytes = product({static_cast<int64_t>(count), format.dtype == COUPLET_FLOAT32 ? 4 : 2});
    couplet::Place const place = is_memory(value) ? couplet::Place::device : couplet::Place::host;
    if (*place_name && format.place != place)
      throw_expected(env(), std::string("the same kind of memory as for `") + *place_name + "`", name, value);
    *place_name = name;
    format.place = place;
    if (place == couplet::Place::host) {
      if (format.dtype == COUPLET_FLOAT32)
        return {reinterpret_cast<uint8_t*>(pin(row.array<float>(name, count))), bytes};
      return {reinterpret_cast<uint8_t*>(pin(row.array<uint16_t>(name, count))), bytes};
    }
    MemoryView view = read_memory(value, name, bytes, format.dtype == COUPLET_FLOAT32 ? 4 : 2);
    Device const device = owner_->cache()->device();
    if (view.owner && view.owner->device() != device)
      throw range_error(env(), "Expected memory of device " + std::to_string(device.index) + " of " +
                                   device.backend->name + " for `" + name + "` but received that of another");
    if (view.owner) kept_.push_back(std::move(view.owner));
    return {static_cast<uint8_t*>(view.address), bytes};
  }

  std::shared_ptr<CacheOwner> owner_;
  std::shared_ptr<const OpenStep> step_;
  int32_t layer_ = 0;
  AttendOptions options_;
  const char* inputs_place_ = nullptr;  // whose place the others' has to be
  const char* outputs_place_ = nullptr;
  std::vector<std::shared_ptr<const DeviceMemory>> kept_;
  std::vector<StepData> data_;
};

class SynchronizeWorker : public Worker {
 public:
  explicit SynchronizeWorker(const Options& options)
      : Worker(options.env()), step_(read_handle<StepHandle>(options.get("step"), "step").step) {}

 protected:
  couplet_status execute(couplet_report* report) override { return step_->step->synchronize(report); }

 private:
  std::shared_ptr<const OpenStep> step_;
};

Napi::Value commit_step(const Napi::CallbackInfo& info) {
  StepHandle const& handle = read_handle<StepHandle>(info[0], "step");
  couplet_report report{};
  throw_unless_ok(info.Env(), handle.step->step->commit(&report), report);
  handle.owner->report_memory();
  return info.Env().Undefined();
}

Napi::Value abort_step(const Napi::CallbackInfo& info) {
  StepHandle const& handle = read_handle<StepHandle>(info[0], "step");
  handle.step->step->abort();
  handle.owner->report_memory();
  return info.Env().Undefined();
}

}  // namespace

void export_cache(Napi::Env env, Napi::Object exports) {
  exports.Set("createCodebook", Napi::Function::New(env, promise_form<CodebookWorker>, "createCodebook"));
  exports.Set("createCodebookSync", Napi::Function::New(env, sync_form<CodebookWorker>, "createCodebookSync"));
  exports.Set("findDevice", Napi::Function::New(env, find_device, "findDevice"));
  exports.Set("createCache", Napi::Function::New(env, create_cache, "createCache"));
  exports.Set("cacheStatistics", Napi::Function::New(env, cache_statistics, "cacheStatistics"));
  exports.Set("disposeCache", Napi::Function::New(env, dispose_cache, "disposeCache"));
  exports.Set("createSequence", Napi::Function::New(env, create_sequence, "createSequence"));
  exports.Set("forkSequence", Napi::Function::New(env, fork_sequence, "forkSequence"));
  exports.Set("copySequence", Napi::Function::New(env, promise_form<CopyWorker>, "copySequence"));
  exports.Set("copySequenceSync", Napi::Function::New(env, sync_form<CopyWorker>, "copySequenceSync"));
  exports.Set("sequenceLength", Napi::Function::New(env, sequence_length, "sequenceLength"));
  exports.Set("truncateSequence", Napi::Function::New(env, truncate_sequence, "truncateSequence"));
  exports.Set("disposeSequence", Napi::Function::New(env, dispose_sequence, "disposeSequence"));
  exports.Set("beginStep", Napi::Function::New(env, begin_step, "beginStep"));
  exports.Set("attendStep", Napi::Function::New(env, promise_form<AttendWorker>, "attendStep"));
  exports.Set("attendStepSync", Napi::Function::New(env, sync_form<AttendWorker>, "attendStepSync"));
  exports.Set("synchronizeStep", Napi::Function::New(env, promise_form<SynchronizeWorker>, "synchronizeStep"));
  exports.Set("synchronizeStepSync", Napi::Function::New(env, sync_form<SynchronizeWorker>, "synchronizeStepSync"));
  exports.Set("commitStep", Napi::Function::New(env, commit_step, "commitStep"));
  exports.Set("abortStep", Napi::Function::New(env, abort_step, "abortStep"));
}

}  // namespace couplet::binding
