// Which backends this process has, and why one is not available.
#pragma once

#include <string>

#include "../abi/backend.h"

namespace couplet {

// "cpu" is always there. "cuda" and "sim" are shared libraries beside the addon, opened on first use and then kept.
// NULL with COUPLET_BACKEND_UNAVAILABLE and the reason when it cannot be had; never another backend instead.
const couplet_backend* find_backend(const std::string& name, couplet_report* report);

// Cores that this process may run on: what `threads: 0` means.
int core_count();

// Opens the backend library at this path. NULL with the reason when it does not load, offers no backend of this name, was made
// for another ABI or layout, or cannot run on this machine. What was opened stays open.
const couplet_backend* open_backend(const std::string& path, const std::string& name, couplet_report* report);

}  // namespace couplet
