// The body of attention_weights. Included by attention_weights_{portable,avx2,avx512}.cc, which define COUPLET_BODY.
//
// Queries go by blocks of 24 rows. Per block, with columns the tokens that some row sees:
//   scores[rows][columns] = queries . keys^T        softmax: probabilities p, in place
//   outputs[rows][channels] = p . values
//   value weight of a column += p^2                 key weight += (p slope)^2 |value - output|^2 |query|^2 / head_dim
// where slope, 1 - (logit / softcap)^2, is the softcap's derivative, or 1.
#pragma once

#include "attend_lanes.h"
#include "attention_weights_task.h"
#include "rotary.h"

namespace couplet::cpu::COUPLET_BODY {

constexpr int32_t block_queries = attention_weights_rows;

class WeightsBody {
 public:
  explicit WeightsBody(const AttentionWeightsTask& task)
      : params_(*task.params),
        task_(task),
        tokens_(params_.rows.tokens),
        channels_(params_.head_dim),
        stride_(attention_weights_stride(tokens_)),
        padded_(attention_weights_padded(channels_)) {
    float* at = task.scratch;
    auto const take = [&at](int64_t count) { return at += count, at - count; };
    keys_by_channel_ = take(channels_ * stride_);
    values_by_channel_ = take(channels_ * stride_);
    scores_ = take(block_queries * stride_);
    slopes_ = take(block_queries * stride_);
    key_part_ = take(stride_);
    value_part_ = take(stride_);
    values_ = take(tokens_ * padded_);
    queries_ = take(block_queries * padded_);
    outputs_ = take(block_queries * padded_);
    angles_ = take(2 * rotary_max_stride);
  }

  void run() {
    load_tokens();
    for (int32_t t = 0; t < tokens_; ++t) task_.key_sums[t] = task_.value_sums[t] = 0;
    for (int32_t first = 0; first < tokens_; first += block_queries) {
      int32_t const rows = first + block_queries < tokens_ ? block_queries : tokens_ - first;
      int32_t const begin = oldest(first) / width * width;  // columns: whole registers of tokens
      int32_t const end = (first + rows + width - 1) / width * width;
      run_block(first, rows, begin, end);
    }
  }

 private:
  // First token that the query of a position sees.
  int32_t oldest(int32_t position) const {
    int32_t const window = params_.local_window;
    return window > 0 && position >= window ? position - window + 1 : 0;
  }

  // Keys rotated to their positions and values, channel by channel; values once more token by token. Zeros beyond the last.
  void load_tokens() {
    int32_t const kv_head = task_.query_head / (params_.query_heads / params_.kv_heads);
    const couplet_dense_rows& rows = params_.rows;
    memset(keys_by_channel_, 0, static_cast<size_t>(channels_ * stride_) * sizeof(float));
    memset(values_by_channel_, 0, static_cast<size_t>(channels_ * stride_) * sizeof(float));
    memset(values_, 0, static_cast<size_t>(tokens_ * padded_) * sizeof(float));
    float rotated[COUPLET_MAX_HEAD_DIM];
    for (int64_t t = 0; t < tokens_; ++t) {
      const float* const key = rows.keys + t * rows.key_token_stride + kv_head * rows.key_head_stride;
      const float* const value = rows.values + t * rows.value_token_stride + kv_head * rows.value_head_stride;
      rotate(static_cast<int32_t>(t), key, rotated);
      for (int64_t c = 0; c < channels_; ++c) {
        keys_by_channel_[c * stride_ + t] = rotated[c];
        values_by_channel_[c * stride_ + t] = value[c];
        values_[t * padded_ + c] = value[c];
      }
    }
  }

  void rotate(int32_t position, const float* row, float* out) {
    if (params_.rotary) {
      position_angles(*params_.rotary, position, angles_, angles_ + rotary_max_stride);
      rotate_row(*params_.rotary, angles_, angles_ + rotary_max_stride, row, out);
    } else {
      memcpy(out, row, static_cast<size_t>(channels_) * sizeof(float));
    }
  }

