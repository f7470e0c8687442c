// What Cache and Step hold, for the files of this room alone.
#pragma once

#include <atomic>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "../common/report.h"
#include "blocks.h"
#include "cache.h"

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

// Workspace of the backend's operations, handed from step to step. `counter` has the bytes of all scratch of a cache.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const couplet_backend* backend, std::atomic<int64_t>* counter) : backend_(backend), counter_(counter) {}
  Scratch(Scratch&& other) noexcept { swap(other); }
  Scratch& operator=(Scratch&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Scratch() { release(); }

  void* memory() const { return memory_; }
  size_t bytes() const { return bytes_; }
  bool grow(size_t wanted) {
    if (wanted <= bytes_) return true;
    release();
    memory_ = backend_->memory.allocate(wanted);
    bytes_ = memory_ ? wanted : 0;
    counter_->fetch_add(static_cast<int64_t>(bytes_), std::memory_order_relaxed);
    return memory_ != nullptr;
  }
  void release() {
    if (!memory_) return;
    backend_->memory.release(memory_, bytes_);
    counter_->fetch_sub(static_cast<int64_t>(bytes_), std::memory_order_relaxed);
    memory_ = nullptr;
    bytes_ = 0;
  }

 private:
  void swap(Scratch& other) {
    std::swap(backend_, other.backend_);
    std::swap(counter_, other.counter_);
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
  }
  const couplet_backend* backend_ = nullptr;
  std::atomic<int64_t>* counter_ = nullptr;
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

inline constexpr size_t idle_scratch_count = 4;
inline constexpr size_t idle_scratch_bytes = size_t{4} << 20;  // more than this goes back to the system after its step

struct StepRowState {
  StepRow row;
  Sequence* sequence = nullptr;  // nothing but this step's commit changes it
  int64_t old_length = 0, new_length = 0;
  int64_t old_coded_end = 0, new_coded_end = 0;
  Tail codes, sinks, window;
  std::vector<uint8_t*> pages;  // the page table after the step; NULL where no code will ever lie (all sinks)
};

enum class StepPhase { open, running, failed, closed };

struct Step::State {
  std::shared_ptr<Cache> cache;
  std::shared_ptr<const Codebook> codebook;
  Prefill prefill = Prefill::exact;
  std::vector<StepRow> public_rows;
  std::vector<StepRowState> rows;
  std::vector<bool> layer_done;
  // Used by the one attend that runs:
  Scratch scratch;
  std::vector<couplet_dense_rows> dense;
  std::vector<couplet_attend_sequence> sequences;
  // Under the mutex of the cache:
  StepPhase phase = StepPhase::open;
  bool abort_wanted = false;

  couplet_status check_layer(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                             couplet_report* report) const;
  couplet_status run_layer(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                           couplet_report* report);

 private:
  couplet_status copy_shared(const StepRowState& row, int32_t layer, couplet_report* report);
  couplet_status store_raw(const StepRowState& row, int32_t layer, const StepData& data, couplet_report* report);
  couplet_status encode_leaving(const StepRowState& row, int32_t layer, const StepData& data, couplet_report* report);
  couplet_status encode_run(const StepRowState& row, int32_t layer, const StepData& data, int64_t first_token,
                            int64_t tokens, couplet_report* report);
  void gather_dense(const StepRowState& row, const StepData& data, int32_t layer);
  void gather_queries(const StepRowState& row, const StepData& data, int64_t begin, int64_t end, size_t dense_offset,
                      size_t dense_count);
  couplet_attend_params attend_params(int32_t layer, const AttendOptions& options) const;
  couplet_status attend_rows(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                             couplet_report* report);
};

struct Cache::State {
  State(Device owner, const CacheConfig& given)
      : device(owner), config(given), pool(owner.backend, given.budget_bytes) {}

  const Device device;
  const CacheConfig config;
  CodeLayout code_layout;
  RawLayout raw_layout;
  Region codes, sinks, window;
  std::atomic<int64_t> scratch_bytes{0};

  mutable std::mutex mutex;  // guards what follows, and the fields of Step::State that say so
  BlockPool pool;            // declared before everything that holds blocks
  std::shared_ptr<const Codebook> codebook;
  std::unordered_map<SequenceId, Sequence> sequences;
  std::unordered_set<Step::State*> open_steps;
  std::vector<Scratch> idle_scratch;
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
  void trim(Sequence* sequence) const;        // drops the blocks in which nothing is live
  void end_step(Step::State* step) noexcept;  // frees what the step reserved and lets its sequences go
};

}  // namespace couplet
