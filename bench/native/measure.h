// How native benchmarks take time: CPU time of the calling thread, so that a busy machine does not count, and the median of
// several runs. Caches are as the run before left them.
#pragma once

#include <time.h>

#include <algorithm>
#include <vector>

namespace couplet::bench {

inline double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// CPU seconds of one call of body: the median of `trials` runs that each repeat it for at least `least` seconds.
template <class Body>
double seconds_of(Body&& body, int trials = 7, double least = 0.005) {
  std::vector<double> times;
  for (int trial = 0; trial < trials; ++trial) {
    double const begin = cpu_seconds();
    double elapsed = 0;
    int calls = 0;
    do {
      body();
      ++calls;
      elapsed = cpu_seconds() - begin;
    } while (elapsed < least);
    times.push_back(elapsed / calls);
  }
  std::nth_element(times.begin(), times.begin() + trials / 2, times.end());
  return times[static_cast<size_t>(trials / 2)];
}

}  // namespace couplet::bench
