#include "operator.h"

#include <cstring>
#include <new>
#include <vector>

#include "../common/report.h"

namespace couplet::onnxruntime {
namespace {

enum Input : size_t { run_input, query_input, key_input, value_input, input_count };

struct Tensor {
  float* data = nullptr;
  int64_t batch = 0, columns = 0, width = 0;  // its dimensions, in elements
};

// One node of a graph.
struct Kernel {
  const Library* library = nullptr;
  const Runs* runs = nullptr;
  int64_t layer = 0, query_heads = 0, kv_heads = 0, head_dim = 0;

  couplet_status create(const KernelInfo* info, couplet_report* report);
  couplet_status compute(KernelContext* context, couplet_report* report) const;

 private:
  couplet_status find_run(KernelContext* context, Run** out, couplet_report* report) const;
  couplet_status attend(KernelContext* context, Run* run, couplet_report* report) const;
  couplet_status read(const Value* value, Tensor* out, couplet_report* report) const;
};

couplet_status Kernel::create(const KernelInfo* info, couplet_report* report) {
  struct Attribute {
    const char* name;
    int64_t* value;
  } const attributes[] = {
      {"layer", &layer}, {"num_heads", &query_heads}, {"kv_num_heads", &kv_heads}, {"head_dim", &head_dim}};
  for (const Attribute& attribute : attributes) {
    couplet_status const status =
        library->check(library->api->kernel_info_integer(info, attribute.name, attribute.value), report);
    if (status != COUPLET_OK) return status;
  }
  if (layer < 0 || query_heads < 1 || kv_heads < 1 || head_dim < 1 || query_heads % kv_heads != 0)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "couplet.Attention has impossible attributes");
  return COUPLET_OK;
}

couplet_status Kernel::compute(KernelContext* context, couplet_report* report) const {
  Run* run = nullptr;
  couplet_status status = find_run(context, &run, report);
  if (status != COUPLET_OK) return status;
  if (run->cancel && __atomic_load_n(run->cancel, __ATOMIC_RELAXED) != 0)
    status = fail(report, COUPLET_CANCELLED, {}, "The operation was aborted");
  else
    status = attend(context, run, report);
  if (status != COUPLET_OK && run->report.status == COUPLET_OK) run->report = *report;
  return status;
}

couplet_status Kernel::find_run(KernelContext* context, Run** out, couplet_report* report) const {
  const Value* value = nullptr;
  void* data = nullptr;
  couplet_status status = library->check(library->api->kernel_context_input(context, run_input, &value), report);
  if (status == COUPLET_OK)
    status = library->check(library->api->get_tensor_data(const_cast<Value*>(value), &data), report);
  if (status != COUPLET_OK) return status;
  *out = runs->find(*static_cast<const int64_t*>(data));
  return *out ? COUPLET_OK
              : fail(report, COUPLET_INTERNAL, {}, "couplet.Attention was reached outside a run of couplet");
}

couplet_status Kernel::read(const Value* value, Tensor* out, couplet_report* report) const {
  const Api& api = *library->api;
  OwnedTensorInfo info(*library);
  size_t dim_count = 0;
  couplet_status status = library->check(api.get_tensor_info(value, info.out()), report);
  if (status == COUPLET_OK) status = library->check(api.get_dim_count(info.get(), &dim_count), report);
  if (status != COUPLET_OK) return status;
  if (dim_count != 3)
    return fail(report, COUPLET_INVALID_ARGUMENT, {.layer = static_cast<int32_t>(layer)},
                "Expected a tensor of 3 dimensions in couplet.Attention but received %zu", dim_count);
  int64_t dims[3] = {};
  void* data = nullptr;
  status = library->check(api.get_dims(info.get(), dims, 3), report);
  if (status == COUPLET_OK) status = library->check(api.get_tensor_data(const_cast<Value*>(value), &data), report);
  if (status == COUPLET_OK) *out = {static_cast<float*>(data), dims[0], dims[1], dims[2]};
  return status;
}

couplet_status Kernel::attend(KernelContext* context, Run* run, couplet_report* report) const {
  const Api& api = *library->api;
  Where const here{.layer = static_cast<int32_t>(layer)};
  if (static_cast<size_t>(layer) >= run->layers.size())
    return fail(report, COUPLET_INTERNAL, here, "couplet.Attention has a layer that the cache does not");

  size_t given = 0;
  couplet_status status = library->check(api.kernel_context_input_count(context, &given), report);
  if (status != COUPLET_OK) return status;
  Tensor tensors[input_count];  // the first stays empty
  for (size_t input = query_input; input < given && input < input_count; ++input) {
    const Value* value = nullptr;
    status = library->check(api.kernel_context_input(context, input, &value), report);
    if (status == COUPLET_OK && value) status = read(value, &tensors[input], report);
    if (status != COUPLET_OK) return status;
  }

  int64_t const query_width = query_heads * head_dim, kv_width = kv_heads * head_dim;
  const Tensor& query = tensors[query_input];
  Tensor key = tensors[key_input], value = tensors[value_input];
  bool const packed = !key.data && !value.data;
  if (packed) {
    key = value = query;
    key.data = query.data + query_width;
    value.data = key.data + kv_width;
  }
  bool const alike = key.batch == query.batch && value.batch == query.batch && key.columns == query.columns &&
                     value.columns == query.columns && value.width == key.width;
  if (!alike || query.width != (packed ? query_width + 2 * kv_width : query_width) ||
      (!packed && key.width != kv_width))
    return fail(report, COUPLET_INVALID_ARGUMENT, here,
                "Queries [%lld][%lld][%lld] and keys [%lld][%lld][%lld] do not fit the heads of couplet.Attention",
                static_cast<long long>(query.batch), static_cast<long long>(query.columns),
                static_cast<long long>(query.width), static_cast<long long>(key.batch),
                static_cast<long long>(key.columns), static_cast<long long>(key.width));

  std::span<const StepRow> const rows = run->step->rows();
  if (static_cast<size_t>(query.batch) != rows.size())
    return fail(report, COUPLET_INVALID_ARGUMENT, here, "Expected a batch of %zu rows but received %lld", rows.size(),
                static_cast<long long>(query.batch));

  Value* output_value = nullptr;
  int64_t const output_dims[] = {query.batch, query.columns, query_width};
  Tensor output;
  status = library->check(api.kernel_context_output(context, 0, output_dims, 3, &output_value), report);
  if (status == COUPLET_OK) status = read(output_value, &output, report);
  if (status != COUPLET_OK) return status;

  std::vector<StepData> data(rows.size());
  for (size_t row = 0; row < rows.size(); ++row) {
    int64_t const padding = query.columns - rows[row].tokens;
    if (padding < 0)
      return fail(report, COUPLET_INVALID_ARGUMENT, here, "Expected at least %d columns but received %lld",
                  rows[row].tokens, static_cast<long long>(query.columns));
    int64_t const first = static_cast<int64_t>(row) * query.columns + padding;  // column of the row's first token
    std::memset(output.data + (first - padding) * query_width, 0,
                sizeof(float) * static_cast<size_t>(padding * query_width));
    data[row] = {
        .queries = query.data + first * query.width,
        .keys = key.data + first * key.width,
        .values = value.data + first * value.width,
        .outputs = output.data + first * query_width,
        .query_token_stride = query.width,
        .query_head_stride = head_dim,
        .key_token_stride = key.width,
        .key_head_stride = head_dim,
        .value_token_stride = value.width,
        .value_head_stride = head_dim,
        .output_token_stride = query_width,
        .output_head_stride = head_dim,
    };
  }
  AttendOptions options = run->layers[static_cast<size_t>(layer)];
  options.cancel = run->cancel;
  status = run->step->attend(static_cast<int32_t>(layer), data, options, report);
  if (status == COUPLET_OK && run->capture)
    status = run->capture->add(static_cast<int32_t>(layer), data, options, report);
  return status;
}

// ---- what the library calls ----

const AttentionOperator& self(const CustomOperator* custom_operator) {
  return *static_cast<const AttentionOperator*>(custom_operator);
}

// Runs a body that fills a report; no C++ exception may pass through the library's frames.
template <class Body>
Status* guarded(const Library& library, const Body& body) {
  couplet_report report{};
  couplet_status status = COUPLET_OK;
  try {
    status = body(&report);
  } catch (const std::bad_alloc&) {
    status = fail(&report, COUPLET_OUT_OF_MEMORY, {}, "The operating system has no memory left for couplet.Attention");
  }
  return status == COUPLET_OK ? nullptr : library.api->create_status(ErrorCode::fail, report.detail);
}

Status* make_kernel(const CustomOperator* custom_operator, const Api*, const KernelInfo* info, void** kernel) {
  const AttentionOperator& attention = self(custom_operator);
  return guarded(*attention.library, [&](couplet_report* report) {
    auto created = std::make_unique<Kernel>();
    created->library = attention.library;
    created->runs = attention.runs;
    couplet_status const status = created->create(info, report);
    if (status == COUPLET_OK) *kernel = created.release();
    return status;
  });
}

Status* compute(void* opaque, KernelContext* context) {
  auto const* const kernel = static_cast<const Kernel*>(opaque);
  return guarded(*kernel->library, [&](couplet_report* report) { return kernel->compute(context, report); });
}

}  // namespace

