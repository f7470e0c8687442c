// gpu::PhaseBarrier: how many arrivals end a phase, how many are still to come, and the number of the phase under way.
#pragma once

#include <cstdint>

#include "scheduler.h"

namespace sim {

constexpr uint64_t phases_of(uint64_t arrivals, uint64_t left, uint64_t phase) {
  return arrivals | left << 16 | phase << 32;
}

inline void initialize_phases(uint64_t* state, uint32_t arrivals) {
  __atomic_store_n(state, phases_of(arrivals, arrivals, 0), __ATOMIC_RELEASE);
}

inline void arrive_at_phase(uint64_t* state, Location where) {
  interruption();
  uint64_t old = __atomic_load_n(state, __ATOMIC_RELAXED);
  uint64_t changed;
  do {
    uint64_t const arrivals = old & 0xffff;
    uint64_t const left = old >> 16 & 0xffff;
    if (left == 0 || left > arrivals) fail(where, "phase barrier: it was not initialized");
    changed = left > 1 ? phases_of(arrivals, left - 1, old >> 32) : phases_of(arrivals, arrivals, (old >> 32) + 1);
  } while (!__atomic_compare_exchange_n(state, &old, changed, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
}

inline bool phase_has_completed(const uint64_t* state, uint32_t parity) {
  return (__atomic_load_n(state, __ATOMIC_ACQUIRE) >> 32 & 1) != parity;
}

}  // namespace sim
