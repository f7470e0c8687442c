#include "session.h"

#include <algorithm>
#include <bit>

#include "../common/report.h"

namespace couplet::onnxruntime {
namespace {

size_t element_bytes(ElementType type) {  // 0 for types whose elements are no plain numbers
  switch (type) {
    case ElementType::uint8:
    case ElementType::int8:
    case ElementType::boolean: return 1;
    case ElementType::uint16:
    case ElementType::int16:
    case ElementType::float16: return 2;
    case ElementType::float32:
    case ElementType::int32:
    case ElementType::uint32: return 4;
    case ElementType::int64:
    case ElementType::uint64:
    case ElementType::float64: return 8;
    case ElementType::undefined: break;
  }
  return 0;
}

float widen(
    uint16_t half) {  // exact; bits moved to float32's places, then the exponent's bias put right by a multiplication
  uint32_t const magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  float const scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  bool const infinite = (half & 0x7c00u) == 0x7c00u;  // infinity or NaN
  return std::bit_cast<float>(sign | (infinite ? magnitude | 0x7f800000u : std::bit_cast<uint32_t>(scaled)));
}

couplet_status append_cuda(const Library& library, int32_t device, SessionOptions* settings, couplet_report* report) {
  const Api& api = *library.api;
  OwnedCudaOptions options(library);
  couplet_status status = library.check(api.create_cuda_options(options.out()), report);
  if (status != COUPLET_OK) return status;
  const char* const key = "device_id";
  std::string const index = std::to_string(device);
  const char* const value = index.c_str();
  status = library.check(api.update_cuda_options(options.get(), &key, &value, 1), report);
  return status == COUPLET_OK ? library.check(api.append_cuda_provider(settings, options.get()), report) : status;
}

}  // namespace

Session::Session(const Library& library)
    : library_(library), operator_(library, runs_), domain_(library), session_(library) {}

couplet_status Session::create(const Library& library, std::span<const uint8_t> model, const Options& options,
                               std::shared_ptr<Session>* out, couplet_report* report) {
  const Api& api = *library.api;
  std::shared_ptr<Session> session(new Session(library));
  OwnedSessionOptions settings(library);
  couplet_status status = library.check(api.create_session_options(settings.out()), report);
  auto const set = [&](Status* result) {
    couplet_status const outcome = library.check(result, report);
    if (status == COUPLET_OK) status = outcome;
  };
  if (status != COUPLET_OK) return status;
  // Errors come back as statuses; the library would print each as well.
  set(api.set_session_log_severity(settings.get(), LogLevel::fatal));
  set(api.set_optimization_level(settings.get(), OptimizationLevel::all));
  set(api.set_intra_op_threads(settings.get(), options.threads));
  // Lengths differ from run to run, and a memory pattern is kept for every combination of them that was ever seen.
  set(api.disable_mem_pattern(settings.get()));
  // Idle threads of the library must not spin on the cores that couplet's own threads need inside the operator.
  set(api.add_session_config(settings.get(), "session.intra_op.allow_spinning", "0"));
  if (!options.folder.empty())
    set(api.add_session_config(settings.get(), "session.model_external_initializers_file_folder_path",
                               options.folder.c_str()));
  if (options.cuda && status == COUPLET_OK) status = append_cuda(library, options.cuda_device, settings.get(), report);
  if (status != COUPLET_OK) return status;
  set(api.create_operator_domain("couplet", session->domain_.out()));
  if (status != COUPLET_OK) return status;
  set(api.operator_domain_add(session->domain_.get(), &session->operator_));
  set(api.add_operator_domain(settings.get(), session->domain_.get()));
  if (status != COUPLET_OK) return status;
  set(api.create_session_from_array(library.env, model.data(), model.size(), settings.get(), session->session_.out()));
  if (status == COUPLET_OK) *out = std::move(session);
  return status;
}

couplet_status Session::check_cuda(const Library& library, const Options& options, couplet_report* report) {
  OwnedSessionOptions settings(library);
  couplet_status const status = library.check(library.api->create_session_options(settings.out()), report);
  return status == COUPLET_OK ? append_cuda(library, options.cuda_device, settings.get(), report) : status;
}

couplet_status Session::run(std::span<const Feed> feeds, std::span<const std::string> wanted, Run* run,
                            std::vector<Output>* outputs, couplet_report* report) {
  const Api& api = *library_.api;
  OwnedRunOptions settings(library_);
  couplet_status status = library_.check(api.create_run_options(settings.out()), report);
  if (status != COUPLET_OK) return status;
  run->options = settings.get();
  int64_t number = runs_.enter(run);
  struct Leave {
    Runs& runs;
    int64_t number;
    ~Leave() { runs.leave(number); }
  } const leave{runs_, number};

  std::vector<const char*> input_names, output_names;
  std::vector<OwnedValue> values;
  std::vector<const Value*> inputs;
  auto const add = [&](const Feed& given) {
    values.emplace_back(library_);
    couplet_status const outcome = feed(given, &values.back(), report);
    input_names.push_back(given.name.c_str());
    inputs.push_back(values.back().get());
    return outcome;
  };
  Feed const own{"couplet.run", ElementType::int64, {1}, &number, sizeof number};
  if (run->step) status = add(own);
  for (const Feed& given : feeds)
    if (status == COUPLET_OK) status = add(given);
  if (status != COUPLET_OK) return status;
  for (const std::string& name : wanted) output_names.push_back(name.c_str());

  std::vector<Value*> results(wanted.size(), nullptr);
  status = library_.check(api.run(session_.get(), settings.get(), input_names.data(), inputs.data(), inputs.size(),
                                  output_names.data(), output_names.size(), results.data()),
                          report);
  outputs->clear();
  for (Value* result : results) {
    outputs->push_back({.value = OwnedValue(library_), .dims = {}, .own = {}});
    *outputs->back().value.out() = result;
  }
  if (run->report.status != COUPLET_OK) {  // what the operator itself said, rather than the library's account of it
    *report = run->report;
    return static_cast<couplet_status>(run->report.status);
  }
  if (status != COUPLET_OK && run->cancel && __atomic_load_n(run->cancel, __ATOMIC_RELAXED) != 0)
    return fail(report, COUPLET_CANCELLED, {}, "The operation was aborted");
  for (Output& output : *outputs)
    if (status == COUPLET_OK) status = describe(&output, report);
  return status;
}

void Session::interrupt(const volatile int32_t* cancel) {
  runs_.for_each([&](const Run& run) {
    if (run.cancel == cancel) library_.check(library_.api->run_options_set_terminate(run.options), nullptr);
  });
}

couplet_status Session::feed(const Feed& given, OwnedValue* out, couplet_report* report) const {
  return library_.check(
      library_.api->create_tensor_with_data(library_.memory, given.data, given.bytes, given.dims.data(),
                                            given.dims.size(), given.type, out->out()),
      report);
}

couplet_status Session::describe(Output* output, couplet_report* report) const {
  const Api& api = *library_.api;
  OwnedTensorInfo info(library_);
  size_t dim_count = 0;
  couplet_status status = library_.check(api.get_tensor_info(output->value.get(), info.out()), report);
  if (status == COUPLET_OK) status = library_.check(api.get_element_type(info.get(), &output->type), report);
  if (status == COUPLET_OK) status = library_.check(api.get_dim_count(info.get(), &dim_count), report);
  if (status != COUPLET_OK) return status;
  output->dims.resize(dim_count);
  if (element_bytes(output->type) == 0)
    return fail(report, COUPLET_UNSUPPORTED, {}, "An output of the graph has elements of type %d, not numbers",
                static_cast<int>(output->type));
  status = library_.check(api.get_dims(info.get(), output->dims.data(), dim_count), report);
  if (status == COUPLET_OK) status = library_.check(api.get_tensor_data(output->value.get(), &output->data), report);
  return status;
}

// ---- Output ----

int64_t Output::elements() const {
  int64_t count = 1;
  for (int64_t const dim : dims) count *= dim;
  return count;
}

size_t Output::bytes() const { return static_cast<size_t>(elements()) * element_bytes(type); }

couplet_status Output::to_logits(bool last_column, couplet_report* report) {
  if (dims.size() != 3 || (type != ElementType::float32 && type != ElementType::float16))
    return fail(report, COUPLET_UNSUPPORTED, {},
                "Expected logits to be float32 or float16 [rows][columns][vocabulary] but the graph gives %zu "
                "dimensions of type %d",
                dims.size(), static_cast<int>(type));
  if (type == ElementType::float32 && !last_column) return COUPLET_OK;
  int64_t const vocabulary = dims[2], columns = dims[1];
  int64_t const first = last_column && columns > 0 ? columns - 1 : 0, kept = columns - first;
  own.resize(static_cast<size_t>(dims[0] * kept * vocabulary));
  float* to = own.data();
  for (int64_t row = 0; row < dims[0]; ++row) {
    int64_t const from = (row * columns + first) * vocabulary, count = kept * vocabulary;
    if (type == ElementType::float32)
      std::copy_n(static_cast<const float*>(data) + from, count, to);
    else
      std::transform(static_cast<const uint16_t*>(data) + from, static_cast<const uint16_t*>(data) + from + count, to,
                     widen);
    to += count;
  }
  type = ElementType::float32;
  dims[1] = kept;
  data = own.data();
  value = OwnedValue(value.library());
  return COUPLET_OK;
}

}  // namespace couplet::onnxruntime
