// How an operation asks whether it should stop.
#pragma once

#include "../abi/status.h"

namespace couplet {

// Other threads raise the flag meanwhile, with an atomic store.
inline bool cancelled(const couplet_control* control) {
  return control && control->cancel && __atomic_load_n(control->cancel, __ATOMIC_RELAXED) != 0;
}

}  // namespace couplet
