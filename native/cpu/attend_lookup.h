// The body of attend for few query rows over many coded keys. Included by attend_lookup_{avx2,avx512}.cc.
//
// For each query token and up to eight of the query heads that share a kv head, blocks of 512 tokens:
//   scores         by unit of 32 tokens: queries rotated once to the unit's first position, centroids looked up and rotated by
//                  their offset in the unit, all heads at once (attend_keys.h)
//   probabilities  relative to a maximum per head that is raised, and what was summed rescaled, only when it grew by 2^8
//   values         by group, over the whole block (attend_values.h)
#pragma once

#include "attend_keys.h"
#include "attend_task.h"
#include "attend_values.h"
#include "unpack.h"

namespace couplet::cpu::COUPLET_BODY {

constexpr float log2_e = 1.44269504088896340736f;
constexpr float rescale_threshold = 8;  // in powers of two
constexpr int64_t most_mass_bytes = 1 << 20;
constexpr int32_t most_heads = 8;

static inline GroupRotation group_rotation(const couplet_rotary* rotary, int32_t groups, int32_t channels) {
  if (!rotary) return {0, 0, groups};
  int32_t const turned = rotary->rotary_dim / channels;
  return rotary->kind == COUPLET_ROTARY_HALF ? GroupRotation{turned / 2, 0, groups - turned}
                                             : GroupRotation{0, turned, groups - turned};
}

class LookupBody {
 public:
  static bool fits(const couplet_attend_params& params) {
    if (!params.key_table || !params.value_table || params.page_tokens % unit != 0) return false;
    int32_t const channels = params.key_codec.group_channels;
    if (!find_key_functions(channels, 1).score || !find_value_function(params.value_codec.group_channels, 1, 1))
      return false;
    if (!params.rotary) return true;
    return params.rotary->rotary_dim % (params.rotary->kind == COUPLET_ROTARY_HALF ? 2 * channels : channels) == 0;
  }

  static size_t scratch(const couplet_attend_params& params) {
    LookupBody body(params);
    uint8_t* const anywhere = reinterpret_cast<uint8_t*>(64);
    return static_cast<size_t>(body.place(anywhere) - anywhere);
  }

  LookupBody(const AttendTask& task, AttendState state, void* scratch) : LookupBody(*task.params) {
    task_ = &task;
    sequence_ = task.sequence;
    state_ = state;
    place(static_cast<uint8_t*>(scratch));
  }

  void run() {
    if (params_.rotary && params_.rotary->linear) arrange_angles_of(0);
    for (int32_t token = 0; token < task_->query_tokens; ++token)
      for (int32_t head = 0, heads; head < group_heads_; head += heads) {
        heads = attend_heads_at_once(group_heads_ - head);
        run_heads(token, head, heads);
      }
  }

 private:
  struct Unit {
    const uint8_t* page;
    int32_t slot;
  };

  explicit LookupBody(const couplet_attend_params& params) : params_(params) {
    group_heads_ = params.query_heads / params.kv_heads;
    padded_ = attend_padded(params.head_dim);
    key_groups_ = couplet_codec_groups(params.key_codec, params.head_dim);
    value_groups_ = couplet_codec_groups(params.value_codec, params.head_dim);
    value_centroids_ = couplet_codec_centroids(params.value_codec);
    rotation_ = group_rotation(params.rotary, key_groups_, params.key_codec.group_channels);
    int32_t const most = attend_heads_at_once(group_heads_);
    mass_bytes_ = int64_t{value_groups_} * value_centroids_ * most * 4;
    if (most < 4 || (params.value_codec.group_channels != 4 && params.value_codec.group_channels != 8) ||
        mass_bytes_ > most_mass_bytes)
      mass_bytes_ = 0;
  }

  // Lays the scratch out from `at` on and returns its end.
  uint8_t* place(uint8_t* at) {
    auto const take = [&at](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<decltype(&*pointer)>(at);
      at += (count * static_cast<int64_t>(sizeof *pointer) + 63) / 64 * 64;
    };
    int64_t const angles = int64_t{rotation_.pairs + rotation_.turned} * params_.key_codec.group_channels * unit;
    int64_t const queries = int64_t{key_groups_} * query_block(params_.key_codec.group_channels, most_heads);
    take(queries_, queries);
    take(turned_, queries);
    take(weighted_, most_heads * padded_);
    take(cos_, angles);
    take(sin_, angles);
    take(row_, 2 * rotary_max_stride);
    take(key_places_, int64_t{key_groups_} * unit + 3);  // readers take four at a time
    take(value_places_, 4 * block_tokens);
    take(scores_, block_tokens * most_heads);
    take(twice_, params_.value_codec.group_channels == 2 ? 2 * block_tokens * most_heads : 0);
    take(mass_, mass_bytes_ / 4);
    return at;
  }

