// The general body of attend: any codec, any shape, many rows. Included by attend_tile_{portable,avx2,avx512}.cc.
//
// A tile is up to 64 keys of one page or one dense run. It is brought into scratch once for all rows of the task (codes looked
// up, keys rotated), then two small matrix products do the rest:
//   scores[64][rows]          = keys . queries^T                 lanes are rows, so the softmax of a row stays in its lane
//   weighted[rows][head_dim] += probabilities^T . values         lanes are channels
// Keys never exist decoded beyond a tile.
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

// Decodes `count` tokens from slot `first` of a page on into out[token][stride].
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
    TileBody body(params, rows);
    uint8_t* const anywhere = reinterpret_cast<uint8_t*>(64);
    return static_cast<size_t>(body.place(anywhere) - anywhere);
  }

  TileBody(const AttendTask& task, AttendState state, void* scratch)
      : TileBody(*task.params, task.query_tokens * (task.params->query_heads / task.params->kv_heads)) {
    task_ = &task;
    sequence_ = task.sequence;
    state_ = state;
    place(static_cast<uint8_t*>(scratch));
  }

  void run(bool with_codes) {
    run_dense(KeySource::below);
    if (with_codes) run_codes();
    run_dense(KeySource::above);
  }

 private:
  TileBody(const couplet_attend_params& params, int32_t rows) : params_(params), rows_(rows) {
    group_heads_ = params.query_heads / params.kv_heads;
    lanes_ = attend_padded(rows);
    padded_ = attend_padded(params.head_dim);
    stride_ = padded_ + 16;  // rows of 512 bytes would all fall into the same few sets of L1
  }

  // Lays the scratch out from `at` on and returns its end.
  uint8_t* place(uint8_t* at) {
    auto const take = [&at](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<decltype(&*pointer)>(at);
      at += (count * static_cast<int64_t>(sizeof *pointer) + 63) / 64 * 64;
    };
    take(keys_, tile * stride_);
    take(values_, tile * stride_);
    take(queries_, params_.head_dim * lanes_);
    take(scores_, tile * lanes_);
    take(row_, padded_);
    take(angles_, 2 * rotary_max_stride);
    take(begin_, lanes_);
    take(end_, lanes_);
    return at;
  }

  int32_t position(int32_t token) const { return sequence_->first_query + task_->first_query + token; }

  // Queries times what turns q.k into the exponent of two (or into the argument of tanh), rotated, one row to a lane. Made when
  // the first tile wants them.
  void load_queries() {
    if (loaded_) return;
    loaded_ = true;
    memset(queries_, 0, static_cast<size_t>(params_.head_dim * lanes_) * sizeof(float));
    float const factor = params_.softcap > 0 ? params_.scale / params_.softcap : params_.scale * log2_e;
    for (int32_t row = 0; row < rows_; ++row) {
      int32_t const token = row / group_heads_, head = task_->kv_head * group_heads_ + row % group_heads_;
      const float* const from = static_cast<const float*>(sequence_->queries) +
                                (task_->first_query + token) * sequence_->query_token_stride +
                                head * sequence_->query_head_stride;
      for (int32_t channel = 0; channel < params_.head_dim; ++channel) row_[channel] = from[channel] * factor;
      if (params_.rotary) {
        if (row % group_heads_ == 0) turn_towards(*params_.rotary, position(token), 0, angles_);
        scale_by_amplitude(*params_.rotary, row_);
        rotate(*params_.rotary, angles_, angles_ + rotary_max_stride, row_, row_);
      }
      for (int32_t channel = 0; channel < params_.head_dim; ++channel) queries_[channel * lanes_ + row] = row_[channel];
    }
  }

  // What at least one row of the task sees of a source, within the task's keys.
  Interval seen_by_any(KeySource source) const {
    int32_t const begin = attend_visible(params_, *sequence_, source, position(0)).begin;
    int32_t const end = attend_visible(params_, *sequence_, source, position(task_->query_tokens - 1)).end;
    return {attend_larger(begin, task_->key_begin), attend_smaller(end, task_->key_end)};
  }

  void run_dense(KeySource source) {
    Interval const any_sees = seen_by_any(source);
    for (int32_t index = 0; index < sequence_->dense_count; ++index) {
      const couplet_dense_rows& run = sequence_->dense[index];
      int32_t const end = attend_smaller(any_sees.end, run.first_token + run.tokens);
      for (int32_t first = attend_larger(any_sees.begin, run.first_token), count; first < end; first += count) {
        count = attend_smaller(tile, end - first);
        if (!find_rows(source, first, count)) continue;
        int64_t const token = first - run.first_token;
        copy_rows(run.keys + token * run.key_token_stride + task_->kv_head * run.key_head_stride, run.key_token_stride,
                  count, keys_);
        copy_rows(run.values + token * run.value_token_stride + task_->kv_head * run.value_head_stride,
                  run.value_token_stride, count, values_);
        run_tile(first, count);
      }
    }
  }

  void run_codes() {
    Interval const any_sees = seen_by_any(KeySource::codes);
    for (int32_t first = any_sees.begin, count; first < any_sees.end; first += count) {
      int32_t const slot = first % params_.page_tokens;
      count = attend_smaller(attend_smaller(tile, params_.page_tokens - slot), any_sees.end - first);
      if (!find_rows(KeySource::codes, first, count)) continue;
      const uint8_t* const page = sequence_->pages[first / params_.page_tokens];
      decode_tile(*params_.key_table, page + params_.key_page_offset + task_->kv_head * params_.key_page_stride,
                  task_->kv_head, params_.page_tokens, slot, count, keys_, stride_);
      decode_tile(*params_.value_table, page + params_.value_page_offset + task_->kv_head * params_.value_page_stride,
                  task_->kv_head, params_.page_tokens, slot, count, values_, stride_);
      run_tile(first, count);
    }
  }

  void copy_rows(const float* from, int64_t from_stride, int32_t count, float* to) {
    for (int32_t i = 0; i < count; ++i)
      memcpy(to + i * stride_, from + i * from_stride, static_cast<size_t>(params_.head_dim) * sizeof(float));
  }

  // Which of the tile's keys each row sees, and which rows see any: [first_row_, end_row_). False when none does.
  bool find_rows(KeySource source, int32_t first, int32_t count) {
    first_row_ = rows_;
    end_row_ = 0;
    all_seen_ = true;
    for (int32_t token = 0; token < task_->query_tokens; ++token) {
      Interval seen = attend_visible(params_, *sequence_, source, position(token));
      seen = {attend_larger(seen.begin - first, 0), attend_smaller(seen.end - first, count)};
      all_seen_ = all_seen_ && seen.begin == 0 && seen.end == count;
      for (int32_t row = token * group_heads_; row < (token + 1) * group_heads_; ++row)
        begin_[row] = seen.begin, end_[row] = seen.end;
      if (seen.begin >= seen.end) continue;
      first_row_ = attend_smaller(first_row_, token * group_heads_);
      end_row_ = (token + 1) * group_heads_;
    }
    for (int64_t lane = rows_; lane < lanes_; ++lane) begin_[lane] = end_[lane] = 0;
    return first_row_ < end_row_;
  }

  // keys_ and values_ hold `count` tokens from position `first` on.
  void run_tile(int32_t first, int32_t count) {
    load_queries();
    rotate_keys(first, count);
    if (padded_ > params_.head_dim)
      for (int32_t i = 0; i < count; ++i)
        memset(values_ + i * stride_ + params_.head_dim, 0,
               static_cast<size_t>(padded_ - params_.head_dim) * sizeof(float));
    int32_t const first_lane = first_row_ / width * width;
    int32_t const end_lane = (end_row_ + width - 1) / width * width;
    multiply({.rows = count,
              .columns = end_lane - first_lane,
              .depth = params_.head_dim,
              .add = false,
              .a = keys_,
              .a_row_stride = stride_,
              .a_depth_stride = 1,
              .b = queries_ + first_lane,
              .b_stride = lanes_,
              .c = scores_ + first_lane,
              .c_stride = lanes_});
    for (int32_t lane = first_lane; lane < end_lane; lane += width) exponentiate(lane, count);
    multiply({.rows = end_row_ - first_row_,
              .columns = static_cast<int32_t>(padded_),
              .depth = count,
              .add = true,
              .a = scores_ + first_row_,
              .a_row_stride = 1,
              .a_depth_stride = lanes_,
              .b = values_,
              .b_stride = stride_,
              .c = state_.weighted + first_row_ * padded_,
              .c_stride = padded_});
  }

  void rotate_keys(int32_t first, int32_t count) {
    if (!params_.rotary) return;
    const couplet_rotary& rotary = *params_.rotary;
    AngleRows const rows = key_angles(rotary, first);
    for (int32_t i = 0; i < count; ++i)
      rotate(rotary, rows.cos + i * rows.stride, rows.sin + i * rows.stride, keys_ + i * stride_, keys_ + i * stride_);
    if (!rotary.linear) return;
    turn_towards(rotary, first, 0, angles_);
    for (int32_t i = 0; i < count; ++i)
      rotate(rotary, angles_, angles_ + rotary_max_stride, keys_ + i * stride_, keys_ + i * stride_);
  }

  // Turns the scores of `width` rows into probabilities relative to the rows' maxima, and adds these up.
  void exponentiate(int32_t lane, int32_t count) {
    Floats const unseen = all(-__builtin_inff());
    Floats largest = unseen;
    float* const scores = scores_ + lane;
    if (params_.softcap > 0)
      for (int32_t i = 0; i < count; ++i)
        store(scores + i * lanes_, tanh_of(load(scores + i * lanes_)) * (params_.softcap * log2_e));
    if (!all_seen_) {
      Ints begin, end;
      memcpy(&begin, begin_ + lane, sizeof begin);
      memcpy(&end, end_ + lane, sizeof end);
      for (int32_t i = 0; i < count; ++i)
        store(scores + i * lanes_, (begin <= i) & (i < end) ? load(scores + i * lanes_) : unseen);
    }
    for (int32_t i = 0; i < count; ++i) largest = larger(largest, load(scores + i * lanes_));
    raise_maxima(lane, largest);
    Floats const maxima = load(state_.maxima + lane);
    Floats const base = maxima == unseen ? Floats{} : maxima;  // rows that have seen nothing yet: 2^(-infinity - 0)
    Floats sum{};
    for (int32_t i = 0; i < count; ++i) {
      Floats const power = exp2_of(load(scores + i * lanes_) - base);
      store(scores + i * lanes_, power);
      sum += power;
    }
    store(state_.sums + lane, load(state_.sums + lane) + sum);
  }

  void raise_maxima(int32_t lane, Floats largest) {
    Floats const before = load(state_.maxima + lane);
    Ints const grown = largest > before + rescale_threshold;
    if (!any(grown)) return;
    Floats const maxima = grown ? largest : before;
    store(state_.maxima + lane, maxima);
    Floats const sums = load(state_.sums + lane);
    if (!any(sums > 0)) return;
    Floats const factor = grown ? exp2_of(before - maxima) : all(1.0f);
    store(state_.sums + lane, sums * factor);
    for (int i = 0; i < width && lane + i < rows_; ++i) {
      if (!grown[i]) continue;
      float* const weighted = state_.weighted + (lane + i) * padded_;
      for (int64_t channel = 0; channel < padded_; channel += width)
        store(weighted + channel, load(weighted + channel) * factor[i]);
    }
  }

  const couplet_attend_params& params_;
  const AttendTask* task_ = nullptr;
  const couplet_attend_sequence* sequence_ = nullptr;
  AttendState state_{};
  int32_t rows_, group_heads_;
  int64_t lanes_;   // rows rounded up to 16
  int64_t padded_;  // head_dim rounded up to 16
  int64_t stride_;  // of keys_ and values_
  bool loaded_ = false;

  // Of the tile in hand.
  int32_t first_row_ = 0, end_row_ = 0;
  bool all_seen_ = false;  // by all rows

  float* keys_ = nullptr;     // [tile][stride]
  float* values_ = nullptr;   // [tile][stride]
  float* queries_ = nullptr;  // [head_dim][lanes]
  float* scores_ = nullptr;   // [tile][lanes], then probabilities
  float* row_ = nullptr;      // [padded]
  float* angles_ = nullptr;   // cos, then sin: [2][rotary_max_stride]
  int32_t* begin_ = nullptr;  // [lanes]: what each row sees of the tile
  int32_t* end_ = nullptr;    // [lanes]
};

static inline void run_tiles(const AttendTask& task, AttendState state, void* scratch, bool with_codes) {
  TileBody(task, state, scratch).run(with_codes);
}

}  // namespace couplet::cpu::COUPLET_BODY
