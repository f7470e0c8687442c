// attend: cuts a call into tasks, runs them on the pool, and turns their softmax states into outputs.
#include "attend.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "../common/report.h"
#include "attend_check.h"
#include "attend_task.h"
#include "backend.h"
#include "pool.h"

namespace couplet::cpu {
namespace {

constexpr int32_t block_floats = 16384;   // of the rows of one task: 64 KB of queries and as much of outputs stay in L2
constexpr int32_t enough_tasks = 16;      // a call with fewer blocks than this is also cut along the keys,
constexpr int32_t smallest_piece = 4096;  // into pieces of at least so many keys

int64_t blocks_up(int64_t count, int64_t size) { return (count + size - 1) / size; }
size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// What a coded key costs, measured on AVX-512 and relative to bringing one into a tile: 1 + tile_row for each row that meets it
// there; the lookup body passes over the keys once for each query token and `heads` of its heads.
constexpr double tile_row = 0.027;
constexpr double lookup_pass(int32_t heads) { return heads == 8 ? 0.45 : heads == 4 ? 0.33 : heads == 2 ? 0.22 : 0.2; }
constexpr double lookup_surcharge = 1.35;  // two channels (gathers) or tables that outgrow the caches

bool lookup_is_cheaper(const couplet_attend_params& params, int32_t query_tokens) {
  int32_t const group_heads = params.query_heads / params.kv_heads;
  double passes = 0;
  for (int32_t head = 0, heads; head < group_heads; head += heads) {
    heads = attend_heads_at_once(group_heads - head);
    passes += lookup_pass(heads);
  }
  for (couplet_codec codec : {params.key_codec, params.value_codec})
    if (codec.group_channels == 2 || codec.code_bits > 8) {
      passes *= lookup_surcharge;
      break;
    }
  return query_tokens * passes <= 1 + tile_row * query_tokens * group_heads;
}

struct Bodies {
  const AttendTile* tile;
  const AttendLookup* lookup;  // NULL when none fits
};

Bodies select(const couplet_attend_params& params, Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512)
    return {&attend_tile_avx512, attend_lookup_avx512.fits(params) ? &attend_lookup_avx512 : nullptr};
  if (isa == Isa::avx2) return {&attend_tile_avx2, attend_lookup_avx2.fits(params) ? &attend_lookup_avx2 : nullptr};
#endif
  (void)params, (void)isa;
  return {&attend_tile_portable, nullptr};
}

// How a call is cut. It depends on the shapes alone, so that the sums, and with them every bit of the outputs, do not depend
// on the number of threads.
class Plan {
 public:
  Plan(const couplet_attend_params& params, Isa isa) : params_(params), bodies_(select(params, isa)) {
    group_heads_ = params.query_heads / params.kv_heads;
    padded_ = attend_padded(params.head_dim);
    block_tokens_ = std::max(1, block_floats / padded_ / group_heads_);
    for (int32_t index = 0; index < params.sequence_count; ++index) {
      const couplet_attend_sequence& sequence = params.sequences[index];
      blocks_ += blocks(sequence);
      block_rows_ = std::max(block_rows_, std::min(block_tokens_, sequence.query_tokens) * group_heads_);
    }
    for (int32_t index = 0; index < params.sequence_count; ++index) {
      const couplet_attend_sequence& sequence = params.sequences[index];
      tasks_ += blocks(sequence) * pieces(sequence);
      if (pieces(sequence) > 1) shared_states_ += blocks(sequence) * pieces(sequence);
    }
    workers_ = static_cast<int>(std::min<int64_t>(resolve_threads(params.threads), std::max<int64_t>(tasks_, 1)));
  }

  size_t workspace() const {
    return 64 + static_cast<size_t>(workers_) * worker_bytes() + static_cast<size_t>(shared_states_) * state_bytes();
  }