  void run_heads(int32_t token, int32_t first_head, int32_t heads) {
    position_ = sequence_->first_query + task_->first_query + token;
    Interval seen = attend_visible(params_, *sequence_, KeySource::codes, position_);
    seen = {attend_larger(seen.begin, task_->key_begin), attend_smaller(seen.end, task_->key_end)};
    if (seen.begin >= seen.end) return;
    heads_ = heads;
    end_ = seen.end;
    key_functions_ = find_key_functions(params_.key_codec.group_channels, heads);
    query_block_ = query_block(params_.key_codec.group_channels, heads);
    // Mass costs a pass over all centroids at the end: worth it when there are a few tokens for each.
    bool const mass = mass_bytes_ > 0 && heads >= 4 && seen.end - seen.begin >= value_centroids_ * (heads == 4 ? 3 : 2);
    mass_used_ = mass ? int64_t{value_groups_} * value_centroids_ * heads : 0;
    memset(mass_, 0, static_cast<size_t>(mass_used_) * sizeof(float));
    memset(weighted_, 0, static_cast<size_t>(heads * padded_) * sizeof(float));
    load_queries(token, first_head);
    maxima_ = all(-__builtin_inff());
    sums_ = Floats{};
    for (int32_t first = seen.begin / unit * unit; first < seen.end; first += block_tokens) {
      int32_t const tokens = attend_smaller(block_tokens, (seen.end - first + unit - 1) / unit * unit);
      find_units(first, tokens);
      score_block(seen, first, tokens);
      add_values(tokens);
    }
    if (mass) spend();
    merge(token, first_head);
  }

  // Queries times what turns q.k into the exponent of two (or the argument of tanh) and, where angles are linear, times both
  // amplitudes. Heads beyond the last are zero.
  void load_queries(int32_t token, int32_t first_head) {
    int32_t const channels = params_.key_codec.group_channels;
    float const factor = params_.softcap > 0 ? params_.scale / params_.softcap : params_.scale * log2_e;
    size_t const bytes = static_cast<size_t>(key_groups_ * query_block_) * sizeof(float);
    memset(queries_, 0, bytes);
    for (int32_t head = 0; head < attend_smaller(heads_, group_heads_ - first_head); ++head) {
      const float* const from =
          static_cast<const float*>(sequence_->queries) + (task_->first_query + token) * sequence_->query_token_stride +
          (int64_t{task_->kv_head} * group_heads_ + first_head + head) * sequence_->query_head_stride;
      for (int32_t channel = 0; channel < params_.head_dim; ++channel) row_[channel] = from[channel] * factor;
      if (params_.rotary) scale_by_amplitude(*params_.rotary, row_);
      for (int32_t group = 0; group < key_groups_; ++group)
        memcpy(queries_ + group * query_block_ + head * channels, row_ + group * channels,
               static_cast<size_t>(channels) * sizeof(float));
    }
    memcpy(turned_, queries_, bytes);
    if (params_.rotary && !params_.rotary->linear) turn_queries_towards(0);
  }

  void arrange_angles_of(int32_t first) {
    const couplet_rotary& rotary = *params_.rotary;
    int32_t const tokens = rotary.linear ? unit : attend_smaller(unit, rotary.positions - first);
    find_key_functions(params_.key_codec.group_channels, 1)
        .arrange(rotation_, key_angles(rotary, first), tokens, cos_, sin_);
  }

  void turn_queries_towards(int32_t first) {
    turn_towards(*params_.rotary, attend_larger(position_, first), first, row_);
    key_functions_.turn(rotation_, heads_, row_, queries_, turned_);
  }

  // Where the units of the block from position `first` on lie.
  void find_units(int32_t first, int32_t tokens) {
    int32_t page = first / params_.page_tokens, slot = first % params_.page_tokens;
    for (int32_t i = 0; i < tokens / unit; ++i) {
      units_[i] = {sequence_->pages[page], slot};
      slot += unit;
      if (slot == params_.page_tokens) ++page, slot = 0;
    }
  }

  // Pages lie anywhere, so the processor does not see them coming: while a unit is scored, its share of the values of its page,
  // which the block reads after its scores, and of the keys of the page after it are on their way.
  void fetch(const Unit& at, int32_t next, KeyUnit::Fetch (&fetch)[2]) const {
    int64_t const units = params_.page_tokens / unit, share = at.slot / unit;
    int64_t const key_bytes = couplet_row_bytes(params_.key_codec, params_.page_tokens) * key_groups_ / units;
    int64_t const value_bytes = couplet_row_bytes(params_.value_codec, params_.page_tokens) * value_groups_ / units;
    fetch[0] = {at.page + params_.value_page_offset + task_->kv_head * params_.value_page_stride + share * value_bytes,
                value_bytes};
    fetch[1] = {};
    if (next < end_)
      fetch[1] = {sequence_->pages[next / params_.page_tokens] + params_.key_page_offset +
                      task_->kv_head * params_.key_page_stride + share * key_bytes,
                  key_bytes};
  }

