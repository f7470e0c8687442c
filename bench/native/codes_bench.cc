// encode and decode by codec, number of tokens and instruction set. One thread, CPU time, checked before timed.
//
//   codes_bench [--codecs 2c8b,4c8b,8c10b,8c8b] [--tokens 1,8,64,1024] [--kv-heads 8] [--head-dim 128] [--json]
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../native/cpu/backend.h"
#include "../../native/cpu/decode.h"
#include "../../native/cpu/encode.h"
#include "../../native/cpu/isa.h"
#include "measure.h"
#include "peak.h"

namespace {

using namespace couplet;
using couplet::cpu::Isa;

struct Options {
  std::vector<std::string> codecs = {"2c8b", "4c8b", "8c10b", "8c8b"};
  std::vector<int> tokens = {1, 8, 64, 1024};
  int kv_heads = 8;
  int head_dim = 128;
  bool json = false;
};

struct TableDeleter {
  void operator()(couplet_table* table) const { cpu::table_entries.destroy(table); }
};
using Table = std::unique_ptr<couplet_table, TableDeleter>;

// Random rows and pages of one layer and side, token-major, and the parameters that name them.
struct Data {
  couplet_codec codec;
  Table table;
  std::vector<float> rows;
  std::vector<uint8_t> memory;
  std::vector<uint8_t*> pages;
  couplet_encode_params encode{};
  couplet_decode_params decode{};

  Data(couplet_codec the_codec, int tokens, const Options& options) : codec(the_codec) {
    std::mt19937 generator(7);
    std::normal_distribution<float> normal;
    size_t const channels = static_cast<size_t>(options.kv_heads * options.head_dim);
    std::vector<float> centroids(channels << codec.code_bits);
    for (float& value : centroids) value = normal(generator);
    couplet_table_params const params = {centroids.data(), options.kv_heads, options.head_dim, codec, nullptr};
    couplet_table* made = nullptr;
    couplet_report report{};
    if (cpu::table_entries.create(&params, &made, &report) != COUPLET_OK) {
      std::fprintf(stderr, "%s\n", report.detail);
      std::exit(1);
    }
    table.reset(made);
    rows.resize(channels * static_cast<size_t>(tokens));
    for (float& value : rows) value = normal(generator);
    int64_t const page_bytes = couplet_page_bytes(codec, options.head_dim, COUPLET_PAGE_TOKENS);
    int64_t const count = (tokens + COUPLET_PAGE_TOKENS - 1) / COUPLET_PAGE_TOKENS;
    memory.resize(static_cast<size_t>(count * page_bytes * options.kv_heads));
    for (int64_t page = 0; page < count; ++page) pages.push_back(memory.data() + page * page_bytes * options.kv_heads);
    fill(encode, tokens, page_bytes, options);
    fill(decode, tokens, page_bytes, options);
  }

