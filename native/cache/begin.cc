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

const Block* block_of(const BlockRef& held) { return held.get(); }
const Block* block_of(const Block& planned) { return &planned; }

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

// Which tokens of a step lie where: the same in every layer.
StepPlan Cache::State::plan_layers(const std::vector<StepRowState>& rows) const {
  StepPlan plan;
  auto const append = [](std::vector<Piece>* pieces, const Region& region, const auto& blocks, size_t row,
                         int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end;) {
      int64_t const index = region.index(token);
      int64_t const next = std::min(end, region.first_token(index + 1));
      pieces->push_back({row, token, next, block_of(blocks.at(index)), token - region.first_token(index)});
      token = next;
    }
  };
  for (size_t index = 0; index < rows.size(); ++index) {
    const StepRowState& row = rows[index];
    if (row.row.tokens == 0) continue;
    plan.given.push_back({index, row.old_length, row.new_length});
    append(&plan.kept, sinks, row.sinks, index, row.old_length, std::min(row.new_length, sinks.end));
    append(&plan.kept, window, row.window, index, std::max(row.old_length, row.new_coded_end), row.new_length);
    int64_t const held_end = std::min(row.new_coded_end, row.old_length);
    size_t const first = plan.held.size();
    append(&plan.held, window, row.sequence->window, index, row.old_coded_end, held_end);
    if (plan.held.size() > first + 1) plan.gathered_tokens += held_end - row.old_coded_end;
    int64_t const fresh_begin = std::max(row.old_coded_end, row.old_length);
    if (fresh_begin < row.new_coded_end) plan.fresh.push_back({index, fresh_begin, row.new_coded_end});
  }
  return plan;
}

couplet_status Cache::State::fail_full(int64_t needed, couplet_report* report) const {
  return fail(report, COUPLET_CACHE_FULL, {},
              "This needs %lld bytes and %lld of the cache's %lld are free; truncate, reset or dispose a sequence, or "
              "create the cache with more memory",
              static_cast<long long>(needed),
              static_cast<long long>(std::max<int64_t>(0, pool.budget_bytes() - pool.used_bytes())),
              static_cast<long long>(pool.budget_bytes()));
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
  if (!pool.fits(needed)) return fail_full(needed, report);
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
  step_state->unread.reserve(static_cast<size_t>(state.config.layers) * static_cast<size_t>(ReportSlot::count));
  step_state->plan = state.plan_layers(planned);
  state.open_steps.insert(step_state.get());
  // Nothing below can fail.
  step_state->rows = std::move(planned);
  for (const StepRowState& row : step_state->rows) row.sequence->in_step = true;
  if (state.idle_memory.empty()) {
    step_state->memory = StepMemory(state.device.backend->memory, &state.scratch_bytes);
  } else {
    step_state->memory = std::move(state.idle_memory.back());
    state.idle_memory.pop_back();
  }
  state.pool.note_peak();
  step->state_ = std::move(step_state);
  out->swap(step);
  return COUPLET_OK;
} catch (const std::bad_alloc&) {
  return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for a step of %zu sequences", rows.size());
}

void Cache::State::end_step(Step::State* step) noexcept {
  if (device.select(nullptr) == COUPLET_OK) step->synchronize(nullptr);  // a lost device works on nothing
  for (StepRowState& row : step->rows) {
    row.codes = row.sinks = row.window = {};
    row.sequence->in_step = false;
    if (row.sequence->abandoned) sequences.erase(row.row.sequence);
    row.sequence = nullptr;
  }
  step->phase = StepPhase::closed;
  step->codebook.reset();
  size_t const most_idle = device.is_host() ? idle_host_bytes : idle_device_bytes;
  if (!disposed && idle_memory.size() < idle_memory_count && step->memory.bytes() <= most_idle) {
    idle_memory.push_back(std::move(step->memory));  // has room: reserved when the cache was made
  } else {
    step->memory.release();
  }
  open_steps.erase(step);
}

couplet_status Step::commit(couplet_report* report) {
  Cache::State& cache = *state_->cache->state_;
  std::lock_guard const lock(cache.mutex);
  if (cache.disposed) return fail(report, COUPLET_DISPOSED, {}, "The cache has been disposed; create another one");
  if (couplet_status const status = state_->enter(report)) return status;
  for (size_t layer = 0; layer < state_->layer_done.size(); ++layer) {
    if (state_->layer_done[layer]) continue;
    return fail(report, COUPLET_INVALID_ARGUMENT, {.layer = static_cast<int32_t>(layer)},
                "Expected every layer to be given to the step before commit but layer %zu is missing", layer);
  }
  couplet_status status = cache.device.select(report);
  if (status == COUPLET_OK) status = state_->finish(report);
  if (status != COUPLET_OK) {
    state_->phase = StepPhase::failed;
    return status;
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
