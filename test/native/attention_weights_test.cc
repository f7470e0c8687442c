// attention_weights against the formula in double, and against what the formula stands for: how far an output moves when a
// key or a value does.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../../native/cpu/backend.h"
#include "check.h"

namespace {

using couplet::test::Random;
couplet_attention_weights_entries const& entries = couplet::cpu::attention_weights_entries;

// One sequence; double throughout, angles by the definition in operations.h.
struct Case {
  int tokens = 40, query_heads = 4, kv_heads = 2, head_dim = 32, local_window = 0, rotary_dim = 0, threads = 1;
  int rotary_kind = COUPLET_ROTARY_HALF;
  double scale = 0.2, softcap = 0;
  bool with_sinks = false;
  std::vector<float> queries = {}, keys = {}, values = {}, sinks = {};  // [token][head][channel]

  void fill(uint64_t seed, double spread = 1) {
    Random random(seed);
    queries = random.normals(size_t(tokens) * query_heads * head_dim, spread);
    keys = random.normals(size_t(tokens) * kv_heads * head_dim);
    values = random.normals(size_t(tokens) * kv_heads * head_dim);
    sinks = with_sinks ? random.normals(size_t(query_heads)) : std::vector<float>{};
  }
  int kv_head(int head) const { return head / (query_heads / kv_heads); }
  double query(int t, int h, int c) const { return double(queries[(size_t(t) * query_heads + h) * head_dim + c]); }
  double key(int t, int g, int c) const { return double(keys[(size_t(t) * kv_heads + g) * head_dim + c]); }
  double value(int t, int g, int c) const { return double(values[(size_t(t) * kv_heads + g) * head_dim + c]); }

  std::vector<double> rotated(std::vector<double> row, int position) const {
    for (int i = 0; i < rotary_dim / 2; ++i) {
      int const first = rotary_kind == COUPLET_ROTARY_HALF ? i : 2 * i;
      int const second = rotary_kind == COUPLET_ROTARY_HALF ? i + rotary_dim / 2 : 2 * i + 1;
      double const angle = position * std::pow(10000.0, -2.0 * i / rotary_dim), x = row[first], y = row[second];
      row[first] = x * std::cos(angle) - y * std::sin(angle);
      row[second] = y * std::cos(angle) + x * std::sin(angle);
    }
    return row;
  }
};

// Probabilities [tokens] and output [head_dim] of one query; `moved` is added to the key of token `at`.
struct Attention {
  std::vector<double> probabilities, output, slopes;  // slopes: of the softcap

