// The general body of attend: any codec, any shape, many rows. Included by attend_tile_{portable,avx2,avx512}.cc.
//
// A tile is up to 64 keys of one page or one dense run. It is brought into scratch once for all rows of the task (codes looked
// up, keys rotated), then scores[rows][64] = queries . keys^T and weighted[rows][head_dim] += probabilities . values are
// small matrix products. Keys never exist decoded beyond a tile.
#pragma once

#include "attend_rotate.h"
#include "attend_task.h"
#include "unpack.h"

namespace couplet::cpu::COUPLET_BODY {

constexpr float log2_e = 1.44269504088896340736f;
constexpr int32_t tile = attend_tile_tokens;

// Growth of a row's maximum (in powers of two) up to which what was summed before is left at its old scale.
constexpr float rescale_threshold = 8;

template <int channels>
static inline void look_up(const float* centroids, const uint16_t* codes, int32_t count, float* out, int64_t stride) {
  for (int32_t i = 0; i < count; ++i)
    memcpy(out + i * stride, centroids + codes[i] * channels, channels * sizeof(float));
}

// Decodes `count` tokens from slot `first` of a page on into out[token][padded].
static inline void decode_tile(const couplet_table& table, const uint8_t* page, int32_t kv_head, int32_t page_tokens,
                               int32_t first, int32_t count, float* out, int64_t stride) {
  uint16_t codes[tile];
  int32_t const channels = table.codec.group_channels;
  int64_t const row_bytes = couplet_row_bytes(table.codec, page_tokens);
  for (int32_t group = 0; group < table.groups; ++group, out += channels) {
    unpack_codes(page + group * row_bytes, table.codec.code_bits, first, count, codes);
    const float* const centroids = table.rows + group_offset(table, kv_head, group);
    switch (channels) {
      case 1: look_up<1>(centroids, codes, count, out, stride); break;
      case 2: look_up<2>(centroids, codes, count, out, stride); break;
      case 4: look_up<4>(centroids, codes, count, out, stride); break;
      case 8: look_up<8>(centroids, codes, count, out, stride); break;
      case 16: look_up<16>(centroids, codes, count, out, stride); break;
      default:
        for (int32_t i = 0; i < count; ++i)
          memcpy(out + i * stride, centroids + int64_t{codes[i]} * channels,
                 static_cast<size_t>(channels) * sizeof(float));
    }
  }
}

// One task's scratch and constants.
class TileBody {
 public:
  static size_t scratch(const couplet_attend_params& params, int32_t rows) {
    return floats(params, rows) * sizeof(float) + static_cast<size_t>(rows) * sizeof(Interval) + 64;
  }

  TileBody(const AttendTask& task, AttendState state, void* scratch)
      : params_(*task.params), sequence_(*task.sequence), task_(task), state_(state) {
    group_heads_ = params_.query_heads / params_.kv_heads;
    rows_ = task.query_tokens * group_heads_;
    padded_ = attend_padded(params_.head_dim);
    float* at = static_cast<float*>(scratch);
    auto const take = [&at](int64_t count) { return at += count, at - count; };
    keys_ = take(tile * padded_);
    turned_keys_ = take(tile * padded_);
    values_ = take(tile * padded_);
    queries_ = take(int64_t{rows_} * padded_);
    rotated_queries_ = take(params_.rotary ? int64_t{rows_} * padded_ : 0);
    scores_ = take(int64_t{rows_} * tile);
    angles_ = take(2 * rotary_max_stride);
    seen_ = reinterpret_cast<Interval*>(at);
  }

  void run(bool with_codes) {
    load_queries();
    memset(keys_, 0, static_cast<size_t>(tile * padded_) * sizeof(float));
    memset(values_, 0, static_cast<size_t>(tile * padded_) * sizeof(float));
    run_dense(KeySource::below);
    if (with_codes) run_codes();
    run_dense(KeySource::above);
  }

 private:
  static size_t floats(const couplet_attend_params& params, int32_t rows) {
    size_t const padded = static_cast<size_t>(attend_padded(params.head_dim)), r = static_cast<size_t>(rows);
    return 3 * tile * padded + (params.rotary ? 2 : 1) * r * padded + r * tile + 2 * rotary_max_stride;
  }

