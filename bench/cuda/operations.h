// What is measured: each makes its data on the device from a seed, checks the answer of that very shape against the CPU backend,
// and only then takes times.
#pragma once

#include "measure.h"

namespace couplet::bench {

// One step of attention over `batch` sequences of `context` tokens: with queries == 1 a decode step, with more a prefill whose last
// `queries` tokens ask; a first prompt, which has no codes yet, where those are all. As a Cache keeps them, the first 4 and the last 32 tokens before the queries are in full precision, as are
// the queries' own; all others are codes, 64 tokens a page. Queries and outputs are float16. Rotary embedding in halves, theta 500000.
// The operation "attend wide" has a value in each sequence and kv head that float16 does not hold, which its prefill finds out.
void attend(const Case& what, Meter& meter, Report& report);

// A decode step by every body of attend that can take it, the plainest first: a row each, on the same data.
void ladder(const Case& what, Meter& meter, Report& report);

// Keys and values of `batch` times `context` tokens, float16, as the two calls of a layer. The check compares the bytes of the last
// 1024 tokens.
void encode(const Case& what, Meter& meter, Report& report);
void decode(const Case& what, Meter& meter, Report& report);

// Rows of `batch` sequences of `context` tokens and all query heads, float16, through a matrix of their kv head (in place; a Hadamard
// matrix, so that numbers stay what they are) or into another order. The check has the last 1024 tokens.
void mix(const Case& what, Meter& meter, Report& report);
void reorder(const Case& what, Meter& meter, Report& report);

// `batch` problems of `context` points, at most `iterations` Lloyd iterations each, until nothing changes.
void kmeans(const Case& what, int32_t iterations, Meter& meter, Report& report);

}  // namespace couplet::bench
