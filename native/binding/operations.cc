#include "exports.h"

namespace couplet::binding {

void export_operations(Napi::Env env, Napi::Object exports) {
  exports.Set("version", Napi::String::New(env, COUPLET_VERSION));
}

}  // namespace couplet::binding
