// attend on every instruction set of this machine against the double oracle, on random codes.
//
// Error of an output row (one query head of one token): |out - oracle| / |oracle|, Euclidean. Allowed: 1e-5; where queries are
// huge, 2^-22 |q||k| / sqrt(d) if that is more: float32 knows a logit no better, and a probability no better than its logit.
#include <cstring>
#include <string>

#include "../../native/cpu/rotary.h"
#include "attend_case.h"

namespace {

using namespace couplet;
using namespace couplet::test;
using Tables = CaseShape::Tables;

std::vector<cpu::Isa> bodies() {
  std::vector<cpu::Isa> all{cpu::Isa::portable};
  for (cpu::Isa isa : {cpu::Isa::avx2, cpu::Isa::avx512})
    if (isa <= cpu::isa()) all.push_back(isa);
  return all;
}

std::string name(const CaseShape& s) {
  char text[400];
  std::snprintf(
      text, sizeof text,
      "kv %d x %d heads, d %d, page %d, keys %dc%db, values %dc%db, rotary %d/%d/%d, local %d, softcap %g, sinks %d",
      s.kv_heads, s.group_heads, s.head_dim, s.page_tokens, s.key_codec.group_channels, s.key_codec.code_bits,
      s.value_codec.group_channels, s.value_codec.code_bits, s.rotary_kind, s.rotary_dim, static_cast<int>(s.tables),
      s.local_window, static_cast<double>(s.softcap), s.head_sinks);
  std::string out = text;
  for (const SequenceShape& q : s.sequences) {
    std::snprintf(text, sizeof text, "; %d + %d tokens, sinks %d, window %d%s%s", q.before, q.queries, q.sinks,
                  q.window, q.coded_prefill ? ", coded prefill" : "", q.uncoded ? ", uncoded" : "");
    out += text;
  }
  return out;
}

double worst = 0;  // error over allowance, of the whole run

void compare(const CaseShape& shape, AttendCase& test, const std::vector<std::vector<float>>& oracle,
             const std::vector<std::vector<float>>& got, cpu::Isa isa, double allowed) {
  for (size_t s = 0; s < oracle.size(); ++s)
    for (int32_t token = 0; token < shape.sequences[s].queries; ++token)
      for (int32_t head = 0; head < test.query_heads(); ++head) {
        size_t const at = static_cast<size_t>(token * test.output_token_stride() + head * test.output_head_stride());
        double difference = 0, norm = 0;
        for (size_t c = 0; c < static_cast<size_t>(shape.head_dim); ++c) {
          double const e = oracle[s][at + c];
          difference += (got[s][at + c] - e) * (got[s][at + c] - e);
          norm += e * e;
        }
        double const error = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
        if (!(error <= allowed) || error / allowed > worst) worst = error / allowed;
        if (!CHECK(error <= allowed, "%s: error %.2g of sequence %zu, token %d, head %d; %s", cpu::isa_name(isa), error,
                   s, token, head, name(shape).c_str()))
          return;
        for (int64_t gap = shape.head_dim; gap < test.output_head_stride(); ++gap)
          if (!CHECK(std::isnan(got[s][at + static_cast<size_t>(gap)]), "%s wrote between output rows",
                     cpu::isa_name(isa)))
            return;
      }
}

void check_case(const CaseShape& shape, uint64_t seed, double allowed = 1e-5) {
  AttendCase test(shape, seed);
  couplet_report report{};
  if (!CHECK(cpu::attend_check(&test.params(), &report) == COUPLET_OK, "%s; %s", report.detail, name(shape).c_str()))
    return;
  auto const oracle = test.run_reference();
  for (cpu::Isa isa : bodies()) {
    auto const got = test.run(isa, 1);
    compare(shape, test, oracle, got, isa, allowed);
    for (int32_t threads : {2, 3}) {
      auto const again = test.run(isa, threads);
      for (size_t s = 0; s < got.size(); ++s)
        CHECK(got[s].empty() || std::memcmp(got[s].data(), again[s].data(), got[s].size() * sizeof(float)) == 0,
              "%s: %d threads differ from 1; %s", cpu::isa_name(isa), threads, name(shape).c_str());
    }
  }
}

const couplet_codec codecs[] = {{2, 8}, {4, 8}, {8, 8}, {8, 10}, {16, 12}, {1, 1}, {1, 2},
                                {1, 4}, {2, 2}, {4, 4}, {8, 12}, {8, 5},   {2, 7}, {4, 11}};

void decoding() {
  for (couplet_codec codec : codecs)
    for (int32_t heads : {1, 2, 3, 4, 7, 8, 12, 16, 20})
      check_case({.kv_heads = 2,
                  .group_heads = heads,
                  .head_dim = 64,
                  .key_codec = codec,
                  .value_codec = codec,
                  .rotary_kind = COUPLET_ROTARY_HALF,
                  .rotary_dim = 64,
                  .sequences = {{.before = 300, .sinks = 4, .window = 32}}},
                 1);
  for (int32_t head_dim = 32; head_dim <= 256; head_dim += 8)
    for (couplet_codec codec : {couplet_codec{8, 8}, couplet_codec{4, 8}, couplet_codec{2, 8}})
      for (int32_t kind : {0, 1, 2})
        check_case({.group_heads = 4,
                    .head_dim = head_dim,
                    .key_codec = codec,
                    .value_codec = codec,
                    .rotary_kind = kind,
                    .rotary_dim = kind ? head_dim : 0,
                    .sequences = {{.before = 200, .sinks = 4, .window = 16}}},
                   2);
}

void long_sequences() {
  for (int32_t heads : {1, 4, 8})
    for (couplet_codec codec : {couplet_codec{8, 8}, couplet_codec{8, 10}, couplet_codec{4, 8}, couplet_codec{2, 8}})
      check_case({.kv_heads = 1,
                  .group_heads = heads,
                  .head_dim = 128,
                  .key_codec = codec,
                  .value_codec = codec,
                  .rotary_kind = COUPLET_ROTARY_HALF,
                  .rotary_dim = 128,
                  .sequences = {{.before = 9000, .sinks = 4, .window = 32}}},
                 3);
  check_case(
      {.kv_heads = 1,
       .group_heads = 2,
       .head_dim = 64,
       .rotary_kind = COUPLET_ROTARY_HALF,
       .rotary_dim = 64,
       .local_window = 9000,
       .sequences = {{.before = 10000, .sinks = 4, .window = 32}, {.before = 3}, {.before = 9100, .uncoded = true}}},
      4);
}

void embeddings() {
  for (int32_t kind : {1, 2})
    for (Tables tables : {Tables::theta, Tables::scaled, Tables::crooked})
      for (int32_t rotary_dim : {2, 20, 32, 64, 80})
        for (int32_t queries : {1, 40})
          check_case({.group_heads = 2,
                      .head_dim = 80,
                      .rotary_kind = kind,
                      .rotary_dim = rotary_dim,
                      .tables = tables,
                      .sequences = {{.before = 333, .queries = queries, .sinks = 2, .window = 5}}},
                     5);
}

void prefill() {
  for (bool coded : {false, true})
    for (int32_t before : {0, 1, 63, 200})
      for (int32_t queries : {2, 65, 300})
        for (int32_t window : {0, 1, 32, 1000})
          check_case(
              {.kv_heads = 2,
               .group_heads = 3,
               .head_dim = 40,
               .page_tokens = 24,
               .key_codec = {4, 8},
               .value_codec = {8, 8},
               .rotary_kind = COUPLET_ROTARY_HALF,
               .rotary_dim = 40,
               .sequences =
                   {{.before = before, .queries = queries, .sinks = 3, .window = window, .coded_prefill = coded}}},
              6);
}

void random_shapes() {
  Random random(7);
  for (int i = 0; i < 150; ++i) {
    int32_t const head_dim = 32 + 8 * static_cast<int32_t>(random.below(29));
    check_case(random_shape(random, head_dim, 500, 70), 1000 + static_cast<uint64_t>(i));
  }
}

void huge_logits() {
  for (double scale : {30.0, 300.0})  // |q||k| / sqrt(d) is about scale * sqrt(128)
    for (int32_t queries : {1, 20})
      check_case({.group_heads = 4,
                  .head_dim = 128,
                  .rotary_kind = COUPLET_ROTARY_HALF,
                  .rotary_dim = 128,
                  .query_scale = scale,
                  .sequences = {{.before = 900, .queries = queries, .sinks = 4, .window = 32}}},
                 8, 0x1p-22 * scale * std::sqrt(128));
}

void blind_rows() {  // local_window hides every token but the query's own, which is always seen; an empty call does nothing
  check_case({.group_heads = 2,
              .head_dim = 32,
              .local_window = 1,
              .sequences = {{.before = 70, .queries = 3, .sinks = 4, .window = 8}}},
             9);
  check_case({.head_dim = 32, .sequences = {}}, 10);
  check_case({.head_dim = 32, .sequences = {{.before = 100, .queries = 0}, {.before = 0, .queries = 1, .window = 1}}},
             11);
}

void refusals() {
  CaseShape const shape{.kv_heads = 2,
                        .group_heads = 2,
                        .head_dim = 64,
                        .rotary_kind = COUPLET_ROTARY_HALF,
                        .rotary_dim = 64,
                        .sequences = {{.before = 200, .queries = 2, .sinks = 4, .window = 32}}};
  auto const refuses = [&](const char* word, auto&& change) {
    AttendCase test(shape, 12);
    change(test);
    couplet_report report{};
    CHECK(cpu::attend_check(&test.params(), &report) == COUPLET_INVALID_ARGUMENT && std::strstr(report.detail, word),
          "%s: \"%s\"", word, report.detail);
  };
  refuses("headDim", [](AttendCase& t) { t.params().head_dim = 60; });
  refuses("headDim", [](AttendCase& t) { t.params().head_dim = 264; });
  refuses("queryHeads", [](AttendCase& t) { t.params().query_heads = 5; });
  refuses("kvHeads", [](AttendCase& t) { t.params().kv_heads = 0; });
  refuses("pageTokens", [](AttendCase& t) { t.params().page_tokens = 12; });
  refuses("scale", [](AttendCase& t) { t.params().scale = NAN; });
  refuses("softcap", [](AttendCase& t) { t.params().softcap = -1; });
  refuses("localWindow", [](AttendCase& t) { t.params().local_window = -1; });
  refuses("keyTable", [](AttendCase& t) { t.params().key_table = nullptr; });
  refuses("valueTable", [](AttendCase& t) { t.params().value_codec = {8, 10}; });
  refuses("keyPageStride", [](AttendCase& t) { t.params().key_page_stride = 8; });
  refuses("queries", [](AttendCase& t) { t.sequence(0).queries = nullptr; });
  refuses("outputs", [](AttendCase& t) { t.sequence(0).outputs = nullptr; });
  refuses("pages", [](AttendCase& t) { t.sequence(0).pages = nullptr; });
  refuses("token 4", [](AttendCase& t) { t.sequence(0).coded_end = 0; });
  refuses("token 168", [](AttendCase& t) { t.sequence(0).dense_count = 1; });
  refuses("below 202", [](AttendCase& t) { t.sequence(0).first_query = 202; });
  refuses("received 203", [](AttendCase& t) { t.sequence(0).first_query = 202; });
}

void detection() {  // given tables that are linear need no row per position
  CaseShape shape{.head_dim = 64,
                  .rotary_kind = COUPLET_ROTARY_HALF,
                  .rotary_dim = 64,
                  .sequences = {{.before = 5000, .uncoded = true}}};
  for (Tables tables : {Tables::theta, Tables::scaled, Tables::crooked}) {
    shape.tables = tables;
    AttendCase test(shape, 13);
    size_t const bytes = cpu::rotary_entries.bytes(test.rotary());
    CHECK((bytes < 64 * 1024) == (tables != Tables::crooked), "tables %d take %zu bytes", static_cast<int>(tables),
          bytes);
  }
}

// The angles themselves, where no sequence of a test is long enough to go: three digits of a position.
void far_angles() {
  for (int32_t kind : {COUPLET_ROTARY_HALF, COUPLET_ROTARY_INTERLEAVED}) {
    couplet_rotary_params const params{nullptr, nullptr, 500000, kind, 64, 1 << 20, 64};
    couplet_rotary* rotary = nullptr;
    couplet_report report{};
    if (!CHECK(cpu::rotary_entries.create(&params, &rotary, &report) == COUPLET_OK, "%s", report.detail)) return;
    for (int32_t position : {0, 1, 63, 64, 4097, 262143, 262144, 262209, (1 << 20) - 1}) {
      float cos[cpu::rotary_max_stride], sin[cpu::rotary_max_stride];
      cpu::position_angles(*rotary, position, cos, sin);
      for (int32_t i = 0; i < 32; ++i) {
        int32_t const entry = kind == COUPLET_ROTARY_HALF ? i : 2 * i + 1;
        double const angle = position * std::pow(500000, -i / 32.0);
        CHECK(std::fabs(cos[entry] - std::cos(angle)) < 3e-7 && std::fabs(sin[entry] - std::sin(angle)) < 3e-7,
              "kind %d, position %d, pair %d: %.8f, %.8f", kind, position, i, static_cast<double>(cos[entry]),
              static_cast<double>(sin[entry]));
      }
    }
    cpu::rotary_entries.destroy(rotary);
  }
}

// Pairs in another order: place i has, bit for bit, the angles of pair order[i]; by theta, linear tables and tables of any kind.
void ordered_angles() {
  constexpr int32_t half = 16, positions = 300;
  std::vector<int32_t> order;
  for (int32_t i = 0; i < half; ++i) order.push_back((7 * i + 3) % half);
  for (bool const is_given : {false, true})
    for (bool const is_linear : {false, true})
      for (int32_t kind : {COUPLET_ROTARY_HALF, COUPLET_ROTARY_INTERLEAVED}) {
        std::vector<float> cos, sin;
        for (int32_t t = 0; t < positions; ++t)
          for (int32_t i = 0; i < half; ++i) {
            double const angle = (is_linear ? t : std::sqrt(t)) * std::pow(10000, -static_cast<double>(i) / half);
            cos.push_back(static_cast<float>((1 + i) * std::cos(angle)));
            sin.push_back(static_cast<float>((1 + i) * std::sin(angle)));
          }
        couplet_rotary_params params{cos.data(), sin.data(), 10000, kind, 2 * half, positions, 64};
        if (!is_given) params.cos = params.sin = nullptr;
        couplet_rotary *own = nullptr, *ordered = nullptr;
        couplet_report report{};
        CHECK(cpu::rotary_entries.create(&params, &own, &report) == COUPLET_OK, "%s", report.detail);
        CHECK(cpu::rotary_entries.reorder(own, order.data(), &ordered, &report) == COUPLET_OK, "%s", report.detail);
        CHECK(cpu::rotary_entries.bytes(own) == cpu::rotary_entries.bytes(ordered), "bytes");
        CHECK(own->linear == (!is_given || is_linear) && own->linear == ordered->linear, "linear %d", own->linear);
        for (int32_t position : {0, 1, 64, 299}) {
          float expected[2][cpu::rotary_max_stride], got[2][cpu::rotary_max_stride];
          cpu::position_angles(*own, position, expected[0], expected[1]);
          cpu::position_angles(*ordered, position, got[0], got[1]);
          int32_t const width = kind == COUPLET_ROTARY_HALF ? 1 : 2;
          for (int32_t entry = 0; entry < width * half; ++entry) {
            int32_t const from = order[static_cast<size_t>(entry / width)] * width + entry % width;
            CHECK(got[0][entry] == expected[0][from] && got[1][entry] == expected[1][from],
                  "position %d, entry %d of kind %d", position, entry, kind);
          }
        }
        cpu::rotary_entries.destroy(ordered);
        for (int32_t const wrong : {-1, half, order[1]}) {
          std::vector<int32_t> none = order;
          none[0] = wrong;
          CHECK(
              cpu::rotary_entries.reorder(own, none.data(), &ordered, &report) == COUPLET_INVALID_ARGUMENT && !ordered,
              "an order with pair %d", wrong);
        }
        CHECK(cpu::rotary_entries.reorder(own, nullptr, &ordered, &report) == COUPLET_INVALID_ARGUMENT, "no order");
        cpu::rotary_entries.destroy(own);
      }
}

// What a model's float32 arithmetic makes of its angles is still linear; a NaN, a missing half and a wrong kind are refused.
void rotary_tables() {
  constexpr int32_t positions = 8192, half = 16;
  std::vector<float> cos, sin;
  for (int32_t t = 0; t < positions; ++t)
    for (int32_t i = 0; i < half; ++i) {
      float const angle = static_cast<float>(t) * std::pow(10000.0f, static_cast<float>(-i) / half);
      cos.push_back(std::cos(angle));
      sin.push_back(std::sin(angle));
    }
  couplet_rotary_params params{cos.data(), sin.data(), 0, COUPLET_ROTARY_HALF, 2 * half, positions, 64};
  couplet_rotary* rotary = nullptr;
  couplet_report report{};
  CHECK(cpu::rotary_entries.create(&params, &rotary, &report) == COUPLET_OK && rotary->linear, "%s", report.detail);
  cpu::rotary_entries.destroy(rotary);
  params.positions = 1;
  CHECK(cpu::rotary_entries.create(&params, &rotary, &report) == COUPLET_OK && rotary->linear, "%s", report.detail);
  cpu::rotary_entries.destroy(rotary);

  auto const refuses = [&](couplet_status status, auto&& change) {
    couplet_rotary_params bad{cos.data(), sin.data(), 0, COUPLET_ROTARY_HALF, 2 * half, positions, 64};
    change(bad);
    CHECK(cpu::rotary_entries.create(&bad, &rotary, &report) == status && !rotary, "%s", report.detail);
  };
  rotary = nullptr;
  refuses(COUPLET_INVALID_ARGUMENT, [](couplet_rotary_params& p) { p.sin = nullptr; });
  refuses(COUPLET_INVALID_ARGUMENT, [](couplet_rotary_params& p) { p.kind = 3; });
  refuses(COUPLET_INVALID_ARGUMENT, [](couplet_rotary_params& p) { p.rotary_dim = 66; });
  refuses(COUPLET_INVALID_ARGUMENT, [](couplet_rotary_params& p) { p.rotary_dim = 31; });
  refuses(COUPLET_INVALID_ARGUMENT, [](couplet_rotary_params& p) { p.positions = 0; });
  refuses(COUPLET_INVALID_ARGUMENT, [](couplet_rotary_params& p) { p.cos = p.sin = nullptr; });
  cos[1000] = NAN;
  refuses(COUPLET_NOT_FINITE, [](couplet_rotary_params&) {});
}

}  // namespace

int main() {
  decoding();
  long_sequences();
  embeddings();
  prefill();
  random_shapes();
  huge_logits();
  blind_rows();
  refusals();
  detection();
  far_angles();
  ordered_angles();
  rotary_tables();
  std::printf("largest error over what is allowed: %.2f\n", worst);
  return couplet::test::finish();
}
