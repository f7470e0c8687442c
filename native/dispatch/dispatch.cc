#include "dispatch.h"

#include <dlfcn.h>
#include <unistd.h>

#include <map>
#include <mutex>

#include "../common/report.h"
#include "../cpu/backend.h"
#include "../cpu/pool.h"

namespace couplet {
namespace {

struct Found {
  const couplet_backend* backend = nullptr;
  couplet_report report{};
};

const couplet_backend* refuse(couplet_report* report, const std::string& reason) {
  fail(report, COUPLET_BACKEND_UNAVAILABLE, {}, "%s", reason.c_str());
  return nullptr;
}

// The folder of the file that this function was linked into: of the addon, or of a test program.
std::string own_folder() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(&own_folder), &info) || !info.dli_fname) return ".";
  std::string const path = info.dli_fname;
  size_t const slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

Found search(const std::string& name) {
  Found found;
  std::string const path = own_folder() + "/libcouplet_" + name + ".so";
  if (access(path.c_str(), F_OK) == 0)
    found.backend = open_backend(path, name, &found.report);
  else
    refuse(&found.report, "This build of couplet has no " + name + " backend: there is no " + path);
  return found;
}

}  // namespace

const couplet_backend* find_backend(const std::string& name, couplet_report* report) {
  if (name == "cpu") return cpu::backend();
  if (name != "cuda" && name != "sim")
    return refuse(report, "Expected \"cpu\", \"cuda\" or \"auto\" for `device` but received \"" + name + "\"");
  static std::mutex mutex;
  static auto* const known = new std::map<std::string, Found>;  // never destroyed: calls may run while the process ends
  std::lock_guard const lock(mutex);
  auto entry = known->find(name);
  if (entry == known->end()) entry = known->emplace(name, search(name)).first;
  if (!entry->second.backend && report) *report = entry->second.report;
  return entry->second.backend;
}

int core_count() { return cpu::core_count(); }

const couplet_backend* open_backend(const std::string& path, const std::string& name, couplet_report* report) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return refuse(report, dlerror());
  auto const entry = reinterpret_cast<couplet_backend_entry_function>(dlsym(library, "couplet_backend_entry"));
  if (!entry) return refuse(report, path + " is not a backend of couplet: it has no couplet_backend_entry");
  couplet_report reason{};
  const couplet_backend* const backend = entry(&reason);
  if (!backend) {
    if (report) *report = reason;
    if (report) report->status = COUPLET_BACKEND_UNAVAILABLE;
    return nullptr;
  }
  auto const differs = [&](const char* what, uint64_t theirs, uint64_t ours) {
    return refuse(
        report, path + " has " + what + " " + std::to_string(theirs) + ", and this addon has " + std::to_string(ours));
  };
  if (backend->abi_version != COUPLET_ABI_VERSION)
    return differs("ABI version", backend->abi_version, COUPLET_ABI_VERSION);
  if (backend->struct_bytes != sizeof(couplet_backend))
    return differs("struct size", backend->struct_bytes, sizeof(couplet_backend));
  if (backend->layout_version != COUPLET_LAYOUT_VERSION)
    return differs("layout version", backend->layout_version, COUPLET_LAYOUT_VERSION);
  if (backend->name != name)
    return refuse(report, path + " holds the backend \"" + backend->name + "\" and not \"" + name + "\"");
  return backend;
}

}  // namespace couplet
