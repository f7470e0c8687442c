// How device time is taken: the call is captured in a graph once, and every sample is L2 read full of something else, an event, one
// replay, an event. While the device reads, the host hands over the rest, so that no launch gap is inside. The median counts.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "../../cuda/backend.h"
#include "../../test/gpu/device_array.h"

namespace couplet::bench {

using test::DeviceArray;

// A benchmark that cannot go on says why and ends.
inline void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s failed with %s: %s\n", what, cudaGetErrorName(error), cudaGetErrorString(error));
  std::exit(1);
}
inline void must(couplet_status status, const couplet_report& report) {
  if (status == COUPLET_OK) return;
  std::fprintf(stderr, "status %d: %s\n", static_cast<int>(status), report.detail);
  std::exit(1);
}

struct Timing {
  double microseconds;  // median
  double fastest;
  double slowest;
  int samples;
};

class Meter {
 public:
  // Samples until `seconds` of device time are spent, at least `least` and at most `most` of them.
  struct Limits {
    double seconds;
    int least, most;
  };

  Meter(Limits limits, size_t flush_bytes);
  Meter(const Meter&) = delete;
  Meter& operator=(const Meter&) = delete;
  ~Meter();

  using Call = std::function<void(cudaStream_t)>;  // only enqueues
  Timing time(const Call& call);                   // as a graph
  Timing time_uncaptured(const Call& call);        // one launch or copy, as it is

  cudaStream_t stream() const { return stream_; }
  void wait() { must(cudaStreamSynchronize(stream_), "waiting for the device"); }

 private:
  Timing samples_of(const Call& call);

  Limits const limits_;
  DeviceArray<uint8_t> const flush_;
  DeviceArray<uint32_t> const sink_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

// Measured in the same run, in bytes a second; the unit of all shares.
struct Ceilings {
  double copy;                 // device to device, bytes read and bytes written
  double lookups;              // of 16-byte rows in shared memory that do not conflict
  double conflicting_lookups;  // of any rows
};
Ceilings measure_ceilings(Meter& meter, bool tiny);

// What one case is. Counts of tokens, heads and channels.
struct Case {
  std::string operation;  // "attend decode"
  couplet_codec codec;
  int32_t batch, context;  // sequences, and tokens of each; kmeans: problems and points
  int32_t queries;         // tokens of each sequence that ask; 0 but for attend
  int32_t query_heads, kv_heads, head_dim;
  bool levels = false;  // tables of values on levels, as calibrate makes those of 8c8b
};

struct Result {
  std::string body;  // as describe() names it
  Timing timing;
  double bytes;         // that have to move: each input once, each output once
  double lookup_bytes;  // of centroids in float16; 0 where nothing is looked up
  double error;         // of the check, in the unit that `check` says
  std::string check;
  std::string note;
};

// Prints a line a case, and writes all of them as JSON for report.py.
class Report {
 public:
  explicit Report(const Ceilings& ceilings) : ceilings_(ceilings) {}
  void add(const Case& what, const Result& result);
  // A case whose answer is wrong has no times; the others go on.
  void refuse(const Case& what, const Result& result);
  void write(const char* path) const;
  size_t size() const { return rows_.size(); }
  size_t failures() const { return failures_.size(); }

 private:
  Ceilings const ceilings_;
  std::vector<std::string> rows_;
  std::vector<std::string> failures_;
};

inline std::string name_of(couplet_codec codec) {
  return std::to_string(codec.group_channels) + "c" + std::to_string(codec.code_bits) + "b";
}

}  // namespace couplet::bench
