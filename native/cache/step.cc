// What a step refuses, what it waits for, and what it reports. layer.h has the work.
#include <algorithm>
#include <cstring>
#include <new>

#include "state.h"

namespace couplet {
namespace {

couplet_status with_layer(couplet_status status, int32_t layer, couplet_report* report) {
  if (status != COUPLET_OK && report) report->layer = layer;
  return status;
}

}  // namespace

couplet_status Step::State::check_layer(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                                        couplet_report* report) const {
  Where const where = {.layer = layer};
  if (layer < 0 || layer >= static_cast<int32_t>(layer_done.size())) {
    return fail(report, COUPLET_INVALID_ARGUMENT, where, "Expected 0 to %zu for `layer` but received %d",
                layer_done.size() - 1, layer);
  }
  if (layer_done[static_cast<size_t>(layer)]) {
    return fail(report, COUPLET_INVALID_ARGUMENT, where,
                "Expected each layer once in a step but received layer %d again", layer);
  }
  if (data.size() != rows.size()) {
    return fail(report, COUPLET_INVALID_ARGUMENT, where,
                "Expected one entry for each of the step's %zu sequences but received %zu", rows.size(), data.size());
  }
  for (RowFormat const& format : {options.inputs, options.outputs}) {
    if (format.dtype == COUPLET_FLOAT32 || !owner().device.is_host()) continue;
    return fail(report, COUPLET_UNSUPPORTED, where,
                "A cache on the CPU takes and gives float32; float16 and bfloat16 need one on a GPU");
  }
  if (codebook && codebook->key_order(layer).channels && !options.rotary != !options.ordered_rotary) {
    return fail(
        report, COUPLET_INVALID_ARGUMENT, where,
        "Expected a rotary embedding in the key order of layer %d beside the model's, or neither, but received one",
        layer);
  }
  for (size_t row = 0; row < rows.size(); ++row) {
    if (rows[row].row.tokens == 0) continue;
    if (options.positions > 0 && rows[row].new_length > options.positions) {
      return fail(report, COUPLET_INVALID_ARGUMENT, where,
                  "Expected positions below %d, for which the rotary embedding has angles, but received %lld",
                  options.positions, static_cast<long long>(rows[row].new_length - 1));
    }
    if (!data[row].keys || !data[row].values) {
      return fail(report, COUPLET_INVALID_ARGUMENT, where,
                  "Expected keys and values for row %zu of the step but received none", row);
    }
    if (!data[row].queries != !data[row].outputs) {
      return fail(report, COUPLET_INVALID_ARGUMENT, where,
                  "Expected queries and outputs together for row %zu of the step but received one of them", row);
    }
  }
  if (!options.cancel || !*options.cancel) return COUPLET_OK;
  return fail(report, COUPLET_CANCELLED, where, "The attention of layer %d was cancelled", layer);
}

couplet_status Step::State::enter(couplet_report* report) const {
  switch (phase) {
    case StepPhase::closed:
      return fail(report, COUPLET_DISPOSED, {}, "The step has been committed or aborted; begin another one");
    case StepPhase::running: return fail(report, COUPLET_BUSY, {}, "The step is computing a layer; await that first");
    case StepPhase::failed:
      return fail(report, COUPLET_INVALID_ARGUMENT, {}, "A layer of the step has failed; abort the step");
    case StepPhase::open: break;
  }
  return COUPLET_OK;
}

couplet_status Step::attend(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                            couplet_report* report) {
  Cache::State& cache = *state_->cache->state_;
  {
    std::lock_guard const lock(cache.mutex);
    couplet_status status = with_layer(state_->enter(report), layer, report);
    if (status == COUPLET_OK) status = state_->check_layer(layer, data, options, report);
    if (status != COUPLET_OK) return status;
    state_->phase = StepPhase::running;
  }
  couplet_status status = COUPLET_INTERNAL;
  try {
    status = with_layer(state_->run_layer(layer, data, options, report), layer, report);
  } catch (const std::bad_alloc&) {
    status = fail(report, COUPLET_OUT_OF_MEMORY, {.layer = layer}, "No memory for the attention of layer %d", layer);
  }
  std::lock_guard const lock(cache.mutex);
  if (status == COUPLET_OK) state_->layer_done[static_cast<size_t>(layer)] = true;
  return state_->leave(status, layer, report);
}

couplet_status Step::synchronize(couplet_report* report) {
  Cache::State& cache = *state_->cache->state_;
  {
    std::lock_guard const lock(cache.mutex);
    if (couplet_status const status = state_->enter(report)) return status;
    state_->phase = StepPhase::running;
  }
  couplet_status status = cache.device.select(report);
  if (status == COUPLET_OK) status = state_->finish(report);
  std::lock_guard const lock(cache.mutex);
  return state_->leave(status, -1, report);
}

couplet_status Step::State::leave(couplet_status status, int32_t layer, couplet_report* report) {
  phase = status == COUPLET_OK ? StepPhase::open : StepPhase::failed;
  if (!abort_wanted) return status;
  owner().end_step(this);
  return fail(report, COUPLET_CANCELLED, {.layer = layer}, "The step was aborted while it was computed");
}

couplet_status Step::State::synchronize(couplet_report* report) {
  if (!enqueued) return COUPLET_OK;
  couplet_status const status = owner().device.backend->memory.synchronize(stream, report);
  if (status != COUPLET_OK) return status;
  enqueued = false;
  memory.staged = 0;
  return COUPLET_OK;
}

couplet_status Step::State::finish(couplet_report* report) try {
  couplet_status status = synchronize(report);
  if (status != COUPLET_OK || unread.empty()) return status;
  auto const [first, last] = std::minmax_element(unread.begin(), unread.end(),
                                                 [](const Unread& a, const Unread& b) { return a.layer < b.layer; });
  size_t const begin = report_offset(first->layer, 0, ReportSlot::convert);
  std::vector<uint8_t> bytes(report_offset(last->layer + 1, 0, ReportSlot::convert) - begin);
  status =
      owner().device.backend->memory.copy(bytes.data(), memory.tables.memory() + begin, bytes.size(), stream, report);
  if (status != COUPLET_OK) return status;
  for (const Unread& call : unread) {
    couplet_report found;
    std::memcpy(&found, bytes.data() + report_offset(call.layer, call.part, call.slot) - begin, sizeof found);
    if (found.status == COUPLET_OK) continue;
    status = not_finite(call, found, report);
    break;
  }
  unread.clear();
  return status;
} catch (const std::bad_alloc&) {
  return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for the reports of a step");
}

couplet_status Step::State::reserve(Scratch* scratch, size_t bytes, couplet_report* report) {
  if (bytes <= scratch->bytes()) return COUPLET_OK;
  couplet_status const status = synchronize(report);
  if (status != COUPLET_OK || scratch->grow(bytes)) return status;
  return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for %zu bytes of scratch of a step", bytes);
}

couplet_status Step::State::stage(size_t bytes, uint8_t** out, couplet_report* report) {
  size_t const needed = (bytes + 255) / 256 * 256;
  if (memory.staged + needed > memory.staging.bytes()) {
    if (couplet_status const status = synchronize(report)) return status;
    memory.staged = 0;
    // Twice as much next time: soon a whole step fits, and no layer waits for the one before.
    size_t const wanted = std::max(needed, 2 * memory.staging.bytes());
    if (couplet_status const status = reserve(&memory.staging, wanted, report)) return status;
  }
  *out = memory.staging.memory() + memory.staged;
  memory.staged += needed;
  return COUPLET_OK;
}

// A CPU says what it found at once, so that all layers share a place.
size_t Step::State::reports_bytes() const {
  auto const places = owner().device.is_host() ? 1 : static_cast<int32_t>(layer_done.size());
  return report_offset(places, 0, ReportSlot::convert);
}

size_t Step::State::report_offset(int32_t layer, size_t part, ReportSlot slot) const {
  size_t const place = static_cast<size_t>(layer) * owner().most_parts + part;
  return (place * static_cast<size_t>(ReportSlot::count) + static_cast<size_t>(slot)) * report_bytes;
}

couplet_status Step::State::not_finite(const Unread& call, const couplet_report& found, couplet_report* report) const {
  auto const [layer, part, first_head, slot] = call;
  int32_t const kv_head = first_head + found.kv_head;
  bool const both_sides = slot == ReportSlot::convert || slot == ReportSlot::keep;  // a run of keys, then one of values
  bool const is_held = slot == ReportSlot::held_keys || slot == ReportSlot::held_values;
  const std::vector<Piece>& pieces = slot == ReportSlot::convert ? plan.given
                                     : slot == ReportSlot::keep  ? plan.kept
                                     : is_held                   ? plan.held
                                                                 : plan.fresh;
  bool in_keys = slot == ReportSlot::held_keys || slot == ReportSlot::fresh_keys;
  int64_t left = found.token, position = -1;
  for (const Piece& piece : pieces) {
    int64_t const tokens = piece.tokens() * (both_sides ? 2 : 1);
    if (left >= tokens) {
      left -= tokens;
      continue;
    }
    if (both_sides) in_keys = left < piece.tokens();
    position = piece.begin + left % piece.tokens();
    break;
  }
  const std::vector<int32_t>* const order = in_keys && codebook ? &codebook->key_order(layer).on_host : nullptr;
  bool const is_reordered = order && !order->empty() && found.channel >= 0;
  int32_t const channel = is_reordered ? (*order)[static_cast<size_t>(found.channel)] : found.channel;
  return fail(report, COUPLET_NOT_FINITE, {.layer = layer, .kv_head = kv_head, .token = position, .channel = channel},
              "Expected finite %s but received a NaN or an infinity in layer %d, kv head %d, token %lld, channel %d",
              in_keys ? "keys" : "values", layer, kv_head, static_cast<long long>(position), channel);
}

}  // namespace couplet
