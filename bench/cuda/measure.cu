#include "measure.h"

#include <algorithm>
#include <iterator>

#include "kernels.h"

namespace couplet::bench {
namespace {

constexpr double longest_warm_up = 1.5;  // seconds

}  // namespace

Meter::Meter(Limits limits, size_t flush_bytes) : limits_(limits), flush_(flush_bytes), sink_(1) {
  must(cudaMemset(flush_.data(), 1, flush_bytes), "clearing memory");
  must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
  must(cudaEventCreate(&begin_), "making an event");
  must(cudaEventCreate(&end_), "making an event");
  must(cudaDeviceSynchronize(), "waiting for the device");
}

Meter::~Meter() {
  cudaEventDestroy(begin_);
  cudaEventDestroy(end_);
  cudaStreamDestroy(stream_);
}

Timing Meter::time(const Call& call) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), "beginning a capture");
  call(stream_);
  must(cudaStreamEndCapture(stream_, &graph), "ending a capture");
  must(cudaGraphInstantiate(&replay, graph, 0), "making a graph");
  Timing const timing =
      samples_of([&](cudaStream_t stream) { must(cudaGraphLaunch(replay, stream), "launching a graph"); });
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  return timing;
}

Timing Meter::time_uncaptured(const Call& call) { return samples_of(call); }

Timing Meter::samples_of(const Call& call) {
  std::vector<double> samples;
  double spent = 0;
  auto const sample = [&] {
    must(read_through(flush_.data(), flush_.size(), sink_.data(), stream_), "flushing L2");
    must(cudaEventRecord(begin_, stream_), "recording an event");
    call(stream_);
    must(cudaEventRecord(end_, stream_), "recording an event");
    wait();
    float milliseconds = 0;
    must(cudaEventElapsedTime(&milliseconds, begin_, end_), "reading events");
    samples.push_back(1e3 * static_cast<double>(milliseconds));
    spent += 1e-3 * static_cast<double>(milliseconds);
  };
  sample();
  // The first one also loads code: it counts where that does not matter and time does.
  bool const is_long = spent > longest_warm_up;
  if (!is_long) {
    samples.clear();
    spent = 0;
    for (int taken = 0; taken < limits_.most && (taken < limits_.least || spent < limits_.seconds); ++taken) sample();
  }
  std::sort(samples.begin(), samples.end());
  return {samples[samples.size() / 2], samples.front(), samples.back(), static_cast<int>(samples.size())};
}

Ceilings measure_ceilings(Meter& meter, bool tiny) {
  size_t const copied = tiny ? size_t{1} << 16 : size_t{1} << 30;
  DeviceArray<uint8_t> const from(copied);
  DeviceArray<uint8_t> const to(copied);
  must(fill_bytes(from.data(), copied, 1, meter.stream()), "filling memory");
  // As a graph's node this would be a copy engine's work, which moves two thirds as much.
  Timing const copy = meter.time_uncaptured([&](cudaStream_t stream) {
    must(cudaMemcpyAsync(to.data(), from.data(), copied, cudaMemcpyDeviceToDevice, stream), "copying");
  });

  int device = 0;
  int multiprocessors = 0;
  must(cudaGetDevice(&device), "asking for the device");
  must(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "asking the device");
  int const blocks = tiny ? 1 : 2 * multiprocessors;
  int const steps = tiny ? 1 : 2000;
  DeviceArray<uint32_t> const sink(1);
  auto const rate = [&](Rows rows) {
    Timing const timing =
        meter.time([&](cudaStream_t stream) { must(look_up(rows, blocks, steps, sink.data(), stream), "lookups"); });
    return 16.0 * blocks * lookup_threads * steps * lookups_of_a_step / timing.microseconds * 1e6;
  };
  return {2e6 * static_cast<double>(copied) / copy.microseconds, rate(Rows::own_banks), rate(Rows::any)};
}

