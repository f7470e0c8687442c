// Can the simulator find bugs? Each one of planted.cu is run in every schedule, and under the sanitizers; each must be found in some
// way, and its sound twin in none. Prints what found what.
#include <sys/personality.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "../native/check.h"

namespace {

enum class Outcome { nothing, wrong_result, report, crash, timeout, not_run };

struct Run {
  Outcome outcome;
  std::string output;
};

constexpr int seconds_per_run = 60;

std::string own_folder() {
  char path[4096] = {};
  ssize_t const length = readlink("/proc/self/exe", path, sizeof path - 1);
  std::string const text(path, length > 0 ? static_cast<size_t>(length) : 0);
  return text.substr(0, text.rfind('/'));
}

// What this program itself was started under (qemu, say), so that its children can be.
std::vector<std::string> launcher() {
  const char* const text = std::getenv("COUPLET_TEST_LAUNCHER");
  std::istringstream words(text ? text : "");
  return {std::istream_iterator<std::string>(words), {}};
}

Run run(const std::string& program, const char* name, const char* twin, const std::string& schedule) {
  int ends[2];
  if (pipe(ends) != 0) return {Outcome::not_run, "no pipe"};
  pid_t const child = fork();
  if (child == 0) {
    dup2(ends[1], STDOUT_FILENO);
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
    alarm(seconds_per_run);
    // gcc 12's ThreadSanitizer cannot place its shadow memory where the kernel randomizes mappings by 32 bits.
    personality(ADDR_NO_RANDOMIZE);
    setenv("COUPLET_SIM_SCHEDULE", schedule.c_str(), 1);
    setenv("TSAN_OPTIONS", "exitcode=66 halt_on_error=1 atexit_sleep_ms=0", 1);
    setenv("ASAN_OPTIONS", "exitcode=67 detect_leaks=1", 1);
    std::vector<std::string> words = launcher();
    words.insert(words.end(), {program, name, twin});
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    execvp(argv[0], argv.data());
    _exit(3);
  }
  close(ends[1]);
  Run result{Outcome::not_run, {}};
  char part[4096];
  for (ssize_t length; (length = read(ends[0], part, sizeof part)) > 0;)
    result.output.append(part, static_cast<size_t>(length));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) result.outcome = WTERMSIG(status) == SIGALRM ? Outcome::timeout : Outcome::crash;
  if (WIFEXITED(status)) {
    switch (WEXITSTATUS(status)) {
      case 0: result.outcome = Outcome::nothing; break;
      case 1: result.outcome = Outcome::wrong_result; break;
      case 2:
      case 66:
      case 67: result.outcome = Outcome::report; break;
    }
  }
  return result;
}

bool found(const Run& run) {
  return run.outcome == Outcome::wrong_result || run.outcome == Outcome::report || run.outcome == Outcome::crash;
}

const char* word(const Run& run) {
  switch (run.outcome) {
    case Outcome::nothing: return "-";
    case Outcome::wrong_result: return "result";
    case Outcome::report: return "report";
    case Outcome::crash: return "crash";
    case Outcome::timeout: return "TIMEOUT";
    case Outcome::not_run: return "NOT RUN";
  }
  return "";
}

std::vector<std::string> names_of_cases(const std::string& program) {
  std::istringstream list(run(program, "list", "", "forward").output);
  return {std::istream_iterator<std::string>(list), {}};
}

}  // namespace

int main() {
  std::string const plain = own_folder() + "/planted_plain";
  std::string const address = own_folder() + "/planted_address";
  std::string const thread = own_folder() + "/planted_thread";
  bool const sanitizers = access(address.c_str(), X_OK) == 0 && access(thread.c_str(), X_OK) == 0;
  int const seeds = sanitizers ? 10 : 2;  // a build that is slow, under qemu or a sanitizer, is not there for the table
  if (!sanitizers) std::printf("NOT RUN: the bugs under sanitizers (this build has planted_plain alone)\n");

  std::vector<std::string> schedules{"forward", "reversed"};
  for (int seed = 1; seed <= seeds; ++seed) schedules.push_back("shuffled:" + std::to_string(seed));
  for (const std::string& schedule : schedules) {
    Run const sound = run(plain, "all", "sound", schedule);
    CHECK(sound.outcome == Outcome::nothing, "%s, sound twins: %s\n%s", schedule.c_str(), word(sound),
          sound.output.substr(0, 2000).c_str());
  }
  for (const char* schedule : {"forward", "reversed", "shuffled:1"})
    for (const std::string& program : {address, thread}) {
      if (!sanitizers) continue;
      Run const sound = run(program, "all", "sound", schedule);
      CHECK(sound.outcome == Outcome::nothing, "%s, %s, sound twins: %s\n%s", program.c_str(), schedule, word(sound),
            sound.output.substr(0, 2000).c_str());
    }

  std::vector<std::string> const names = names_of_cases(plain);
  CHECK(names.size() >= 8, "%zu cases", names.size());
  std::printf("%-28s %-8s %-8s %-8s %-8s %-8s %-8s\n", "planted bug", "forward", "reversed", "shuffled", "ASan",
              "TSan f", "TSan s");
  for (const std::string& name : names) {
    const char* const bug = name.c_str();
    Run const forward = run(plain, bug, "bug", "forward");
    Run const reversed = run(plain, bug, "bug", "reversed");
    int shuffled = 0;
    for (int seed = 1; seed <= seeds; ++seed)
      shuffled += found(run(plain, bug, "bug", "shuffled:" + std::to_string(seed)));
    Run const none{Outcome::not_run, {}};
    Run const by_address = sanitizers ? run(address, bug, "bug", "forward") : none;
    Run const by_thread = sanitizers ? run(thread, bug, "bug", "forward") : none;
    Run const by_thread_shuffled = sanitizers ? run(thread, bug, "bug", "shuffled:1") : none;
    std::printf("%-28s %-8s %-8s %2d of %-2d %-8s %-8s %-8s\n", bug, word(forward), word(reversed), shuffled, seeds,
                word(by_address), word(by_thread), word(by_thread_shuffled));
    bool const by_plain = found(forward) || found(reversed) || shuffled > 0;
    bool const by_sanitizer = found(by_address) || found(by_thread) || found(by_thread_shuffled);
    CHECK(by_plain || by_sanitizer || !sanitizers, "%s: not found", bug);
    // Where there are reports, one says where. (A wrong result or a crash of the host leaves that to the test that it breaks.)
    bool reported = false;
    bool placed = false;
    for (const Run& one : {forward, reversed, by_address, by_thread, by_thread_shuffled}) {
      reported |= one.outcome == Outcome::report;
      placed |= one.output.find("planted.cu:") != std::string::npos;
    }
    CHECK(!reported || placed || !sanitizers, "%s: no report says a line", bug);
  }
  return couplet::test::finish();
}
