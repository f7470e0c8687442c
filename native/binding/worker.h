// Calls that run off the JS thread. One base class for every promise of the addon.
//
// Where: on threads of couplet's own, kept for reuse, never on libuv's pool of four: a k-means of minutes there would stop
// every fs and dns call of the process. Such a thread is worker 0 of the CPU backend's pool (native/cpu/pool.h).
// Ending: when the environment goes away in mid-call (process end, worker.terminate()), a cleanup hook cancels what runs
// and waits for it, because the memory of pinned arrays goes with the environment. process.exit() on the main thread runs no
// hooks and frees nothing, so the process ends at once.
#pragma once

#include <napi.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "../abi/status.h"
#include "error.h"
#include "values.h"

namespace couplet::binding {

class Runtime;

// One call. A subclass reads its arguments in its constructor (pinning what execute will touch), works in execute, and makes
// the JS value of the outcome in result. Constructor, result and destructor run on the JS thread.
class Worker {
 public:
  virtual ~Worker() = default;
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

 protected:
  explicit Worker(Napi::Env env) : env_(env) {}

  // On another thread (in the Sync form on the JS thread): no napi here. A status other than COUPLET_OK rejects with *report.
  virtual couplet_status execute(couplet_report* report) = 0;
  virtual Napi::Value result(Napi::Env env) { return env.Undefined(); }
  virtual PlaceNames places() const { return {}; }  // members of the error that a report becomes

  // Keeps the array reachable until the call is over and returns its memory (NULL for an empty View). A buffer that is
  // transferred away meanwhile makes the call reject; whoever got it has to keep it until then.
  template <class T>
  T* pin(const View<T>& view) {
    if (view) keep(view.array, view.name);
    return view.data;
  }

  // Members that every long call takes: `cancel`, an Int32Array of one element (over a SharedArrayBuffer, so that it cannot be
  // detached) which becomes non-zero to stop the call, and `onProgress`, a function(done, total, problem, iteration).
  void read_control(const Options& options);
  const couplet_control* control() const { return &control_; }
  bool cancelled() const { return __atomic_load_n(cancel_, __ATOMIC_RELAXED) != 0; }

  Napi::Env env() const { return env_; }

 private:
  friend class Runtime;
  friend Napi::Value run_async(Napi::Env env, std::unique_ptr<Worker> worker);
  friend Napi::Value run_sync(Napi::Env env, std::unique_ptr<Worker> worker);

  enum class Kind { progress, finished };
  struct Event {  // what travels through the queue to the JS thread
    Worker* worker;
    Kind kind;
  };
  struct Pin {
    const char* name;
    uint32_t index;  // in pinned_
  };
  struct Progress {
    int64_t done = 0, total = 0;
    int32_t problem = 0, iteration = 0;
  };

  void keep(Napi::Value array, const char* name);
  void work();  // execute, with C++ exceptions turned into a report; on any thread
  void stop() { __atomic_store_n(cancel_, 1, __ATOMIC_RELAXED); }
  Napi::Error failure(Napi::Env env);  // of work(), or of a buffer that was detached; empty when there is none
  Napi::Value settle(Napi::Env env);   // throws
  void note_progress(Progress progress);
  void deliver_progress(Napi::Env env);

  Napi::Env env_;
  Runtime* runtime_ = nullptr;
  Napi::Reference<Napi::Array> pinned_;
  std::vector<Pin> pins_;
  std::unique_ptr<Napi::Promise::Deferred> deferred_;
  couplet_report report_{};

  volatile int32_t own_cancel_ = 0;
  volatile int32_t* cancel_ = &own_cancel_;
  couplet_control control_{.cancel = &own_cancel_, .progress = nullptr, .user = nullptr};

  Napi::FunctionReference on_progress_;
  Napi::Error thrown_;  // by onProgress
  std::mutex progress_mutex_;
  Progress progress_;
  bool progress_queued_ = false;
  std::chrono::steady_clock::time_point progress_time_{};
  Event progress_event_{this, Kind::progress};
  Event finished_event_{this, Kind::finished};
};

// The promise form: resolves with result(), rejects with the report.
Napi::Value run_async(Napi::Env env, std::unique_ptr<Worker> worker);
// The Sync form: runs here and now, returns result() or throws.
Napi::Value run_sync(Napi::Env env, std::unique_ptr<Worker> worker);

// The two forms of a call whose arguments are one options object.
template <class Call>
Napi::Value promise_form(const Napi::CallbackInfo& info) {
  return run_async(info.Env(), std::make_unique<Call>(Options(info[0])));
}
template <class Call>
Napi::Value sync_form(const Napi::CallbackInfo& info) {
  return run_sync(info.Env(), std::make_unique<Call>(Options(info[0])));
}

// The calls of one environment that are under way.
class Runtime {
 public:
  explicit Runtime(Napi::Env env);
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

 private:
  friend class Worker;
  friend Napi::Value run_async(Napi::Env env, std::unique_ptr<Worker> worker);

  void start(Napi::Env env, Worker* worker);
  void post(Worker::Event* event);  // from any thread
  void finish(Napi::Env env, Worker* worker);
  static void on_event(napi_env env, napi_value, void* runtime, void* event);
  static void on_teardown(void* runtime);

  napi_threadsafe_function queue_ = nullptr;
  std::unordered_set<Worker*> open_;  // JS thread only
  std::mutex mutex_;
  std::condition_variable idle_;
  size_t running_ = 0;  // workers that a thread still has to finish
};

}  // namespace couplet::binding