  // Probabilities of the block from position `first` on, unit by unit while its scores are in L1.
  void score_block(Interval seen, int32_t first, int32_t tokens) {
    const couplet_table& table = *params_.key_table;
    int64_t const row_bytes = couplet_row_bytes(table.codec, params_.page_tokens);
    int const shift = place_shift(table.codec.group_channels);
    KeyUnit keys = {.centroids = table.rows + group_offset(table, task_->kv_head, 0),
                    .group_stride = group_stride(table),
                    .places = key_places_,
                    .queries = turned_,
                    .cos = cos_,
                    .sin = sin_,
                    .rotation = rotation_,
                    .scores = scores_,
                    .fetch = {}};
    for (int32_t i = 0; i < tokens / unit; ++i, first += unit, keys.scores += unit * heads_) {
      unpack_unit(units_[i].page + params_.key_page_offset + task_->kv_head * params_.key_page_stride, row_bytes,
                  key_groups_, table.codec.code_bits, units_[i].slot, shift, key_places_);
      if (params_.rotary && params_.rotary->linear) turn_queries_towards(first);
      if (params_.rotary && !params_.rotary->linear) arrange_angles_of(first);
      fetch(units_[i], first + params_.page_tokens, keys.fetch);
      key_functions_.score(keys);
      exponentiate(keys.scores, {attend_larger(seen.begin - first, 0), attend_smaller(seen.end - first, unit)});
    }
    if (params_.value_codec.group_channels == 2) double_probabilities(tokens);
  }

  // Turns the scores of a unit into probabilities; those of tokens outside `seen` become 0.
  // Lane i of a vector of scores belongs to head i % heads; maxima_ and sums_ keep that order.
  void exponentiate(float* scores, Interval seen) {
    Floats const unseen = all(-__builtin_inff());
    int32_t const count = unit * heads_;
    if (params_.softcap > 0)
      for (int32_t i = 0; i < count; i += width)
        store(scores + i, tanh_of(load(scores + i)) * (params_.softcap * log2_e));
    for (int32_t i = 0; i < seen.begin * heads_; ++i) scores[i] = unseen[0];
    for (int32_t i = seen.end * heads_; i < count; ++i) scores[i] = unseen[0];

    Floats largest = unseen;
    for (int32_t i = 0; i < count; i += width) largest = larger(largest, load(scores + i));
    largest = largest_of_heads(largest);
    if (any(largest > maxima_ + rescale_threshold)) raise_maxima(larger(largest, maxima_), scores);
    Floats const maxima = maxima_;
    Floats sums = sums_;
    for (int32_t i = 0; i < count; i += width) {
      Floats const power = exp2_of(load(scores + i) - maxima);
      sums += power;
      store(scores + i, power);
    }
    sums_ = sums;
  }

  // The largest of all lanes of each head, in all of them.
  Floats largest_of_heads(Floats v) const {
#if defined(__AVX512F__)
    if (heads_ <= 8) v = larger(v, swapped<8>(v, AllLanes{}));
#endif
    if (heads_ <= 4) v = larger(v, swapped<4>(v, AllLanes{}));
    if (heads_ <= 2) v = larger(v, swapped<2>(v, AllLanes{}));
    if (heads_ <= 1) v = larger(v, swapped<1>(v, AllLanes{}));
    return v;
  }

  // Brings all that was summed so far to new maxima: earlier blocks, and this block's probabilities before `scores`.
  void raise_maxima(Floats raised, const float* scores) {
    Floats const factor = exp2_of(maxima_ - raised);
    maxima_ = raised;
    if (!any(sums_ > 0)) return;
    sums_ *= factor;
    for (float* p = scores_; p < scores; p += width) store(p, load(p) * factor);
    for (int64_t i = 0; i < mass_used_; i += width) store(mass_ + i, load(mass_ + i) * factor);
    for (int32_t head = 0; head < heads_; ++head)
      for (int64_t i = head * padded_; i < (head + 1) * padded_; i += width)
        store(weighted_ + i, load(weighted_ + i) * factor[head]);
  }

  void double_probabilities(int32_t tokens) {
    for (int32_t token = 0; token < tokens; ++token)
      for (int32_t head = 0; head < heads_; ++head) {
        float* const to = twice_ + 2 * (head * block_tokens + token);
        to[0] = to[1] = scores_[token * heads_ + head];
      }
  }

