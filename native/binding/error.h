// From a couplet_report to what JavaScript sees. JS thread only.
#pragma once

#include <napi.h>

#include "../abi/status.h"

namespace couplet::binding {

// What an operation calls the places that a report names.
struct PlaceNames {
  const char* kv_head = "kvHead";
  const char* token = "token";
};

// The error of a failed operation: a RangeError for COUPLET_INVALID_ARGUMENT and COUPLET_NOT_FINITE, an AbortError for
// COUPLET_CANCELLED, else an Error. `code` is ERR_COUPLET_* (ABORT_ERR); layer, kvHead, token, channel and nativeCode
// are set where the report knows them.
Napi::Error error_of(Napi::Env env, const couplet_report& report, PlaceNames places = {});

// Throws error_of(report) unless status is COUPLET_OK.
void throw_unless_ok(Napi::Env env, couplet_status status, const couplet_report& report);

// A TypeError (the wrong kind of value) or RangeError (a value out of range) with code ERR_COUPLET_INVALID_ARGUMENT.
// The message is one sentence: "Expected X for `name` but received Y".
Napi::Error type_error(Napi::Env env, const std::string& message);
Napi::Error range_error(Napi::Env env, const std::string& message);

// An Error with code ERR_COUPLET_DISPOSED.
Napi::Error disposed_error(Napi::Env env, const char* what);

}  // namespace couplet::binding
