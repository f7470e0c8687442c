// Kernels of the CUDA backend, measured on the GPU of this machine without Node. run.sh is how to start it; README.md says what its
// columns mean.
//
//   couplet_bench_cuda [--operations attend,ladder,prefill,wide,prompt,encode,decode,mix,reorder,kmeans]
//                      [--codecs 8c8b,4c8b,2c8b,8c10b]
//                      [--shapes 16x30720,32x61440,64x30720,1x131072,8x8192] [--heads 1,4,8] [--head-dims 64,128]
//                      [--seconds 0.15] [--full-kmeans] [--no-levels] [--tiny] [--json FILE]
//
// --no-levels: values of 8c8b on no levels, where those of calibrate are on levels. --heads is query heads per kv head, of which there
// are 8. --full-kmeans adds all 8192 problems of a Llama-3.1-8B. --tiny is one
// sample of tiny shapes, to see that everything runs.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "operations.h"

namespace {

using namespace couplet;
using namespace couplet::bench;

struct Shape {
  int32_t batch, context;
};

struct Flags {
  std::vector<std::string> operations{"attend", "ladder", "prefill", "wide",    "prompt",
                                      "encode", "decode", "mix",     "reorder", "kmeans"};
  std::vector<couplet_codec> codecs{{8, 8}, {4, 8}, {2, 8}, {8, 10}};
  std::vector<Shape> shapes{{16, 30720}, {32, 61440}, {64, 30720}, {1, 131072}, {8, 8192}};
  std::vector<int32_t> heads{1, 4, 8};
  std::vector<int32_t> head_dims{64, 128};
  double seconds = 0.15;
  bool full_kmeans = false;
  bool tiny = false;
  bool levels = true;
  const char* json = nullptr;
};

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts{""};
  for (char letter : list)
    if (letter == ',')
      parts.emplace_back();
    else
      parts.back() += letter;
  return parts;
}

// Each part of a list read by `format`; false when one cannot be.
template <class T, class... Fields>
bool read_list(const std::string& list, const char* format, std::vector<T>* to, Fields... fields) {
  to->clear();
  for (const std::string& part : split(list)) {
    T value{};
    char beyond;
    if (std::sscanf(part.c_str(), (std::string(format) + "%c").c_str(), &(value.*fields)..., &beyond) !=
        sizeof...(fields))
      return false;
    to->push_back(value);
  }
  return true;
}

bool read_numbers(const std::string& list, std::vector<int32_t>* to) {
  struct Number {
    int32_t value;
  };
  std::vector<Number> numbers;
  if (!read_list(list, "%d", &numbers, &Number::value)) return false;
  to->clear();
  for (Number number : numbers) to->push_back(number.value);
  return std::all_of(to->begin(), to->end(), [](int32_t value) { return value > 0; });
}

bool parse(int count, char** words, Flags* flags) {
  for (int i = 1; i < count; ++i) {
    std::string const name = words[i];
    if (name == "--tiny") {
      flags->tiny = true;
      continue;
    }
    if (name == "--no-levels") {
      flags->levels = false;
      continue;
    }
    if (name == "--full-kmeans") {
      flags->full_kmeans = true;
      continue;
    }
    if (++i == count) return false;
    std::string const value = words[i];
    if (name == "--json")
      flags->json = words[i];
    else if (name == "--operations")
      flags->operations = split(value);
    else if (name == "--seconds")
      flags->seconds = std::atof(words[i]);
    else if (name == "--codecs"   ? !read_list(value, "%dc%db", &flags->codecs, &couplet_codec::group_channels,
                                               &couplet_codec::code_bits)
             : name == "--shapes" ? !read_list(value, "%dx%d", &flags->shapes, &Shape::batch, &Shape::context)
             : name == "--heads"  ? !read_numbers(value, &flags->heads)
                                  : name != "--head-dims" || !read_numbers(value, &flags->head_dims))
      return false;
  }
  return true;
}

// The name that rows have, of operations that are ways to attend.
const char* attend_name(const std::string& operation) {
  return operation == "attend"    ? "attend decode"
         : operation == "ladder"  ? "attend ladder"
         : operation == "prefill" ? "attend prefill"
         : operation == "wide"    ? "attend wide"
         : operation == "prompt"  ? "attend prompt"
                                  : nullptr;
}

// Rows as they come, of no codec.
bool moves_rows(const std::string& operation) { return operation == "mix" || operation == "reorder"; }

