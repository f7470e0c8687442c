#include "worker.h"

#include <cstdio>
#include <exception>
#include <new>
#include <utility>

#include "../common/report.h"
#include "instance.h"
#include "threads.h"

namespace couplet::binding {
namespace {

constexpr std::chrono::milliseconds progress_interval{50};

}  // namespace

// ---- Worker ----

void Worker::keep(Napi::Value array, const char* name) {
  if (pinned_.IsEmpty()) pinned_ = Napi::Persistent(Napi::Array::New(env_));
  uint32_t const index = static_cast<uint32_t>(pins_.size());
  pinned_.Value().Set(index, array);
  pins_.push_back({name, index});
}

void Worker::read_control(const Options& options) {
  View<int32_t> const cancel = options.array_or_none<int32_t>("cancel", 1);
  if (cancel) {
    cancel_ = pin(cancel);
    control_.cancel = cancel_;
  }
  if (!options.has("onProgress")) return;
  on_progress_ = Napi::Persistent(read_function(options.get("onProgress"), "onProgress"));
  control_.user = this;
  control_.progress = [](void* user, int64_t done, int64_t total, int32_t problem, int32_t iteration) {
    static_cast<Worker*>(user)->note_progress({done, total, problem, iteration});
  };
}

void Worker::work() {
  couplet_status status = COUPLET_INTERNAL;
  try {
    status = cancelled() ? fail(&report_, COUPLET_CANCELLED, {}, "The operation was aborted") : execute(&report_);
  } catch (const std::bad_alloc&) {
    status = fail(&report_, COUPLET_OUT_OF_MEMORY, {}, "The operating system has no memory left for this call");
  } catch (const std::exception& error) {
    status = fail(&report_, COUPLET_INTERNAL, {}, "%s", error.what());
  }
  report_.status = status;
}

Napi::Error Worker::failure(Napi::Env env) {
  if (!thrown_.IsEmpty()) return thrown_;
  if (report_.status != COUPLET_OK) return error_of(env, report_, places());
  for (const Pin& pin : pins_) {
    bool detached = false;
    Napi::Value const buffer = pinned_.Value().Get(pin.index).As<Napi::Object>().Get("buffer");
    napi_is_detached_arraybuffer(env, buffer, &detached);
    if (detached)
      return type_error(env, std::string("Expected the buffer of `") + pin.name +
                                 "` to stay where it is but it was detached during the call");
  }
  return {};
}

Napi::Value Worker::settle(Napi::Env env) {
  Napi::Error const error = failure(env);
  if (!error.IsEmpty()) throw error;
  return result(env);
}

void Worker::note_progress(Progress progress) {
  auto const now = std::chrono::steady_clock::now();
  bool post = false;
  {
    std::lock_guard const lock(progress_mutex_);
    progress_ = progress;
    if (!progress_queued_ && (now - progress_time_ >= progress_interval || progress.done == progress.total)) {
      progress_queued_ = post = true;
      progress_time_ = now;
    }
  }
  if (post && runtime_) runtime_->post(&progress_event_);
}

void Worker::deliver_progress(Napi::Env env) {
  Progress progress;
  {
    std::lock_guard const lock(progress_mutex_);
    progress = progress_;
    progress_queued_ = false;
  }
  if (!thrown_.IsEmpty()) return;
  try {
    on_progress_.Value().Call({Napi::Number::New(env, static_cast<double>(progress.done)),
                               Napi::Number::New(env, static_cast<double>(progress.total)),
                               Napi::Number::New(env, progress.problem), Napi::Number::New(env, progress.iteration)});
  } catch (Napi::Error& error) {
    thrown_ = std::move(error);  // not copied: Napi::Error cannot assign a copy of what is no object (`throw 'enough'`)
    stop();
  }
}

Napi::Value run_async(Napi::Env env, std::unique_ptr<Worker> worker) {
  worker->deferred_ = std::make_unique<Napi::Promise::Deferred>(env);
  Napi::Promise const promise = worker->deferred_->Promise();
  Instance::of(env).runtime.start(env, worker.release());
  return promise;
}

Napi::Value run_sync(Napi::Env env, std::unique_ptr<Worker> worker) {
  worker->work();
  return worker->settle(env);
}

// ---- Runtime ----

Runtime::Runtime(Napi::Env env) {
  napi_value const name = Napi::String::New(env, "couplet");
  napi_status status =
      napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, this, on_event, &queue_);
  // Idle, it does not keep the process alive; start() and finish() do that while a call is under way.
  if (status == napi_ok) status = napi_unref_threadsafe_function(env, queue_);
  // After the queue's own hook, so it runs before it (hooks run last in, first out): no thread posts to a closed queue.
  if (status == napi_ok) status = napi_add_env_cleanup_hook(env, on_teardown, this);
  if (status != napi_ok) throw Napi::Error::New(env, "couplet could not set up its queue");
}

void Runtime::start(Napi::Env env, Worker* worker) {
  worker->runtime_ = this;
  if (open_.empty()) napi_ref_threadsafe_function(env, queue_);
  open_.insert(worker);
  {
    std::lock_guard const lock(mutex_);
    ++running_;
  }
  auto const job = [this, worker] {
    worker->work();
    std::lock_guard const lock(mutex_);
    post(&worker->finished_event_);
    if (--running_ == 0) idle_.notify_all();
  };
  if (run_on_thread(job)) return;
  {
    std::lock_guard const lock(mutex_);
    --running_;
  }
  worker->report_.status =
      fail(&worker->report_, COUPLET_OUT_OF_MEMORY, {}, "The operating system has no thread left for this call");
  finish(env, worker);
}

void Runtime::post(Worker::Event* event) { napi_call_threadsafe_function(queue_, event, napi_tsfn_nonblocking); }

void Runtime::on_event(napi_env raw, napi_value, void* runtime, void* data) {
  if (!raw) return;  // the environment is gone, and on_teardown has freed the worker
  auto* const event = static_cast<Worker::Event*>(data);
  try {
    if (event->kind == Worker::Kind::progress)
      event->worker->deliver_progress(raw);
    else
      static_cast<Runtime*>(runtime)->finish(raw, event->worker);
  } catch (const Napi::Error&) {
    // Only an environment that is being terminated refuses to settle a promise, and then nobody waits for it.
  }
}

void Runtime::finish(Napi::Env env, Worker* raw) {
  std::unique_ptr<Worker> const worker(raw);
  open_.erase(raw);
  if (open_.empty()) napi_unref_threadsafe_function(env, queue_);
  try {
    worker->deferred_->Resolve(worker->settle(env));
  } catch (const Napi::Error& error) {
    worker->deferred_->Reject(error.Value());
  }
}

void Runtime::on_teardown(void* data) {
  auto* const runtime = static_cast<Runtime*>(data);
  for (Worker* worker : runtime->open_) worker->stop();
  {
    std::unique_lock lock(runtime->mutex_);
    runtime->idle_.wait(lock, [runtime] { return runtime->running_ == 0; });
  }
  for (Worker* worker : runtime->open_) delete worker;
  runtime->open_.clear();
}

}  // namespace couplet::binding
