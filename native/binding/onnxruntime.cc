// Sessions over graphs with couplet.Attention, and captures. lib/native/onnxruntime.ts types what this exports.
#include <cstring>

#include "../onnxruntime/session.h"
#include "cache.h"
#include "error.h"
#include "exports.h"
#include "handles.h"
#include "values.h"
#include "worker.h"

namespace couplet::binding {
namespace {

using onnxruntime::Capture;
using onnxruntime::ElementType;
using onnxruntime::Feed;
using onnxruntime::Library;
using onnxruntime::Output;
using onnxruntime::Session;

constexpr int32_t kMostThreads = 256;
constexpr size_t kCopiedBytes = size_t{1} << 16;  // results up to this size are copied, larger ones handed over

struct SessionHandle {
  static constexpr napi_type_tag tag{0x4e2f8a6b8d5c4e10, 0x9b7d21c35f0a6e84};
  static constexpr const char* noun = "a session";
  std::shared_ptr<Session> session;  // NULL once disposed
};

struct CaptureHandle {
  static constexpr napi_type_tag tag{0x7a1c5b90e3d24f86, 0x8c6e94d7b2f3015a};
  static constexpr const char* noun = "a capture";
  std::shared_ptr<Capture> capture;
  Napi::Reference<Napi::Array> memory;  // the typed arrays that the sample lies in
};

const Library& open_library(const Options& options) {
  couplet_report report{};
  const Library* library = nullptr;
  throw_unless_ok(options.env(), Library::open(options.string("library"), &library, &report), report);
  return *library;
}

// ---- sessions ----

void read_provider(const Options& options, Session::Options* settings) {
  settings->cuda = options.boolean_or("cuda", false);
  settings->cuda_device = options.has("deviceIndex") ? options.integer("deviceIndex", 0) : 0;
}

class CreateSessionWorker : public Worker {
 public:
  explicit CreateSessionWorker(const Options& options)
      : Worker(options.env()), library_(open_library(options)), model_(options.array<uint8_t>("model", 1)) {
    settings_.folder = options.string_or("folder", "");
    settings_.threads = options.integer("threads", 1, kMostThreads);
    read_provider(options, &settings_);
    pin(model_);
  }

 protected:
  couplet_status execute(couplet_report* report) override {
    return Session::create(library_, {model_.data, model_.length}, settings_, &session_, report);
  }
  Napi::Value result(Napi::Env env) override {
    return make_handle(env, std::make_unique<SessionHandle>(SessionHandle{std::move(session_)}));
  }

 private:
  const Library& library_;
  View<uint8_t> model_;
  Session::Options settings_;
  std::shared_ptr<Session> session_;
};

std::shared_ptr<Session> live_session(Napi::Env env, const SessionHandle& handle) {
  if (!handle.session) throw disposed_error(env, "model");
  return handle.session;
}

// The memory of a result as an ArrayBuffer: the library's own where Node allows that, else a copy.
Napi::Value buffer_of(Napi::Env env, std::unique_ptr<Output> output) {
  size_t const bytes = output->bytes();
  if (bytes > kCopiedBytes) {
    auto const release = [](napi_env, void*, void* hint) { delete static_cast<Output*>(hint); };
    napi_value buffer = nullptr;
    if (napi_create_external_arraybuffer(env, output->data, bytes, release, output.get(), &buffer) == napi_ok) {
      output.release();
      return {env, buffer};
    }
  }
  Napi::ArrayBuffer buffer = Napi::ArrayBuffer::New(env, bytes);
  if (bytes) std::memcpy(buffer.Data(), output->data, bytes);
  return buffer;
}

class RunWorker : public Worker {
 public:
  explicit RunWorker(const Options& options)
      : Worker(options.env()),
        session_(live_session(env(), read_handle<SessionHandle>(options.get("session"), "session"))) {
    if (options.has("step")) step_ = read_handle<StepHandle>(options.get("step"), "step").step;
    read_control(options);
    read_feeds(options.list("feeds"));
    Napi::Array const names = options.list("outputs");
    for (uint32_t i = 0; i < names.Length(); ++i) wanted_.push_back(read_string(names.Get(i), "outputs"));
    logits_ = options.string("logits");
    last_column_ = options.boolean_or("lastColumn", false);
    if (step_ && options.has("capture")) begin_capture(read_handle<CaptureHandle>(options.get("capture"), "capture"));
  }
  ~RunWorker() override {
    if (capture_) capture_->end(succeeded_);
  }

