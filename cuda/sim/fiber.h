// Stacks of simulated GPU threads and the switch between them, with what the sanitizers must be told.
#pragma once

#include <cstddef>

namespace sim {

// One fiber runs `body`, which never returns: it leaves for the scheduler and is entered again where it left.
class Fiber {
 public:
  explicit Fiber(void (*body)());
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  void enter();  // from the scheduler; returns when the fiber leaves
  void leave();  // from the fiber itself

  // From the scheduler: drops whatever the fiber was in the middle of, so that it enters `body` anew. What it did before is
  // ordered before acquire(tag).
  void restart(void* tag);

 private:
  void prepare();

  void (*const body_)();
  std::byte* stack_;               // lowest usable address; a guard page lies below it
  void* stack_pointer_ = nullptr;  // while it is not running
  void* race_checker_ = nullptr;   // ThreadSanitizer's view of this fiber
  void* fake_stack_ = nullptr;     // AddressSanitizer's
};

// To be called by the thread that is about to enter fibers: libuv, say, launches from many.
void adopt_scheduler_thread();

// Happens-before edges for ThreadSanitizer; nothing in other builds. Everything that a fiber did before release(tag) is
// ordered before what another does after acquire(tag). Switching between fibers orders nothing by itself.
void release(void* tag);
void acquire(void* tag);

// Whatever is done inside counts as done by the scheduler, not by the running fiber.
class AsScheduler {
 public:
  AsScheduler();
  AsScheduler(const AsScheduler&) = delete;
  AsScheduler& operator=(const AsScheduler&) = delete;
  ~AsScheduler();

 private:
  void* fiber_;
};

}  // namespace sim
