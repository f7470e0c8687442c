// What the addon keeps per environment (the main thread, each worker_thread): nothing of it is shared between them.
#pragma once

#include <napi.h>

#include "worker.h"

namespace couplet::binding {

struct Instance {
  explicit Instance(Napi::Env env) : runtime(env) {}
  static Instance& of(Napi::Env env) { return *env.GetInstanceData<Instance>(); }

  Runtime runtime;
};

}  // namespace couplet::binding