 protected:
  couplet_status execute(couplet_report* report) override {
    onnxruntime::Run run{.step = step_ ? step_->step.get() : nullptr,
                         .layers = step_ ? std::span(*step_->layers) : std::span<const couplet::AttendOptions>(),
                         .capture = capture_.get(),
                         .cancel = control()->cancel};
    couplet_status status = session_->run(feeds_, wanted_, &run, &outputs_, report);
    succeeded_ = status == COUPLET_OK;
    for (size_t i = 0; i < outputs_.size() && status == COUPLET_OK; ++i)
      if (wanted_[i] == logits_) status = outputs_[i].to_logits(last_column_, report);
    return status;
  }

  Napi::Value result(Napi::Env env) override {
    Napi::Array const list = Napi::Array::New(env, outputs_.size());
    for (uint32_t i = 0; i < outputs_.size(); ++i) {
      Napi::Object const entry = Napi::Object::New(env);
      Napi::Array const dims = Napi::Array::New(env, outputs_[i].dims.size());
      for (uint32_t axis = 0; axis < dims.Length(); ++axis)
        dims.Set(axis, Napi::Number::New(env, static_cast<double>(outputs_[i].dims[axis])));
      entry.Set("name", wanted_[i]);
      entry.Set("type", Napi::Number::New(env, static_cast<int32_t>(outputs_[i].type)));
      entry.Set("dims", dims);
      entry.Set("data", buffer_of(env, std::make_unique<Output>(std::move(outputs_[i]))));
      list.Set(i, entry);
    }
    return list;
  }

 private:
  // Begun here and ended by the destructor: on the JS thread, like all that a capture tells about itself.
  void begin_capture(const CaptureHandle& handle) {
    Napi::Array const memory = handle.memory.Value();
    for (uint32_t i = 0; i < memory.Length(); ++i)
      pin(read_array<float>(memory.Get(i), "capture", 1));  // or it was transferred
    couplet_report report{};
    throw_unless_ok(env(), handle.capture->begin(*step_->step, &report), report);
    capture_ = handle.capture;
  }

  void read_feeds(const Napi::Array& list) {
    for (uint32_t i = 0; i < list.Length(); ++i) {
      Options const feed(list.Get(i), "feeds");
      auto const type = static_cast<ElementType>(feed.integer("type", 1));
      Napi::Value const data = feed.get("data");
      bool const floats = data.IsTypedArray() && data.As<Napi::TypedArray>().TypedArrayType() == napi_float32_array;
      if (floats)
        read_feed<float>(feed, type, ElementType::float32);
      else
        read_feed<int64_t>(feed, type, ElementType::int64);
    }
  }

  // `stored`: the elements of the array; `type` is another one only where there are no elements.
  template <class T>
  void read_feed(const Options& feed, ElementType type, ElementType stored) {
    View<T> const view = feed.array<T>("data");
    Napi::Array const dims = feed.list("dims");
    Feed& added = feeds_.emplace_back(Feed{feed.string("name"), type, {}, pin(view), view.length * sizeof(T)});
    size_t elements = 1;
    for (uint32_t axis = 0; axis < dims.Length(); ++axis) {
      added.dims.push_back(read_integer(dims.Get(axis), "dims", 0, std::numeric_limits<int32_t>::max()));
      elements = product({static_cast<int64_t>(elements), added.dims.back()});
    }
    if (elements != view.length || (elements != 0 && type != stored))
      throw_expected(env(), "an array of " + std::to_string(elements) + " elements of its type", "data", view.array);
  }

