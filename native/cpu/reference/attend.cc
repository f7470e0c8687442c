#include "attend.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../table.h"

namespace couplet::cpu {
namespace {

using Row = std::vector<double>;

uint32_t read_code(const uint8_t* row, couplet_codec codec, int32_t slot) {
  uint32_t code = 0;
  for (int32_t bit = 0; bit < codec.code_bits; ++bit) {
    int64_t const at = int64_t{slot} * codec.code_bits + bit;
    code |= static_cast<uint32_t>(row[at / 8] >> at % 8 & 1) << bit;
  }
  return code;
}

Row decode(const couplet_table& table, const uint8_t* page, int32_t page_tokens, int32_t kv_head, int32_t slot) {
  Row channels;
  for (int32_t group = 0; group < table.groups; ++group) {
    uint32_t const code = read_code(page + group * couplet_row_bytes(table.codec, page_tokens), table.codec, slot);
    for (int32_t c = 0; c < table.codec.group_channels; ++c)
      channels.push_back(
          table.rows[group_offset(table, kv_head, group) + int64_t{code} * table.codec.group_channels + c]);
  }
  return channels;
}

// cos and sin of every pair at every position that is asked for.
class Angles {
 public:
  Angles(const couplet_rotary_params* rotary, int64_t positions) : rotary_(rotary) {
    if (!rotary) return;
    half_ = rotary->rotary_dim / 2;
    for (int64_t position = 0; position < positions; ++position)
      for (int64_t i = 0; i < half_; ++i) {
        double const angle =
            static_cast<double>(position) * std::pow(rotary->theta, -2.0 * static_cast<double>(i) / rotary->rotary_dim);
        cos_.push_back(rotary->cos ? rotary->cos[position * half_ + i] : std::cos(angle));
        sin_.push_back(rotary->sin ? rotary->sin[position * half_ + i] : std::sin(angle));
      }
  }

  Row rotate(int64_t position, Row row) const {
    bool const interleaved = rotary_ && rotary_->kind == COUPLET_ROTARY_INTERLEAVED;
    for (int64_t i = 0; i < half_; ++i) {
      double const cos = cos_[static_cast<size_t>(position * half_ + i)],
                   sin = sin_[static_cast<size_t>(position * half_ + i)];
      double& x = row[static_cast<size_t>(interleaved ? 2 * i : i)];
      double& y = row[static_cast<size_t>(interleaved ? 2 * i + 1 : i + half_)];
      double const turned = x * cos - y * sin;
      y = y * cos + x * sin;
      x = turned;
    }
    return row;
  }

 private:
  const couplet_rotary_params* rotary_;
  int64_t half_ = 0;
  Row cos_, sin_;
};

// One token of one kv head as a query may read it: key rotated, value as it is. Empty when it is not there in this form.
struct Token {
  Row key, value;
};

struct Tokens {
  std::vector<Token> coded, dense;  // by position
};

Tokens read_tokens(const couplet_attend_params& params, const Angles& angles, const couplet_attend_sequence& sequence,
                   int32_t kv_head) {
  size_t const count = static_cast<size_t>(sequence.first_query + sequence.query_tokens);
  Tokens tokens{std::vector<Token>(count), std::vector<Token>(count)};
  for (int64_t j = sequence.coded_begin; j < std::min<int64_t>(sequence.coded_end, static_cast<int64_t>(count)); ++j) {
    const uint8_t* const page = sequence.pages[j / params.page_tokens];
    int32_t const slot = static_cast<int32_t>(j % params.page_tokens);
    if (!page) continue;
    tokens.coded[static_cast<size_t>(j)] = {
        angles.rotate(j, decode(*params.key_table, page + params.key_page_offset + kv_head * params.key_page_stride,
                                params.page_tokens, kv_head, slot)),
        decode(*params.value_table, page + params.value_page_offset + kv_head * params.value_page_stride,
               params.page_tokens, kv_head, slot)};
  }
  for (int32_t r = 0; r < sequence.dense_count; ++r) {
    const couplet_dense_rows& run = sequence.dense[r];
    for (int64_t i = 0; i < run.tokens && run.first_token + i < static_cast<int64_t>(count); ++i) {
      const float* const key = run.keys + i * run.key_token_stride + kv_head * run.key_head_stride;
      const float* const value = run.values + i * run.value_token_stride + kv_head * run.value_head_stride;
      tokens.dense[static_cast<size_t>(run.first_token + i)] = {
          angles.rotate(run.first_token + i, Row(key, key + params.head_dim)), Row(value, value + params.head_dim)};
    }
  }
  return tokens;
}

void attend_row(const couplet_attend_params& params, const couplet_attend_sequence& sequence, const Tokens& tokens,
                const Row& query, int64_t position, double sink, float* out) {
  std::vector<const Token*> seen;
  Row logits;
  for (int64_t j = 0; j <= position; ++j) {
    if (params.local_window && j <= position - params.local_window) continue;
    bool const coded = j >= sequence.coded_begin && j < sequence.coded_end && j < position - sequence.window + 1;
    const Token& token = (coded ? tokens.coded : tokens.dense)[static_cast<size_t>(j)];
    double product = 0;
    for (size_t c = 0; c < query.size(); ++c) product += query[c] * token.key[c];
    double const logit = static_cast<double>(params.scale) * product;
    double const cap = params.softcap;
    logits.push_back(cap > 0 ? cap * std::tanh(logit / cap) : logit);
    seen.push_back(&token);
  }
  double largest = sink;
  for (double logit : logits) largest = std::max(largest, logit);
  double sum = seen.empty() ? 1 : std::exp(sink - largest);
  Row weighted(query.size());
  for (size_t i = 0; i < seen.size(); ++i) {
    double const power = std::exp(logits[i] - largest);
    sum += power;
    for (size_t c = 0; c < query.size(); ++c) weighted[c] += power * seen[i]->value[c];
  }
  for (size_t c = 0; c < query.size(); ++c) out[c] = static_cast<float>(weighted[c] / sum);
}

}  // namespace

void reference_attend(const couplet_attend_params& params, const couplet_rotary_params* rotary) {
  int32_t const group_heads = params.query_heads / params.kv_heads;
  for (int32_t s = 0; s < params.sequence_count; ++s) {
    const couplet_attend_sequence& sequence = params.sequences[s];
    Angles const angles(rotary, sequence.query_tokens ? int64_t{sequence.first_query} + sequence.query_tokens : 0);
    for (int32_t kv_head = 0; kv_head < params.kv_heads && sequence.query_tokens > 0; ++kv_head) {
      Tokens const tokens = read_tokens(params, angles, sequence, kv_head);
      for (int64_t i = 0; i < sequence.query_tokens; ++i)
        for (int64_t head = kv_head * group_heads; head < (kv_head + 1) * group_heads; ++head) {
          const float* const query = static_cast<const float*>(sequence.queries) + i * sequence.query_token_stride +
                                     head * sequence.query_head_stride;
          int64_t const position = sequence.first_query + i;
          double const sink = params.head_sinks ? static_cast<double>(params.head_sinks[head])
                                                : -std::numeric_limits<double>::infinity();
          attend_row(params, sequence, tokens, angles.rotate(position, Row(query, query + params.head_dim)), position,
                     sink,
                     static_cast<float*>(sequence.outputs) + i * sequence.output_token_stride +
                         head * sequence.output_head_stride);
        }
    }
  }
}

}  // namespace couplet::cpu
