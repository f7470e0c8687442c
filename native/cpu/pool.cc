#include "pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace couplet::cpu {
namespace {

thread_local bool inside_body = false;

// One parallel_for in progress. It lives on the caller's stack: workers leave it (pending drops) before the caller returns.
struct Job {
  TaskBody body;
  void* context;
  int64_t tasks;
  int wanted;           // helpers that may still join
  int next_worker = 1;  // the caller is worker 0
  int pending = 0;      // helpers inside
  std::atomic<int64_t> next{0};
  std::condition_variable left{};  // signalled under the pool's mutex when pending becomes 0

  void work(int worker) {
    inside_body = true;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task, worker);
    inside_body = false;
  }
};

// Never destroyed: workers sleep on its condition variable until the process ends, and joining them while Node tears the
// process down could wait for a thread that the loader holds.
class Pool {
 public:
  void run(Job& job) {
    {
      std::unique_lock lock(mutex_);
      jobs_.push_back(&job);
      while (static_cast<int>(threads_) < job.wanted && threads_ < 255 && grow()) {
      }
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    job.left.wait(lock, [&] { return job.pending == 0; });
  }

 private:
  bool grow() {
    try {
      std::thread([this] { serve(); }).detach();
    } catch (...) {
      return false;  // the operating system has no thread left: the caller does the work with those there are
    }
    ++threads_;
    return true;
  }

  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      Job* const job = pick();
      if (!job) {
        wake_.wait(lock);
        continue;
      }
      int const worker = job->next_worker++;
      --job->wanted;
      ++job->pending;
      lock.unlock();
      job->work(worker);
      lock.lock();
      if (--job->pending == 0) job->left.notify_one();
    }
  }

  Job* pick() {
    for (Job* job : jobs_)
      if (job->wanted > 0 && job->next.load(std::memory_order_relaxed) < job->tasks) return job;
    return nullptr;
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Job*> jobs_;
  size_t threads_ = 0;
};

Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

int core_count() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int resolve_threads(int asked) { return std::clamp(asked > 0 ? asked : core_count(), 1, 256); }

void parallel_for(int threads, int64_t tasks, TaskBody body, void* context) {
  int const team = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (team <= 1 || inside_body) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
  Job job{.body = body, .context = context, .tasks = tasks, .wanted = team - 1};
  pool().run(job);
}

}  // namespace couplet::cpu
