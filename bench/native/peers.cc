// The peers of the attend benchmark as a Node addon of their own, so that they run in the same process as couplet:
// float32 and float16 attention written here, and an onnxruntime operator called without copies (its tensors bound once).
// For the benchmark only: arguments are what bench/attend.ts gives, checked there.
#include <napi.h>

#include <memory>
#include <string>
#include <vector>

#include "../../native/onnxruntime/library.h"
#include "float_attention.h"

namespace couplet::bench {
namespace {

using namespace couplet::onnxruntime;

template <class Array>
auto data_of(Napi::Value value) {
  return value.As<Array>().Data();
}

// floatAttention(shape: Int32Array [4], scale, queries, keys, values, out): float32, or float16 as Uint16Array
Napi::Value run_float(const Napi::CallbackInfo& info) {
  const int32_t* const counts = data_of<Napi::Int32Array>(info[0]);
  FloatShape const shape{counts[0], counts[1], counts[2], counts[3]};
  float const scale = info[1].ToNumber().FloatValue();
  const float* const queries = data_of<Napi::Float32Array>(info[2]);
  float* const out = data_of<Napi::Float32Array>(info[5]);
  if (info[3].As<Napi::TypedArray>().TypedArrayType() == napi_uint16_array)
    float_attention(shape, scale, queries, data_of<Napi::Uint16Array>(info[3]), data_of<Napi::Uint16Array>(info[4]),
                    out);
  else
    float_attention(shape, scale, queries, data_of<Napi::Float32Array>(info[3]), data_of<Napi::Float32Array>(info[4]),
                    out);
  return info.Env().Undefined();
}

// toHalf(Float32Array): Uint16Array
Napi::Value run_to_half(const Napi::CallbackInfo& info) {
  auto const from = info[0].As<Napi::Float32Array>();
  Napi::Uint16Array to = Napi::Uint16Array::New(info.Env(), from.ElementLength());
  std::vector<half_bits> const bits = to_half(from.Data(), static_cast<int64_t>(from.ElementLength()));
  std::copy(bits.begin(), bits.end(), to.Data());
  return to;
}

// A graph whose inputs and outputs are bound to typed arrays. An output over the array of an input is written in place.
class BoundGraph {
 public:
  static Napi::Value create(const Napi::CallbackInfo& info) {
    auto graph = std::make_unique<BoundGraph>();
    std::string const path = info[0].ToString();
    auto const model = info[1].As<Napi::Uint8Array>();
    couplet_report report{};
    if (Library::open(path, &graph->library_, &report) != COUPLET_OK) throw Napi::Error::New(info.Env(), report.detail);
    const Library& library = *graph->library_;
    graph->session_ = std::make_unique<OwnedSession>(library);
    OwnedSessionOptions options(library);
    graph->must(info.Env(), library.api->create_session_options(options.out()));
    graph->must(info.Env(), library.api->set_intra_op_threads(options.get(), info[2].ToNumber()));
    graph->must(info.Env(), library.api->create_session_from_array(library.env, model.Data(), model.ByteLength(),
                                                                   options.get(), graph->session_->out()));
    graph->bind(info.Env(), info[3].As<Napi::Array>(), graph->input_names_, graph->inputs_);
    graph->bind(info.Env(), info[4].As<Napi::Array>(), graph->output_names_, graph->outputs_);
    return Napi::External<BoundGraph>::New(info.Env(), graph.release(), [](Napi::Env, BoundGraph* it) { delete it; });
  }

  static Napi::Value run(const Napi::CallbackInfo& info) {
    auto* const graph = info[0].As<Napi::External<BoundGraph>>().Data();
    std::vector<const char*> inputs, outputs;
    for (const auto& name : graph->input_names_) inputs.push_back(name.c_str());
    for (const auto& name : graph->output_names_) outputs.push_back(name.c_str());
    std::vector<const Value*> feeds;
    for (const auto& value : graph->inputs_) feeds.push_back(value.get());
    std::vector<Value*> results;
    for (const auto& value : graph->outputs_) results.push_back(value.get());
    graph->must(info.Env(), graph->library_->api->run(graph->session_->get(), nullptr, inputs.data(), feeds.data(),
                                                      feeds.size(), outputs.data(), outputs.size(), results.data()));
    return info.Env().Undefined();
  }

 private:
  void must(Napi::Env env, Status* status) const {
    couplet_report report{};
    if (library_->check(status, &report) != COUPLET_OK) throw Napi::Error::New(env, report.detail);
  }

  // list: [name, element type of ONNX, dims: number[], typed array] each
  void bind(Napi::Env env, Napi::Array list, std::vector<std::string>& names, std::vector<OwnedValue>& values) {
    for (uint32_t i = 0; i < list.Length(); ++i) {
      auto const entry = list.Get(i).As<Napi::Array>();
      auto const dims = entry.Get(2u).As<Napi::Array>();
      std::vector<int64_t> shape;
      for (uint32_t d = 0; d < dims.Length(); ++d) shape.push_back(dims.Get(d).ToNumber().Int64Value());
      auto const array = entry.Get(3u).As<Napi::TypedArray>();
      auto* const start = static_cast<uint8_t*>(array.ArrayBuffer().Data()) + array.ByteOffset();
      auto const type = static_cast<ElementType>(entry.Get(1u).ToNumber().Int32Value());
      OwnedValue value(*library_);
      must(env, library_->api->create_tensor_with_data(library_->memory, start, array.ByteLength(), shape.data(),
                                                       shape.size(), type, value.out()));
      names.push_back(entry.Get(0u).ToString());
      values.push_back(std::move(value));
      kept_.push_back(Napi::Persistent(array.As<Napi::Object>()));
    }
  }

  const Library* library_ = nullptr;
  std::unique_ptr<OwnedSession> session_;
  std::vector<std::string> input_names_, output_names_;
  std::vector<OwnedValue> inputs_, outputs_;
  std::vector<Napi::ObjectReference> kept_;
};

Napi::Object initialize(Napi::Env env, Napi::Object exports) {
  exports["floatAttention"] = Napi::Function::New(env, run_float);
  exports["toHalf"] = Napi::Function::New(env, run_to_half);
  exports["bindGraph"] = Napi::Function::New(env, BoundGraph::create);
  exports["runGraph"] = Napi::Function::New(env, BoundGraph::run);
  return exports;
}

}  // namespace
}  // namespace couplet::bench

using couplet::bench::initialize;
NODE_API_MODULE(peers, initialize)