  // Queries times what turns q.k into the exponent of two (or into the argument of tanh), rows padded with zeros.
  void load_queries() {
    float const factor = params_.softcap > 0 ? params_.scale / params_.softcap : params_.scale * log2_e;
    for (int32_t row = 0; row < rows_; ++row) {
      int64_t const head = int64_t{task_.kv_head} * group_heads_ + row % group_heads_;
      const float* const from = sequence_.queries +
                                (task_.first_query + row / group_heads_) * sequence_.query_token_stride +
                                head * sequence_.query_head_stride;
      float* const to = queries_ + int64_t{row} * padded_;
      for (int32_t channel = 0; channel < padded_; ++channel)
        to[channel] = channel < params_.head_dim ? from[channel] * factor : 0;
      if (params_.rotary) scale_by_amplitude(*params_.rotary, to);
    }
    if (params_.rotary)
      memcpy(rotated_queries_, queries_, static_cast<size_t>(rows_) * static_cast<size_t>(padded_) * sizeof(float));
  }

  int32_t position(int32_t token) const { return sequence_.first_query + task_.first_query + token; }

  // What at least one row of the task sees of a source, within the task's keys.
  Interval seen_by_any(KeySource source) const {
    int32_t const begin = attend_visible(params_, sequence_, source, position(0)).begin;
    int32_t const end = attend_visible(params_, sequence_, source, position(task_.query_tokens - 1)).end;
    return {attend_larger(begin, task_.key_begin), attend_smaller(end, task_.key_end)};
  }

  void run_dense(KeySource source) {
    Interval const any = seen_by_any(source);
    for (int32_t index = 0; index < sequence_.dense_count; ++index) {
      const couplet_dense_rows& run = sequence_.dense[index];
      int32_t const end = attend_smaller(any.end, run.first_token + run.tokens);
      for (int32_t first = attend_larger(any.begin, run.first_token), count; first < end; first += count) {
        count = attend_smaller(tile, end - first);
        if (!find_rows(source, first, count)) continue;
        copy_rows(run.keys + (first - run.first_token) * run.key_token_stride + task_.kv_head * run.key_head_stride,
                  run.key_token_stride, count, keys_);
        copy_rows(
            run.values + (first - run.first_token) * run.value_token_stride + task_.kv_head * run.value_head_stride,
            run.value_token_stride, count, values_);
        run_tile(first, count);
      }
    }
  }

  void run_codes() {
    Interval const any = seen_by_any(KeySource::codes);
    for (int32_t first = any.begin, count; first < any.end; first += count) {
      int32_t const slot = first % params_.page_tokens;
      count = attend_smaller(attend_smaller(tile, params_.page_tokens - slot), any.end - first);
      if (!find_rows(KeySource::codes, first, count)) continue;
      const uint8_t* const page = sequence_.pages[first / params_.page_tokens];
      decode_tile(*params_.key_table, page + params_.key_page_offset + task_.kv_head * params_.key_page_stride,
                  task_.kv_head, params_.page_tokens, slot, count, keys_, padded_);
      decode_tile(*params_.value_table, page + params_.value_page_offset + task_.kv_head * params_.value_page_stride,
                  task_.kv_head, params_.page_tokens, slot, count, values_, padded_);
      run_tile(first, count);
    }
  }

  void copy_rows(const float* from, int64_t stride, int32_t count, float* to) {
    for (int32_t i = 0; i < count; ++i)
      memcpy(to + i * padded_, from + i * stride, static_cast<size_t>(params_.head_dim) * sizeof(float));
  }

  // Which of the tile's keys each row sees, and which rows see any: [first_row_, end_row_). False when none does.
  bool find_rows(KeySource source, int32_t first, int32_t count) {
    first_row_ = rows_;
    end_row_ = 0;
    for (int32_t token = 0; token < task_.query_tokens; ++token) {
      Interval seen = attend_visible(params_, sequence_, source, position(token));
      seen = {attend_larger(seen.begin - first, 0), attend_smaller(seen.end - first, count)};
      for (int32_t head = 0; head < group_heads_; ++head) seen_[token * group_heads_ + head] = seen;
      if (seen.begin >= seen.end) continue;
      first_row_ = attend_smaller(first_row_, token * group_heads_);
      end_row_ = (token + 1) * group_heads_;
    }
    return first_row_ < end_row_;
  }

