#include "cache.h"

#include <new>

#include "state.h"

namespace couplet {
namespace {

couplet_status check_config(const CacheConfig& config, couplet_report* report) {
  if (config.layers < 1 || config.kv_heads < 1 || config.query_heads < 1 || config.query_heads % config.kv_heads != 0) {
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected layers, kvHeads and queryHeads of at least 1, queryHeads a multiple of kvHeads, but received "
                "%d layers, "
                "%d kv heads, %d query heads",
                config.layers, config.kv_heads, config.query_heads);
  }
  if (config.head_dim < 32 || config.head_dim > COUPLET_MAX_HEAD_DIM || config.head_dim % 8 != 0) {
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected a multiple of 8 from 32 to %d for `headDim` but received %d", COUPLET_MAX_HEAD_DIM,
                config.head_dim);
  }
  if (config.sinks < 0) {
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected 0 or more for `sinks` but received %d", config.sinks);
  }
  if (config.page_tokens < 8 || config.page_tokens % 8 != 0) {
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a multiple of 8 for `pageTokens` but received %d",
                config.page_tokens);
  }
  if (config.budget_bytes < 0) {
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected 0 or more bytes for `memory` but received %lld",
                static_cast<long long>(config.budget_bytes));
  }
  return COUPLET_OK;
}

couplet_status check_codebook(const CacheConfig& config, Device device, const Codebook* codebook,
                              couplet_report* report) {
  if (!codebook) {
    if (config.window < 0) return COUPLET_OK;
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected a codebook, or Infinity for `window` (everything in full precision), but received window %d "
                "and no codebook",
                config.window);
  }
  if (codebook->device() != device) {
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a codebook on device %s %d but received one on %s %d",
                device.backend->name, device.index, codebook->device().backend->name, codebook->device().index);
  }
  const Codebook::Shape& shape = codebook->shape();
  if (shape.layers == config.layers && shape.kv_heads == config.kv_heads && shape.head_dim == config.head_dim)
    return COUPLET_OK;
  return fail(
      report, COUPLET_MISMATCH, {},
      "The codebook is for %d layers, %d kv heads, headDim %d and the cache for %d layers, %d kv heads, headDim %d",
      shape.layers, shape.kv_heads, shape.head_dim, config.layers, config.kv_heads, config.head_dim);
}

int64_t list_bytes(const BlockList& list) { return static_cast<int64_t>(list.blocks.capacity() * sizeof(BlockRef)); }

// A shared_ptr's two counts and its vtable pointer lie beside the object.
constexpr int64_t block_header_bytes = sizeof(Block) + 2 * sizeof(void*);

}  // namespace

Cache::Cache() = default;
Cache::~Cache() = default;

couplet_status Cache::create(Device device, const CacheConfig& config, std::shared_ptr<const Codebook> codebook,
                             std::shared_ptr<Cache>* out, couplet_report* report) try {
  couplet_status status = check_config(config, report);
  if (status == COUPLET_OK) status = check_codebook(config, device, codebook.get(), report);
  if (status == COUPLET_OK) status = device.select(report);
  if (status != COUPLET_OK) return status;
  std::shared_ptr<Cache> cache(new Cache);
  cache->state_ = std::make_unique<State>(device, config);
  State& state = *cache->state_;
  if (codebook) {
    state.code_layout = code_layout(codebook->shape(), config.page_tokens);
    for (int32_t layer = 0; layer < config.layers; ++layer)
      state.most_parts = std::max(state.most_parts, codebook->layer(layer).size());
  }
  state.raw_layout = {.layers = config.layers, .kv_heads = config.kv_heads, .head_dim = config.head_dim};
  state.codes = {.kind = BlockKind::codes, .block_tokens = config.page_tokens};
  state.sinks = {.end = config.sinks};
  state.window = {.begin = config.sinks};
  state.codebook = std::move(codebook);
  state.idle_memory.reserve(idle_memory_count);
  *out = std::move(cache);
  return COUPLET_OK;
} catch (const std::bad_alloc&) {
  return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for a cache of %d layers", config.layers);
}

const CacheConfig& Cache::config() const { return state_->config; }
Device Cache::device() const { return state_->device; }

couplet_status Cache::State::find(SequenceId id, Sequence** out, couplet_report* report) {
  if (disposed) return fail(report, COUPLET_DISPOSED, {}, "The cache has been disposed; create another one");
  auto const found = sequences.find(id);
  if (found == sequences.end() || found->second.abandoned) {
    return fail(report, COUPLET_DISPOSED, {},
                "The sequence has been disposed; create another one with cache.sequence()");
  }
  *out = &found->second;
  return COUPLET_OK;
}

couplet_status Cache::State::find_idle(SequenceId id, Sequence** out, couplet_report* report) {
  couplet_status const status = find(id, out, report);
  if (status != COUPLET_OK || !(*out)->in_step) return status;
  return fail(report, COUPLET_BUSY, {}, "The sequence is inside an open step; commit or abort that first");
}

void Cache::State::trim(Sequence* sequence) const {
  sequence->codes.keep(codes.index(config.sinks),
                       sequence->coded_end > config.sinks ? codes.blocks_until(sequence->coded_end) : 0);
  sequence->sinks.keep(0, sinks.blocks_until(std::min<int64_t>(sequence->length, config.sinks)));
  sequence->window.keep(window.index(sequence->coded_end),
                        sequence->coded_end < sequence->length ? window.blocks_until(sequence->length) : 0);
}

