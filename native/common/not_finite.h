// The sentences about numbers that are not allowed, said alike by every backend and by whoever counts on from a slice of a call.
#pragma once

#include <cmath>

#include "report.h"

namespace couplet {

// A NaN or an infinity among the rows of encode and store.
inline couplet_status rows_not_finite(couplet_report* report, int64_t token, int32_t kv_head, int32_t channel) {
  return fail(report, COUPLET_NOT_FINITE, {.kv_head = kv_head, .token = token, .channel = channel},
              "Expected finite numbers for `rows` but received a NaN or an infinity at token %lld, kv head %d, "
              "channel %d",
              static_cast<long long>(token), kv_head, channel);
}

// The same among the points of kmeans.
inline couplet_status point_not_finite(couplet_report* report, float value, int32_t problem, int64_t point,
                                       int32_t channel) {
  return fail(report, COUPLET_NOT_FINITE, {.kv_head = problem, .token = point, .channel = channel},
              "Expected finite numbers for `points` but received %f in problem %d, point %lld, channel %d",
              static_cast<double>(value), problem, static_cast<long long>(point), channel);
}

// Among its weights; a negative one is COUPLET_INVALID_ARGUMENT.
inline couplet_status weight_not_allowed(couplet_report* report, float value, int32_t problem, int64_t point) {
  return fail(report, std::isfinite(value) ? COUPLET_INVALID_ARGUMENT : COUPLET_NOT_FINITE,
              {.kv_head = problem, .token = point},
              "Expected finite numbers of 0 or more for `weights` but received %g in problem %d, point %lld",
              static_cast<double>(value), problem, static_cast<long long>(point));
}

}  // namespace couplet
