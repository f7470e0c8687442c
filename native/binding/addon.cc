#include "exports.h"
#include "instance.h"

namespace {

Napi::Object initialize(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new couplet::binding::Instance(env));
  couplet::binding::export_capabilities(env, exports);
  couplet::binding::export_device(env, exports);
  couplet::binding::export_kmeans(env, exports);
  couplet::binding::export_codes(env, exports);
  couplet::binding::export_cache(env, exports);
  couplet::binding::export_onnxruntime(env, exports);
  return exports;
}

}  // namespace

NODE_API_MODULE(couplet, initialize)