  void run(void* workspace) const {
    auto* const start = reinterpret_cast<uint8_t*>(aligned(reinterpret_cast<size_t>(workspace)));
    uint8_t* const shared = start + static_cast<size_t>(workers_) * worker_bytes();
    parallel_for(workers_, tasks_, [&](int64_t index, int worker) {
      Place const place = find(index);
      uint8_t* const own = start + static_cast<size_t>(worker) * worker_bytes();
      AttendState const state =
          state_at(place.shared_state < 0 ? own : shared + static_cast<size_t>(place.shared_state) * state_bytes());
      std::fill_n(state.maxima, attend_padded(block_rows_), -std::numeric_limits<float>::infinity());
      std::fill_n(state.sums, attend_padded(block_rows_), 0.0f);
      std::memset(state.weighted, 0, static_cast<size_t>(block_rows_) * static_cast<size_t>(padded_) * sizeof(float));
      run_task(place.task, state, own + state_bytes());
      if (place.shared_state < 0) finish(place.task, state);
    });
    if (shared_states_ > 0)
      parallel_for(workers_, tasks_, [&](int64_t index, int) {
        Place const place = find(index);
        if (place.shared_state >= 0 && place.piece == 0)
          finish_pieces(place, shared + static_cast<size_t>(place.shared_state) * state_bytes());
      });
  }

 private:
  struct Place {
    AttendTask task;
    int32_t piece;
    int32_t pieces;
    int64_t shared_state;  // the first of the block plus piece, or -1 when the block is one piece
  };

  int64_t blocks(const couplet_attend_sequence& sequence) const {
    return blocks_up(sequence.query_tokens, block_tokens_) * params_.kv_heads;
  }

  int64_t keys(const couplet_attend_sequence& sequence) const {
    int64_t const end = int64_t{sequence.first_query} + sequence.query_tokens;
    return params_.local_window ? std::min<int64_t>(end, int64_t{params_.local_window} + sequence.query_tokens) : end;
  }

  int32_t pieces(const couplet_attend_sequence& sequence) const {
    if (blocks_ >= enough_tasks || sequence.query_tokens == 0) return 1;
    int64_t const wanted = std::min(blocks_up(enough_tasks, blocks_), keys(sequence) / smallest_piece);
    return static_cast<int32_t>(std::max<int64_t>(wanted, 1));
  }

  Place find(int64_t index) const {
    int64_t shared_state = 0;
    const couplet_attend_sequence* sequence = params_.sequences;
    for (;; ++sequence) {
      int64_t const tasks = blocks(*sequence) * pieces(*sequence);
      if (index < tasks) break;
      index -= tasks;
      if (pieces(*sequence) > 1) shared_state += tasks;
    }
    int32_t const count = pieces(*sequence);
    int32_t const piece = static_cast<int32_t>(index % count);
    int32_t const kv_head = static_cast<int32_t>(index / count % params_.kv_heads);
    int32_t const first = static_cast<int32_t>(index / count / params_.kv_heads) * block_tokens_;
    int64_t const end = int64_t{sequence->first_query} + sequence->query_tokens;
    // Pieces end on a page, or on a tile of a long dense run, so that no tile is shorter for the cut.
    int64_t const grain = std::max(params_.page_tokens, attend_tile_tokens);
    int64_t const origin = (end - keys(*sequence)) / grain * grain;
    int64_t const length = blocks_up(blocks_up(end - origin, count), grain) * grain;
    return {.task = {.params = &params_,
                     .sequence = sequence,
                     .kv_head = kv_head,
                     .first_query = first,
                     .query_tokens = std::min(block_tokens_, sequence->query_tokens - first),
                     .key_begin = static_cast<int32_t>(std::min(end, origin + piece * length)),
                     .key_end = static_cast<int32_t>(std::min(end, origin + (piece + 1) * length))},
            .piece = piece,
            .pieces = count,
            .shared_state = count > 1 ? shared_state + index : -1};
  }

  bool looks_up(int32_t query_tokens) const { return bodies_.lookup && lookup_is_cheaper(params_, query_tokens); }

  void run_task(const AttendTask& task, AttendState state, void* scratch) const {
    bool const lookup = looks_up(task.query_tokens);
    bodies_.tile->run(task, state, scratch, !lookup);
    if (lookup) bodies_.lookup->run(task, state, scratch);
  }

  size_t scratch_bytes() const {
    size_t const tile = bodies_.tile->scratch(params_, block_rows_);
    return bodies_.lookup ? std::max(tile, bodies_.lookup->scratch(params_)) : tile;
  }

  size_t state_bytes() const {
    size_t const rows = static_cast<size_t>(attend_padded(block_rows_));
    return rows * (2 + static_cast<size_t>(padded_)) * sizeof(float);
  }
  size_t worker_bytes() const { return state_bytes() + aligned(scratch_bytes()); }