int64_t Runs::enter(Run* run) {
  std::lock_guard const lock(mutex_);
  runs_.emplace(next_, run);
  return next_++;
}

void Runs::leave(int64_t number) {
  std::lock_guard const lock(mutex_);
  runs_.erase(number);
}

Run* Runs::find(int64_t number) const {
  std::lock_guard const lock(mutex_);
  auto const found = runs_.find(number);
  return found == runs_.end() || !found->second->step ? nullptr : found->second;
}

AttentionOperator::AttentionOperator(const Library& opened, const Runs& registry)
    : CustomOperator{
          .version = custom_operator_version,
          .create_kernel_without_status = nullptr,
          .get_name = [](const CustomOperator*) { return "Attention"; },
          .get_execution_provider = [](const CustomOperator*) -> const char* { return nullptr; },
          .get_input_type = [](const CustomOperator*,
                               size_t index) { return index == run_input ? ElementType::int64 : ElementType::float32; },
          .get_input_count = [](const CustomOperator*) -> size_t { return input_count; },
          .get_output_type = [](const CustomOperator*, size_t) { return ElementType::float32; },
          .get_output_count = [](const CustomOperator*) -> size_t { return 1; },
          .kernel_compute_without_status = nullptr,
          .kernel_destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); },
          .get_input_presence =
              [](const CustomOperator*, size_t index) {
                return index <= query_input ? Presence::required : Presence::optional;
              },
          .get_output_presence = [](const CustomOperator*, size_t) { return Presence::required; },
          .get_input_memory = [](const CustomOperator*, size_t) { return MemoryType::standard; },
          .get_variadic_input_minimum = [](const CustomOperator*) { return 0; },
          .get_variadic_input_homogeneous = [](const CustomOperator*) { return 0; },
          .get_variadic_output_minimum = [](const CustomOperator*) { return 0; },
          .get_variadic_output_homogeneous = [](const CustomOperator*) { return 0; },
          .create_kernel = make_kernel,
          .kernel_compute = compute,
      },
      library(&opened),
      runs(&registry) {}

}  // namespace couplet::onnxruntime
