#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <thread>

namespace couplet::cpu {
namespace {

constexpr int most_threads = 256;
constexpr size_t stack_bytes = 1 << 20;  // musl's default, 128 KiB, is less than a body may want

thread_local bool inside_body = false;

// One parallel_for in progress. It lives on the caller's stack: workers leave it (pending drops) before the caller returns.
struct Job {
  TaskBody body;
  void* context;
  int64_t tasks;
  int wanted;           // helpers that may still join
  int next_worker = 1;  // the caller is worker 0
  int pending = 0;      // helpers inside
  Job* newer = nullptr;
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
      Job** end = &jobs_;
      while (*end) end = &(*end)->newer;
      *end = &job;
      while (threads_ < job.wanted && grow()) {
      }
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock lock(mutex_);
    Job** link = &jobs_;
    while (*link != &job) link = &(*link)->newer;
    *link = job.newer;
    job.left.wait(lock, [&] { return job.pending == 0; });
  }

 private:
  // False when the operating system has no thread left: the caller does the work with those there are.
  bool grow() {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return false;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, stack_bytes);
    // A new thread inherits the signal mask: signals stay with the threads of Node, which expects them there.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    bool const created = pthread_create(&thread, &attributes, serve, this) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    threads_ += created;
    return created;
  }

  static void* serve(void* pool) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "couplet");
#endif
    static_cast<Pool*>(pool)->serve();
    return nullptr;
  }

  [[noreturn]] void serve() {
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
    for (Job* job = jobs_; job; job = job->newer)
      if (job->wanted > 0 && job->next.load(std::memory_order_relaxed) < job->tasks) return job;
    return nullptr;
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  Job* jobs_ = nullptr;  // oldest first
  int threads_ = 0;
};

Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

// What a container may use, from cgroup v2: "max 100000" or "150000 100000" (microseconds of CPU per period).
int quota_cores() {
  std::FILE* const file = std::fopen("/sys/fs/cgroup/cpu.max", "re");
  if (!file) return most_threads;
  long long quota = 0, period = 0;
  int const numbers = std::fscanf(file, "%lld %lld", &quota, &period);
  std::fclose(file);
  if (numbers != 2 || quota <= 0 || period <= 0) return most_threads;
  return static_cast<int>(std::clamp<long long>((quota + period - 1) / period, 1, most_threads));
}

int affinity_cores() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

int core_count() {
  static int const cores = std::clamp(std::min(affinity_cores(), quota_cores()), 1, most_threads);
  return cores;
}

int resolve_threads(int asked) { return std::clamp(asked > 0 ? asked : core_count(), 1, most_threads); }

void parallel_for(int threads, int64_t tasks, TaskBody body, void* context) {
  int const team = static_cast<int>(std::min<int64_t>(std::min(threads, most_threads), tasks));
  if (team <= 1 || inside_body) {
    bool const outer = inside_body;
    inside_body = true;
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    inside_body = outer;
    return;
  }
  Job job{.body = body, .context = context, .tasks = tasks, .wanted = team - 1};
  pool().run(job);
}

}  // namespace couplet::cpu
