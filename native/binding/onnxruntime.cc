#include "exports.h"

namespace couplet::binding {

void export_onnxruntime(Napi::Env, Napi::Object) {}

}  // namespace couplet::binding
