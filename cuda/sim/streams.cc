#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "memory.h"
#include "random.h"
#include "runtime.h"

using Work = std::function<cudaError_t()>;

// CUDA's own opaque names.
struct CUstream_st {
  std::deque<Work> work;  // not run yet
  uint64_t enqueued = 0;  // since the stream was made
  uint64_t finished = 0;
  int device = 0;
  bool blocking = true;  // ordered with the default stream
  bool capturing = false;
  bool spoiled = false;  // the capture met what it may not hold
  std::vector<Work> captured;
};
struct CUevent_st {
  CUstream_st* stream = nullptr;  // where it was recorded last; NULL: nowhere, and so complete
  uint64_t position = 0;
  std::chrono::steady_clock::time_point when;
};
struct CUgraph_st {
  std::vector<Work> work;
};
struct CUgraphExec_st {
  std::vector<Work> work;
};

namespace sim {
namespace {

// Work of a stream runs when somebody waits for it (a launcher that forgets to wait sees poison), or at once: by schedule.
struct Queue {
  std::recursive_mutex mutex;
  std::map<int, CUstream_st> default_streams;  // by device, made when it is first used
  std::set<CUstream_st*> streams;
  int capturing = 0;
  bool failed = false;  // a kernel broke a rule
  Random random{options().seed};

  CUstream_st* stream(cudaStream_t handle) {
    bool const is_default = !handle || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
    auto* const stream = is_default ? default_stream() : handle;
    return streams.contains(stream) ? stream : nullptr;
  }

  CUstream_st* default_stream() {
    auto const [entry, is_new] = default_streams.try_emplace(current_device());
    if (is_new) {
      entry->second.device = entry->first;
      streams.insert(&entry->second);
    }
    return &entry->second;
  }

  cudaError_t sticky() {
    if (failed && !has_failure()) failed = false;  // it was taken
    return failed ? cudaErrorLaunchFailure : cudaSuccess;
  }

  cudaError_t run_until(CUstream_st& stream, uint64_t position) {
    while (stream.finished < position && !stream.work.empty()) {
      Work const next = std::move(stream.work.front());
      stream.work.pop_front();
      ++stream.finished;
      if (!sticky() && next() != cudaSuccess) failed = true;
    }
    return sticky();
  }

  cudaError_t run_all(CUstream_st& stream) { return run_until(stream, stream.enqueued); }

  bool at_once() {
    if (options().schedule == Schedule::shuffled) return random.below(2);
    return options().schedule == Schedule::forward;
  }

  cudaError_t enqueue(cudaStream_t handle, Work work) {
    std::lock_guard const lock(mutex);
    CUstream_st* const target = stream(handle);
    if (!target || target->device != current_device()) return cudaErrorInvalidResourceHandle;
    if (cudaError_t const error = sticky()) return error;
    if (target->capturing) {
      target->captured.push_back(std::move(work));
      return cudaSuccess;
    }
    // The default stream starts after all that blocking streams were given before, and they after it.
    CUstream_st* const default_one = default_stream();
    if (target == default_one && capturing) return refuse();
    for (CUstream_st* other : streams)
      if (other != target && other->device == target->device && other->blocking && target->blocking &&
          (target == default_one || other == default_one))
        run_all(*other);
    target->work.push_back(std::move(work));
    ++target->enqueued;
    return at_once() ? run_all(*target) : cudaSuccess;
  }

  cudaError_t refuse() {
    std::lock_guard const lock(mutex);
    if (capturing == 0) return cudaSuccess;
    for (CUstream_st* stream : streams) stream->spoiled |= stream->capturing;
    return cudaErrorStreamCaptureUnsupported;
  }
};

Queue& queue() {
  static Queue& queue = *new Queue;  // never destroyed: work may go on while the process ends
  return queue;
}

// COUPLET_SIM_BREAK=n: the n-th launch of the process ends as one that read where nothing is. For tests of what comes after.
bool is_to_break() {
  static uint64_t const asked = [] {
    const char* const text = std::getenv("COUPLET_SIM_BREAK");
    return text ? std::strtoull(text, nullptr, 10) : 0;
  }();
  static std::atomic<uint64_t> launches{0};
  return ++launches == asked;
}

}  // namespace

cudaError_t enqueue_launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                           std::function<void()> kernel) {
  uint64_t const threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0)
    return remember(cudaErrorInvalidConfiguration);
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return remember(cudaErrorInvalidConfiguration);
  if (shared_bytes > options().shared_limit) return remember(cudaErrorInvalidValue);
  bool const breaks = is_to_break();
  return remember(queue().enqueue(stream, [=, kernel = std::move(kernel)]() mutable {
    if (breaks) {
      fail(Location::current(), "this launch breaks because COUPLET_SIM_BREAK asks for it");
      return cudaErrorLaunchFailure;
    }
    auto const call = [](void* function) { (*static_cast<std::function<void()>*>(function))(); };
    return run({grid, block, shared_bytes, call, &kernel}) ? cudaSuccess : cudaErrorLaunchFailure;
  }));
}

cudaError_t enqueue_work(cudaStream_t stream, Work work) { return queue().enqueue(stream, std::move(work)); }