  template <class Params>
  void fill(Params& params, int tokens, int64_t page_bytes, const Options& options) {
    params.rows = rows.data();
    params.table = table.get();
    params.pages = pages.data();
    params.token_stride = int64_t{options.kv_heads} * options.head_dim;
    params.head_stride = options.head_dim;
    params.page_stride = page_bytes;
    params.tokens = tokens;
    params.kv_heads = options.kv_heads;
    params.head_dim = options.head_dim;
    params.page_tokens = COUPLET_PAGE_TOKENS;
    params.dtype = COUPLET_FLOAT32;
    params.threads = 1;
    params.codec = codec;
  }
};

// The same codes as the portable body's, and rows that encode to the codes they were decoded from.
bool check(const cpu::NearestBody& nearest, const cpu::DecodeBody& decoding, couplet_codec codec,
           const Options& options) {
  Data data(codec, 80, options);
  couplet_report report{};
  if (cpu::encode(cpu::nearest_portable, data.encode, &report) != COUPLET_OK) return false;
  std::vector<uint8_t> const expected = data.memory;
  std::fill(data.memory.begin(), data.memory.end(), uint8_t{0});
  if (cpu::encode(nearest, data.encode, &report) != COUPLET_OK || data.memory != expected) return false;
  if (cpu::decode(decoding, data.decode, &report) != COUPLET_OK) return false;
  std::fill(data.memory.begin(), data.memory.end(), uint8_t{0});
  return cpu::encode(nearest, data.encode, &report) == COUPLET_OK && data.memory == expected;
}

struct Body {
  const cpu::NearestBody* nearest;
  const cpu::DecodeBody* decode;
  double peak;  // GFLOP/s of the encode mix; 0: not measured
};

std::vector<Body> bodies() {
  std::vector<Body> all;
#if defined(__x86_64__)
  if (cpu::isa() >= Isa::avx512)
    all.push_back({&cpu::nearest_avx512, &cpu::decode_avx512, bench::peak_gflops(bench::squares_avx512, 16)});
  if (cpu::isa() >= Isa::avx2)
    all.push_back({&cpu::nearest_avx2, &cpu::decode_avx2, bench::peak_gflops(bench::squares_avx2, 8)});
#endif
  all.push_back({&cpu::nearest_portable, &cpu::decode_portable, 0});
  return all;
}

std::vector<std::string> split(const char* list) {
  std::vector<std::string> parts(1);
  for (; *list; ++list)
    if (*list == ',')
      parts.emplace_back();
    else
      parts.back() += *list;
  return parts;
}

bool parse(int count, char** arguments, Options& options) {
  for (int i = 1; i < count; ++i) {
    auto const is = [&](const char* name) { return std::strcmp(arguments[i], name) == 0; };
    if (is("--json")) {
      options.json = true;
      continue;
    }
    if (i + 1 == count) return false;
    const char* const value = arguments[i + 1];
    if (is("--codecs")) {
      options.codecs = split(value);
    } else if (is("--tokens")) {
      options.tokens.clear();
      for (std::string const& part : split(value)) options.tokens.push_back(std::atoi(part.c_str()));
    } else if (is("--kv-heads")) {
      options.kv_heads = std::atoi(value);
    } else if (is("--head-dim")) {
      options.head_dim = std::atoi(value);
    } else {
      return false;
    }
    ++i;
  }
  return true;
}

void run(const Options& options, couplet_codec codec, int tokens, const Body& body, double memcpy_bytes_per_ns,
         bool first) {
  Data data(codec, tokens, options);
  couplet_report report{};
  double const rows = double{1} * tokens * options.kv_heads;
  double const encode_ns = bench::seconds_of([&] { cpu::encode(*body.nearest, data.encode, &report); }) * 1e9 / rows;
  double const decode_ns = bench::seconds_of([&] { cpu::decode(*body.decode, data.decode, &report); }) * 1e9 / rows;
  double const gflops = 3.0 * options.head_dim * couplet_codec_centroids(codec) / encode_ns;
  double const bytes_per_ns = 4.0 * options.head_dim / decode_ns;
  if (options.json)
    std::printf(
        "%s{\"codec\":\"%dc%db\",\"tokens\":%d,\"isa\":\"%s\",\"encodeNs\":%.1f,\"encodeGflops\":%.1f,\"peakGflops\":%."
        "1f,"
        "\"decodeNs\":%.1f,\"decodeGBs\":%.2f}",
        first ? "\n" : ",\n", codec.group_channels, codec.code_bits, tokens, body.nearest->name, encode_ns, gflops,
        body.peak, decode_ns, bytes_per_ns);
  else
    std::printf("%3dc%db%s %6d  %-8s %10.1f %8.1f %7.0f %% %10.1f %8.1f %7.0f %%\n", codec.group_channels,
                codec.code_bits, codec.code_bits < 10 ? " " : "", tokens, body.nearest->name, encode_ns, gflops,
                body.peak > 0 ? 100 * gflops / body.peak : 0.0, decode_ns, bytes_per_ns,
                100 * bytes_per_ns / memcpy_bytes_per_ns);
}

double memcpy_speed(size_t bytes) {
  std::vector<char> from(bytes, 1), to(bytes);
  double const seconds = bench::seconds_of([&] {
    std::memcpy(to.data(), from.data(), bytes);
    asm volatile("" ::"r"(to.data()) : "memory");
  });
  return static_cast<double>(bytes) / seconds * 1e-9;
}

}  // namespace

int main(int count, char** arguments) {
  Options options;
  if (!parse(count, arguments, options)) {
    std::fprintf(stderr, "codes_bench [--codecs 2c8b,8c8b] [--tokens 1,64] [--kv-heads 8] [--head-dim 128] [--json]\n");
    return 2;
  }
  std::vector<Body> const all = bodies();
  if (options.json) {
    std::printf("{\"kvHeads\":%d,\"headDim\":%d,\"results\":[", options.kv_heads, options.head_dim);
  } else {
    std::printf("ns: CPU time of one thread per token and kv head (%d kv heads, headDim %d), median of 7.\n",
                options.kv_heads, options.head_dim);
    std::printf("GFLOP/s: 3 headDim 2^codeBits operations (subtract, multiply, add) per token and kv head.\n");
    std::printf("peak: the same subtraction and fma in registers, nothing else, on this core:");
    for (Body const& body : all)
      if (body.peak > 0) std::printf(" %s %.0f GFLOP/s", body.nearest->name, body.peak);
    std::printf(
        ".\nGB/s: float32 rows written by decode; memcpy: of as many bytes, from memory that is written nowhere "
        "else.\n\n");
    std::printf("codec   tokens  isa       encode ns  GFLOP/s  of peak  decode ns     GB/s of memcpy\n");
  }
  bool first = true;
  for (std::string const& name : options.codecs) {
    couplet_codec codec{};
    if (std::sscanf(name.c_str(), "%dc%db", &codec.group_channels, &codec.code_bits) != 2 ||
        !couplet_codec_valid(codec, options.head_dim)) {
      std::fprintf(stderr, "Expected a codec of headDim %d such as 8c8b but received %s\n", options.head_dim,
                   name.c_str());
      return 2;
    }
    for (Body const& body : all)
      if (!check(*body.nearest, *body.decode, codec, options)) {
        std::fprintf(stderr, "%s: the %s body is wrong; nothing was timed\n", name.c_str(), body.nearest->name);
        return 1;
      }
    for (int tokens : options.tokens) {
      double const memcpy_bytes_per_ns =
          memcpy_speed(sizeof(float) * static_cast<size_t>(tokens * options.kv_heads * options.head_dim));
      for (Body const& body : all) {
        run(options, codec, tokens, body, memcpy_bytes_per_ns, first);
        first = false;
        std::fflush(stdout);
      }
    }
  }
  if (options.json) std::printf("\n]}\n");
  return 0;
}
