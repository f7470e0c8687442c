// What is loaded: versions, backends, devices. lib/native/capabilities.ts types what this exports.
#include "exports.h"
#include "shared_options.h"

namespace couplet::binding {
namespace {

std::string version_text(int32_t version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Napi::Object device_object(Napi::Env env, int32_t index, const couplet_device_info& info) {
  Napi::Object const object = Napi::Object::New(env);
  auto const set = [&](const char* name, auto value) {
    object.Set(name, Napi::Number::New(env, static_cast<double>(value)));
  };
  set("index", index);
  object.Set("name", Napi::String::New(env, info.name));
  object.Set("architecture", Napi::String::New(env, info.architecture));
  set("memoryBytes", info.memory_bytes);
  set("freeBytes", info.free_bytes);
  set("multiprocessors", info.multiprocessors);
  return object;
}

// A device that does not answer, a lost one say, says why instead.
Napi::Object available(Napi::Env env, const couplet_backend* backend) {
  Napi::Object const object = Napi::Object::New(env);
  object.Set("available", Napi::Boolean::New(env, true));
  object.Set("variant", Napi::String::New(env, backend->variant()));
  Napi::Array const devices = Napi::Array::New(env);
  for (int32_t index = 0; index < backend->device.count(); ++index) {
    couplet_report report{};
    couplet_device_info info{};
    Napi::Object device;
    if (backend->device.describe(index, &info, &report) == COUPLET_OK) {
      device = device_object(env, index, info);
      if (info.driver_version) object.Set("driver", Napi::String::New(env, version_text(info.driver_version)));
      if (info.runtime_version) object.Set("runtime", Napi::String::New(env, version_text(info.runtime_version)));
    } else {
      device = Napi::Object::New(env);
      device.Set("index", Napi::Number::New(env, index));
      device.Set("reason", Napi::String::New(env, report.detail));
    }
    devices.Set(static_cast<uint32_t>(index), device);
  }
  object.Set("devices", devices);
  return object;
}

// Of the backend of this name.
Napi::Value backend_state(const Napi::CallbackInfo& info) {
  Napi::Env const env = info.Env();
  couplet_report report{};
  if (const couplet_backend* const backend = find_backend(read_string(info[0], "name"), &report))
    return available(env, backend);
  Napi::Object const missing = Napi::Object::New(env);
  missing.Set("available", Napi::Boolean::New(env, false));
  missing.Set("reason", Napi::String::New(env, report.detail));
  return missing;
}

Napi::Value build_info(const Napi::CallbackInfo& info) {
  Napi::Env const env = info.Env();
  Napi::Object const result = Napi::Object::New(env);
  result.Set("version", Napi::String::New(env, COUPLET_VERSION));
  result.Set("abi", Napi::Number::New(env, COUPLET_ABI_VERSION));
  result.Set("layout", Napi::Number::New(env, COUPLET_LAYOUT_VERSION));
  result.Set("isa", Napi::String::New(env, find_backend("cpu", nullptr)->variant()));
  result.Set("cores", Napi::Number::New(env, core_count()));
  return result;
}

}  // namespace

void export_capabilities(Napi::Env env, Napi::Object exports) {
  exports.Set("version", Napi::String::New(env, COUPLET_VERSION));
  exports.Set("buildInfo", Napi::Function::New(env, build_info, "buildInfo"));
  exports.Set("backendState", Napi::Function::New(env, backend_state, "backendState"));
}

}  // namespace couplet::binding
