// A backend library that does nothing, sound or with one fault: compiled once per FAKE_* (CMakeLists.txt).
#include "../../../native/abi/backend.h"

#if !defined(FAKE_NO_ENTRY)

namespace {

const char* variant() { return "fake"; }

[[maybe_unused]] couplet_backend make() {
  couplet_backend backend{};
  backend.abi_version = COUPLET_ABI_VERSION;
  backend.layout_version = COUPLET_LAYOUT_VERSION;
  backend.struct_bytes = sizeof(couplet_backend);
  backend.name = "sim";
  backend.variant = variant;
#if defined(FAKE_OTHER_ABI)
  backend.abi_version += 1;
#elif defined(FAKE_OTHER_SIZE)
  backend.struct_bytes += 8;
#elif defined(FAKE_OTHER_LAYOUT)
  backend.layout_version += 1;
#elif defined(FAKE_OTHER_NAME)
  backend.name = "cuda";
#endif
  return backend;
}

}  // namespace

extern "C" [[gnu::visibility("default")]] const couplet_backend* couplet_backend_entry(couplet_report* report) {
#if defined(FAKE_REFUSES)
  *report = couplet_report{};
  report->status = COUPLET_DEVICE_ERROR;
  report->native_code = 35;
  __builtin_strcpy(report->detail, "The driver is too old");
  return nullptr;
#else
  static couplet_backend const backend = make();
  static_cast<void>(report);
  return &backend;
#endif
}

#else

extern "C" [[gnu::visibility("default")]] int something_else() { return 0; }

#endif