cudaError_t finish_stream(cudaStream_t handle) {
  std::lock_guard const lock(queue().mutex);
  CUstream_st* const stream = queue().stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (stream->capturing) return queue().refuse();
  return queue().run_all(*stream);
}

cudaError_t finish_device() {
  std::lock_guard const lock(queue().mutex);
  for (CUstream_st* stream : queue().streams) queue().run_all(*stream);
  return queue().sticky();
}

cudaError_t refuse_in_capture() { return queue().refuse(); }

cudaError_t sticky_error() {
  std::lock_guard const lock(queue().mutex);
  return queue().sticky();
}

}  // namespace sim

using sim::queue;
using sim::remember;

extern "C" {

// ---- streams -----------------------------------------------------------------------------------------------------------
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  std::lock_guard const lock(queue().mutex);
  *stream = new CUstream_st;
  (*stream)->device = sim::current_device();
  (*stream)->blocking = flags != cudaStreamNonBlocking;
  queue().streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  std::lock_guard const lock(queue().mutex);
  if (!stream || !queue().streams.contains(stream)) return remember(cudaErrorInvalidResourceHandle);
  cudaError_t const error = queue().run_all(*stream);
  queue().streams.erase(stream);
  if (stream->capturing) --queue().capturing;
  delete stream;
  return remember(error);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return remember(sim::finish_stream(stream)); }
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  std::lock_guard const lock(queue().mutex);
  CUstream_st* const stream = queue().stream(handle);
  if (!stream) return remember(cudaErrorInvalidResourceHandle);
  if (stream->work.empty()) return remember(queue().sticky());
  queue().run_until(*stream, stream->finished + 1);  // so that who asks again and again gets there
  return cudaErrorNotReady;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* user) {
  return remember(sim::enqueue_work(stream, [=] {
    function(user);
    return cudaSuccess;
  }));
}

// ---- events ------------------------------------------------------------------------------------------------------------
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (!event) return remember(cudaErrorInvalidResourceHandle);
  std::lock_guard const lock(queue().mutex);
  if (event->stream && queue().streams.contains(event->stream)) queue().run_until(*event->stream, event->position);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  std::lock_guard const lock(queue().mutex);
  CUstream_st* const stream = queue().stream(handle);
  if (!stream || !event) return remember(cudaErrorInvalidResourceHandle);
  if (stream->capturing) return cudaSuccess;
  cudaError_t const error = queue().enqueue(handle, [event] {
    event->when = std::chrono::steady_clock::now();
    return cudaSuccess;
  });
  event->stream = stream;
  event->position = stream->enqueued;
  return remember(error);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  std::lock_guard const lock(queue().mutex);
  if (!event) return remember(cudaErrorInvalidResourceHandle);
  if (cudaError_t const refused = queue().refuse()) return remember(refused);
  if (!event->stream || !queue().streams.contains(event->stream)) return cudaSuccess;
  return remember(queue().run_until(*event->stream, event->position));
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  std::lock_guard const lock(queue().mutex);
  if (!event) return remember(cudaErrorInvalidResourceHandle);
  if (!event->stream || !queue().streams.contains(event->stream) || event->stream->finished >= event->position)
    return remember(queue().sticky());
  queue().run_until(*event->stream, event->stream->finished + 1);
  return cudaErrorNotReady;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  std::lock_guard const lock(queue().mutex);
  CUstream_st* const source = event ? event->stream : nullptr;
  if (!source) return cudaSuccess;
  return remember(queue().enqueue(stream, [source, position = event->position] {
    return queue().streams.contains(source) ? queue().run_until(*source, position) : cudaSuccess;
  }));
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  std::lock_guard const lock(queue().mutex);
  if (!start || !end || !start->stream || !end->stream) return remember(cudaErrorInvalidResourceHandle);
  if (end->stream->finished < end->position) return remember(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(end->when - start->when).count();
  return cudaSuccess;
}

// ---- graphs: a captured stream keeps its work instead of running it --------------------------------------------------------
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  std::lock_guard const lock(queue().mutex);
  if (!stream || !queue().streams.contains(stream)) return remember(cudaErrorStreamCaptureUnsupported);
  if (stream->capturing) return remember(cudaErrorIllegalState);
  stream->capturing = true;
  stream->spoiled = false;
  stream->captured.clear();
  ++queue().capturing;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  std::lock_guard const lock(queue().mutex);
  CUstream_st* const stream = queue().stream(handle);
  if (!stream) return remember(cudaErrorInvalidResourceHandle);
  *status = !stream->capturing ? cudaStreamCaptureStatusNone
            : stream->spoiled  ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  std::lock_guard const lock(queue().mutex);
  *graph = nullptr;
  if (!stream || !queue().streams.contains(stream) || !stream->capturing) return remember(cudaErrorIllegalState);
  stream->capturing = false;
  --queue().capturing;
  if (stream->spoiled) return remember(cudaErrorStreamCaptureInvalidated);
  *graph = new CUgraph_st{std::move(stream->captured)};
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  for (const Work& work : executable->work)
    if (cudaError_t const error = sim::enqueue_work(stream, work)) return remember(error);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

}  // extern "C"
