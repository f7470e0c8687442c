// Memory of a step beside its blocks, handed from step to step of a cache.
#pragma once

#include <atomic>
#include <utility>

#include "../abi/backend.h"

namespace couplet {

// One piece of memory that is replaced when more is wanted. `counter` has the bytes of all scratch of a cache.
class Scratch {
 public:
  using Allocate = void* (*)(size_t bytes);
  using Release = void (*)(void* memory, size_t bytes);

  Scratch() = default;
  Scratch(Allocate allocate, Release release, std::atomic<int64_t>* counter)
      : allocate_(allocate), release_(release), counter_(counter) {}
  Scratch(Scratch&& other) noexcept { swap(other); }
  Scratch& operator=(Scratch&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Scratch() { release(); }

  uint8_t* memory() const { return static_cast<uint8_t*>(memory_); }
  size_t bytes() const { return bytes_; }
  // What it held is gone, so no work under way may use it.
  bool grow(size_t wanted) {
    if (wanted <= bytes_) return true;
    release();
    memory_ = allocate_(wanted);
    bytes_ = memory_ ? wanted : 0;
    counter_->fetch_add(static_cast<int64_t>(bytes_), std::memory_order_relaxed);
    return memory_ != nullptr;
  }
  void release() {
    if (!memory_) return;
    release_(memory_, bytes_);
    counter_->fetch_sub(static_cast<int64_t>(bytes_), std::memory_order_relaxed);
    memory_ = nullptr;
    bytes_ = 0;
  }

 private:
  void swap(Scratch& other) {
    std::swap(allocate_, other.allocate_);
    std::swap(release_, other.release_);
    std::swap(counter_, other.counter_);
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
  }
  Allocate allocate_ = nullptr;
  Release release_ = nullptr;
  std::atomic<int64_t>* counter_ = nullptr;
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

struct StepMemory {
  StepMemory() = default;
  StepMemory(const couplet_memory_entries& memory, std::atomic<int64_t>* counter)
      : tables(memory.allocate, memory.release, counter),
        rows(memory.allocate, memory.release, counter),
        arrays(memory.allocate, memory.release, counter),
        workspace(memory.allocate, memory.release, counter),
        staging(memory.allocate_staging, memory.release_staging, counter) {}

  Scratch tables;     // of the whole step: reports, and the page tables of its rows
  Scratch rows;       // of a layer: rows that the caller has elsewhere, or in another element type
  Scratch arrays;     // of a layer: runs, dense runs and sequences
  Scratch workspace;  // of attend
  Scratch staging;    // the host's side of what is uploaded
  size_t staged = 0;  // bytes of staging that the device may still have to read

  size_t bytes() const { return tables.bytes() + rows.bytes() + arrays.bytes() + workspace.bytes() + staging.bytes(); }
  void release() {
    for (Scratch* scratch : {&tables, &rows, &arrays, &workspace, &staging}) scratch->release();
  }
};

// Hands out pieces of memory of which only the address has to be known: run once at 0 to measure, then at what was allocated.
class Bump {
 public:
  explicit Bump(const void* base) : base_(reinterpret_cast<uintptr_t>(base)), end_(base_) {}
  template <class T = uint8_t>
  T* take(size_t count) {
    uintptr_t const at = end_;
    end_ += (count * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(at);
  }
  size_t bytes() const { return end_ - base_; }

 private:
  uintptr_t base_, end_;
};

}  // namespace couplet
