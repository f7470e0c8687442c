// The part of onnxruntime's C API that couplet uses, declared by position. OrtApi is a struct of function pointers to which
// releases only append, so a position means the same in every version that has it. Everything here is in 1.18 and later.
#pragma once

#include <cstddef>
#include <cstdint>

namespace couplet::onnxruntime {

// Objects of the library, each released by the function of its name.
struct Env;
struct Status;
struct SessionOptions;
struct RunOptions;
struct OrtSession;
struct Value;
struct MemoryInfo;
struct TensorInfo;  // OrtTensorTypeAndShapeInfo
struct OperatorDomain;
struct CudaOptions;  // OrtCUDAProviderOptionsV2
struct KernelInfo;
struct KernelContext;
struct CustomOperator;

enum class ErrorCode : int32_t { fail = 1, invalid_argument = 2 };
enum class LogLevel : int32_t { warning = 2, fatal = 4 };
enum class OptimizationLevel : int32_t { all = 99 };
enum class ElementType : int32_t {
  undefined = 0,
  float32 = 1,
  uint8 = 2,
  int8 = 3,
  uint16 = 4,
  int16 = 5,
  int32 = 6,
  int64 = 7,
  boolean = 9,
  float16 = 10,
  float64 = 11,
  uint32 = 12,
  uint64 = 13
};
enum class AllocatorType : int32_t { arena = 1 };
enum class MemoryType : int32_t { standard = 0 };
enum class Presence : int32_t { required = 0, optional = 1 };

constexpr uint32_t api_version = 18;  // the version asked for
constexpr int minimum_minor = 18;     // of the library's version string, 1.<minor>

// Positions count functions from 0. `skipped_*` are functions that couplet does not call.
struct Api {
  using Function = void (*)();

