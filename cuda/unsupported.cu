// Entries of the operations that have no kernels yet: each says so. An operation leaves this file when its own defines the entries.
#include "backend.h"

#include <cstdio>

#include "../native/common/report.h"

namespace couplet::cuda {
namespace {

couplet_status refuse(couplet_report* report, const char* what) {
  return fail(report, COUPLET_UNSUPPORTED, {}, "The CUDA backend has no %s", what);
}

template <class Params>
struct Unsupported {
  static constexpr const char* name = "operation of this kind";
  static couplet_status check(const Params*, couplet_report* report) { return refuse(report, name); }
  static size_t workspace(const Params*) { return 0; }
  static couplet_status run(const Params*, void*, void*, couplet_report* report) { return refuse(report, name); }
  static void describe(const Params*, char* text, size_t text_bytes) { std::snprintf(text, text_bytes, "unsupported"); }
};

template <class Entries, class Body>
constexpr Entries entries_of() {
  return {Body::check, Body::workspace, Body::run, Body::describe};
}

}  // namespace

const couplet_attention_weights_entries attention_weights_entries =
    entries_of<couplet_attention_weights_entries, Unsupported<couplet_attention_weights_params>>();

}  // namespace couplet::cuda
