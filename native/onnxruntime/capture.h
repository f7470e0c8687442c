// Keys and values of a uniform sample of the tokens that runs see, for learning codebooks: bounded memory whatever the text.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "../cache/cache.h"

namespace couplet::onnxruntime {

// A reservoir: each token seen so far is in it with the same chance, and a token is in it with all its layers and heads.
// For one run at a time: begin -> add, once per layer -> end. A run that does not end spoils the sample for good.
class Capture {
 public:
  struct Shape {
    int32_t layers = 0, query_heads = 0, kv_heads = 0, head_dim = 0;
    int64_t points = 0;  // tokens kept at most
    uint64_t seed = 0;
  };
  // All of it owned by the caller, who keeps it alive.
  struct Memory {
    float* keys = nullptr;         // [points][layers][kv_heads][head_dim], before rotary
    float* values = nullptr;       // likewise
    float* key_weights = nullptr;  // [points][layers][kv_heads], or NULL with value_weights for no weights
    float* value_weights = nullptr;
  };

  Capture(const Shape& shape, const Memory& memory);

  // COUPLET_INVALID_ARGUMENT when weights are wanted and a row is not the beginning of its sequence: a token's weight is the
  // attention that all of its text pays to it. COUPLET_BUSY during another run or after one that failed.
  couplet_status begin(const Step& step, couplet_report* report);
  couplet_status add(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                     couplet_report* report);
  void end(bool succeeded);

  const Shape& shape() const { return shape_; }
  int64_t tokens_seen() const { return seen_; }
  int64_t tokens_kept() const { return seen_ < shape_.points ? seen_ : shape_.points; }

 private:
  enum class Phase { idle, running, spoiled };

  int64_t draw_slot();  // of the next token, or -1
  couplet_status weigh(const StepData& data, int32_t tokens, const AttendOptions& options, couplet_report* report);

  Shape shape_;
  Memory memory_;
  Phase phase_ = Phase::idle;
  int64_t seen_ = 0;
  uint64_t random_state_;
  const couplet_backend* backend_ = nullptr;  // of the running step's cache
  int32_t threads_ = 0;
  std::vector<int32_t> row_tokens_;
  std::vector<int64_t> slots_;                      // of the run's tokens, row after row; -1: not kept
  std::vector<float> key_weights_, value_weights_;  // of one row and layer, [tokens][kv_heads]
};

}  // namespace couplet::onnxruntime
