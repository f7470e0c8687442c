// The bodies of decode by instruction set, and decode with a given one, for tests and benchmarks. Everybody else calls
// decode_entries. Float32 rows are copies of centroids; float16 rows are rounded to nearest even (65520 and more becomes an
// infinity). Either way the bodies write the same bytes.
#pragma once

#include "../abi/operations.h"

namespace couplet::cpu {

constexpr int32_t decode_tokens = 64;  // most tokens of one call of a body

// Tokens of one kv head: channel c of token t is rows[t * token_stride + c].
struct DecodeRows {
  void* rows;             // out, float32, or float16 when half is set
  int64_t token_stride;   // elements
  const float* table;     // float32 [groups][centroids][channels]
  const uint16_t* codes;  // [groups][decode_tokens]
  int32_t tokens;         // 1 to decode_tokens
  int32_t groups;
  int32_t channels;
  int32_t centroids;
  bool half;
};

struct DecodeBody {
  const char* name;
  void (*rows)(const DecodeRows& call);
};

extern const DecodeBody decode_portable;
#if defined(__x86_64__)
extern const DecodeBody decode_avx2;
extern const DecodeBody decode_avx512;
#endif

// As decode_entries.run, for parameters that decode_entries.check accepts.
couplet_status decode(const DecodeBody& body, const couplet_decode_params& params, couplet_report* report);

}  // namespace couplet::cpu