  Attention(Case const& c, int position, int head, int at = -1, std::vector<double> const& moved = {},
            std::vector<double> const& moved_value = {}) {
    int const g = c.kv_head(head);
    std::vector<double> query(c.head_dim), logits(c.tokens, -INFINITY);
    slopes.assign(c.tokens, 1);
    for (int i = 0; i < c.head_dim; ++i) query[i] = c.query(position, head, i);
    query = c.rotated(query, position);
    double largest = c.with_sinks ? double(c.sinks[head]) : -INFINITY;
    for (int t = c.local_window ? std::max(0, position - c.local_window + 1) : 0; t <= position; ++t) {
      std::vector<double> key(c.head_dim);
      for (int i = 0; i < c.head_dim; ++i) key[i] = c.key(t, g, i) + (t == at && !moved.empty() ? moved[i] : 0);
      key = c.rotated(key, t);
      double dot = 0;
      for (int i = 0; i < c.head_dim; ++i) dot += query[i] * key[i];
      logits[t] = c.softcap > 0 ? c.softcap * std::tanh(c.scale * dot / c.softcap) : c.scale * dot;
      if (c.softcap > 0) slopes[t] = 1 - std::pow(logits[t] / c.softcap, 2);
      largest = std::max(largest, logits[t]);
    }
    double sum = c.with_sinks ? std::exp(double(c.sinks[head]) - largest) : 0;
    for (double const logit : logits) sum += std::exp(logit - largest);
    output.assign(c.head_dim, 0);
    for (int t = 0; t < c.tokens; ++t) {
      probabilities.push_back(std::exp(logits[t] - largest) / sum);
      for (int i = 0; i < c.head_dim; ++i)
        output[i] += probabilities[t] * (c.value(t, g, i) + (t == at && !moved_value.empty() ? moved_value[i] : 0));
    }
  }
};

struct Weights {
  std::vector<double> key, value;  // [tokens][kv_heads]
};

Weights reference(Case const& c) {
  size_t const count = size_t(c.tokens) * c.kv_heads;
  Weights weights{std::vector<double>(count), std::vector<double>(count)};
  for (int h = 0; h < c.query_heads; ++h)
    for (int i = 0; i < c.tokens; ++i) {
      Attention const attention(c, i, h);
      double norm = 0;
      for (int x = 0; x < c.head_dim; ++x) norm += c.query(i, h, x) * c.query(i, h, x);
      for (int t = 0; t <= i; ++t) {
        double distance = 0;
        for (int x = 0; x < c.head_dim; ++x) distance += std::pow(c.value(t, c.kv_head(h), x) - attention.output[x], 2);
        double const square = attention.probabilities[t] * attention.probabilities[t];
        weights.value[size_t(t) * c.kv_heads + c.kv_head(h)] += square;
        weights.key[size_t(t) * c.kv_heads + c.kv_head(h)] +=
            square * std::pow(attention.slopes[t], 2) * distance * norm / c.head_dim;
      }
    }
  return weights;
}

struct Result {
  couplet_status status;
  std::vector<float> key, value;
  couplet_report report{};
};

couplet_attention_weights_params params_of(Case const& c, Result& result, const couplet_rotary* rotary) {
  result.key.assign(size_t(c.tokens) * c.kv_heads, -7);
  result.value = result.key;
  couplet_attention_weights_params p{};
  p.queries = c.queries.data();
  p.rows = {.keys = c.keys.data(),
            .values = c.values.data(),
            .key_token_stride = int64_t{c.kv_heads} * c.head_dim,
            .key_head_stride = c.head_dim,
            .value_token_stride = int64_t{c.kv_heads} * c.head_dim,
            .value_head_stride = c.head_dim,
            .first_token = 0,
            .tokens = c.tokens};
  p.key_weights = result.key.data();
  p.value_weights = result.value.data();
  p.rotary = rotary;
  p.head_sinks = c.with_sinks ? c.sinks.data() : nullptr;
  p.query_token_stride = int64_t{c.query_heads} * c.head_dim;
  p.query_head_stride = c.head_dim;
  p.query_heads = c.query_heads;
  p.kv_heads = c.kv_heads;
  p.head_dim = c.head_dim;
  p.local_window = c.local_window;
  p.scale = float(c.scale);
  p.softcap = float(c.softcap);
  p.threads = c.threads;
  return p;
}

couplet_status run_params(couplet_attention_weights_params const& p, couplet_report* report) {
  if (couplet_status const status = entries.check(&p, report); status != COUPLET_OK) return status;
  size_t const bytes = entries.workspace(&p);
  std::vector<char> memory(bytes + 128);
  char* const workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  std::memset(workspace, 0xff, bytes);  // NaN everywhere: nothing is read before it is written
  std::memset(workspace + bytes, 0x5a, 64);
  couplet_status const status = entries.run(&p, workspace, nullptr, report);
  CHECK(std::all_of(workspace + bytes, workspace + bytes + 64, [](char byte) { return byte == 0x5a; }),
        "wrote beyond the %zu bytes of workspace", bytes);
  return status;
}

Result run(Case const& c) {
  Result result;
  couplet_rotary* rotary = nullptr;
  if (c.rotary_dim > 0) {
    couplet_rotary_params const params{.cos = nullptr,
                                       .sin = nullptr,
                                       .theta = 10000,
                                       .kind = c.rotary_kind,
                                       .rotary_dim = c.rotary_dim,
                                       .positions = 4096,
                                       .head_dim = c.head_dim};
    CHECK(couplet::cpu::rotary_entries.create(&params, &rotary, &result.report) == COUPLET_OK, "%s",
          result.report.detail);
  }
  result.status = run_params(params_of(c, result, rotary), &result.report);
  couplet::cpu::rotary_entries.destroy(rotary);
  return result;
}

// float32 against double: relative to the weight, and to a small share of the largest one where nearly nothing is left.
void compare(std::vector<float> const& got, std::vector<double> const& want, const char* name) {
  double const largest = *std::max_element(want.begin(), want.end());
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i)
    worst = std::max(worst, std::abs(double(got[i]) - want[i]) / (want[i] + 1e-6 * largest));
  CHECK(worst < 2e-4, "%s: relative error %g", name, worst);
}

