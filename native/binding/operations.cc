#include "exports.h"

namespace couplet::binding {

void export_operations(Napi::Env, Napi::Object) {}

}  // namespace couplet::binding
