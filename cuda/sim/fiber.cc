// This folder is compiled without -fsanitize=thread (SIM_TSAN says that the kernels have it): ThreadSanitizer sees the accesses of
// kernels and the edges named here, and nothing of the scheduler.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#ifdef SIM_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* tag);
void __tsan_release(void* tag);
}
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a call must preserve on the running stack, stores its pointer in *save, and goes on with what `to` holds.
extern "C" void couplet_sim_switch(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .hidden couplet_sim_switch
  .globl couplet_sim_switch
  .type couplet_sim_switch, @function
couplet_sim_switch:
  push %rbp
  push %rbx
  push %r15
  push %r14
  push %r13
  push %r12
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r12
  pop %r13
  pop %r14
  pop %r15
  pop %rbx
  pop %rbp
  ret
  .size couplet_sim_switch, . - couplet_sim_switch
)");
#elif defined(__aarch64__)
asm(R"(
  .text
  .p2align 4
  .hidden couplet_sim_switch
  .globl couplet_sim_switch
  .type couplet_sim_switch, %function
couplet_sim_switch:
  sub sp, sp, #160
  stp x29, x30, [sp, #0]
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x29, x30, [sp, #0]
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size couplet_sim_switch, . - couplet_sim_switch
)");
#else
#error "The simulator switches stacks on x86-64 and aarch64"
#endif

namespace sim {
namespace {

constexpr size_t stack_bytes =
    256 << 10;  // touched lazily; instrumented kernels keep several copies of their registers in it

// The thread that enters fibers. Launches are serialized by the scheduler's lock, so one of each is enough.
void* scheduler_stack_pointer;
[[maybe_unused]] void* scheduler_race_checker;
[[maybe_unused]] void* scheduler_fake_stack;
[[maybe_unused]] const void* scheduler_stack;
[[maybe_unused]] size_t scheduler_stack_bytes;

size_t page_bytes() {
  static auto const bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

void check_race_as([[maybe_unused]] void* race_checker) {
#ifdef SIM_TSAN
  unsigned const no_edge = 1;
  __tsan_switch_to_fiber(race_checker, no_edge);
#endif
}

// The first words a fresh fiber runs: what leave() does after its switch, then the body.
void (*next_body)();
void begin() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  next_body();
}

}  // namespace

Fiber::Fiber(void (*body)()) : body_(body) {
  size_t const guard = page_bytes();
  void* const mapping =
      mmap(nullptr, stack_bytes + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapping, guard, PROT_NONE);
  stack_ = static_cast<std::byte*>(mapping) + guard;
  prepare();
}

Fiber::~Fiber() {
#ifdef SIM_TSAN
  __tsan_destroy_fiber(race_checker_);
#endif
  munmap(stack_ - page_bytes(), stack_bytes + page_bytes());
}

void Fiber::restart([[maybe_unused]] void* tag) {
#ifdef SIM_TSAN
  check_race_as(race_checker_);
  __tsan_release(tag);
  check_race_as(scheduler_race_checker);
  __tsan_destroy_fiber(race_checker_);  // its shadow call stack stands in the middle of a kernel
#endif
  prepare();
}

void Fiber::prepare() {
#ifdef SIM_TSAN
  race_checker_ = __tsan_create_fiber(0);
#endif
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack_, stack_bytes);  // red zones of frames that were abandoned
#endif
  fake_stack_ = nullptr;
  // The frame that couplet_sim_switch pops. Both ABIs want the stack pointer a multiple of 16 at a call, which on x86-64
  // is 8 bytes off once the return address lies on it: `begin` starts as if called.
  std::byte* const top = stack_ + stack_bytes;
  auto const entry = reinterpret_cast<void*>(&begin);
#if defined(__x86_64__)
  constexpr size_t frame_bytes =
      8 * sizeof(void*);  // six registers, the return address, an empty slot for the caller's
  constexpr size_t entry_slot = 6;
#else
  constexpr size_t frame_bytes = 160;
  constexpr size_t entry_slot = 1;  // x30
#endif
  std::byte* const frame = top - frame_bytes;
  std::memset(frame, 0, frame_bytes);
  std::memcpy(frame + entry_slot * sizeof(void*), &entry, sizeof entry);
  stack_pointer_ = frame;
}

void Fiber::enter() {
  next_body = body_;
  check_race_as(race_checker_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_, stack_bytes);
#endif
  couplet_sim_switch(&scheduler_stack_pointer, stack_pointer_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::leave() {
#ifdef SIM_TSAN
  check_race_as(scheduler_race_checker);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fake_stack_, scheduler_stack, scheduler_stack_bytes);
#endif
  couplet_sim_switch(&stack_pointer_, scheduler_stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void adopt_scheduler_thread() {
#ifdef SIM_TSAN
  scheduler_race_checker = __tsan_get_current_fiber();
#endif
}

void release([[maybe_unused]] void* tag) {
#ifdef SIM_TSAN
  __tsan_release(tag);
#endif
}

void acquire([[maybe_unused]] void* tag) {
#ifdef SIM_TSAN
  __tsan_acquire(tag);
#endif
}

AsScheduler::AsScheduler() : fiber_(nullptr) {
#ifdef SIM_TSAN
  fiber_ = __tsan_get_current_fiber();
  check_race_as(scheduler_race_checker);
#endif
}

AsScheduler::~AsScheduler() {
#ifdef SIM_TSAN
  check_race_as(fiber_);
#endif
}

}  // namespace sim