  // keys_ and values_ hold `count` tokens from position `first` on.
  void run_tile(int32_t first, int32_t count) {
    int32_t const columns = (count + width - 1) / width * width;
    int32_t const rows = end_row_ - first_row_;
    rotate_tile(first, count);
    transpose(keys_, padded_, columns, params_.head_dim, turned_keys_, tile);
    const float* const queries = (params_.rotary ? rotated_queries_ : queries_) + int64_t{first_row_} * padded_;
    float* const scores = scores_ + int64_t{first_row_} * tile;
    multiply(rows, columns, queries, padded_, turned_keys_, tile, params_.head_dim, scores, tile, false);
    for (int32_t row = first_row_; row < end_row_; ++row) exponentiate(row, columns);
    multiply(rows, padded_, scores, tile, values_, padded_, count, state_.weighted + int64_t{first_row_} * padded_,
             padded_, true);
  }

  void rotate_tile(int32_t first, int32_t count) {
    if (!params_.rotary) return;
    const couplet_rotary& rotary = *params_.rotary;
    AngleRows const angles = key_angles(rotary, first);
    for (int32_t i = 0; i < count; ++i)
      rotate(rotary, angles.cos + i * angles.stride, angles.sin + i * angles.stride, keys_ + i * padded_,
             keys_ + i * padded_);
    if (!rotary.linear && rotated_) return;
    rotated_ = true;
    for (int32_t row = rotary.linear ? first_row_ : 0; row < (rotary.linear ? end_row_ : rows_); ++row) {
      int32_t const at = position(row / group_heads_);
      if (row % group_heads_ == 0) turn_towards(rotary, attend_larger(at, first), first, angles_);
      rotate(rotary, angles_, angles_ + rotary_max_stride, queries_ + int64_t{row} * padded_,
             rotated_queries_ + int64_t{row} * padded_);
    }
  }

  // Turns a row of scores into probabilities relative to the row's maximum, and keeps its sum.
  void exponentiate(int32_t row, int32_t columns) {
    float* const scores = scores_ + int64_t{row} * tile;
    Interval const seen = seen_[row];
    if (seen.begin >= seen.end) {
      memset(scores, 0, static_cast<size_t>(columns) * sizeof(float));
      return;
    }
    Ints lane{};
    for (int i = 0; i < width; ++i) lane[i] = i;
    Floats largest = all(-__builtin_inff());
    for (int32_t column = 0; column < columns; column += width) {
      Floats score = load(scores + column);
      if (params_.softcap > 0) score = tanh_of(score) * (params_.softcap * log2_e);
      Ints const at = lane + column;
      score = (at >= seen.begin) & (at < seen.end) ? score : all(-__builtin_inff());
      store(scores + column, score);
      largest = larger(largest, score);
    }
    raise_maximum(row, largest_of(largest));
    Floats sum{};
    for (int32_t column = 0; column < columns; column += width) {
      Floats const power = exp2_of(load(scores + column) - state_.maxima[row]);
      store(scores + column, power);
      sum += power;
    }
    state_.sums[row] += sum_of(sum);
  }

  void raise_maximum(int32_t row, float largest) {
    float const before = state_.maxima[row];
    if (!(largest > before + rescale_threshold)) return;
    state_.maxima[row] = largest;
    if (state_.sums[row] == 0) return;
    Floats const factor = exp2_of(all(before - largest));
    state_.sums[row] *= factor[0];
    float* const weighted = state_.weighted + int64_t{row} * padded_;
    for (int32_t channel = 0; channel < padded_; channel += width)
      store(weighted + channel, load(weighted + channel) * factor);
  }

  const couplet_attend_params& params_;
  const couplet_attend_sequence& sequence_;
  const AttendTask& task_;
  AttendState state_;
  int32_t group_heads_, rows_, first_row_ = 0, end_row_ = 0;
  int64_t padded_;
  bool rotated_ = false;
  float* keys_;             // [tile][padded]
  float* turned_keys_;      // [head_dim][tile]
  float* values_;           // [tile][padded]
  float* queries_;          // [rows][padded]
  float* rotated_queries_;  // [rows][padded]: relative to the tile's first position when angles are linear
  float* scores_;           // [rows][tile]
  float* angles_;           // cos, then sin: [2][rotary_max_stride]
  Interval* seen_;          // [rows], relative to the tile
};

static inline void run_tiles(const AttendTask& task, AttendState state, void* scratch, bool with_codes) {
  TileBody(task, state, scratch).run(with_codes);
}

}  // namespace couplet::cpu::COUPLET_BODY
