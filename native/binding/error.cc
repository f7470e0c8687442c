#include "error.h"

namespace couplet::binding {
namespace {

const char* code_of(int32_t status) {
  switch (status) {
    case COUPLET_INVALID_ARGUMENT: return "ERR_COUPLET_INVALID_ARGUMENT";
    case COUPLET_OUT_OF_MEMORY: return "ERR_COUPLET_OUT_OF_MEMORY";
    case COUPLET_NOT_FINITE: return "ERR_COUPLET_NOT_FINITE";
    case COUPLET_CANCELLED: return "ABORT_ERR";
    case COUPLET_CACHE_FULL: return "ERR_COUPLET_CACHE_FULL";
    case COUPLET_UNSUPPORTED: return "ERR_COUPLET_UNSUPPORTED";
    case COUPLET_BACKEND_UNAVAILABLE: return "ERR_COUPLET_BACKEND_UNAVAILABLE";
    case COUPLET_DEVICE_ERROR: return "ERR_COUPLET_DEVICE";
    case COUPLET_BUSY: return "ERR_COUPLET_BUSY";
    case COUPLET_DISPOSED: return "ERR_COUPLET_DISPOSED";
    case COUPLET_MISMATCH: return "ERR_COUPLET_CODEBOOK_MISMATCH";
    case COUPLET_ONNXRUNTIME: return "ERR_COUPLET_ONNXRUNTIME";
    default: return "ERR_COUPLET_INTERNAL";
  }
}

template <class Kind>
Napi::Error coded(Napi::Env env, const char* code, const std::string& message) {
  Napi::Error error = Kind::New(env, message);
  error.Set("code", Napi::String::New(env, code));
  return error;
}

void set_where(Napi::Error& error, const char* name, int64_t index) {
  if (index >= 0) error.Set(name, Napi::Number::New(error.Env(), static_cast<double>(index)));
}

}  // namespace

Napi::Error error_of(Napi::Env env, const couplet_report& report, PlaceNames places) {
  bool const argument = report.status == COUPLET_INVALID_ARGUMENT || report.status == COUPLET_NOT_FINITE;
  const char* const code = code_of(report.status);
  std::string const message = report.detail[0]                     ? report.detail
                              : report.status == COUPLET_CANCELLED ? "The operation was aborted"
                                                                   : code;
  Napi::Error error = argument ? coded<Napi::RangeError>(env, code, message) : coded<Napi::Error>(env, code, message);
  if (report.status == COUPLET_CANCELLED) error.Set("name", Napi::String::New(env, "AbortError"));
  set_where(error, "layer", report.layer);
  set_where(error, places.kv_head, report.kv_head);
  set_where(error, places.token, report.token);
  set_where(error, "channel", report.channel);
  set_where(error, "nativeCode", report.native_code);
  return error;
}

void throw_unless_ok(Napi::Env env, couplet_status status, const couplet_report& report) {
  if (status != COUPLET_OK) throw error_of(env, report);
}

Napi::Error type_error(Napi::Env env, const std::string& message) {
  return coded<Napi::TypeError>(env, code_of(COUPLET_INVALID_ARGUMENT), message);
}

Napi::Error range_error(Napi::Env env, const std::string& message) {
  return coded<Napi::RangeError>(env, code_of(COUPLET_INVALID_ARGUMENT), message);
}

Napi::Error disposed_error(Napi::Env env, const char* what) {
  return coded<Napi::Error>(env, code_of(COUPLET_DISPOSED), std::string("This ") + what + " has been disposed");
}

}  // namespace couplet::binding
