// What attend.cc hands to a body: one task is some queries of one sequence and kv head against a range of key positions.
#pragma once

#include "../abi/operations.h"
#include "table.h"

namespace couplet::cpu {

constexpr int32_t attend_tile_tokens = 64;  // keys decoded at a time, at most

// A *row* is one query token and one of the query heads that share the kv head: row = token * group_heads + head.
struct AttendTask {
  const couplet_attend_params* params;
  const couplet_attend_sequence* sequence;
  int32_t kv_head;
  int32_t first_query;  // index into the sequence's queries
  int32_t query_tokens;
  int32_t key_begin;  // positions
  int32_t key_end;
};

// Softmax in progress, in powers of two: weighted = sum of 2^(logit - maximum) * value, sums = sum of 2^(logit - maximum).
// A row that has seen no key has maximum -infinity, sum 0 and weighted 0.
struct AttendState {
  float* maxima;    // float32 [rows rounded up to 16]
  float* sums;      // likewise
  float* weighted;  // float32 [rows][padded head_dim]
};

// Rows and channels are laid out in whole vectors of the widest instruction set.
constexpr int32_t attend_padded(int32_t count) { return (count + 15) / 16 * 16; }

// The general body of one instruction set: any codec, any number of rows.
struct AttendTile {
  size_t (*scratch)(const couplet_attend_params& params, int32_t rows);
  void (*run)(const AttendTask& task, AttendState state, void* scratch, bool with_codes);
};

// The body for the coded keys of tasks of few rows, where there is one for the shapes; dense runs stay with the tile body.
struct AttendLookup {
  bool (*fits)(const couplet_attend_params& params);
  size_t (*scratch)(const couplet_attend_params& params);
  void (*run)(const AttendTask& task, AttendState state, void* scratch);
};

// Query heads that one pass of a lookup body serves when `left` are to go; a few idle ones cost less than a second pass.
static inline int32_t attend_heads_at_once(int32_t left) { return left > 4 ? 8 : left > 2 ? 4 : left; }

extern const AttendTile attend_tile_portable;
extern const AttendTile attend_tile_avx2;
extern const AttendTile attend_tile_avx512;
extern const AttendLookup attend_lookup_avx2;
extern const AttendLookup attend_lookup_avx512;

// ---- what a query sees -------------------------------------------------------------------------------------------
// The keys of a sequence come from three sources, each seen by a query as one interval of positions whose ends never
// fall from one query to the next.
enum class KeySource { below, codes, above };  // dense runs before coded_begin; codes; dense runs from coded_begin on

struct Interval {
  int32_t begin;
  int32_t end;
};

static inline int32_t attend_larger(int32_t a, int32_t b) { return a > b ? a : b; }
static inline int32_t attend_smaller(int32_t a, int32_t b) { return a < b ? a : b; }

static inline Interval attend_visible(const couplet_attend_params& params, const couplet_attend_sequence& sequence,
                                      KeySource source, int32_t position) {
  int32_t const oldest = params.local_window ? attend_larger(0, position - params.local_window + 1) : 0;
  int32_t const coded_end = attend_smaller(sequence.coded_end, position - sequence.window + 1);
  int32_t const oldest_above = attend_larger(oldest, sequence.coded_begin);
  switch (source) {
    case KeySource::below: return {oldest, attend_smaller(sequence.coded_begin, position + 1)};
    case KeySource::codes: return {oldest_above, coded_end};
    default: return {attend_larger(oldest_above, coded_end), position + 1};
  }
}

}  // namespace couplet::cpu
