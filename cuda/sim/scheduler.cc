#include "scheduler.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "device_state.h"
#include "fiber.h"
#include "memory.h"
#include "random.h"

namespace sim {

const Place* place;
dim3 grid_dim;
dim3 block_dim;

namespace {

struct Block;

enum class State : uint8_t { ready, at_barrier, in_collective, finished };

struct GpuThread : Place {
  explicit GpuThread(void (*body)()) : fiber(body) {}

  Fiber fiber;
  Block* owner = nullptr;
  State state = State::finished;
  Location where;
  int barrier = 0;                // while at_barrier
  unsigned barriers_met = 0;      // calls so far
  uint32_t mask = 0;              // while in_collective
  Operation operation = nullptr;  //
  void* operand = nullptr;        //
  int copy_group = 0;             // groups committed so far
  std::vector<AsyncCopy> copies;  // issued and not landed, oldest first
};

// Lanes that wait in one and the same collective.
struct Meeting {
  Operation operation = nullptr;
  uint32_t mask = 0;
  uint32_t lanes = 0;
  Location where;
};

struct Warp {
  uint32_t waiting = 0;  // lanes in a collective
  uint32_t absent = 0;   // lanes that have exited, or lie beyond the block
  unsigned fewest_barriers_of_exited = ~0u;
  Meeting meeting;  // the one joined last: as a rule, the only one
  unsigned generation = 0;
  char order_tags[2] = {};  // of __syncwarp, alternating: a fast lane may be one generation ahead, never two
  std::vector<uint8_t> lanes;
};

struct Barrier {
  unsigned arrived = 0;
  unsigned expected = 0;
  unsigned generation = 0;
  char order_tags[2] = {};
  Location where;
};

struct Block {
  uint3 index{};
  unsigned alive = 0;
  std::vector<GpuThread*> threads;
  std::vector<Warp> warps;
  std::vector<uint16_t> warp_order;
  Barrier barriers[16];
  std::vector<std::unique_ptr<SharedRegion>> shared;
};

struct Run {  // of one launch
  const Launch* launch = nullptr;
  Random random{1};
  bool failed = false;
  bool leave_warp = false;  // the running thread asks for another warp's turn
  bool entered = false;     // some thread ran since this was cleared
  bool progress = false;    // ... and did more than spin
  unsigned idle_rounds = 0;
  char launch_tag = 0;
  char exit_tag = 0;
};

constexpr unsigned warp_lanes = 32;
constexpr unsigned most_idle_rounds = 100'000;

std::mutex device;  // one launch at a time
Run run_state;
std::string failure;
// Threads between blocks, oldest first. Never destroyed: launches may go on while the process ends. A block takes them from
// the front, and there are more than it needs, so that two blocks in succession do not look like one to ThreadSanitizer.
std::vector<GpuThread*>& pool = *new std::vector<GpuThread*>;

GpuThread& running() { return *const_cast<GpuThread*>(static_cast<const GpuThread*>(place)); }

void pause() { running().fiber.leave(); }

bool shuffled() { return options().schedule == Schedule::shuffled; }

[[gnu::format(printf, 1, 2)]] std::string text_of(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

bool same_place(Location left, Location right) {
  bool const same_file = left.file_name() == right.file_name() || std::strcmp(left.file_name(), right.file_name()) == 0;
  return left.line() == right.line() && left.column() == right.column() && same_file;
}

// No string: a fiber that fails is dropped with all that it owns.
struct Position {
  explicit Position(Location where) {
    std::snprintf(text, sizeof text, "%s:%u", where.file_name(), static_cast<unsigned>(where.line()));
  }
  char text[256];
};

std::string name_of(const uint3& index) { return text_of("(%u,%u,%u)", index.x, index.y, index.z); }

void keep_failure(const std::string& text) {
  if (!options().quiet) std::fprintf(stderr, "sim: %s\n", text.c_str());
  if (failure.empty()) failure = text;
  run_state.failed = true;
}

void open_barrier(Block& block, int id) {
  Barrier& barrier = block.barriers[id];
  barrier.arrived = 0;
  barrier.expected = 0;
  ++barrier.generation;
  ++statistics().barriers;
  for (GpuThread* thread : block.threads)
    if (thread->state == State::at_barrier && thread->barrier == id) thread->state = State::ready;
}

// A barrier of the whole block waits for the threads that are left. PTX allows a warp to have exited as a whole only.
void finish_thread(GpuThread& thread) {
  Block& block = *thread.owner;
  if (!thread.copies.empty())
    return fail(thread.where, "the thread exited with asynchronous copies that it never waited for");
  release(&run_state.exit_tag);
  thread.state = State::finished;
  Warp& warp = block.warps[thread.linear / warp_lanes];
  warp.absent |= 1u << thread.linear % warp_lanes;
  warp.fewest_barriers_of_exited = std::min(warp.fewest_barriers_of_exited, thread.barriers_met);
  --block.alive;
  Barrier& whole = block.barriers[0];
  if (block.alive && whole.arrived == block.alive && whole.expected == 0) open_barrier(block, 0);
}

void thread_body() {
  for (;;) {
    acquire(&run_state.launch_tag);
    run_state.launch->kernel(run_state.launch->arguments);
    finish_thread(running());
    pause();
  }
}

std::unique_ptr<Block> start_block(uint64_t number) {
  const Launch& launch = *run_state.launch;
  unsigned const count = launch.block.x * launch.block.y * launch.block.z;
  auto block = std::make_unique<Block>();
  block->index = {static_cast<unsigned>(number % launch.grid.x),
                  static_cast<unsigned>(number / launch.grid.x % launch.grid.y),
                  static_cast<unsigned>(number / launch.grid.x / launch.grid.y)};
  block->alive = count;
  if (launch.shared_bytes) {
    block->shared.push_back(std::make_unique<SharedRegion>(nullptr, launch.shared_bytes, 128));
    block->shared.back()->publish();
  }
  while (pool.size() < 2 * count) pool.push_back(new GpuThread(thread_body));
  block->threads.assign(pool.begin(), pool.begin() + count);
  pool.erase(pool.begin(), pool.begin() + count);
  bool const descending = options().schedule == Schedule::reversed;
  for (unsigned linear = 0; linear < count; ++linear) {
    GpuThread& thread = *block->threads[linear];
    thread.thread = {linear % launch.block.x, linear / launch.block.x % launch.block.y,
                     linear / launch.block.x / launch.block.y};
    thread.block = block->index;
    thread.linear = linear;
    thread.owner = block.get();
    thread.state = State::ready;
    thread.where = Location();
    thread.barriers_met = 0;
    thread.copy_group = 0;
    thread.copies.clear();
  }
  unsigned const warps = (count + warp_lanes - 1) / warp_lanes;
  block->warps.resize(warps);
  for (unsigned index = 0; index < warps; ++index) {
    Warp& warp = block->warps[index];
    unsigned const lanes = std::min(warp_lanes, count - index * warp_lanes);
    if (lanes < warp_lanes) warp.absent = ~0u << lanes;
    for (unsigned lane = 0; lane < lanes; ++lane)
      warp.lanes.push_back(static_cast<uint8_t>(descending ? lanes - 1 - lane : lane));
    block->warp_order.push_back(static_cast<uint16_t>(descending ? warps - 1 - index : index));
  }
  return block;
}

void end_block(Block& block) {
  for (const auto& region : block.shared)
    if (!run_state.failed && !region->intact())
      keep_failure(text_of("block %s wrote outside its shared memory, beside the %s variable of %zu bytes",
                           name_of(block.index).c_str(), region->key() ? "static" : "dynamic", region->bytes()));
  for (GpuThread* thread : block.threads) {
    if (thread->state != State::finished) thread->fiber.restart(&run_state.exit_tag);
    thread->state = State::finished;
    pool.push_back(thread);
  }
}

void enter(GpuThread& thread) {
  place = &thread;
  ++statistics().switches;
  thread.fiber.enter();
  place = nullptr;
}

// Runs the warp until every lane of it waits, is gone, or spins.
void run_warp(Block& block, unsigned index) {
  Warp& warp = block.warps[index];
  for (bool again = true; again && !run_state.failed;) {
    again = false;
    if (shuffled()) run_state.random.shuffle(warp.lanes);
    for (uint8_t lane : warp.lanes) {
      GpuThread& thread = *block.threads[index * warp_lanes + lane];
      if (thread.state != State::ready) continue;
      bool const before = run_state.progress;
      run_state.progress = true;
      run_state.entered = true;
      enter(thread);  // clears progress when it only spun
      again |= run_state.progress;
      run_state.progress |= before;
      if (run_state.failed || std::exchange(run_state.leave_warp, false)) return;
    }
    if (shuffled() && run_state.random.below(8) == 0) return;
  }
}

void describe_stuck(const Block& block, std::string& text) {
  for (size_t first = 0; first < block.threads.size();) {
    const GpuThread& thread = *block.threads[first];
    size_t last = first;
    auto const alike = [&](const GpuThread& other) {
      return other.state == thread.state && other.mask == thread.mask && other.where.line() == thread.where.line();
    };
    while (last + 1 < block.threads.size() && alike(*block.threads[last + 1])) ++last;
    if (thread.state != State::finished) {
      text += text_of("\n  block %s, threads %zu to %zu wait ", name_of(block.index).c_str(), first, last);
      if (thread.state == State::in_collective) text += text_of("for lanes %08x of their warp, ", thread.mask);
      if (thread.state == State::at_barrier) text += text_of("at barrier %d, ", thread.barrier);
      if (thread.state == State::ready) text += "in a loop, ";
      text += Position(thread.where).text;
    }
    first = last + 1;
  }
}

void run_blocks() {
  const Launch& launch = *run_state.launch;
  uint64_t const total = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  size_t const resident = shuffled() ? 1 + run_state.random.below(3) : 1;
  bool const descending = options().schedule == Schedule::reversed || (shuffled() && run_state.random.below(2));
  std::vector<std::unique_ptr<Block>> live;
  uint64_t started = 0;
  while (!run_state.failed && (started < total || !live.empty())) {
    for (; started < total && live.size() < resident; ++started)
      live.push_back(start_block(descending ? total - 1 - started : started));
    run_state.progress = false;
    run_state.entered = false;
    if (shuffled()) run_state.random.shuffle(live);
    for (const auto& block : live) {
      if (shuffled()) run_state.random.shuffle(block->warp_order);
      for (uint16_t warp : block->warp_order)
        if (!run_state.failed) run_warp(*block, warp);
    }
    run_state.idle_rounds = run_state.progress ? 0 : run_state.idle_rounds + 1;
    if (!run_state.failed && (!run_state.entered || run_state.idle_rounds > most_idle_rounds)) {
      std::string text = run_state.entered ? "livelock: threads spin and nothing changes" : "deadlock";
      for (const auto& block : live) describe_stuck(*block, text);
      keep_failure(text);
    }
    for (auto block = live.begin(); block != live.end();) {
      if ((*block)->alive == 0) end_block(**block);
      block = (*block)->alive == 0 ? live.erase(block) : block + 1;
    }
  }
  for (const auto& block : live) end_block(*block);
}

Options from_environment() {
  Options options;
  if (const char* text = std::getenv("COUPLET_SIM_SCHEDULE")) {
    std::string const name = text;
    if (name == "reversed") options.schedule = Schedule::reversed;
    if (name.rfind("shuffled", 0) == 0) options.schedule = Schedule::shuffled;
    if (name.rfind("shuffled:", 0) == 0) options.seed = std::strtoull(text + 9, nullptr, 10);
    if (name != "forward" && options.schedule == Schedule::forward)
      std::fprintf(stderr, "sim: COUPLET_SIM_SCHEDULE=%s is none of forward, reversed, shuffled, shuffled:<seed>\n",
                   text);
  }
  if (const char* text = std::getenv("COUPLET_SIM_SHARED_LIMIT"))
    options.shared_limit = std::strtoull(text, nullptr, 10);
  return options;
}

}  // namespace

Options& options() {
  static Options options = from_environment();
  return options;
}

Statistics& statistics() {
  static Statistics statistics;
  return statistics;
}

std::string take_failure() {
  std::lock_guard const lock(device);
  std::string text;
  text.swap(failure);
  return text;
}

bool has_failure() {
  std::lock_guard const lock(device);
  return !failure.empty();
}

void fail(Location where, const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  if (!place) {
    std::lock_guard const lock(device);
    return keep_failure(text_of("%s: %s", Position(where).text, message));
  }
  keep_failure(text_of("%s: %s (block %s, thread %s)", Position(where).text, message, name_of(place->block).c_str(),
                       name_of(place->thread).c_str()));
  pause();  // for ever: the launch is over
}

bool run(const Launch& launch) {
  std::lock_guard const lock(device);
  uint64_t const count = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  uint64_t const blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  run_state = Run{};
  run_state.launch = &launch;
  run_state.random = Random(options().seed + statistics().launches++);
  statistics().threads += count * blocks;
  grid_dim = launch.grid;
  block_dim = launch.block;
  adopt_scheduler_thread();
  DeviceMemoryOpen const open;
  release(&run_state.launch_tag);
  run_blocks();
  acquire(&run_state.exit_tag);
  if (size_t const bytes = device_overrun(); bytes && !run_state.failed)
    keep_failure(text_of("a launch of %s blocks of %s threads wrote behind the end of device memory of %zu bytes",
                         name_of({grid_dim.x, grid_dim.y, grid_dim.z}).c_str(),
                         name_of({block_dim.x, block_dim.y, block_dim.z}).c_str(), bytes));
  return !run_state.failed;
}

void interruption() {
  if (shuffled() && run_state.random.below(4) == 0) pause();
}

void spin(Location where) {
  running().where = where;
  run_state.progress = false;
  pause();
}

namespace {

// The thread comes to a barrier. True when that opens it.
bool come(Barrier& barrier, int id, unsigned threads, Location where) {
  GpuThread& thread = running();
  const Block& block = *thread.owner;
  if (id < 0 || id > 15) fail(where, "barrier %d: there are 0 to 15", id);
  if (threads % warp_lanes != 0) fail(where, "barrier %d of %u threads: not a multiple of 32", id, threads);
  if (threads > block.threads.size())
    fail(where, "barrier %d of %u threads in a block of %zu", id, threads, block.threads.size());
  if (block.warps[thread.linear / warp_lanes].fewest_barriers_of_exited < ++thread.barriers_met)
    fail(where, "a barrier that other lanes of this warp will never come to: they have exited");
  if (barrier.arrived && barrier.expected != threads)
    fail(where, "barrier %d of %u threads, while others wait at it as one of %u, %s", id, threads, barrier.expected,
         Position(barrier.where).text);
  if (threads == 0 && barrier.arrived && !same_place(barrier.where, where))
    fail(where, "threads of one block meet at different barriers; others wait at %s", Position(barrier.where).text);
  barrier.expected = threads;
  barrier.where = where;
  return ++barrier.arrived == (threads ? threads : block.alive);
}

}  // namespace

void barrier(int id, unsigned threads, Location where) {
  GpuThread& thread = running();
  Block& block = *thread.owner;
  Barrier& barrier = block.barriers[id & 15];
  char* const tag = &barrier.order_tags[barrier.generation % 2];
  release(tag);
  bool const opens = come(barrier, id, threads, where);
  thread.state = State::at_barrier;
  thread.barrier = id;
  thread.where = where;
  if (opens) open_barrier(block, id);
  pause();
  acquire(tag);
}

void barrier_arrive(int id, unsigned threads, Location where) {
  Barrier& barrier = running().owner->barriers[id & 15];
  if (threads == 0) fail(where, "barrier %d: who only arrives says how many threads it is for", id);
  release(&barrier.order_tags[barrier.generation % 2]);
  if (come(barrier, id, threads, where)) open_barrier(*running().owner, id);
  // Whoever it lets through may be faster than the rest of this warp.
  if (options().schedule == Schedule::forward) return;
  run_state.leave_warp = true;
  pause();
}

void collective(Operation operation, uint32_t mask, void* operand, Location where, bool orders_memory) {
  GpuThread& thread = running();
  Block& block = *thread.owner;
  unsigned const lane = thread.linear % warp_lanes;
  GpuThread** const lanes = &block.threads[thread.linear - lane];
  Warp& warp = block.warps[thread.linear / warp_lanes];
  uint32_t const bit = 1u << lane;
  if (!(mask & bit)) fail(where, "lane %u is not in the mask %08x of the collective that it calls", lane, mask);
  if (mask & warp.absent)
    fail(where, "the mask %08x names lanes %08x, which have exited or are beyond the block", mask, mask & warp.absent);
  thread.state = State::in_collective;
  thread.operation = operation;
  thread.mask = mask;
  thread.operand = operand;
  thread.where = where;
  char* const tag = &warp.order_tags[warp.generation % 2];
  if (orders_memory) release(tag);
  // __syncwarp may be reached by several ways; every other collective is one instruction.
  auto const fits = [&](Operation other, uint32_t other_mask, Location place) {
    return other == operation && other_mask == mask && (orders_memory || same_place(place, where));
  };
  Meeting& meeting = warp.meeting;
  bool const joins = (warp.waiting & mask) == meeting.lanes && fits(meeting.operation, meeting.mask, meeting.where);
  for (uint32_t others = joins ? 0 : warp.waiting & mask; others; others &= others - 1) {
    const GpuThread& other = *lanes[__builtin_ctz(others)];
    if (!fits(other.operation, other.mask, other.where))
      fail(where, "lane %u (mask %08x) meets lane %u in another collective (mask %08x), %s", lane, mask,
           other.linear % warp_lanes, other.mask, Position(other.where).text);
  }
  meeting = {operation, mask, (warp.waiting & mask) | bit, where};
  warp.waiting |= bit;
  if ((warp.waiting & mask) == mask) {
    void* operands[warp_lanes] = {};
    for (uint32_t left = mask; left; left &= left - 1)
      operands[__builtin_ctz(left)] = lanes[__builtin_ctz(left)]->operand;
    operation(operands, mask, where);
    warp.waiting &= ~mask;
    ++warp.generation;
    ++statistics().collectives;
    for (uint32_t left = mask; left; left &= left - 1) lanes[__builtin_ctz(left)]->state = State::ready;
    interruption();
  } else {
    pause();
  }
  if (orders_memory) acquire(tag);
}

void* dynamic_shared(Location where) {
  for (const auto& region : running().owner->shared)
    if (!region->key()) return region->claim();
  fail(where, "the launch gave this kernel no dynamic shared memory");
  return nullptr;
}

void* static_shared(const void* key, size_t bytes, size_t alignment, Location where) {
  constexpr size_t static_limit = 48 << 10;
  auto& shared = running().owner->shared;
  size_t static_bytes = bytes;
  size_t all_bytes = bytes;
  for (const auto& region : shared) {
    if (region->key() == key) return region->claim();
    all_bytes += region->bytes();
    if (region->key()) static_bytes += region->bytes();
  }
  if (static_bytes > static_limit)
    fail(where, "%zu bytes of static shared memory; the limit is %zu", static_bytes, static_limit);
  if (all_bytes > options().shared_limit)
    fail(where, "%zu bytes of shared memory; the limit is %zu", all_bytes, options().shared_limit);
  {
    AsScheduler const scheduler;
    shared.push_back(std::make_unique<SharedRegion>(key, bytes, alignment));
    shared.back()->publish();
  }
  return shared.back()->claim();
}

bool is_shared(const void* address, size_t bytes) {
  const auto& shared = running().owner->shared;
  return std::any_of(shared.begin(), shared.end(), [&](const auto& region) { return region->holds(address, bytes); });
}

bool async_copy_lands_now(const AsyncCopy& copy) {
  GpuThread& thread = running();
  if (options().schedule == Schedule::reversed || (shuffled() && run_state.random.below(2))) return true;
  thread.copies.push_back(copy);
  thread.copies.back().group = thread.copy_group;
  return false;
}

void async_commit() { ++running().copy_group; }

bool async_landing(int groups_left, AsyncCopy& copy) {
  GpuThread& thread = running();
  if (thread.copies.empty() || thread.copies.front().group >= thread.copy_group - groups_left) return false;
  copy = thread.copies.front();
  thread.copies.erase(thread.copies.begin());
  return true;
}

}  // namespace sim
