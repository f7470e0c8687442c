// The threads of the CPU backend: one pool for the process, grown on demand, never one thread per call.
#pragma once

#include <cstdint>
#include <type_traits>

namespace couplet::cpu {

// Cores this process may use (affinity mask and container quota, not the machine's count), as asked first: a plan made
// from it (workspace sizes) stays true.
int core_count();

// 0 or less means all cores; the answer is between 1 and 256.
int resolve_threads(int asked);

// Calls body(context, task, worker) for every task in [0, tasks), on up to `threads` threads of which the caller is one.
// worker is in [0, threads) and no two calls with the same worker overlap. Tasks are handed out in ascending order.
// Bodies must not throw. A call from inside a body runs its tasks on that thread alone, one after another.
using TaskBody = void (*)(void* context, int64_t task, int worker);
void parallel_for(int threads, int64_t tasks, TaskBody body, void* context);

template <class Body>
void parallel_for(int threads, int64_t tasks, Body&& body) {
  parallel_for(
      threads, tasks,
      [](void* context, int64_t task, int worker) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(task, worker);
      },
      &body);
}

}  // namespace couplet::cpu
