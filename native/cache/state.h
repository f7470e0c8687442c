// What Cache and Step hold, for the files of this room alone.
#pragma once

#include <atomic>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "../common/report.h"
#include "blocks.h"
#include "cache.h"
#include "memory.h"

namespace couplet {

// Tokens [0, min(sinks, length)) and [coded_end, length) are raw, tokens [sinks, coded_end) are coded.
// Each list covers exactly what is live in it. coded_end is never below sinks.
struct Sequence {
  int64_t length = 0;
  int64_t coded_end = 0;
  BlockList codes, sinks, window;
  bool in_step = false;
  bool abandoned = false;
};

// What is kept for the next steps. More goes back to the system; a device takes its time for that, and waits for all of its work.
inline constexpr size_t idle_memory_count = 4;
inline constexpr size_t idle_host_bytes = size_t{4} << 20;
inline constexpr size_t idle_device_bytes = size_t{64} << 20;

struct StepRowState {
  StepRow row;
  Sequence* sequence = nullptr;  // nothing but this step's commit changes it
  int64_t old_length = 0, new_length = 0;
  int64_t old_coded_end = 0, new_coded_end = 0;
  Tail codes, sinks, window;
  std::vector<uint8_t*> pages;           // the page table after the step; NULL where no code will ever lie (all sinks)
  uint8_t* const* page_table = nullptr;  // that, in the device's memory
};

// Positions [begin, end) of a row of the step, in a block or, where that is NULL, in what the caller gives.
struct Piece {
  size_t row = 0;
  int64_t begin = 0, end = 0;
  const Block* block = nullptr;
  int64_t slot = 0;  // of `begin` in the block

  int32_t tokens() const { return static_cast<int32_t>(end - begin); }
};

// What a step does in each of its layers, in the order in which backends count the tokens.
struct StepPlan {
  std::vector<Piece> given;     // all new tokens, a piece for each row
  std::vector<Piece> kept;      // new tokens that go into raw blocks
  std::vector<Piece> held;      // tokens that leave the window from raw blocks
  std::vector<Piece> fresh;     // new tokens that are coded at once
  int64_t gathered_tokens = 0;  // held, of rows whose held tokens lie in more than one block
};

// What a report speaks of: one for each call of store or encode in a layer, and for encode in each of its parts.
enum class ReportSlot { convert, keep, held_keys, held_values, fresh_keys, fresh_values, count };

enum class StepPhase { open, running, failed, closed };

struct Step::State {
  std::shared_ptr<Cache> cache;
  std::shared_ptr<const Codebook> codebook;
  Prefill prefill = Prefill::exact;
  std::vector<StepRow> public_rows;
  std::vector<StepRowState> rows;
  StepPlan plan;
  std::vector<bool> layer_done;
  StepMemory memory;
  // Under the mutex of the cache:
  StepPhase phase = StepPhase::open;
  bool abort_wanted = false;

  // Used by the one call that runs, or by the end of the step:
  struct Unread {
    int32_t layer;
    size_t part;
    int32_t first_head;  // of the part
    ReportSlot slot;
  };
  void* stream = nullptr;      // of the work that was enqueued last
  bool enqueued = false;       // it may be under way
  std::vector<Unread> unread;  // reports on the device that nobody has looked at
  bool tables_uploaded = false;

  Cache::State& owner() const { return *cache->state_; }
  couplet_status check_layer(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                             couplet_report* report) const;
  couplet_status run_layer(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                           couplet_report* report);
  couplet_status enter(couplet_report* report) const;  // whether a call may run
  couplet_status leave(couplet_status status, int32_t layer, couplet_report* report);
  couplet_status synchronize(couplet_report* report);  // until what was enqueued is done
  couplet_status finish(couplet_report* report);       // that, and tells of a NaN or an infinity in what it was given

  // At least so many bytes; what the memory held is gone.
  couplet_status reserve(Scratch* scratch, size_t bytes, couplet_report* report);
  // Host memory that stays as it is until the device has read it; for a CPU, until the next layer.
  couplet_status stage(size_t bytes, uint8_t** out, couplet_report* report);

  size_t reports_bytes() const;                                             // of the start of memory.tables
  size_t report_offset(int32_t layer, size_t part, ReportSlot slot) const;  // in there
  // `found` is of a backend, which knows calls, runs and the heads of a part; this is about layers, positions and all heads.
  couplet_status not_finite(const Unread& call, const couplet_report& found, couplet_report* report) const;

 private:
  class Layer;
};

// More than store and encode of any backend want for a workspace, which begins with their report.
inline constexpr size_t report_bytes = 512;

struct Cache::State {
  State(Device owner, const CacheConfig& given)
      : device(owner), config(given), pool(owner.backend, given.budget_bytes) {}

  const Device device;
  const CacheConfig config;
  CodeLayout code_layout;
  size_t most_parts = 1;  // of a layer
  RawLayout raw_layout;
  Region codes, sinks, window;
  std::atomic<int64_t> scratch_bytes{0};

  mutable std::mutex mutex;  // guards what follows, and the fields of Step::State that say so
  BlockPool pool;            // declared before everything that holds blocks
  std::shared_ptr<const Codebook> codebook;
  std::unordered_map<SequenceId, Sequence> sequences;
  std::unordered_set<Step::State*> open_steps;
  std::vector<StepMemory> idle_memory;
  SequenceId next_id = 1;
  bool disposed = false;

  int64_t block_bytes(const Region& region, int64_t index) const {
    return region.kind == BlockKind::codes ? code_layout.block_bytes : raw_layout.block_bytes(region.capacity(index));
  }
  template <class Visit>  // visit(const Region&, Tail*)
  void for_each_tail(StepRowState* row, const Visit& visit) const {
    visit(codes, &row->codes);
    visit(sinks, &row->sinks);
    visit(window, &row->window);
  }
  // The rest needs the mutex.
  couplet_status find(SequenceId id, Sequence** out, couplet_report* report);       // any live sequence
  couplet_status find_idle(SequenceId id, Sequence** out, couplet_report* report);  // one that is in no step
  couplet_status plan(std::span<const StepRow> rows, std::vector<StepRowState>* out, couplet_report* report);
  couplet_status reserve(std::vector<StepRowState>* rows, couplet_report* report);
  couplet_status take_in(const Sequence& source, Sequence* out, couplet_report* report);
  couplet_status fail_full(int64_t needed, couplet_report* report) const;
  StepPlan plan_layers(const std::vector<StepRowState>& rows) const;
  void trim(Sequence* sequence) const;        // drops the blocks in which nothing is live
  void end_step(Step::State* step) noexcept;  // frees what the step reserved and lets its sequences go
};

}  // namespace couplet
