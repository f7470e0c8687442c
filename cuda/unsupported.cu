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

template <class Params, class Object>
struct UnsupportedObject {
  static couplet_status create(const Params*, Object** object, couplet_report* report) {
    *object = nullptr;
    return refuse(report, "object of this kind");
  }
  static void destroy(Object*) {}
  static size_t bytes(const Object*) { return 0; }
};

template <class Entries, class Body>
constexpr Entries entries_of() {
  return {Body::check, Body::workspace, Body::run, Body::describe};
}

using Rotary = UnsupportedObject<couplet_rotary_params, couplet_rotary>;

}  // namespace

const couplet_rotary_entries rotary_entries = {Rotary::create, Rotary::destroy, Rotary::bytes};
const couplet_attend_entries attend_entries = entries_of<couplet_attend_entries, Unsupported<couplet_attend_params>>();
const couplet_attention_weights_entries attention_weights_entries =
    entries_of<couplet_attention_weights_entries, Unsupported<couplet_attention_weights_params>>();

}  // namespace couplet::cuda
