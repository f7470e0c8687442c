// All the test framework that native tests have: CHECK, one summary line, and seeded random data.
//
//   int main() {
//     CHECK(1 + 1 == 2, "sum %d", 1 + 1);   // prints file:line, the condition and the message when false, and goes on
//     return couplet::test::finish();       // "N passed, M failed"; the exit status
//   }
#pragma once

#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace couplet::test {

inline std::atomic<int> passed{0};
inline std::atomic<int> failed{0};
inline constexpr int most_printed = 50;  // a broken kernel fails thousands of checks; the first ones say why

[[gnu::format(printf, 5, 6)]] inline bool check(bool held, const char* file, int line, const char* condition,
                                                const char* format, ...) {
  if (held) {
    ++passed;
    return true;
  }
  if (failed++ >= most_printed) return false;
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "%s:%d: failed: %s: %s\n", file, line, condition, message);
  return false;
}

inline int finish() {
  std::printf("%d passed, %d failed\n", passed.load(), failed.load());
  if (passed + failed > 0) return failed ? 1 : 0;
  std::fprintf(stderr, "no check ran\n");  // a test that checks nothing must not look green
  return 1;
}

// The same numbers from the same seed on every machine (SplitMix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }  // [0, 1)
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  int64_t below(int64_t count) { return static_cast<int64_t>(next() % static_cast<uint64_t>(count)); }  // [0, count)
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586476925 * uniform()); }
  std::vector<float> normals(size_t count, double scale = 1) {
    std::vector<float> values(count);
    for (float& value : values) value = static_cast<float>(scale * normal());
    return values;
  }

 private:
  uint64_t state_;
};

}  // namespace couplet::test

// CHECK(condition, "printf format", ...): true when the condition holds, so a test can stop early with if (!CHECK(...)) return;
#define CHECK(condition, ...) \
  ::couplet::test::check(static_cast<bool>(condition), __FILE__, __LINE__, #condition, __VA_ARGS__)
