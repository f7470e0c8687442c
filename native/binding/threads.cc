#include "threads.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace couplet::binding {
namespace {

constexpr size_t most_threads = 64;
constexpr std::chrono::seconds idle_time{10};  // then a thread without work ends

// Never destroyed: its threads may outlive the end of main.
class Threads {
 public:
  bool run(std::function<void()> job) {
    std::unique_lock lock(mutex_);
    jobs_.push_back(std::move(job));
    if (jobs_.size() > idle_ && count_ < most_threads && !grow() && count_ == 0) {
      jobs_.pop_back();
      return false;
    }
    lock.unlock();
    wake_.notify_one();
    return true;
  }

 private:
  bool grow() {
    try {
      std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      return false;
    }
    ++count_;
    return true;
  }

  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      ++idle_;
      bool const found = wake_.wait_for(lock, idle_time, [this] { return !jobs_.empty(); });
      --idle_;
      if (!found) break;
      std::function<void()> const job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      job();
      lock.lock();
    }
    --count_;
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> jobs_;
  size_t idle_ = 0;   // threads that wait
  size_t count_ = 0;  // threads
};

}  // namespace

bool run_on_thread(std::function<void()> job) {
  static Threads* const threads = new Threads;
  return threads->run(std::move(job));
}

}  // namespace couplet::binding