// What is measured of each operation. Encode and decode do not know heads or batch: they have one long sequence.
std::vector<Case> cases_of(const Flags& flags, const std::string& operation) {
  int32_t const kv_heads = flags.tiny ? 2 : 8;
  bool const attends = attend_name(operation) != nullptr;
  std::vector<Shape> shapes = attends ? flags.shapes : std::vector<Shape>{{1, 8192}, {8, 8192}, {16, 30720}};
  std::vector<int32_t> heads = attends ? flags.heads : std::vector<int32_t>{1};
  std::vector<int32_t> head_dims = flags.head_dims;
  int32_t queries = operation == "attend" || operation == "ladder" ? 1 : 0;
  if (operation == "ladder") {
    shapes = {{16, 30720}, {64, 30720}};
    heads = {4};
    head_dims = {128};
  }
  if (operation == "prefill" || operation == "wide") {
    shapes = {{1, 8192}, {8, 8192}, {1, 30720}};
    heads = {4};
    queries = 512;
  }
  if (operation == "prompt") {
    shapes = {{1, 2048}, {8, 2048}};
    heads = {4};
    queries = 2048;
  }
  if (moves_rows(operation)) {
    shapes = {{64, 1}, {8, 8192}};  // a step, prompts
    heads = {4};
  }
  if (operation == "kmeans") {
    shapes = {{528, 32768}};  // four of each multiprocessor's, of 132
    head_dims = {128};
  }
  if (flags.tiny) {
    shapes = {operation == "kmeans" ? Shape{2, 500} : Shape{2, 150}};
    heads = {4};
    head_dims = {operation == "ladder" ? 128 : 64};
    queries = operation == "prompt" ? 150 : std::min(queries, 5);
  }
  std::vector<couplet_codec> const codecs = moves_rows(operation)                 ? std::vector<couplet_codec>{{1, 16}}
                                            : flags.tiny && operation == "kmeans" ? std::vector<couplet_codec>{{8, 6}}
                                                                                  : flags.codecs;
  std::vector<Case> cases;
  for (int32_t head_dim : head_dims)
    for (couplet_codec codec : codecs)
      for (Shape shape : shapes)
        for (int32_t group_heads : heads)
          cases.push_back({attends ? attend_name(operation) : operation, codec, shape.batch, shape.context, queries,
                           kv_heads * group_heads, kv_heads, head_dim,
                           flags.levels && codec.group_channels == 8 && codec.code_bits == 8});
  return cases;
}

bool measure(const Flags& flags, const std::string& operation, Meter& meter, Report& report) {
  constexpr int32_t iterations = 100;
  for (const Case& what : cases_of(flags, operation)) {
    if (operation == "ladder")
      ladder(what, meter, report);
    else if (attend_name(operation))
      attend(what, meter, report);
    else if (operation == "encode")
      encode(what, meter, report);
    else if (operation == "decode")
      decode(what, meter, report);
    else if (operation == "mix")
      mix(what, meter, report);
    else if (operation == "reorder")
      reorder(what, meter, report);
    else if (operation == "kmeans")
      kmeans(what, flags.tiny ? 3 : iterations, meter, report);
    else
      return false;
  }
  // 32 layers, keys and values, 8 kv heads, 16 groups.
  if (operation == "kmeans" && flags.full_kmeans)
    kmeans({"kmeans", {8, 8}, 8192, 32768, 0, 8, 8, 128}, iterations, meter, report);
  return true;
}

}  // namespace

int main(int count, char** words) {
  Flags flags;
  if (!parse(count, words, &flags)) {
    std::fprintf(stderr, "usage: see the first lines of bench/cuda/main.cu\n");
    return 2;
  }
  int devices = 0;
  must(cudaGetDeviceCount(&devices), "looking for a device");
  int l2_bytes = 0;
  must(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, 0), "asking for the size of L2");
  Meter meter(flags.tiny ? Meter::Limits{0, 1, 1} : Meter::Limits{flags.seconds, 5, 100},
              flags.tiny ? 4096 : std::max(size_t{256} << 20, 4 * static_cast<size_t>(l2_bytes)));
  Ceilings const ceilings = measure_ceilings(meter, flags.tiny);
  std::printf("copy %.0f GB/s; lookups of 16 bytes in shared memory %.0f GB/s, with conflicts %.0f GB/s\n",
              ceilings.copy * 1e-9, ceilings.lookups * 1e-9, ceilings.conflicting_lookups * 1e-9);
  Report report(ceilings);
  for (const std::string& operation : flags.operations)
    if (!measure(flags, operation, meter, report)) {
      std::fprintf(stderr, "there is no operation \"%s\"\n", operation.c_str());
      return 2;
    }
  if (flags.json) report.write(flags.json);
  if (test::failed > 0) return 1;  // memory that could not be had, copies that failed
  std::printf("%zu cases, %zu wrong\n", report.size(), report.failures());
  return report.failures() > 0 ? 1 : 0;
}
