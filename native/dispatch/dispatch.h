// Which backends this process has, and why one is not available.
#pragma once

#include <string>

#include "../abi/backend.h"

namespace couplet {

// "cpu" is always there. "cuda" and "sim" are shared libraries beside the addon, opened on first use.
// NULL with COUPLET_BACKEND_UNAVAILABLE and the reason when it cannot be had; never another backend instead.
const couplet_backend* find_backend(const std::string& name, couplet_report* report);

}  // namespace couplet
