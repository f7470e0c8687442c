// The onnxruntime library of this process: the very file that onnxruntime-node loads, so that both share its one OrtEnv.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "../abi/status.h"
#include "api.h"

namespace couplet::onnxruntime {

// Opened once per file and kept until the process ends. Safe to use from any thread.
struct Library {
  const Api* api = nullptr;
  const Env* env = nullptr;
  const MemoryInfo* memory = nullptr;  // of ordinary host memory
  std::string version;

  // COUPLET_ONNXRUNTIME with the reason when the file cannot be opened or is not an onnxruntime that couplet can use.
  static couplet_status open(const std::string& path, const Library** out, couplet_report* report);

  // Execution providers that this build knows, as it names them; what one needs may still be missing here.
  couplet_status list_providers(std::vector<std::string>* names, couplet_report* report) const;

  // COUPLET_OK for NULL; else COUPLET_ONNXRUNTIME with the library's own message. Releases the status.
  couplet_status check(Status* status, couplet_report* report) const;
};

// Owns an object of the library.
template <class Object, void (*Api::*release)(Object*)>
class Owned {
 public:
  explicit Owned(const Library& library) : library_(&library) {}
  Owned(Owned&& other) noexcept : library_(other.library_), object_(std::exchange(other.object_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(library_, other.library_);
    std::swap(object_, other.object_);
    return *this;
  }
  ~Owned() {
    if (object_) (library_->api->*release)(object_);
  }
  const Library& library() const { return *library_; }
  Object* get() const { return object_; }
  Object** out() { return &object_; }

 private:
  const Library* library_;
  Object* object_ = nullptr;
};

using OwnedValue = Owned<Value, &Api::release_value>;
using OwnedTensorInfo = Owned<TensorInfo, &Api::release_tensor_info>;
using OwnedSession = Owned<OrtSession, &Api::release_session>;
using OwnedSessionOptions = Owned<SessionOptions, &Api::release_session_options>;
using OwnedCudaOptions = Owned<CudaOptions, &Api::release_cuda_options>;
using OwnedRunOptions = Owned<RunOptions, &Api::release_run_options>;
using OwnedOperatorDomain = Owned<OperatorDomain, &Api::release_operator_domain>;

}  // namespace couplet::onnxruntime
