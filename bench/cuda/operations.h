// What is measured: each makes its data on the device from a seed, checks the answer of that very shape against the CPU backend,
// and only then takes times.
#pragma once

#include "measure.h"

namespace couplet::bench {

// One step of attention over `batch` sequences of `context` tokens: with queries == 1 a decode step, with more a prefill whose last
// `queries` tokens ask; a first prompt, which has no codes yet, where those are all. As a Cache keeps them, the first 4 and the last 32 tokens before the queries are in full precision, as are
// the queries' own; all others are codes, 64 tokens a page. Queries and outputs are float16. Rotary embedding in halves, theta 500000.
void attend(const Case& what, Meter& meter, Report& report);

// Keys and values of `batch` times `context` tokens, float16, as the two calls of a layer. The check compares the bytes of the last
// 1024 tokens.
void encode(const Case& what, Meter& meter, Report& report);
void decode(const Case& what, Meter& meter, Report& report);

// `batch` problems of `context` points, at most `iterations` Lloyd iterations each, until nothing changes.
void kmeans(const Case& what, int32_t iterations, Meter& meter, Report& report);

}  // namespace couplet::bench
