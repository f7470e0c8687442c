// The threads that promises run on: one set for the process, kept for reuse.
#pragma once

#include <functional>

namespace couplet::binding {

// Runs the job on a thread of its own, soon: on an idle one if there is one, else on a new one, and in line behind the others
// once there are 64. False when the operating system has no thread to give and there is none to wait for.
bool run_on_thread(std::function<void()> job);

}  // namespace couplet::binding