couplet_status Cache::create_sequence(SequenceId* out, couplet_report* report) try {
  std::lock_guard const lock(state_->mutex);
  if (state_->disposed) return fail(report, COUPLET_DISPOSED, {}, "The cache has been disposed; create another one");
  Sequence sequence;
  sequence.coded_end = state_->config.sinks;
  state_->sequences.emplace(state_->next_id, std::move(sequence));
  *out = state_->next_id++;
  return COUPLET_OK;
} catch (const std::bad_alloc&) {
  return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for another sequence");
}

couplet_status Cache::fork(SequenceId from, SequenceId* out, couplet_report* report) try {
  std::lock_guard const lock(state_->mutex);
  Sequence* sequence = nullptr;
  couplet_status const status = state_->find_idle(from, &sequence, report);
  if (status != COUPLET_OK) return status;
  Sequence copy = *sequence;
  state_->sequences.emplace(state_->next_id, std::move(copy));
  *out = state_->next_id++;
  return COUPLET_OK;
} catch (const std::bad_alloc&) {
  return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for another sequence");
}

couplet_status Cache::truncate(SequenceId id, int64_t tokens, couplet_report* report) {
  std::lock_guard const lock(state_->mutex);
  Sequence* sequence = nullptr;
  couplet_status const status = state_->find_idle(id, &sequence, report);
  if (status != COUPLET_OK) return status;
  if (tokens < 0 || tokens > sequence->length) {
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected 0 to %lld (the sequence's length) for `tokens` but received %lld",
                static_cast<long long>(sequence->length), static_cast<long long>(tokens));
  }
  sequence->length = tokens;
  sequence->coded_end = std::max<int64_t>(state_->config.sinks, std::min(sequence->coded_end, tokens));
  state_->trim(sequence);
  return COUPLET_OK;
}

couplet_status Cache::reset(SequenceId sequence, couplet_report* report) { return truncate(sequence, 0, report); }

couplet_status Cache::drop(SequenceId id, couplet_report* report) {
  std::lock_guard const lock(state_->mutex);
  Sequence* sequence = nullptr;
  couplet_status const status = state_->find_idle(id, &sequence, report);
  if (status == COUPLET_OK) state_->sequences.erase(id);
  return status;
}

void Cache::abandon(SequenceId id) noexcept {
  std::lock_guard const lock(state_->mutex);
  auto const found = state_->sequences.find(id);
  if (found == state_->sequences.end()) return;
  if (found->second.in_step) {
    found->second.abandoned = true;
  } else {
    state_->sequences.erase(found);
  }
}

couplet_status Cache::length(SequenceId id, int64_t* out, couplet_report* report) const {
  std::lock_guard const lock(state_->mutex);
  Sequence* sequence = nullptr;
  couplet_status const status = state_->find(id, &sequence, report);
  if (status == COUPLET_OK) *out = sequence->length;
  return status;
}

CacheStatistics Cache::statistics() const {
  std::lock_guard const lock(state_->mutex);
  const CacheConfig& config = state_->config;
  CacheStatistics statistics;
  statistics.sequences = static_cast<int64_t>(state_->sequences.size());
  statistics.bookkeeping_bytes = static_cast<int64_t>(sizeof(State)) +
                                 state_->scratch_bytes.load(std::memory_order_relaxed) +
                                 state_->pool.blocks() * block_header_bytes + state_->pool.spare_bytes();
  for (const auto& [id, sequence] : state_->sequences) {
    statistics.tokens += sequence.length;
    statistics.coded_tokens += sequence.coded_end - config.sinks;
    statistics.bookkeeping_bytes += static_cast<int64_t>(sizeof id + sizeof sequence) + list_bytes(sequence.codes) +
                                    list_bytes(sequence.sinks) + list_bytes(sequence.window);
  }
  statistics.raw_tokens = statistics.tokens - statistics.coded_tokens;
  statistics.page_bytes = state_->pool.page_bytes();
  statistics.raw_bytes = state_->pool.raw_bytes();
  statistics.codebook_bytes = state_->codebook ? static_cast<int64_t>(state_->codebook->bytes()) : 0;
  statistics.budget_bytes = config.budget_bytes;
  statistics.peak_bytes = state_->pool.peak_bytes();
  if (statistics.tokens > 0) {
    double const channels =
        2.0 * config.layers * config.kv_heads * config.head_dim * static_cast<double>(statistics.tokens);
    statistics.bits_per_channel =
        8.0 * static_cast<double>(statistics.page_bytes + statistics.raw_bytes + statistics.codebook_bytes) / channels;
  }
  return statistics;
}

int64_t Cache::memory_bytes() const { return state_->pool.used_bytes(); }

void Cache::dispose() noexcept {
  std::lock_guard const lock(state_->mutex);
  state_->disposed = true;
  for (auto next = state_->open_steps.begin(); next != state_->open_steps.end();) {
    Step::State* const step = *next++;
    if (step->phase == StepPhase::running) {
      step->abort_wanted = true;
    } else {
      state_->end_step(step);
    }
  }
  for (auto& [id, sequence] : state_->sequences) sequence.abandoned = true;
  std::erase_if(state_->sequences, [](const auto& entry) { return !entry.second.in_step; });
  state_->idle_memory.clear();
  state_->pool.release_spares();
  state_->codebook.reset();
}

bool Cache::disposed() const {
  std::lock_guard const lock(state_->mutex);
  return state_->disposed;
}

}  // namespace couplet
