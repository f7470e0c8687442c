// The thread pool: every task once, worker numbers in range and never shared, nesting, many callers at once.
#include "../../native/cpu/pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"

using couplet::cpu::core_count;
using couplet::cpu::parallel_for;
using couplet::cpu::resolve_threads;

namespace {

void every_task_runs_once(int threads, int64_t tasks) {
  std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks));
  std::vector<std::atomic<int>> inside(static_cast<size_t>(std::max(threads, 1)));
  std::atomic<int> wrong_workers{0}, shared_workers{0};
  parallel_for(threads, tasks, [&](int64_t task, int worker) {
    if (worker < 0 || worker >= std::max(threads, 1)) {
      ++wrong_workers;
      return;
    }
    if (++inside[static_cast<size_t>(worker)] != 1) ++shared_workers;
    ++runs[static_cast<size_t>(task)];
    --inside[static_cast<size_t>(worker)];
  });
  int missed = 0;
  for (auto const& count : runs) missed += count != 1;
  CHECK(missed == 0, "%d of %d tasks on %d threads", missed, static_cast<int>(tasks), threads);
  CHECK(wrong_workers == 0, "%d on %d threads", wrong_workers.load(), threads);
  CHECK(shared_workers == 0, "%d on %d threads", shared_workers.load(), threads);
}

void results_are_visible_to_the_caller() {
  std::vector<int64_t> squares(10000);  // plain memory: ThreadSanitizer sees a missing barrier
  for (int round = 0; round < 20; ++round) {
    parallel_for(4, 10000, [&](int64_t task, int) { squares[static_cast<size_t>(task)] += task; });
    int64_t sum = 0;
    for (int64_t value : squares) sum += value;
    CHECK(sum == (round + 1) * int64_t{49995000}, "%lld", static_cast<long long>(sum));
  }
}

void nested_calls_stay_on_their_thread() {
  for (int outer_threads : {1, 3}) {
    std::atomic<int> moved{0}, ran{0};
    parallel_for(outer_threads, 12, [&](int64_t, int) {
      std::thread::id const here = std::this_thread::get_id();
      parallel_for(8, 5, [&](int64_t, int worker) {
        ++ran;
        moved += worker != 0 || std::this_thread::get_id() != here;
      });
    });
    CHECK(ran == 60, "%d", ran.load());
    CHECK(moved == 0, "%d", moved.load());
  }
  // and afterwards the caller's thread may share its work again
  std::atomic<bool> helped{false};
  std::thread::id const caller = std::this_thread::get_id();
  parallel_for(2, 2, [&](int64_t, int) {
    if (std::this_thread::get_id() != caller) helped = true;
    for (int i = 0; i < 2000 && !helped; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  CHECK(helped, "no helper came");
}

void callers_do_not_wait_for_each_other() {
  std::vector<std::thread> callers;
  std::atomic<int64_t> sum{0};
  for (int c = 0; c < 6; ++c)
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) parallel_for(3, 7, [&](int64_t task, int) { sum += task; });
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(sum == 6 * 200 * 21, "%lld", static_cast<long long>(sum.load()));
}

}  // namespace

int main() {
  for (int threads : {-1, 0, 1, 2, 3, 7, 64, 1000})
    for (int64_t tasks : {0, 1, 2, 5, 1000}) every_task_runs_once(threads, tasks);
  results_are_visible_to_the_caller();
  nested_calls_stay_on_their_thread();
  callers_do_not_wait_for_each_other();
  CHECK(core_count() >= 1 && core_count() <= 256, "%d", core_count());
  CHECK(resolve_threads(0) == core_count(), "%d", resolve_threads(0));
  CHECK(resolve_threads(-3) == core_count(), "%d", resolve_threads(-3));
  CHECK(resolve_threads(5) == 5, "%d", resolve_threads(5));
  CHECK(resolve_threads(100000) == 256, "%d", resolve_threads(100000));
  return couplet::test::finish();
}