namespace {

[[gnu::format(printf, 1, 2)]] std::string text_of(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

std::string json_of(const Case& what) {
  return text_of(
      "\"operation\":\"%s\",\"codec\":\"%s\",\"batch\":%d,\"context\":%d,\"queries\":%d,\"queryHeads\":%d,"
      "\"kvHeads\":%d,\"headDim\":%d",
      what.operation.c_str(), name_of(what.codec).c_str(), what.batch, what.context, what.queries, what.query_heads,
      what.kv_heads, what.head_dim);
}

void write_list(std::FILE* file, const char* name, const std::vector<std::string>& lines) {
  std::fprintf(file, ",\n\"%s\":[\n", name);
  for (size_t line = 0; line < lines.size(); ++line)
    std::fprintf(file, "%s%s\n", lines[line].c_str(), line + 1 < lines.size() ? "," : "");
  std::fprintf(file, "]");
}

}  // namespace

void Report::refuse(const Case& what, const Result& result) {
  failures_.push_back(text_of("{%s,\"body\":\"%s\",\"error\":\"%g\",\"check\":\"%s\"}", json_of(what).c_str(),
                              result.body.c_str(), result.error, result.check.c_str()));
  std::printf("WRONG: %s\n", failures_.back().c_str());
  std::fflush(stdout);
}

void Report::add(const Case& what, const Result& result) {
  Timing const& timing = result.timing;
  double const seconds = timing.microseconds * 1e-6;
  double const of_copy = result.bytes / seconds / ceilings_.copy;
  double const of_lookups = result.lookup_bytes / seconds / ceilings_.lookups;
  std::printf(
      "%-14s %-5s %5d x %-6d heads %2d/%d x %-3d  %10.1f us  %5.1f %% of copy  %5.1f %% of lookups  error %.1e  "
      "%s%s%s\n",
      what.operation.c_str(), name_of(what.codec).c_str(), what.batch, what.context, what.query_heads, what.kv_heads,
      what.head_dim, timing.microseconds, 100 * of_copy, 100 * of_lookups, result.error, result.body.c_str(),
      result.note.empty() ? "" : "; ", result.note.c_str());
  std::fflush(stdout);
  rows_.push_back(text_of("{%s,\"body\":\"%s\",\"microseconds\":%.3f,\"fastest\":%.3f,\"slowest\":%.3f,\"samples\":%d,",
                          json_of(what).c_str(), result.body.c_str(), timing.microseconds, timing.fastest,
                          timing.slowest, timing.samples) +
                  text_of("\"bytes\":%.0f,\"lookupBytes\":%.0f,\"shareOfCopy\":%.4f,\"shareOfLookups\":%.4f,",
                          result.bytes, result.lookup_bytes, of_copy, of_lookups) +
                  text_of("\"error\":%.3g,\"check\":\"%s\",\"note\":\"%s\"}", result.error, result.check.c_str(),
                          result.note.c_str()));
}

void Report::write(const char* path) const {
  std::FILE* const file = std::fopen(path, "w");
  if (!file) {
    std::fprintf(stderr, "%s cannot be written\n", path);
    std::exit(1);
  }
  cudaDeviceProp properties{};
  int runtime = 0;
  int driver = 0;
  must(cudaGetDeviceProperties(&properties, 0), "asking the device");
  must(cudaRuntimeGetVersion(&runtime), "asking for a version");
  must(cudaDriverGetVersion(&driver), "asking for a version");
  std::fprintf(file,
               "{\"device\":{\"name\":\"%s\",\"architecture\":\"sm_%d%d\",\"multiprocessors\":%d,\"l2Bytes\":%d,"
               "\"memoryBytes\":%zu,\"cudaRuntime\":%d,\"cudaDriver\":%d},\n",
               properties.name, properties.major, properties.minor, properties.multiProcessorCount,
               properties.l2CacheSize, properties.totalGlobalMem, runtime, driver);
  std::fprintf(file,
               "\"ceilings\":{\"copyBytesPerSecond\":%.0f,\"lookupBytesPerSecond\":%.0f,"
               "\"conflictingLookupBytesPerSecond\":%.0f}",
               ceilings_.copy, ceilings_.lookups, ceilings_.conflicting_lookups);
  write_list(file, "rows", rows_);
  write_list(file, "failures", failures_);
  std::fprintf(file, "}\n");
  if (std::fclose(file) != 0) {
    std::fprintf(stderr, "%s cannot be written\n", path);
    std::exit(1);
  }
}

}  // namespace couplet::bench