  Status* (*create_status)(ErrorCode code, const char* message);         // 0
  ErrorCode (*get_error_code)(const Status* status);                     // 1
  const char* (*get_error_message)(const Status* status);                // 2
  Status* (*create_env)(LogLevel level, const char* log_id, Env** out);  // 3
  Function skipped_4[4];
  Status* (*create_session_from_array)(const Env* env, const void* model, size_t model_bytes,
                                       const SessionOptions* options,
                                       OrtSession** out);  // 8
  Status* (*run)(OrtSession* session, const RunOptions* options, const char* const* input_names,
                 const Value* const* inputs, size_t input_count, const char* const* output_names, size_t output_count,
                 Value** outputs);                          // 9
  Status* (*create_session_options)(SessionOptions** out);  // 10
  Function skipped_11[6];
  Status* (*disable_mem_pattern)(SessionOptions* options);  // 17
  Function skipped_18[4];
  Status* (*set_session_log_severity)(SessionOptions* options, LogLevel level);         // 22
  Status* (*set_optimization_level)(SessionOptions* options, OptimizationLevel level);  // 23
  Status* (*set_intra_op_threads)(SessionOptions* options, int threads);                // 24
  Function skipped_25[1];
  Status* (*create_operator_domain)(const char* name, OperatorDomain** out);                      // 26
  Status* (*operator_domain_add)(OperatorDomain* domain, const CustomOperator* custom_operator);  // 27
  Status* (*add_operator_domain)(SessionOptions* options, OperatorDomain* domain);                // 28
  Function skipped_29[10];
  Status* (*create_run_options)(RunOptions** out);  // 39
  Function skipped_40[6];
  Status* (*run_options_set_terminate)(RunOptions* options);  // 46
  Function skipped_47[2];
  Status* (*create_tensor_with_data)(const MemoryInfo* memory, void* data, size_t data_bytes, const int64_t* dims,
                                     size_t dim_count, ElementType type, Value** out);  // 49
  Function skipped_50[1];
  Status* (*get_tensor_data)(Value* value, void** out);  // 51
  Function skipped_52[8];
  Status* (*get_element_type)(const TensorInfo* info, ElementType* out);         // 60
  Status* (*get_dim_count)(const TensorInfo* info, size_t* out);                 // 61
  Status* (*get_dims)(const TensorInfo* info, int64_t* dims, size_t dim_count);  // 62
  Function skipped_63[2];
  Status* (*get_tensor_info)(const Value* value, TensorInfo** out);  // 65
  Function skipped_66[3];
  Status* (*create_cpu_memory_info)(AllocatorType allocator, MemoryType memory, MemoryInfo** out);  // 69
  Function skipped_70[16];
  Status* (*kernel_info_integer)(const KernelInfo* info, const char* name, int64_t* out);  // 86
  Function skipped_87[1];
  Status* (*kernel_context_input_count)(const KernelContext* context, size_t* out);  // 88
  Function skipped_89[1];
  Status* (*kernel_context_input)(const KernelContext* context, size_t index, const Value** out);  // 90
  Status* (*kernel_context_output)(KernelContext* context, size_t index, const int64_t* dims, size_t dim_count,
                                   Value** out);  // 91
  Function skipped_92[1];
  void (*release_status)(Status*);           // 93
  void (*release_memory_info)(MemoryInfo*);  // 94
  void (*release_session)(OrtSession*);      // 95
  void (*release_value)(Value*);             // 96
  void (*release_run_options)(RunOptions*);  // 97
  Function skipped_98[1];
  void (*release_tensor_info)(TensorInfo*);          // 99
  void (*release_session_options)(SessionOptions*);  // 100
  void (*release_operator_domain)(OperatorDomain*);  // 101
  Function skipped_102[23];
  Status* (*get_available_providers)(char*** names, int* count);    // 125
  Status* (*release_available_providers)(char** names, int count);  // 126
  Function skipped_127[3];
  Status* (*add_session_config)(SessionOptions* options, const char* key, const char* value);  // 130
  Function skipped_131[73];
  Status* (*append_cuda_provider)(SessionOptions* options, const CudaOptions* cuda);  // 204
  Status* (*create_cuda_options)(CudaOptions** out);                                  // 205
  Status* (*update_cuda_options)(CudaOptions* options, const char* const* keys, const char* const* values,
                                 size_t count);  // 206
  Function skipped_207[1];
  void (*release_cuda_options)(CudaOptions*);  // 208
};

#define COUPLET_AT(function, position)                                                   \
  static_assert(offsetof(Api, function) == (position) * sizeof(Api::Function), #function \
                " stands at another "                                                    \
                "position")
COUPLET_AT(create_env, 3);
COUPLET_AT(create_session_from_array, 8);
COUPLET_AT(create_session_options, 10);
COUPLET_AT(disable_mem_pattern, 17);
COUPLET_AT(set_session_log_severity, 22);
COUPLET_AT(set_intra_op_threads, 24);
COUPLET_AT(create_operator_domain, 26);
COUPLET_AT(create_run_options, 39);
COUPLET_AT(run_options_set_terminate, 46);
COUPLET_AT(create_tensor_with_data, 49);
COUPLET_AT(get_tensor_data, 51);
COUPLET_AT(get_element_type, 60);
COUPLET_AT(get_tensor_info, 65);
COUPLET_AT(create_cpu_memory_info, 69);
COUPLET_AT(kernel_info_integer, 86);
COUPLET_AT(kernel_context_input_count, 88);
COUPLET_AT(kernel_context_input, 90);
COUPLET_AT(release_status, 93);
COUPLET_AT(release_tensor_info, 99);
COUPLET_AT(release_operator_domain, 101);
COUPLET_AT(get_available_providers, 125);
COUPLET_AT(add_session_config, 130);
COUPLET_AT(append_cuda_provider, 204);
COUPLET_AT(release_cuda_options, 208);
#undef COUPLET_AT

struct ApiBase {  // what the library's only export, OrtGetApiBase, returns
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// OrtCustomOp. `version` says how much of it the library reads: 16 is up to kernel_compute.
struct CustomOperator {
  using Function = void (*)();

  uint32_t version;
  Function create_kernel_without_status;
  const char* (*get_name)(const CustomOperator*);
  const char* (*get_execution_provider)(const CustomOperator*);  // NULL: the CPU
  ElementType (*get_input_type)(const CustomOperator*, size_t index);
  size_t (*get_input_count)(const CustomOperator*);
  ElementType (*get_output_type)(const CustomOperator*, size_t index);
  size_t (*get_output_count)(const CustomOperator*);
  Function kernel_compute_without_status;
  void (*kernel_destroy)(void* kernel);
  Presence (*get_input_presence)(const CustomOperator*, size_t index);
  Presence (*get_output_presence)(const CustomOperator*, size_t index);
  MemoryType (*get_input_memory)(const CustomOperator*, size_t index);
  int (*get_variadic_input_minimum)(const CustomOperator*);
  int (*get_variadic_input_homogeneous)(const CustomOperator*);
  int (*get_variadic_output_minimum)(const CustomOperator*);
  int (*get_variadic_output_homogeneous)(const CustomOperator*);
  Status* (*create_kernel)(const CustomOperator*, const Api* api, const KernelInfo* info, void** kernel);
  Status* (*kernel_compute)(void* kernel, KernelContext* context);
};

constexpr uint32_t custom_operator_version = 16;
static_assert(offsetof(CustomOperator, get_name) == 16 && offsetof(CustomOperator, kernel_destroy) == 72 &&
              offsetof(CustomOperator, get_input_memory) == 96 && offsetof(CustomOperator, create_kernel) == 136 &&
              offsetof(CustomOperator, kernel_compute) == 144 && sizeof(CustomOperator) == 152);

}  // namespace couplet::onnxruntime