  AttendState state_at(uint8_t* memory) const {
    float* const weighted = reinterpret_cast<float*>(memory);
    float* const maxima = weighted + int64_t{attend_padded(block_rows_)} * padded_;
    return {.maxima = maxima, .sums = maxima + attend_padded(block_rows_), .weighted = weighted};
  }

  // Adds the states of a block's other pieces to the first, in their order, and writes its outputs.
  void finish_pieces(const Place& place, uint8_t* memory) const {
    AttendState const total = state_at(memory);
    int32_t const rows = place.task.query_tokens * group_heads_;
    for (int32_t piece = 1; piece < place.pieces; ++piece) {
      AttendState const part = state_at(memory + static_cast<size_t>(piece) * state_bytes());
      for (int32_t row = 0; row < rows; ++row) {
        if (part.sums[row] == 0) continue;
        float const largest = std::max(total.maxima[row], part.maxima[row]);
        float const total_factor = total.sums[row] == 0 ? 0 : std::exp2(total.maxima[row] - largest);
        float const part_factor = std::exp2(part.maxima[row] - largest);
        total.maxima[row] = largest;
        total.sums[row] = total.sums[row] * total_factor + part.sums[row] * part_factor;
        float* const to = total.weighted + int64_t{row} * padded_;
        const float* const from = part.weighted + int64_t{row} * padded_;
        for (int32_t channel = 0; channel < padded_; ++channel)
          to[channel] = to[channel] * total_factor + from[channel] * part_factor;
      }
    }
    finish(place.task, total);
  }

  // outputs = weighted / sum, with the head's sink as one more logit that has no value. A row that saw no key becomes 0.
  void finish(const AttendTask& task, AttendState state) const {
    const couplet_attend_sequence& sequence = *task.sequence;
    for (int32_t row = 0; row < task.query_tokens * group_heads_; ++row) {
      int64_t const head = int64_t{task.kv_head} * group_heads_ + row % group_heads_;
      float factor = 0;
      if (state.sums[row] != 0) {
        float const sink = params_.head_sinks ? params_.head_sinks[head] * static_cast<float>(M_LOG2E) : -INFINITY;
        float const largest = std::max(state.maxima[row], sink);
        float const own = std::exp2(state.maxima[row] - largest);
        factor = own / (state.sums[row] * own + std::exp2(sink - largest));
      }
      float* const to = static_cast<float*>(sequence.outputs) +
                        (task.first_query + row / group_heads_) * sequence.output_token_stride +
                        head * sequence.output_head_stride;
      const float* const from = state.weighted + int64_t{row} * padded_;
      for (int32_t channel = 0; channel < params_.head_dim; ++channel) to[channel] = from[channel] * factor;
    }
  }

  const couplet_attend_params& params_;
  Bodies bodies_;
  int32_t group_heads_, padded_, block_tokens_;
  int32_t block_rows_ = 0;     // rows of the largest block
  int64_t blocks_ = 0;         // (sequence, query block, kv head)
  int64_t tasks_ = 0;          // blocks times their pieces
  int64_t shared_states_ = 0;  // states of blocks that are cut along the keys
  int workers_ = 1;
};

couplet_status run(const couplet_attend_params* params, void* workspace, void*, couplet_report*) {
  attend_run(*params, isa(), workspace);
  return COUPLET_OK;
}

void describe(const couplet_attend_params* params, char* text, size_t text_bytes) {
  bool lookup = select(*params, isa()).lookup != nullptr;
  for (int32_t index = 0; index < params->sequence_count; ++index)
    lookup = lookup && lookup_is_cheaper(*params, params->sequences[index].query_tokens);
  std::snprintf(text, text_bytes, "attend %s %dc%db %s", isa_name(isa()), params->key_codec.group_channels,
                params->key_codec.code_bits, lookup ? "lookup" : "tile");
}

}  // namespace

size_t attend_workspace(const couplet_attend_params& params, Isa isa) { return Plan(params, isa).workspace(); }
void attend_run(const couplet_attend_params& params, Isa isa, void* workspace) { Plan(params, isa).run(workspace); }

const couplet_attend_entries attend_entries = {
    .check = attend_check,
    .workspace = [](const couplet_attend_params* params) { return attend_workspace(*params, isa()); },
    .run = run,
    .describe = describe,
};

}  // namespace couplet::cpu
