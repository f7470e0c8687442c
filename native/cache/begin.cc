// How a step starts and ends: what it reserves, and how its sequences take that over or let it go.
#include <new>

#include "state.h"

namespace couplet {
namespace {

// The page table that the row's sequence will have after the step.
void gather_pages(const Region& region, StepRowState* row, int64_t sinks) {
  if (row->new_coded_end <= sinks) return;
  const BlockList& held = row->sequence->codes;
  row->pages.resize(static_cast<size_t>(region.blocks_until(row->new_coded_end)));
  for (int64_t index = region.index(sinks); index < static_cast<int64_t>(row->pages.size()); ++index) {
    bool const is_new = !row->codes.blocks.empty() && index >= row->codes.first;
    row->pages[static_cast<size_t>(index)] = is_new ? row->codes.at(index).memory() : held.at(index)->memory();
  }
}

// Whether the backend has so much at all. A system that overcommits grants small pieces without end and ends the process
// when they are touched; one piece of the whole size it refuses.
bool obtainable(const couplet_memory_entries& memory, int64_t bytes) {
  constexpr int64_t gibibyte = int64_t{1} << 30;
  if (bytes < gibibyte) return true;
  void* const probe = memory.allocate(static_cast<size_t>(bytes));
  if (probe) memory.release(probe, static_cast<size_t>(bytes));
  return probe != nullptr;
}

}  // namespace

couplet_status Cache::State::plan(std::span<const StepRow> rows, std::vector<StepRowState>* out,
                                  couplet_report* report) {
  if (rows.empty())
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected at least one sequence for a step but received none");
  std::unordered_set<SequenceId> seen;
  for (const StepRow& row : rows) {
    StepRowState next;
    next.row = row;
    couplet_status const status = find_idle(row.sequence, &next.sequence, report);
    if (status != COUPLET_OK) return status;
    if (!seen.insert(row.sequence).second) {
      return fail(report, COUPLET_INVALID_ARGUMENT, {},
                  "Expected each sequence once in a step but received one of them twice");
    }
    const Sequence& sequence = *next.sequence;
    if (row.tokens < 0 || row.tokens > INT32_MAX - sequence.length) {
      return fail(report, COUPLET_INVALID_ARGUMENT, {},
                  "Expected 0 to %lld new tokens (a sequence holds at most 2^31 - 1) but received %d",
                  static_cast<long long>(INT32_MAX - sequence.length), row.tokens);
    }
    next.old_length = sequence.length;
    next.new_length = sequence.length + row.tokens;
    next.old_coded_end = sequence.coded_end;
    next.new_coded_end =
        config.window < 0 ? sequence.coded_end : std::max(sequence.coded_end, next.new_length - config.window);
    int64_t const old_sinks = std::min<int64_t>(next.old_length, config.sinks);
    int64_t const new_sinks = std::min<int64_t>(next.new_length, config.sinks);
    next.codes =
        plan_tail(sequence.codes, codes, next.old_coded_end, next.new_coded_end, config.sinks, next.old_coded_end);
    next.sinks = plan_tail(sequence.sinks, sinks, old_sinks, new_sinks, 0, old_sinks);
    next.window = plan_tail(sequence.window, window, std::max(next.new_coded_end, next.old_length), next.new_length,
                            next.new_coded_end, next.old_length);
    out->push_back(std::move(next));
  }
  return COUPLET_OK;
}

couplet_status Cache::State::reserve(std::vector<StepRowState>* rows, couplet_report* report) {
  int64_t needed = 0;
  for (StepRowState& row : *rows) {
    for_each_tail(&row, [&](const Region& region, Tail* tail) {
      for (int64_t index = tail->first; index < tail->end(); ++index) {
        if (!tail->blocks[static_cast<size_t>(index - tail->first)]) needed += block_bytes(region, index);
      }
    });
  }
  if (!pool.fits(needed)) {
    return fail(report, COUPLET_CACHE_FULL, {},
                "The step needs %lld bytes and %lld of the cache's %lld are free; truncate, reset or dispose a "
                "sequence, or create "
                "the cache with more memory",
                static_cast<long long>(needed),
                static_cast<long long>(std::max<int64_t>(0, pool.budget_bytes() - pool.used_bytes())),
                static_cast<long long>(pool.budget_bytes()));
  }
  bool complete = obtainable(device.backend->memory, needed);
  for (StepRowState& row : *rows) {
    for_each_tail(&row, [&](const Region& region, Tail* tail) {
      for (int64_t index = tail->first; index < tail->end() && complete; ++index) {
        BlockRef& block = tail->blocks[static_cast<size_t>(index - tail->first)];
        if (!block) block = pool.allocate(region.kind, block_bytes(region, index), region.capacity(index));
        complete = block != nullptr;
      }
    });
    if (!complete) {
      return fail(report, COUPLET_OUT_OF_MEMORY, {}, "The system has no memory for the %lld bytes that the step needs",
                  static_cast<long long>(needed));
    }
    gather_pages(codes, &row, config.sinks);
    reserve_tail(&row.sequence->codes, row.codes);
    reserve_tail(&row.sequence->sinks, row.sinks);
    reserve_tail(&row.sequence->window, row.window);
  }
  return COUPLET_OK;
}

couplet_status Cache::begin(std::span<const StepRow> rows, Prefill prefill, std::shared_ptr<Step>* out,
                            couplet_report* report) try {
  std::shared_ptr<Step> step(new Step);  // before the lock: what *out held before may be a step that its end aborts
  std::lock_guard const lock(state_->mutex);
  State& state = *state_;
  if (state.disposed) return fail(report, COUPLET_DISPOSED, {}, "The cache has been disposed; create another one");
  std::vector<StepRowState> planned;
  couplet_status status = state.device.select(report);
  if (status == COUPLET_OK) status = state.plan(rows, &planned, report);
  if (status == COUPLET_OK) status = state.reserve(&planned, report);
  if (status != COUPLET_OK) return status;

  auto step_state = std::make_unique<Step::State>();
  step_state->cache = shared_from_this();
  step_state->codebook = state.codebook;
  step_state->prefill = state.config.window < 0 ? Prefill::exact : prefill;
  step_state->public_rows.assign(rows.begin(), rows.end());
  step_state->layer_done.resize(static_cast<size_t>(state.config.layers));
  state.open_steps.insert(step_state.get());
  // Nothing below can fail.
  step_state->rows = std::move(planned);
  for (const StepRowState& row : step_state->rows) row.sequence->in_step = true;
  if (state.idle_scratch.empty()) {
    step_state->scratch = Scratch(state.device.backend, &state.scratch_bytes);
  } else {
    step_state->scratch = std::move(state.idle_scratch.back());
    state.idle_scratch.pop_back();
  }
  state.pool.note_peak();
  step->state_ = std::move(step_state);
  out->swap(step);
  return COUPLET_OK;
} catch (const std::bad_alloc&) {
  return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for a step of %zu sequences", rows.size());
}

void Cache::State::end_step(Step::State* step) noexcept {
  for (StepRowState& row : step->rows) {
    row.codes = row.sinks = row.window = {};
    row.sequence->in_step = false;
    if (row.sequence->abandoned) sequences.erase(row.row.sequence);
    row.sequence = nullptr;
  }
  step->phase = StepPhase::closed;
  step->codebook.reset();
  if (!disposed && idle_scratch.size() < idle_scratch_count && step->scratch.bytes() <= idle_scratch_bytes) {
    idle_scratch.push_back(std::move(step->scratch));  // has room: reserved when the cache was made
  } else {
    step->scratch.release();
  }
  open_steps.erase(step);
}

couplet_status Step::commit(couplet_report* report) {
  Cache::State& cache = *state_->cache->state_;
  std::lock_guard const lock(cache.mutex);
  if (cache.disposed) return fail(report, COUPLET_DISPOSED, {}, "The cache has been disposed; create another one");
  switch (state_->phase) {
    case StepPhase::closed:
      return fail(report, COUPLET_DISPOSED, {}, "The step has been committed or aborted; begin another one");
    case StepPhase::running:
      return fail(report, COUPLET_BUSY, {}, "The step is computing a layer; await that before commit");
    case StepPhase::failed:
      return fail(report, COUPLET_INVALID_ARGUMENT, {}, "A layer of the step has failed; abort the step");
    case StepPhase::open: break;
  }
  for (size_t layer = 0; layer < state_->layer_done.size(); ++layer) {
    if (state_->layer_done[layer]) continue;
    return fail(report, COUPLET_INVALID_ARGUMENT, {.layer = static_cast<int32_t>(layer)},
                "Expected every layer to be given to the step before commit but layer %zu is missing", layer);
  }
  for (StepRowState& row : state_->rows) {
    Sequence& sequence = *row.sequence;
    apply_tail(&sequence.codes, &row.codes);
    apply_tail(&sequence.sinks, &row.sinks);
    apply_tail(&sequence.window, &row.window);
    sequence.length = row.new_length;
    sequence.coded_end = row.new_coded_end;
    cache.trim(&sequence);
  }
  cache.end_step(state_.get());
  return COUPLET_OK;
}

void Step::abort() noexcept {
  Cache::State& cache = *state_->cache->state_;
  std::lock_guard const lock(cache.mutex);
  if (state_->phase == StepPhase::running) {
    state_->abort_wanted = true;
  } else if (state_->phase != StepPhase::closed) {
    cache.end_step(state_.get());
  }
}

Step::Step() = default;

Step::~Step() {
  if (state_) abort();
}

std::span<const StepRow> Step::rows() const { return state_->public_rows; }
int64_t Step::first_token(size_t row) const { return state_->rows[row].old_length; }
const std::shared_ptr<Cache>& Step::cache() const { return state_->cache; }

}  // namespace couplet