void agrees_with_the_formula() {
  std::vector<Case> cases(1);
  for (int const tokens : {1, 2, 23, 24, 25, 100, 131}) cases.push_back({.tokens = tokens});
  for (int const head_dim : {1, 5, 8, 40, 64, 128, 256})
    cases.push_back({.tokens = 50, .head_dim = head_dim, .scale = 1 / std::sqrt(head_dim)});
  for (int const kv_heads : {1, 2, 6}) cases.push_back({.query_heads = 6, .kv_heads = kv_heads});
  for (int const window : {1, 2, 17, 40, 1000}) cases.push_back({.tokens = 90, .local_window = window});
  for (double const softcap : {0.5, 5.0, 50.0}) cases.push_back({.scale = 1, .softcap = softcap});
  for (int const kind : {COUPLET_ROTARY_HALF, COUPLET_ROTARY_INTERLEAVED})
    for (int const dim : {2, 16, 32}) cases.push_back({.tokens = 80, .rotary_dim = dim, .rotary_kind = kind});
  cases.push_back({.with_sinks = true});
  cases.push_back(
      {.tokens = 120, .local_window = 30, .rotary_dim = 24, .threads = 3, .softcap = 8, .with_sinks = true});
  for (size_t i = 0; i < cases.size(); ++i) {
    for (double const spread : {1.0, 6.0}) {  // flat and peaked probabilities
      Case& c = cases[i];
      c.fill(i, spread);
      Result const result = run(c);
      if (!CHECK(result.status == COUPLET_OK, "case %zu: %s", i, result.report.detail)) continue;
      Weights const want = reference(c);
      std::string const name = "case " + std::to_string(i) + ", spread " + std::to_string(spread);
      compare(result.value, want.value, (name + ", values").c_str());
      compare(result.key, want.key, (name + ", keys").c_str());
    }
  }
}

// What the weights stand for, against central differences of all outputs of a kv head's queries. Let token t's key or value
// move by a small step along one channel; the squared movement of the outputs, per squared step and averaged over the
// channels, is the value weight itself, and scale^2 times the key weight: the error that coding the token with a small error
// of equal size in every direction makes.
void weights_are_the_movement_of_outputs() {
  std::vector<Case> const cases{
      {.tokens = 9, .query_heads = 2, .kv_heads = 1, .head_dim = 16, .scale = 0.3, .with_sinks = true},
      {.tokens = 9, .query_heads = 4, .kv_heads = 2, .head_dim = 16, .rotary_dim = 16, .scale = 0.25},
      {.tokens = 9, .query_heads = 6, .kv_heads = 2, .head_dim = 8, .local_window = 4, .rotary_dim = 4, .scale = 0.4},
      {.tokens = 9, .query_heads = 2, .kv_heads = 1, .head_dim = 16, .scale = 0.5, .softcap = 1.5},
      {.tokens = 9,
       .query_heads = 4,
       .kv_heads = 2,
       .head_dim = 12,
       .rotary_dim = 8,
       .rotary_kind = COUPLET_ROTARY_INTERLEAVED,
       .scale = 0.5,
       .softcap = 3,
       .with_sinks = true},
  };
  double const step = 1e-4;
  for (size_t number = 0; number < cases.size(); ++number) {
    Case c = cases[number];
    c.fill(99 + number);
    Result const result = run(c);
    if (!CHECK(result.status == COUPLET_OK, "case %zu: %s", number, result.report.detail)) continue;
    for (int t = 0; t < c.tokens; ++t)
      for (int g = 0; g < c.kv_heads; ++g) {
        double key_movement = 0, value_movement = 0;
        for (int channel = 0; channel < c.head_dim; ++channel) {
          std::vector<double> up(c.head_dim), down(c.head_dim);
          up[channel] = step, down[channel] = -step;
          for (int h = 0; h < c.query_heads; ++h)
            for (int i = t; i < c.tokens && c.kv_head(h) == g; ++i) {
              auto const squared = [&](Attention const& above, Attention const& below) {
                double sum = 0;
                for (int x = 0; x < c.head_dim; ++x)
                  sum += std::pow((above.output[x] - below.output[x]) / (2 * step), 2);
                return sum;
              };
              key_movement += squared(Attention(c, i, h, t, up), Attention(c, i, h, t, down));
              value_movement += squared(Attention(c, i, h, t, {}, up), Attention(c, i, h, t, {}, down));
            }
        }
        size_t const at = size_t(t) * c.kv_heads + g;
        double const key = c.scale * c.scale * double(result.key[at]), value = double(result.value[at]);
        double const key_want = key_movement / c.head_dim, value_want = value_movement / c.head_dim;
        CHECK(std::abs(key - key_want) < 1e-4 * key_want + 1e-9, "case %zu, token %d: key %g, outputs move by %g",
              number, t, key, key_want);
        CHECK(std::abs(value - value_want) < 1e-4 * value_want + 1e-9,
              "case %zu, token %d: value %g, outputs move by %g", number, t, value, value_want);
      }
  }
}

