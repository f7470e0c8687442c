#include "library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "../common/report.h"

namespace couplet::onnxruntime {
namespace {

couplet_status load(const std::string& path, Library* library, couplet_report* report) {
  // NOLOAD first: if onnxruntime-node is in the process already, this is its own copy, whatever the file is by now.
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!handle) handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) return fail(report, COUPLET_ONNXRUNTIME, {}, "onnxruntime cannot be opened: %s", dlerror());
  auto const get_base = reinterpret_cast<const ApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
  if (!get_base) return fail(report, COUPLET_ONNXRUNTIME, {}, "%s is not an onnxruntime library", path.c_str());

  const ApiBase* const base = get_base();
  library->version = base->get_version();
  char* rest = nullptr;
  long const major = std::strtol(library->version.c_str(), &rest, 10);
  long const minor = *rest == '.' ? std::strtol(rest + 1, nullptr, 10) : -1;
  if (major != 1 || minor < minimum_minor)
    return fail(report, COUPLET_ONNXRUNTIME, {}, "Expected onnxruntime 1.%d or later (below 2) but %s is version %s",
                minimum_minor, path.c_str(), library->version.c_str());
  library->api = base->get_api(api_version);
  if (!library->api)
    return fail(report, COUPLET_ONNXRUNTIME, {}, "onnxruntime %s does not offer version %u of its API",
                library->version.c_str(), api_version);

  // There is one OrtEnv per process, reference counted by the library; this reference is never given back, because sessions
  // of other worker_threads may outlive whichever thread opened the library.
  Env* env = nullptr;
  MemoryInfo* memory = nullptr;
  couplet_status status = library->check(library->api->create_env(LogLevel::warning, "couplet", &env), report);
  if (status == COUPLET_OK)
    status = library->check(library->api->create_cpu_memory_info(AllocatorType::arena, MemoryType::standard, &memory),
                            report);
  library->env = env;
  library->memory = memory;
  return status;
}

}  // namespace

couplet_status Library::open(const std::string& path, const Library** out, couplet_report* report) {
  static std::mutex mutex;
  static auto& libraries = *new std::map<std::string, Library>;  // never destroyed: used until the last thread is gone
  std::lock_guard const lock(mutex);
  auto found = libraries.find(path);
  if (found == libraries.end()) {
    Library library;
    if (couplet_status const status = load(path, &library, report); status != COUPLET_OK) return status;
    found = libraries.emplace(path, std::move(library)).first;
  }
  *out = &found->second;
  return COUPLET_OK;
}

couplet_status Library::list_providers(std::vector<std::string>* names, couplet_report* report) const {
  char** listed = nullptr;
  int count = 0;
  couplet_status const status = check(api->get_available_providers(&listed, &count), report);
  if (status != COUPLET_OK) return status;
  names->assign(listed, listed + count);
  return check(api->release_available_providers(listed, count), report);
}

couplet_status Library::check(Status* status, couplet_report* report) const {
  if (!status) return COUPLET_OK;
  fail(report, COUPLET_ONNXRUNTIME, {.native_code = static_cast<int32_t>(api->get_error_code(status))}, "%s",
       api->get_error_message(status));
  api->release_status(status);
  return COUPLET_ONNXRUNTIME;
}

}  // namespace couplet::onnxruntime
