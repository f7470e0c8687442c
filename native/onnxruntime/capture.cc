#include "capture.h"

#include <cmath>
#include <cstring>
#include <memory>

#include "../common/report.h"

namespace couplet::onnxruntime {
namespace {

uint64_t next_random(uint64_t* state) {  // splitmix64
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The high word of a product of a random word and `bound`: uniform below bound but for a bias of bound / 2^64.
uint64_t random_below(uint64_t* state, uint64_t bound) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(next_random(state)) * bound) >> 64);
}

}  // namespace

Capture::Capture(const Shape& shape, const Memory& memory)
    : shape_(shape), memory_(memory), random_state_(shape.seed) {}

int64_t Capture::draw_slot() {
  int64_t const index = seen_++;
  if (index < shape_.points) return index;
  auto const slot = static_cast<int64_t>(random_below(&random_state_, static_cast<uint64_t>(index) + 1));
  return slot < shape_.points ? slot : -1;
}

couplet_status Capture::begin(const Step& step, couplet_report* report) {
  if (phase_ == Phase::running) return fail(report, COUPLET_BUSY, {}, "This capture is part of another run");
  if (phase_ == Phase::spoiled)
    return fail(report, COUPLET_BUSY, {}, "A run of this capture failed, so its sample is not whole; make a new one");
  const CacheConfig& config = step.cache()->config();
  if (config.layers != shape_.layers || config.query_heads != shape_.query_heads ||
      config.kv_heads != shape_.kv_heads || config.head_dim != shape_.head_dim)
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected a capture of this model but received one of another");
  size_t const rows = step.rows().size();
  for (size_t row = 0; memory_.key_weights && row < rows; ++row) {
    if (step.first_token(row) == 0) continue;
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected fresh sequences for a capture with attention weights but row %zu has %lld tokens already",
                row, static_cast<long long>(step.first_token(row)));
  }

  Device const device = step.cache()->device();
  if (memory_.key_weights && !device.is_host())
    return fail(report, COUPLET_UNSUPPORTED, {},
                "Attention weights are computed on the CPU but the cache is on device %s %d", device.backend->name,
                device.index);

  row_tokens_.clear();
  slots_.clear();
  for (const StepRow& row : step.rows()) {
    row_tokens_.push_back(row.tokens);
    for (int32_t token = 0; token < row.tokens; ++token) slots_.push_back(draw_slot());
  }
  backend_ = device.backend;
  threads_ = config.threads;
  phase_ = Phase::running;
  return COUPLET_OK;
}

couplet_status Capture::add(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                            couplet_report* report) {
  size_t const head_dim = static_cast<size_t>(shape_.head_dim), kv_heads = static_cast<size_t>(shape_.kv_heads);
  const int64_t* slot = slots_.data();
  for (size_t row = 0; row < data.size(); ++row) {
    const StepData& rows = data[row];
    int32_t const tokens = row_tokens_[row];
    if (memory_.key_weights && tokens > 0) {
      couplet_status const status = weigh(rows, tokens, options, report);
      if (status != COUPLET_OK) return status;
    }
    for (int32_t token = 0; token < tokens; ++token) {
      // Of two tokens of a run that drew the same slot the later one stays, as in a reservoir filled one by one.
      int64_t const kept = *slot++;
      if (kept < 0) continue;
      size_t const head =
          (static_cast<size_t>(kept) * static_cast<size_t>(shape_.layers) + static_cast<size_t>(layer)) * kv_heads;
      for (size_t h = 0; h < kv_heads; ++h) {
        auto const source = static_cast<int64_t>(h);
        std::memcpy(
            memory_.keys + (head + h) * head_dim,
            static_cast<const float*>(rows.keys) + token * rows.key_token_stride + source * rows.key_head_stride,
            head_dim * sizeof(float));
        std::memcpy(
            memory_.values + (head + h) * head_dim,
            static_cast<const float*>(rows.values) + token * rows.value_token_stride + source * rows.value_head_stride,
            head_dim * sizeof(float));
      }
      if (!memory_.key_weights) continue;
      size_t const weights = static_cast<size_t>(token) * kv_heads;
      std::memcpy(memory_.key_weights + head, key_weights_.data() + weights, kv_heads * sizeof(float));
      std::memcpy(memory_.value_weights + head, value_weights_.data() + weights, kv_heads * sizeof(float));
    }
  }
  return COUPLET_OK;
}

couplet_status Capture::weigh(const StepData& data, int32_t tokens, const AttendOptions& options,
                              couplet_report* report) {
  size_t const count = static_cast<size_t>(tokens) * static_cast<size_t>(shape_.kv_heads);
  key_weights_.resize(count);
  value_weights_.resize(count);
  couplet_attention_weights_params const params{
      .queries = static_cast<const float*>(data.queries),
      .rows = {.keys = static_cast<const float*>(data.keys),
               .values = static_cast<const float*>(data.values),
               .key_token_stride = data.key_token_stride,
               .key_head_stride = data.key_head_stride,
               .value_token_stride = data.value_token_stride,
               .value_head_stride = data.value_head_stride,
               .first_token = 0,
               .tokens = tokens},
      .key_weights = key_weights_.data(),
      .value_weights = value_weights_.data(),
      .rotary = options.rotary,
      .head_sinks = options.head_sinks,
      .query_token_stride = data.query_token_stride,
      .query_head_stride = data.query_head_stride,
      .query_heads = shape_.query_heads,
      .kv_heads = shape_.kv_heads,
      .head_dim = shape_.head_dim,
      .local_window = options.local_window,
      .scale = options.scale != 0 ? options.scale : 1 / std::sqrt(static_cast<float>(shape_.head_dim)),
      .softcap = options.softcap,
      .threads = threads_,
      .reserved = 0,
  };
  const couplet_attention_weights_entries& entries = backend_->attention_weights;
  couplet_status const status = entries.check(&params, report);
  if (status != COUPLET_OK) return status;
  size_t const bytes = entries.workspace(&params);
  auto const release = [this, bytes](void* memory) { backend_->memory.release(memory, bytes); };
  std::unique_ptr<void, decltype(release)> const workspace(bytes ? backend_->memory.allocate(bytes) : nullptr, release);
  if (bytes && !workspace)
    return fail(report, COUPLET_OUT_OF_MEMORY, {}, "There is no memory for %zu bytes of workspace", bytes);
  return entries.run(&params, workspace.get(), nullptr, report);
}

void Capture::end(bool succeeded) { phase_ = succeeded ? Phase::idle : Phase::spoiled; }

}  // namespace couplet::onnxruntime
