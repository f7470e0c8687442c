#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "fiber.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) static_cast<void>(0)
#endif

namespace sim {
namespace {

constexpr int poison = 0xff;
constexpr int untouched = 0xc5;  // fills the margins

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

void fill(std::byte* memory, int value, size_t bytes) { std::memset(memory, value, bytes); }

// Whether a margin is as it was made. AddressSanitizer lets nobody touch it, not even this function.
bool intact_margin([[maybe_unused]] const std::byte* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  return true;
#else
  return std::all_of(memory, memory + bytes, [](std::byte value) { return value == std::byte{untouched}; });
#endif
}

}  // namespace

// ---- shared memory -----------------------------------------------------------------------------------------------------
namespace {

constexpr size_t shared_margin = 1024;  // also the greatest alignment of a shared variable

}  // namespace

// Fresh pages each time: ThreadSanitizer must not see in them the accesses of an earlier block.
SharedRegion::SharedRegion(const void* key, size_t bytes, size_t alignment) : key_(key), bytes_(bytes) {
  static_cast<void>(alignment);  // never above shared_margin
  mapping_bytes_ = round_up(bytes, 8) + 2 * shared_margin;
#ifdef SIM_TSAN
  void* const mapping = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<std::byte*>(mapping);
#else
  mapping_ = static_cast<std::byte*>(::operator new(mapping_bytes_, std::align_val_t(shared_margin)));
#endif
  memory_ = mapping_ + shared_margin;
  fill(mapping_, untouched, mapping_bytes_);
  fill(memory_, poison, bytes_);
  ASAN_POISON_MEMORY_REGION(mapping_, shared_margin);
  ASAN_POISON_MEMORY_REGION(memory_ + bytes_, mapping_bytes_ - shared_margin - bytes_);
}

SharedRegion::~SharedRegion() {
  ASAN_UNPOISON_MEMORY_REGION(mapping_, mapping_bytes_);
#ifdef SIM_TSAN
  munmap(mapping_, mapping_bytes_);
#else
  ::operator delete(mapping_, std::align_val_t(shared_margin));
#endif
}

bool SharedRegion::holds(const void* address, size_t bytes) const {
  auto const* const first = static_cast<const std::byte*>(address);
  return first >= memory_ && first + bytes <= memory_ + bytes_;
}

bool SharedRegion::intact() const {
  return intact_margin(mapping_, shared_margin) &&
         intact_margin(memory_ + bytes_, mapping_bytes_ - shared_margin - bytes_);
}

void SharedRegion::publish() { release(&tag_); }

void* SharedRegion::claim() {
  acquire(&tag_);
  return memory_;
}

// ---- device memory -----------------------------------------------------------------------------------------------------
namespace {

constexpr size_t arena_bytes = size_t{4} << 30;  // reserved, not used until touched
constexpr size_t device_alignment = 256;         // what cudaMalloc promises
constexpr size_t device_margin = 256;

struct Arena {
  std::mutex mutex;
  std::byte* base = nullptr;
  size_t capacity = 0;
  size_t used = 0;
  size_t high_water = 0;            // nothing beyond was ever handed out
  int open = 0;                     // DeviceMemoryOpen alive
  std::map<size_t, size_t> free;    // offset -> bytes, neighbours merged
  std::map<size_t, size_t> blocks;  // offset -> bytes asked for

  Arena() {
    void* const mapping = mmap(nullptr, arena_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return;
    base = static_cast<std::byte*>(mapping);
    const char* const text = std::getenv("COUPLET_SIM_MEMORY");
    capacity = text ? std::min(arena_bytes, static_cast<size_t>(std::strtoull(text, nullptr, 10))) : arena_bytes;
    capacity = capacity / 4096 * 4096;
    if (capacity) free[0] = capacity;
  }

  void protect(int protection) const {
    if (high_water) mprotect(base, round_up(high_water, 4096), protection);
  }
};

Arena& arena() {
  static Arena& arena = *new Arena;  // never destroyed: launches may go on while the process ends
  return arena;
}

size_t block_bytes(size_t bytes) { return round_up(bytes, device_alignment) + device_margin; }

}  // namespace

void* allocate_device(size_t bytes) {
  Arena& arena = sim::arena();
  DeviceMemoryOpen const open;
  std::lock_guard const lock(arena.mutex);
  size_t const needed = block_bytes(bytes);
  if (bytes == 0 || needed < bytes) return nullptr;
  auto const place =
      std::find_if(arena.free.begin(), arena.free.end(), [&](const auto& range) { return range.second >= needed; });
  if (place == arena.free.end()) return nullptr;
  auto const [offset, room] = *place;
  arena.free.erase(place);
  if (room > needed) arena.free[offset + needed] = room - needed;
  arena.blocks[offset] = bytes;
  arena.used += needed;
  if (offset + needed > arena.high_water) {
    arena.high_water = offset + needed;
    arena.protect(PROT_READ | PROT_WRITE);
  }
  std::byte* const memory = arena.base + offset;
  ASAN_UNPOISON_MEMORY_REGION(memory, needed);
  fill(memory, poison, bytes);
  fill(memory + bytes, untouched, needed - bytes);
  ASAN_POISON_MEMORY_REGION(memory + bytes, needed - bytes);
  return memory;
}

Released release_device(void* memory) {
  Arena& arena = sim::arena();
  DeviceMemoryOpen const open;
  std::lock_guard const lock(arena.mutex);
  auto const* const address = static_cast<std::byte*>(memory);
  auto const block =
      address < arena.base ? arena.blocks.end() : arena.blocks.find(static_cast<size_t>(address - arena.base));
  if (block == arena.blocks.end()) return Released::unknown;
  auto const [offset, bytes] = *block;
  size_t const length = block_bytes(bytes);
  bool const intact = intact_margin(address + bytes, length - bytes);
  ASAN_POISON_MEMORY_REGION(memory, length);
  arena.blocks.erase(block);
  arena.used -= length;
  auto range = arena.free.emplace(offset, length).first;
  if (auto const next = std::next(range); next != arena.free.end() && offset + length == next->first) {
    range->second += next->second;
    arena.free.erase(next);
  }
  if (range != arena.free.begin()) {
    if (auto const previous = std::prev(range); previous->first + previous->second == range->first) {
      previous->second += range->second;
      arena.free.erase(range);
    }
  }
  return intact ? Released::sound : Released::overrun;
}

size_t device_overrun() {
  Arena& arena = sim::arena();
  std::lock_guard const lock(arena.mutex);
  for (auto const& [offset, bytes] : arena.blocks) {
    std::byte* const end = arena.base + offset + bytes;
    size_t const margin = block_bytes(bytes) - bytes;
    if (intact_margin(end, margin)) continue;
    fill(end, untouched, margin);  // said once
    return bytes;
  }
  return 0;
}

bool is_device(const void* address) {
  const Arena& arena = sim::arena();
  return address >= arena.base && address < arena.base + arena_bytes;
}

size_t device_bytes_total() { return arena().capacity; }

size_t device_bytes_free() {
  Arena& arena = sim::arena();
  std::lock_guard const lock(arena.mutex);
  return arena.capacity - arena.used;
}

DeviceMemoryOpen::DeviceMemoryOpen() {
  Arena& arena = sim::arena();
  std::lock_guard const lock(arena.mutex);
  if (arena.open++ == 0) arena.protect(PROT_READ | PROT_WRITE);
}

DeviceMemoryOpen::~DeviceMemoryOpen() {
  Arena& arena = sim::arena();
  std::lock_guard const lock(arena.mutex);
  if (--arena.open == 0) arena.protect(PROT_NONE);
}

}  // namespace sim
