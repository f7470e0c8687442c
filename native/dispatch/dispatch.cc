#include "dispatch.h"

#include "../common/report.h"
#include "../cpu/backend.h"

namespace couplet {

const couplet_backend* find_backend(const std::string& name, couplet_report* report) {
  if (name == "cpu") return cpu::backend();
  fail(report, COUPLET_BACKEND_UNAVAILABLE, {}, "Backend \"%s\" is not part of this build", name.c_str());
  return nullptr;
}

}  // namespace couplet