  ValueBlock value_block(int32_t group) const {
    const couplet_table& table = *params_.value_table;
    return {.centroids = table.rows + group_offset(table, task_->kv_head, group),
            .group_stride = group_stride(table),
            .places = value_places_,
            .probabilities = table.codec.group_channels == 2 ? twice_ : scores_,
            .tokens = 0,
            .mass = mass_ + int64_t{group} * value_centroids_ * heads_,
            .weighted = weighted_ + group * table.codec.group_channels,
            .padded = padded_};
  }

  void add_values(int32_t tokens) {
    couplet_codec const codec = params_.value_codec;
    int64_t const row_bytes = couplet_row_bytes(codec, params_.page_tokens);
    int const shift = place_shift(mass_used_ > 0 ? heads_ : codec.group_channels);
    int32_t const most = mass_used_ > 0 ? 1 : groups_at_once(codec.group_channels, heads_);
    for (int32_t group = 0, groups; group < value_groups_; group += groups) {
      groups = value_groups_ - group >= most ? most : 1;
      int64_t const row = params_.value_page_offset + task_->kv_head * params_.value_page_stride + group * row_bytes;
      for (int32_t g = 0; g < groups; ++g)
        for (int32_t i = 0; i < tokens / unit; ++i)
          unpack_unit(units_[i].page + row + g * row_bytes, row_bytes, 1, codec.code_bits, units_[i].slot, shift,
                      value_places_ + g * block_tokens + i * unit);
      ValueBlock block = value_block(group);
      block.tokens = tokens;
      if (mass_used_ == 0)
        find_value_function(codec.group_channels, heads_, groups)(block);
      else if (heads_ == 8)
        add_mass<8>(block);
      else
        add_mass<4>(block);
    }
  }

  void spend() {
    for (int32_t group = 0; group < value_groups_; ++group) {
      ValueBlock const block = value_block(group);
      switch (params_.value_codec.group_channels * 16 + heads_) {
        case 4 * 16 + 4: spend_mass<4, 4>(block, value_centroids_); break;
        case 4 * 16 + 8: spend_mass<4, 8>(block, value_centroids_); break;
        case 8 * 16 + 4: spend_mass<8, 4>(block, value_centroids_); break;
        case 8 * 16 + 8: spend_mass<8, 8>(block, value_centroids_); break;
      }
    }
  }

  // Adds what these heads found to the task's state.
  void merge(int32_t token, int32_t first_head) {
    for (int32_t head = 0; head < attend_smaller(heads_, group_heads_ - first_head); ++head) {
      int64_t const row = token * group_heads_ + first_head + head;
      float sum = 0;
      for (int lane = head; lane < width; lane += heads_) sum += sums_[lane];
      float const before = state_.maxima[row], own = maxima_[head];
      float const largest = before > own ? before : own;
      float const before_factor = exp2_of(all(before - largest))[0], own_factor = exp2_of(all(own - largest))[0];
      state_.maxima[row] = largest;
      state_.sums[row] = state_.sums[row] * before_factor + sum * own_factor;
      float* const to = state_.weighted + row * padded_;
      const float* const from = weighted_ + head * padded_;
      for (int64_t c = 0; c < padded_; c += width)
        store(to + c, load(to + c) * before_factor + load(from + c) * own_factor);
    }
  }

  const couplet_attend_params& params_;
  const AttendTask* task_ = nullptr;
  const couplet_attend_sequence* sequence_ = nullptr;
  AttendState state_{};
  int32_t group_heads_, key_groups_, value_groups_, value_centroids_;
  int64_t padded_, mass_bytes_;
  GroupRotation rotation_{};

  // Of the heads in hand.
  int32_t heads_ = 0, position_ = 0, end_ = 0;
  int64_t mass_used_ = 0;  // floats
  KeyFunctions key_functions_{};
  int64_t query_block_ = 0;
  Floats maxima_{}, sums_{};
  Unit units_[block_units]{};  // of the block in hand

  float* queries_ = nullptr;          // [key groups][query_block]
  float* turned_ = nullptr;           // likewise, turned towards the unit in hand
  float* weighted_ = nullptr;         // [heads][padded]
  float* cos_ = nullptr;              // [pairs + turned groups][unit][channels]
  float* sin_ = nullptr;              // likewise
  float* row_ = nullptr;              // cos, then sin of a row of angles: [2][rotary_max_stride]
  uint16_t* key_places_ = nullptr;    // [groups][unit]
  uint16_t* value_places_ = nullptr;  // [groups at once][block_tokens]
  float* scores_ = nullptr;           // [block_tokens][heads]; then probabilities
  float* twice_ = nullptr;            // [heads][block_tokens][2]: probabilities for the gathering kernel
  float* mass_ = nullptr;             // [groups][centroids][heads]
};

}  // namespace couplet::cpu::COUPLET_BODY
