// How a backend fills a couplet_report.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "../abi/status.h"

namespace couplet {

struct Where {
  int32_t layer = -1;
  int32_t kv_head = -1;
  int64_t token = -1;
  int32_t channel = -1;
  int32_t native_code = -1;
};

// Returns status, so that a check reads `return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected ...")`.
[[gnu::format(printf, 4, 5)]] inline couplet_status fail(couplet_report* report, couplet_status status, Where where,
                                                         const char* format, ...) {
  if (!report) return status;
  *report = couplet_report{};
  report->status = status;
  report->layer = where.layer;
  report->kv_head = where.kv_head;
  report->token = where.token;
  report->channel = where.channel;
  report->native_code = where.native_code;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(report->detail, sizeof report->detail, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace couplet