  void run_block(int32_t first, int32_t rows, int32_t begin, int32_t end) {
    float importance[block_queries];  // |query|^2 / head_dim
    for (int32_t r = 0; r < rows; ++r) {
      const float* const query =
          params_.queries + (first + r) * params_.query_token_stride + task_.query_head * params_.query_head_stride;
      double norm = 0;
      for (int64_t c = 0; c < channels_; ++c) norm += static_cast<double>(query[c]) * static_cast<double>(query[c]);
      importance[r] = static_cast<float>(norm / static_cast<double>(channels_));
      rotate(first + r, query, queries_ + r * padded_);
    }
    int32_t const columns = end - begin;
    multiply({.rows = rows,
              .columns = columns,
              .depth = params_.head_dim,
              .add = false,
              .a = queries_,
              .a_row_stride = padded_,
              .a_depth_stride = 1,
              .b = keys_by_channel_ + begin,
              .b_stride = stride_,
              .c = scores_ + begin,
              .c_stride = stride_});
    for (int32_t r = 0; r < rows; ++r) softmax(first + r, begin, end, scores_ + r * stride_, slopes_ + r * stride_);
    int32_t const seen = (end < tokens_ ? end : tokens_) - begin;
    multiply({.rows = rows,
              .columns = static_cast<int32_t>(padded_),
              .depth = seen,
              .add = false,
              .a = scores_ + begin,
              .a_row_stride = stride_,
              .a_depth_stride = 1,
              .b = values_ + begin * padded_,
              .b_stride = padded_,
              .c = outputs_,
              .c_stride = padded_});

    memset(key_part_ + begin, 0, static_cast<size_t>(columns) * sizeof(float));
    memset(value_part_ + begin, 0, static_cast<size_t>(columns) * sizeof(float));
    for (int32_t r = 0; r < rows; r += 4) {
      for (int32_t t = begin; t < end; t += width) {
        switch (rows - r) {
          case 1: add_rows<1>(r, t, importance); break;
          case 2: add_rows<2>(r, t, importance); break;
          case 3: add_rows<3>(r, t, importance); break;
          default: add_rows<4>(r, t, importance);
        }
      }
    }
    for (int32_t t = begin; t < begin + seen; ++t) {
      task_.key_sums[t] += static_cast<double>(key_part_[t]);
      task_.value_sums[t] += static_cast<double>(value_part_[t]);
    }
  }

  // Scores of one query become probabilities; what it does not see gets 0. A score that overflowed makes all of them NaN.
  // slopes are written where there is a softcap.
  void softmax(int32_t position, int32_t begin, int32_t end, float* scores, float* slopes) {
    constexpr float log2_e = 1.44269504088896340736f;
    int32_t const low = oldest(position);
    Ints lane{};
    for (int i = 0; i < width; ++i) lane[i] = i;
    float const sink = params_.head_sinks ? params_.head_sinks[task_.query_head] : -__builtin_inff();
    Floats largest = all(sink), poison{};
    for (int32_t t = begin; t < end; t += width) {
      Floats score = load(scores + t) * params_.scale;
      poison += score * 0.0f;
      if (params_.softcap > 0) {
        Floats const capped = tanh_of(score / params_.softcap);
        store(slopes + t, 1.0f - capped * capped);
        score = capped * params_.softcap;
      }
      Ints const token = lane + t;
      score = (token >= low) & (token <= position) ? score : all(-__builtin_inff());
      store(scores + t, score);
      largest = larger(largest, score);
    }
    float const maximum = largest_of(largest);
    double sum = 0;
    for (int32_t t = begin; t < end; t += width) {
      Floats const power = exp2_of((load(scores + t) - maximum) * log2_e);
      store(scores + t, power);
      sum += static_cast<double>(sum_of(power));
    }
    if (params_.head_sinks) sum += static_cast<double>(exp2_of(all((sink - maximum) * log2_e))[0]);
    float const factor = static_cast<float>(1 / sum) + sum_of(poison);
    for (int32_t t = begin; t < end; t += width) store(scores + t, load(scores + t) * factor);
  }

  // |value - output|^2 is summed as it stands, not as |value|^2 + |output|^2 - 2 output.value: where a query attends to one
  // token alone, output is nearly that value, and nothing would be left of the difference.
  template <int count>
  void add_rows(int32_t row, int32_t token, const float* importance) {
    Floats distances[count] = {};
    const float* const outputs = outputs_ + row * padded_;
    for (int64_t c = 0; c < channels_; ++c) {
      Floats const value = load(values_by_channel_ + c * stride_ + token);
      for (int r = 0; r < count; ++r) {
        Floats const difference = value - outputs[r * padded_ + c];
        distances[r] = fused(difference, difference, distances[r]);
      }
    }
    Floats key = load(key_part_ + token), value = load(value_part_ + token);
    for (int r = 0; r < count; ++r) {
      Floats const probability = load(scores_ + (row + r) * stride_ + token);
      Floats square = probability * probability;
      value += square;
      if (params_.softcap > 0) {
        Floats const slope = load(slopes_ + (row + r) * stride_ + token);
        square *= slope * slope;
      }
      key = fused(square * importance[row + r], distances[r], key);
    }
    store(key_part_ + token, key);
    store(value_part_ + token, value);
  }

  const couplet_attention_weights_params& params_;
  const AttentionWeightsTask& task_;
  int64_t const tokens_, channels_, stride_, padded_;
  float* keys_by_channel_;    // [head_dim][stride]
  float* values_by_channel_;  // [head_dim][stride]
  float* scores_;             // [block_queries][stride]
  float* slopes_;             // [block_queries][stride]
  float* key_part_;           // [stride], sums of one block
  float* value_part_;         // [stride]
  float* values_;             // [tokens][padded]
  float* queries_;            // [block_queries][padded], rotated
  float* outputs_;            // [block_queries][padded]
  float* angles_;             // cos, then sin: [2][rotary_max_stride]
};

static inline void run_weights(const AttentionWeightsTask& task) { WeightsBody(task).run(); }

}  // namespace couplet::cpu::COUPLET_BODY
