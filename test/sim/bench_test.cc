// bench/cuda in the simulator: one sample of tiny shapes. Its times mean nothing here; that it runs and that every case passes its own
// check does.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "../native/check.h"

namespace {

std::string own_folder() {
  char path[4096] = {};
  ssize_t const length = readlink("/proc/self/exe", path, sizeof path - 1);
  std::string const text(path, length > 0 ? static_cast<size_t>(length) : 0);
  return text.substr(0, text.rfind('/'));
}

std::string read(const std::string& path) {
  std::string text;
  std::FILE* const file = std::fopen(path.c_str(), "r");
  if (!file) return text;
  char part[4096];
  for (size_t length; (length = std::fread(part, 1, sizeof part, file)) > 0;) text.append(part, length);
  std::fclose(file);
  return text;
}

size_t count(const std::string& text, const std::string& part) {
  size_t found = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

}  // namespace

int main() {
  char path[] = "/tmp/couplet-bench-XXXXXX";
  int const file = mkstemp(path);
  if (!CHECK(file >= 0, "no temporary file")) return couplet::test::finish();
  close(file);
  const char* const launcher = std::getenv("COUPLET_TEST_LAUNCHER");  // what this program was started under: qemu, say
  std::string const program = std::string(launcher ? launcher : "") + " '" + own_folder() + "/couplet_bench_sim'";
  int const status = std::system((program + " --tiny --json " + path).c_str());
  CHECK(status == 0, "exit status %d", status);
  std::string const document = read(path);
  unlink(path);
  // Four codecs of each operation; two to four bodies of attend that can take a codec, and one by levels; one set of problems, and of rows.
  for (const char* operation : {"attend decode", "attend prefill", "attend wide", "attend prompt", "encode", "decode"})
    CHECK(count(document, "\"operation\":\"" + std::string(operation) + "\"") == 4, "%s: %s", operation,
          document.c_str());
  for (const char* operation : {"kmeans", "mix", "reorder"})
    CHECK(count(document, "\"operation\":\"" + std::string(operation) + "\"") == 1, "%s: %s", operation,
          document.c_str());
  CHECK(count(document, "\"operation\":\"attend ladder\"") == 14, "ladder: %s", document.c_str());
  CHECK(count(document, "nan") == 0 && count(document, "inf") == 0, "%s", document.c_str());
  return couplet::test::finish();
}
