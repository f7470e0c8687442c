// The custom operator couplet.Attention: attention of one layer over the cache of the sequences in a running step.
//
// Inputs   0 run     int64 [1]: which Run this is
//          1 query   float32 [batch][columns][query_heads * head_dim], or packed with key and value behind it:
//                    [batch][columns][(query_heads + 2 * kv_heads) * head_dim]
//          2 key     float32 [batch][columns][kv_heads * head_dim], before rotary; absent when packed
//          3 value   likewise
// Output   0         float32 [batch][columns][query_heads * head_dim]
// Attributes (integers): layer, num_heads, kv_num_heads, head_dim.
//
// Row b of the batch is row b of the step; its tokens are its last columns, and what stands before them is padding, whose
// output is 0.
#pragma once

#include <mutex>
#include <span>
#include <unordered_map>

#include "../cache/cache.h"
#include "capture.h"
#include "library.h"

namespace couplet::onnxruntime {

// One run of a session, as the operator sees it.
struct Run {
  Step* step = nullptr;
  std::span<const AttendOptions> layers;
  Capture* capture = nullptr;                // or NULL
  const volatile int32_t* cancel = nullptr;  // or NULL; non-zero ends the run at the next layer
  RunOptions* options = nullptr;             // of the library, set by Session::run
  couplet_report report{};                   // of the first failure inside the operator
};

// The runs under way in a session, by the number that the graph input "couplet.run" carries. Safe to use from any thread.
class Runs {
 public:
  int64_t enter(Run* run);
  void leave(int64_t number);
  Run* find(int64_t number) const;  // NULL when there is none, or it is not in a step
  template <class Visit>
  void for_each(const Visit& visit) const {  // none enters or leaves meanwhile
    std::lock_guard const lock(mutex_);
    for (const auto& [number, run] : runs_) visit(*run);
  }

 private:
  mutable std::mutex mutex_;
  std::unordered_map<int64_t, Run*> runs_;
  int64_t next_ = 1;
};

// Stays where it is and alive as long as a session that it was registered with.
struct AttentionOperator : CustomOperator {
  AttentionOperator(const Library& library, const Runs& runs);
  const Library* library;
  const Runs* runs;
};

}  // namespace couplet::onnxruntime
