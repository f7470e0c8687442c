// Runs one kernel launch on the calling thread: a fiber for every GPU thread, blocks and warps in an order that tries to do harm.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <source_location>
#include <string>

namespace sim {

using Location = std::source_location;

// What a device may legally do, chosen to be as unlike the last run as possible. A correct kernel gives the same result in all.
//   forward   blocks, warps and lanes ascending; asynchronous copies land as late as they may
//   reversed  descending; copies land at once; streams run their work only when somebody waits for it
//   shuffled  by seed: order, several blocks at a time, interruptions at atomics, each copy early or late, streams too
// In all of them one warp runs until it must wait for another, which is the greatest lead it can have.
enum class Schedule { forward, reversed, shuffled };

struct Options {
  Schedule schedule = Schedule::forward;
  uint64_t seed = 1;
  size_t shared_limit = 227 << 10;  // bytes a block may ask for; sm_80 has 163 KB, sm_86, 89 and 120 have 99 KB
  bool quiet = false;               // failures are kept for take_failure() and not printed
};

// From COUPLET_SIM_SCHEDULE (forward, reversed, shuffled or shuffled:<seed>) and COUPLET_SIM_SHARED_LIMIT (bytes) at first use.
Options& options();

struct Statistics {
  uint64_t launches = 0;
  uint64_t threads = 0;
  uint64_t switches = 0;
  uint64_t barriers = 0;     // of a block, completed
  uint64_t collectives = 0;  // of a warp, completed
};
Statistics& statistics();

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;  // dynamic
  void (*kernel)(void* arguments);
  void* arguments;
};

// False when the kernel broke a rule; why is in take_failure(). Threads that had not finished are dropped where they stood.
bool run(const Launch& launch);

// The text of the first failure since the last call, with file and line; empty when there was none.
std::string take_failure();
bool has_failure();

// ---- for code that runs inside a kernel ------------------------------------------------------------------------------
// Ends the launch. Outside a kernel it only keeps the text.
[[gnu::format(printf, 2, 3)]] void fail(Location where, const char* format, ...);

// A point at which another thread may run first.
void interruption();
// As above, for a thread that waits in a loop for what another one writes. Fails when it has waited for long in vain.
void spin(Location where);

// Waits at barrier `id` (0 to 15) until `threads` threads have come, or all of the block when it is 0.
void barrier(int id, unsigned threads, Location where);
void barrier_arrive(int id, unsigned threads, Location where);

// All lanes of `mask` come here with the same operation and mask; the last one applies it to the operands of all,
// operands[lane] being NULL for lanes outside the mask. `orders_memory` is true for __syncwarp alone.
using Operation = void (*)(void* const* operands, uint32_t mask, Location where);
void collective(Operation operation, uint32_t mask, void* operand, Location where, bool orders_memory = false);

void* dynamic_shared(Location where);
void* static_shared(const void* key, size_t bytes, size_t alignment, Location where);

// Whether [address, address + bytes) lies in one shared variable of the running block.
bool is_shared(const void* address, size_t bytes);

// cp.async: a copy lands at its issue (then async_copy is true and the caller does it now) or when its group is waited for.
struct AsyncCopy {
  void* to;
  const void* from;
  unsigned bytes;         // written
  unsigned source_bytes;  // read; the rest is written as zeros
  int group;
};
bool async_copy_lands_now(const AsyncCopy& copy);
void async_commit();
bool async_landing(int groups_left,
                   AsyncCopy& copy);  // the next copy that a wait for all but `groups_left` groups completes

}  // namespace sim
