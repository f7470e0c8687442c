#include "exports.h"

namespace couplet::binding {

void export_cache(Napi::Env, Napi::Object) {}

}  // namespace couplet::binding
