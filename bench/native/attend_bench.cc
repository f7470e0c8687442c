// attend on packed codes: CPU ns per coded token and kv head of one decoding step (or GFLOP/s of a prefill).
//
//   attend_bench [--isa avx512] [--codec 8c8b,4c8b] [--heads 1,4,8] [--context 32768] [--kv-heads 8] [--head-dim 128]
//                [--queries 1] [--threads 1] [--runs 11] [--dense] [--json]
//
// --dense keeps every key in full precision instead: attention on float32 rows by the tile body, for comparison.
//
// Every body is first checked against the double oracle on the same shape with 2048 tokens. Then: two warm-up runs, the
// median of --runs, by the CPU time of the process (wall time when --threads is above 1). Codes, tables and queries are random
// from a fixed seed; nothing is in full precision; caches are as warm as one run leaves them for the next.
#include <time.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "../../test/native/attend_case.h"

namespace {

using namespace couplet;
using namespace couplet::test;

double seconds(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

struct Flags {
  cpu::Isa isa = cpu::isa();
  std::vector<couplet_codec> codecs{{8, 8}};
  std::vector<int32_t> heads{1, 4, 8};
  int32_t context = 32768, kv_heads = 8, head_dim = 128, queries = 1, threads = 1, runs = 11;
  bool json = false, dense = false;
};

std::vector<std::string> split(const char* list) {
  std::vector<std::string> parts{""};
  for (; *list; ++list)
    if (*list == ',')
      parts.emplace_back();
    else
      parts.back() += *list;
  return parts;
}

bool parse(int count, char** words, Flags* flags) {
  for (int i = 1; i < count; ++i) {
    std::string const name = words[i];
    if (name == "--json" || name == "--dense") {
      (name == "--json" ? flags->json : flags->dense) = true;
      continue;
    }
    if (++i == count) return false;
    const char* const value = words[i];
    struct Number {
      const char* name;
      int32_t* to;
    } const numbers[] = {{"--context", &flags->context},   {"--kv-heads", &flags->kv_heads},
                         {"--head-dim", &flags->head_dim}, {"--queries", &flags->queries},
                         {"--threads", &flags->threads},   {"--runs", &flags->runs}};
    bool known = false;
    for (const Number& number : numbers)
      if (name == number.name) *number.to = std::atoi(value), known = *number.to > 0;
    if (name == "--heads") {
      flags->heads.clear();
      for (const std::string& part : split(value)) flags->heads.push_back(std::atoi(part.c_str()));
      known = true;
    }
    if (name == "--codec") {
      flags->codecs.clear();
      known = true;
      for (const std::string& part : split(value)) {
        couplet_codec codec{};
        known = known && std::sscanf(part.c_str(), "%dc%db", &codec.group_channels, &codec.code_bits) == 2;
        flags->codecs.push_back(codec);
      }
    }
    if (name == "--isa")
      for (cpu::Isa isa : {cpu::Isa::portable, cpu::Isa::avx2, cpu::Isa::avx512})
        if (std::strcmp(value, cpu::isa_name(isa)) == 0 && isa <= cpu::isa()) flags->isa = isa, known = true;
    if (!known) return false;
  }
  return true;
}

CaseShape shape_of(const Flags& flags, couplet_codec codec, int32_t heads, int32_t context, int32_t kv_heads) {
  return {.kv_heads = kv_heads,
          .group_heads = heads,
          .head_dim = flags.head_dim,
          .key_codec = codec,
          .value_codec = codec,
          .rotary_kind = COUPLET_ROTARY_HALF,
          .rotary_dim = flags.head_dim,
          .threads = flags.threads,
          .sequences = {{.before = std::max(0, context - flags.queries),
                         .queries = flags.queries,
                         .coded_prefill = true,
                         .uncoded = flags.dense}}};
}

double largest_error(const Flags& flags, couplet_codec codec, int32_t heads) {
  CaseShape const shape = shape_of(flags, codec, heads, std::min(flags.context, 2048), 1);
  AttendCase test(shape, 1);
  auto const oracle = test.run_reference(), got = test.run(flags.isa, 1);
  double worst = 0;
  for (int64_t row = 0; row < int64_t{flags.queries} * heads; ++row) {
    double difference = 0, norm = 0;
    for (int64_t c = row * test.output_head_stride(); c < row * test.output_head_stride() + flags.head_dim; ++c) {
      double const expected = oracle[0][static_cast<size_t>(c)], found = got[0][static_cast<size_t>(c)];
      difference += (found - expected) * (found - expected);
      norm += expected * expected;
    }
    worst = std::max(worst, std::sqrt(difference / norm));
  }
  return worst;
}

double median_seconds(const Flags& flags, AttendCase* test) {
  clockid_t const clock = flags.threads > 1 ? CLOCK_MONOTONIC : CLOCK_PROCESS_CPUTIME_ID;
  std::vector<uint8_t> workspace(cpu::attend_workspace(test->params(), flags.isa));
  std::vector<double> times;
  for (int run = -2; run < flags.runs; ++run) {
    double const start = seconds(clock);
    cpu::attend_run(test->params(), flags.isa, workspace.data());
    if (run >= 0) times.push_back(seconds(clock) - start);
  }
  std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

}  // namespace

int main(int count, char** words) {
  Flags flags;
  if (!parse(count, words, &flags)) {
    std::fprintf(stderr, "usage: see the first lines of bench/native/attend_bench.cc\n");
    return 2;
  }
  if (!flags.json)
    std::printf(
        "attend, %s, %d tokens, %d kv heads, headDim %d, %d queries, %d threads; %s ns per %s token and kv head\n",
        cpu::isa_name(flags.isa), flags.context, flags.kv_heads, flags.head_dim, flags.queries, flags.threads,
        flags.threads > 1 ? "wall" : "CPU", flags.dense ? "float32" : "coded");
  for (couplet_codec codec : flags.codecs)
    for (int32_t heads : flags.heads) {
      double const error = largest_error(flags, codec, heads);
      AttendCase test(shape_of(flags, codec, heads, flags.context, flags.kv_heads), 2);
      double const time = median_seconds(flags, &test);
      double const keys = flags.context - (flags.queries - 1) / 2.0;  // that a query sees, on average
      double const ns = time * 1e9 / (flags.context * static_cast<double>(flags.kv_heads));
      double const flops = 4.0 * keys * flags.head_dim * flags.queries * heads * flags.kv_heads / time * 1e-9;
      std::printf(flags.json
                      ? "{\"operation\":\"attend\",\"codec\":\"%dc%db\",\"heads\":%d,\"nsPerTokenAndKvHead\":%.3f,"
                        "\"gflops\":%.2f,\"error\":%.3g}\n"
                      : "%2dc%-2db  %2d query heads per kv head: %8.2f ns  %7.2f GFLOP/s  error %.1e\n",
                  codec.group_channels, codec.code_bits, heads, ns, flops, error);
      if (!(error < 1e-5)) return 1;
    }
  return 0;
}