  std::shared_ptr<Session> session_;
  std::shared_ptr<const OpenStep> step_;  // NULL for a graph without couplet.Attention
  std::shared_ptr<Capture> capture_;
  std::vector<Feed> feeds_;
  std::vector<std::string> wanted_;
  std::string logits_;
  bool last_column_ = false;
  bool succeeded_ = false;
  std::vector<Output> outputs_;
};

// ---- captures ----

Napi::Value create_capture(const Napi::CallbackInfo& info) {
  Napi::Env const env = info.Env();
  Options const options(info[0]);
  Capture::Shape const shape{
      .layers = options.integer("layers", 1),
      .query_heads = options.integer("queryHeads", 1),
      .kv_heads = options.integer("kvHeads", 1),
      .head_dim = options.integer("headDim", 1),
      .points = options.integer<int64_t>("points", 1),
      .seed = options.seed_or("seed", 0),
  };
  size_t const rows = product({shape.points, shape.layers, shape.kv_heads});
  size_t const elements = product({shape.points, shape.layers, shape.kv_heads, shape.head_dim});
  View<float> const keys = options.array<float>("keys", elements);
  View<float> const values = options.array<float>("values", elements);
  View<float> const key_weights = options.array_or_none<float>("keyWeights", rows);
  View<float> const value_weights = options.array_or_none<float>("valueWeights", key_weights ? rows : 0);
  if (!key_weights != !value_weights)
    throw_expected(env, "both kinds of weights", "valueWeights", options.get("valueWeights"));

  auto handle = std::make_unique<CaptureHandle>();
  handle->capture =
      std::make_shared<Capture>(shape, Capture::Memory{keys.data, values.data, key_weights.data, value_weights.data});
  Napi::Array const memory = Napi::Array::New(env);
  for (const View<float>* view : {&keys, &values, &key_weights, &value_weights})
    if (*view) memory.Set(memory.Length(), view->array);
  handle->memory = Napi::Persistent(memory);
  return make_handle(env, std::move(handle));
}

Napi::Value capture_tokens(const Napi::CallbackInfo& info) {
  const Capture& capture = *read_handle<CaptureHandle>(info[0], "capture").capture;
  Napi::Object const tokens = Napi::Object::New(info.Env());
  tokens.Set("seen", Napi::Number::New(info.Env(), static_cast<double>(capture.tokens_seen())));
  tokens.Set("kept", Napi::Number::New(info.Env(), static_cast<double>(capture.tokens_kept())));
  return tokens;
}

// ---- exports ----

Napi::Value open_onnxruntime(const Napi::CallbackInfo& info) {
  return Napi::String::New(info.Env(), open_library(Options(info[0])).version);
}

Napi::Value list_providers(const Napi::CallbackInfo& info) {
  Napi::Env const env = info.Env();
  std::vector<std::string> names;
  couplet_report report{};
  throw_unless_ok(env, open_library(Options(info[0])).list_providers(&names, &report), report);
  Napi::Array const list = Napi::Array::New(env);
  for (const std::string& name : names) list.Set(list.Length(), name);
  return list;
}

Napi::Value check_cuda_provider(const Napi::CallbackInfo& info) {
  Options const options(info[0]);
  Session::Options settings;
  read_provider(options, &settings);
  couplet_report report{};
  throw_unless_ok(info.Env(), Session::check_cuda(open_library(options), settings, &report), report);
  return info.Env().Undefined();
}

Napi::Value create_session(const Napi::CallbackInfo& info) {
  return run_async(info.Env(), std::make_unique<CreateSessionWorker>(Options(info[0])));
}

Napi::Value run_session(const Napi::CallbackInfo& info) {
  return run_async(info.Env(), std::make_unique<RunWorker>(Options(info[0])));
}

Napi::Value interrupt_session(const Napi::CallbackInfo& info) {
  const SessionHandle& handle = read_handle<SessionHandle>(info[0], "session");
  View<int32_t> const cancel = read_array<int32_t>(info[1], "cancel", 1);
  if (handle.session) handle.session->interrupt(cancel.data);
  return info.Env().Undefined();
}

Napi::Value dispose_session(const Napi::CallbackInfo& info) {
  read_handle<SessionHandle>(info[0], "session").session.reset();
  return info.Env().Undefined();
}

}  // namespace

void export_onnxruntime(Napi::Env env, Napi::Object exports) {
  exports.Set("openOnnxruntime", Napi::Function::New(env, open_onnxruntime, "openOnnxruntime"));
  exports.Set("listProviders", Napi::Function::New(env, list_providers, "listProviders"));
  exports.Set("checkCudaProvider", Napi::Function::New(env, check_cuda_provider, "checkCudaProvider"));
  exports.Set("createSession", Napi::Function::New(env, create_session, "createSession"));
  exports.Set("runSession", Napi::Function::New(env, run_session, "runSession"));
  exports.Set("interruptSession", Napi::Function::New(env, interrupt_session, "interruptSession"));
  exports.Set("disposeSession", Napi::Function::New(env, dispose_session, "disposeSession"));
  exports.Set("createCapture", Napi::Function::New(env, create_capture, "createCapture"));
  exports.Set("captureTokens", Napi::Function::New(env, capture_tokens, "captureTokens"));
}

}  // namespace couplet::binding