void threads_change_nothing() {
  Case c{.tokens = 300, .query_heads = 8, .kv_heads = 2, .head_dim = 64, .rotary_dim = 64};
  c.fill(5);
  Result const one = run(c);
  for (int const threads : {2, 3, 7, 0}) {
    c.threads = threads;
    Result const many = run(c);
    CHECK(one.key == many.key && one.value == many.value, "%d threads", threads);
  }
}

void strides_are_followed() {
  Case c{.tokens = 30};
  c.fill(6);
  Result const plain = run(c);
  // [head][token][channel] within one array: queries, then keys, then values, rows 3 apart
  int const pitch = c.head_dim + 3;
  auto const spread_out = [&](std::vector<float> const& rows, int heads) {
    std::vector<float> out(size_t(heads) * c.tokens * pitch, NAN);
    for (int t = 0; t < c.tokens; ++t)
      for (int h = 0; h < heads; ++h)
        std::copy_n(&rows[(size_t(t) * heads + h) * c.head_dim], c.head_dim, &out[(size_t(h) * c.tokens + t) * pitch]);
    return out;
  };
  std::vector<float> const queries = spread_out(c.queries, c.query_heads), keys = spread_out(c.keys, c.kv_heads),
                           values = spread_out(c.values, c.kv_heads);
  Result strided;
  couplet_attention_weights_params p = params_of(c, strided, nullptr);
  p.queries = queries.data();
  p.rows.keys = keys.data();
  p.rows.values = values.data();
  p.query_token_stride = p.rows.key_token_stride = p.rows.value_token_stride = pitch;
  p.query_head_stride = p.rows.key_head_stride = p.rows.value_head_stride = int64_t{c.tokens} * pitch;
  CHECK(run_params(p, &strided.report) == COUPLET_OK, "%s", strided.report.detail);
  CHECK(strided.key == plain.key && strided.value == plain.value, "strided rows give other weights");
}

void bad_input_is_refused() {
  Case c{};
  c.fill(7);
  Result result;
  auto const refused = [&](const char* word, auto&& spoil) {
    couplet_attention_weights_params p = params_of(c, result, nullptr);
    spoil(p);
    couplet_report report{};
    CHECK(entries.check(&p, &report) == COUPLET_INVALID_ARGUMENT && std::strstr(report.detail, word), "%s: %s", word,
          report.detail);
  };
  using P = couplet_attention_weights_params;
  refused("tokens", [](P& p) { p.rows.tokens = -1; });
  refused("fresh", [](P& p) { p.rows.first_token = 1; });
  refused("headDim", [](P& p) { p.head_dim = 0; });
  refused("headDim", [](P& p) { p.head_dim = 257; });
  refused("kvHeads", [](P& p) { p.kv_heads = 0; });
  refused("queryHeads", [](P& p) { p.query_heads = 3; });
  refused("queryHeads", [](P& p) { p.query_heads = 0; });
  refused("localWindow", [](P& p) { p.local_window = -1; });
  refused("scale", [](P& p) { p.scale = NAN; });
  refused("softcap", [](P& p) { p.softcap = -1; });
  refused("queries", [](P& p) { p.queries = nullptr; });
  refused("keys", [](P& p) { p.rows.keys = nullptr; });
  refused("values", [](P& p) { p.rows.values = nullptr; });
  refused("keyWeights", [](P& p) { p.key_weights = nullptr; });
  refused("valueWeights", [](P& p) { p.value_weights = nullptr; });

  for (std::vector<float>* const array : {&c.queries, &c.keys, &c.values}) {
    float& spoiled = (*array)[array->size() / 2 + 3];
    float const kept = spoiled;
    for (float const bad : {NAN, INFINITY, -INFINITY}) {
      spoiled = bad;
      Result const spoilt = run(c);
      CHECK(spoilt.status == COUPLET_NOT_FINITE && spoilt.report.token == 20 && spoilt.report.kv_head == 0 &&
                spoilt.report.channel == 3,
            "status %d: %s", spoilt.status, spoilt.report.detail);
    }
    spoiled = 3e38f;  // finite, and its square is not
    CHECK(run(c).status == COUPLET_NOT_FINITE, "overflow is not reported");
    spoiled = kept;
  }
  c.with_sinks = true;
  c.sinks = {0, NAN, 0, 0};
  CHECK(run(c).status == COUPLET_NOT_FINITE, "a sink that is NaN");
  c.with_sinks = false;
  c.tokens = 0;
  CHECK(run(c).status == COUPLET_OK, "no tokens");
}

}  // namespace

int main() {
  agrees_with_the_formula();
  weights_are_the_movement_of_outputs();
  threads_change_nothing();
  strides_are_followed();
  bad_input_is_refused();
  return couplet::test::finish();
}
