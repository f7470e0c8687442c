// dispatch: finds what is there, and says why the rest is not.
#include "../../native/dispatch/dispatch.h"

#include <unistd.h>

#include <cstring>
#include <string>

#include "check.h"

namespace {

using couplet::find_backend;
using couplet::open_backend;

std::string own_folder() {
  char path[4096] = {};
  ssize_t const length = readlink("/proc/self/exe", path, sizeof path - 1);
  return std::string(path, length > 0 ? static_cast<size_t>(length) : 0).substr(0, std::string(path).rfind('/'));
}

void expect_refusal(const char* library, const char* reason) {
  couplet_report report{};
  std::string const path = own_folder() + "/" + library;
  CHECK(!open_backend(path, "sim", &report), "%s was accepted", library);
  CHECK(report.status == COUPLET_BACKEND_UNAVAILABLE, "%s: status %d", library, report.status);
  CHECK(std::strstr(report.detail, reason), "%s: \"%s\" says nothing of \"%s\"", library, report.detail, reason);
  CHECK(!open_backend(path, "sim", nullptr), "%s was accepted without a report", library);
}

void test_libraries() {
  couplet_report report{};
  const couplet_backend* const backend = open_backend(own_folder() + "/fake_sound.so", "sim", &report);
  CHECK(backend && std::strcmp(backend->variant(), "fake") == 0, "the sound library was refused: %s", report.detail);
  expect_refusal("fake_no_entry.so", "has no couplet_backend_entry");
  expect_refusal("fake_other_abi.so", "has ABI version 2, and this addon has 1");
  expect_refusal("fake_other_size.so", "has struct size");
  expect_refusal("fake_other_layout.so", "has layout version 2, and this addon has 1");
  expect_refusal("fake_other_name.so", "holds the backend \"cuda\" and not \"sim\"");
  expect_refusal("fake_refuses.so", "The driver is too old");
  expect_refusal("fake_absent.so", "No such file");
}

void test_names() {
  couplet_report report{};
  const couplet_backend* const cpu = find_backend("cpu", &report);
  CHECK(cpu && std::strcmp(cpu->name, "cpu") == 0 && cpu->abi_version == COUPLET_ABI_VERSION, "no CPU backend");
  CHECK(!find_backend("tpu", &report) && std::strstr(report.detail, "\"tpu\""), "tpu: %s", report.detail);
  for (int call = 0; call < 2; ++call) {  // the second answer comes from what the first one found
    report = {};
    const couplet_backend* const cuda = find_backend("cuda", &report);
    CHECK(cuda || (report.status == COUPLET_BACKEND_UNAVAILABLE && report.detail[0]), "no reason why there is no cuda");
  }
  CHECK(couplet::core_count() >= 1, "%d cores", couplet::core_count());
}

}  // namespace

int main() {
  test_libraries();
  test_names();
  return couplet::test::finish();
}
