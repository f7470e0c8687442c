/* Parameters of the operations. Plain structs: pointers, counts, strides. Every stride is in elements unless it says
 * bytes. The caller (native/cache, native/binding) owns all memory; `run` neither allocates nor keeps a pointer. */
#ifndef COUPLET_ABI_OPERATIONS_H
#define COUPLET_ABI_OPERATIONS_H

#include "layout.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Opaque, made by a backend once and read by many calls and threads at the same time. */
typedef struct couplet_table couplet_table;   /* the centroids of one layer and side, in the backend's own order */
typedef struct couplet_rotary couplet_rotary; /* rotary angles, in the backend's own order */

/* ---- tables --------------------------------------------------------------------------------------------------- */
typedef struct couplet_table_params {
  const float* centroids; /* float32 [kv_heads][groups][2^code_bits][group_channels], contiguous; copied */
  int32_t kv_heads;
  int32_t head_dim;
  couplet_codec codec;
  /* What encode calls near: |M (x - c)|^2 is least for the code of x, M the matrix of its kv head and group. decode and attend
     do not know of it. float32 [kv_heads][groups][group_channels][group_channels], row by row, copied; or NULL: |x - c|^2. */
  const float* metric;
} couplet_table_params;

/* ---- rotary embedding ------------------------------------------------------------------------------------------ */
typedef enum couplet_rotary_kind {
  COUPLET_ROTARY_HALF = 1,       /* channel i pairs with i + rotary_dim / 2 (Llama, Qwen) */
  COUPLET_ROTARY_INTERLEAVED = 2 /* channel 2i pairs with 2i + 1 (GPT-J) */
} couplet_rotary_kind;

/* Rotates channels [0, rotary_dim) of queries and keys; the others pass through.
   (x, y) of pair i at position t becomes (x cos - y sin, y cos + x sin).
   Either cos and sin are given, float32 [positions][rotary_dim / 2] (any scaling: yarn, llama3, longrope, an amplitude
   other than 1), or they are NULL and the angle is t * theta^(-2 i / rotary_dim). */
typedef struct couplet_rotary_params {
  const float* cos;
  const float* sin;
  double theta;
  int32_t kind;       /* couplet_rotary_kind */
  int32_t rotary_dim; /* even, 2 to head_dim */
  int32_t positions;  /* first position that may not be asked for; rows of cos and sin */
  int32_t head_dim;
} couplet_rotary_params;

/* ---- kmeans ---------------------------------------------------------------------------------------------------- */
/* k-means++ and Lloyd, `problems` times. The result depends on points, weights, seed and limits alone: not on threads,
   instruction set, or the place of a problem in the batch.
   Weights enter the seeding and the means, not the search for the nearest centroid; their unit does not matter. A point of
   weight 0 moves no centroid; weights that are all 0 count as all 1. Where there are fewer distinct points of positive
   weight than centroids, each of them becomes a centroid and the remaining centroids repeat the last one. A centroid that
   loses its points gets a new place. Equal distances go to the lowest index. Any finite numbers are allowed; a NaN, an
   infinity or a negative weight is reported with its problem, point and channel before anything is learned.
   A GPU backend: all arrays are device memory, control and what it points to are the host's. Without a control run only
   enqueues; the first bytes of the workspace are then a couplet_report, as in encode (problem in kv_head, point in token,
   channel -1 for a weight), and nothing is written unless its status is COUPLET_OK. With one, run waits for the device every few
   steps to tell progress and to see cancel, cannot be captured in a graph, and returns such a status itself. Centroids need
   not be the CPU's bit for bit. */
typedef struct couplet_kmeans_params {
  const float* points;  /* float32; channel c of point n of problem p:
                           points[p * problem_stride + n * point_stride + c] */
  const float* weights; /* float32 >= 0, or NULL for all 1; of point n of problem p:
                           weights[(p / weight_sharing) * weight_problem_stride + n * weight_point_stride] */
  float* centroids;     /* out, float32 [problems][centroid_count][channels] */
  double* inertia; /* out, [problems]: sum over points of weight * squared distance to the nearest centroid, or NULL */
  int32_t* assignments;           /* out, [problems][point_count], or NULL */
  int32_t* iterations;            /* out, [problems]: Lloyd iterations run, or NULL */
  const couplet_control* control; /* or NULL */
  int64_t problem_stride;
  int64_t point_stride;
  int64_t weight_problem_stride;
  int64_t weight_point_stride;
  uint64_t seed;
  double tolerance; /* stop when inertia falls by less than this share of itself; 0 runs until nothing changes */
  int32_t problems;
  int32_t point_count;
  int32_t channels;       /* 1 to 32 */
  int32_t centroid_count; /* 1 to 4096 */
  int32_t weight_sharing; /* consecutive problems that read the same weights, >= 1 */
  int32_t max_iterations; /* >= 0 */
  int32_t threads;        /* 0: all cores */
  int32_t reserved;
} couplet_kmeans_params;

/* ---- encode and decode ----------------------------------------------------------------------------------------- */
/* Tokens first_token .. first_token + tokens - 1 of a page table: token t lies in page t / page_tokens, slot
   t % page_tokens; kv head h of page p starts at pages[p] + page_offset + h * page_stride (bytes).
   A GPU backend: rows, pages and the entries of pages are device pointers. Its run enqueues encode and returns, so it cannot
   report a NaN or an infinity in rows; the first bytes of the workspace are a couplet_report for that. When the stream has got
   there, status is COUPLET_OK, or COUPLET_NOT_FINITE with the token (counted from the first of the call), kv head and channel
   of the first such value in that order; detail is empty. The codes of the groups with such values are unspecified then, all
   others are written. Who does not ask need not copy it.
   Many stretches of tokens can be encoded at once: `runs`. A token is then counted over the runs in their order. No two runs have
   tokens in the same 8 slots of a page (slot / 8). */
typedef struct couplet_encode_run {
  const void* rows; /* the fields of couplet_encode_params that have these names */
  uint8_t* const* pages;
  int64_t token_stride;
  int64_t head_stride;
  int64_t first_token;   /* below 2^35 */
  int64_t tokens_before; /* of the runs before this one */
  int32_t tokens;
  int32_t reserved;
} couplet_encode_run;

typedef struct couplet_encode_params {
  const void* rows; /* dtype; channel c of kv head h of the i-th token: rows[i * token_stride + h * head_stride + c] */
  const couplet_table* table;
  uint8_t* const* pages;
  int64_t token_stride;
  int64_t head_stride;
  int64_t page_offset; /* bytes */
  int64_t page_stride; /* bytes */
  int64_t first_token;
  int32_t tokens;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t page_tokens;
  int32_t dtype; /* COUPLET_FLOAT32 or COUPLET_FLOAT16; COUPLET_BFLOAT16 on a GPU */
  int32_t threads;
  couplet_codec codec;
  /* [run_count], for a GPU backend in its memory, or NULL: one run, of the fields above. With runs, `tokens` is the most that one
     has, and rows, pages, first_token and the strides are not read. */
  const couplet_encode_run* runs;
  int32_t run_count; /* at most 65535 */
  int32_t reserved;
} couplet_encode_params;

typedef struct couplet_decode_params {
  void* rows; /* dtype, out; addressed as in encode */
  const couplet_table* table;
  const uint8_t* const* pages;
  int64_t token_stride;
  int64_t head_stride;
  int64_t page_offset; /* bytes */
  int64_t page_stride; /* bytes */
  int64_t first_token;
  int32_t tokens;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t page_tokens;
  int32_t dtype; /* COUPLET_FLOAT32 or COUPLET_FLOAT16; COUPLET_BFLOAT16 on a GPU */
  int32_t threads;
  couplet_codec codec;
} couplet_decode_params;

/* ---- attend ---------------------------------------------------------------------------------------------------- */
/* A run of tokens in full precision: keys before rotary, values as they are. */
typedef struct couplet_dense_rows {
  const float* keys;   /* float32; channel c of kv head h of token first_token + i:
                          keys[i * key_token_stride + h * key_head_stride + c] */
  const float* values; /* float32, likewise */
  int64_t key_token_stride;
  int64_t key_head_stride;
  int64_t value_token_stride;
  int64_t value_head_stride;
  int32_t first_token;
  int32_t tokens;
} couplet_dense_rows;

/* One sequence. The query of position t sees token j when  t - local_window < j <= t  (j <= t when local_window is 0).
   Of those it reads from codes   coded_begin <= j < min(coded_end, t - window + 1)   and all others from the dense
   runs, which are disjoint, ascending and cover every token that some query reads so. */
typedef struct couplet_attend_sequence {
  const void* queries; /* query_dtype, before rotary; channel c of query head h of the i-th query:
                          queries[i * query_token_stride + h * query_head_stride + c] */
  void* outputs;       /* output_dtype, addressed likewise with the output strides; may not overlap an input */
  const uint8_t* const* pages;
  const couplet_dense_rows* dense;
  int64_t query_token_stride;
  int64_t query_head_stride;
  int64_t output_token_stride;
  int64_t output_head_stride;
  int32_t dense_count;
  int32_t first_query;  /* position of the first query */
  int32_t query_tokens; /* 0 is allowed: nothing happens */
  int32_t coded_begin;
  int32_t coded_end;
  int32_t window; /* newest tokens, the query's own among them, that a query never reads from codes */
} couplet_attend_sequence;

/* For a GPU backend every pointer in here is the device's, but for the tables and the rotary embedding: `sequences` itself,
   what its elements point to, `dense` and `pages` and what those point to, and head_sinks. Its `check` sees the counts alone,
   so positions beyond the rotary embedding, missing pages and missing dense rows are the caller's to avoid; `run` only
   enqueues, and may be captured in a graph that is replayed after the device's arrays have changed, as long as
   sequence_count has not. */
typedef struct couplet_attend_params {
  const couplet_attend_sequence* sequences; /* [sequence_count] */
  const couplet_table* key_table;           /* NULL when no sequence has codes */
  const couplet_table* value_table;
  const couplet_rotary* rotary; /* NULL: no rotary embedding */
  const float* head_sinks;      /* float32 [query_heads], one more logit in each softmax, or NULL */
  int64_t key_page_offset;      /* bytes; kv head h of page p: pages[p] + key_page_offset + h * key_page_stride */
  int64_t key_page_stride;
  int64_t value_page_offset;
  int64_t value_page_stride;
  int32_t sequence_count;
  int32_t query_heads; /* a multiple of kv_heads; query head h reads kv head h / (query_heads / kv_heads) */
  int32_t kv_heads;
  int32_t head_dim; /* 32 to 256 in steps of 8 */
  int32_t page_tokens;
  int32_t local_window; /* 0: unlimited */
  float scale;          /* logit = softcap(scale * q.k) */
  float softcap;        /* 0: none; else softcap * tanh(x / softcap) */
  couplet_codec key_codec;
  couplet_codec value_codec;
  int32_t threads;
  int32_t most_query_tokens; /* no sequence has more query_tokens; 0: not said. 1 spares a GPU a launch */
  int32_t query_dtype;       /* couplet_dtype; COUPLET_FLOAT32 alone on the CPU */
  int32_t output_dtype;      /* likewise */
} couplet_attend_params;

/* ---- store ------------------------------------------------------------------------------------------------------- */
/* Rows into the memory of a cache, as float32: run after run, run r having tokens tokens. A NaN or an infinity is COUPLET_NOT_FINITE
   with its token, counted over the runs in their order, its kv head and channel: the first in that order. The CPU then has stored
   nothing. A GPU backend: runs and what they point to are the device's; its run enqueues, stores everything, and leaves a
   couplet_report in the first bytes of the workspace, as encode does. */
typedef struct couplet_store_run {
  const void* rows; /* dtype; channel c of kv head h of the i-th token: rows[i * token_stride + h * head_stride + c] */
  float* stored;    /* addressed likewise with the stored strides; runs do not overlap */
  int64_t token_stride;
  int64_t head_stride;
  int64_t stored_token_stride;
  int64_t stored_head_stride;
  int64_t first_token; /* tokens of the runs before this one */
  int32_t tokens;
  int32_t reserved;
} couplet_store_run;

typedef struct couplet_store_params {
  const couplet_store_run* runs; /* [run_count] */
  int32_t run_count;
  int32_t most_tokens; /* no run has more tokens */
  int32_t kv_heads;
  int32_t head_dim;
  int32_t dtype; /* COUPLET_FLOAT32, COUPLET_FLOAT16 or COUPLET_BFLOAT16 */
  int32_t reserved;
} couplet_store_params;

/* ---- mix --------------------------------------------------------------------------------------------------------- */
/* Rows in place: x becomes x M, M the matrix of its head, float32 sums in ascending order of channels. For values on their way into
   a cache, and outputs of attention on their way out. A GPU backend: runs, what they point to and the matrices are the device's; its
   run enqueues. */
typedef struct couplet_mix_run {
  void* rows; /* dtype; channel c of head h of the i-th token: rows[i * token_stride + h * head_stride + c] */
  int64_t token_stride;
  int64_t head_stride;
  int32_t tokens;
  int32_t reserved;
} couplet_mix_run;

typedef struct couplet_mix_params {
  const couplet_mix_run* runs; /* [run_count], no two of them with the same rows */
  const float* matrices;       /* float32 [matrix_heads][head_dim of x][head_dim of the result] */
  int32_t run_count;
  int32_t most_tokens; /* no run has more tokens */
  int32_t heads;       /* a multiple of matrix_heads; head h has matrix h / (heads / matrix_heads) */
  int32_t matrix_heads;
  int32_t head_dim;
  int32_t dtype; /* COUPLET_FLOAT32, COUPLET_FLOAT16 or COUPLET_BFLOAT16; the CPU has float32 alone */
  int32_t threads;
  int32_t reserved;
} couplet_mix_params;

/* ---- reorder ----------------------------------------------------------------------------------------------------- */
/* Rows with their channels in another order: channel c of a row becomes what channel order[c] was. Elements are moved as they are. For
   keys on their way into a cache, and queries on theirs to attention. A GPU backend: order, runs and what they point to are the
   device's; its run enqueues. */
typedef struct couplet_reorder_run {
  const void* rows; /* dtype; channel c of head h of the i-th token: rows[i * token_stride + h * head_stride + c] */
  void* reordered;  /* addressed likewise with its own strides; overlaps no rows */
  int64_t token_stride;
  int64_t head_stride;
  int64_t reordered_token_stride;
  int64_t reordered_head_stride;
  int32_t tokens;
  int32_t heads;
} couplet_reorder_run;

typedef struct couplet_reorder_params {
  const couplet_reorder_run* runs; /* [run_count] */
  const int32_t* order;            /* [head_dim], each below head_dim */
  int32_t run_count;
  int32_t most_rows; /* no run has more tokens * heads */
  int32_t head_dim;
  int32_t dtype; /* COUPLET_FLOAT32, COUPLET_FLOAT16 or COUPLET_BFLOAT16 */
} couplet_reorder_params;

/* ---- attention_weights ------------------------------------------------------------------------------------------ */
/* Importance of the tokens of one fresh sequence, for weighted kmeans (design.md section 2). With p the probability of
   query i on token t and o_i its output, summed over queries and the query heads that share a kv head:
     value weight of t = sum p^2
     key weight of t   = sum (p s)^2 (|v_t|^2 + |o_i|^2 - 2 o_i.v_t) |q_i|^2 / head_dim
   with s = 1 - (logit / softcap)^2 where there is a softcap, and 1 where there is none. */
typedef struct couplet_attention_weights_params {
  const float* queries;    /* float32, before rotary, addressed as in attend */
  couplet_dense_rows rows; /* all tokens; first_token is 0 */
  float* key_weights;      /* out, float32 [tokens][kv_heads] */
  float* value_weights;    /* out, float32 [tokens][kv_heads] */
  const couplet_rotary* rotary;
  const float* head_sinks;
  int64_t query_token_stride;
  int64_t query_head_stride;
  int32_t query_heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t local_window;
  float scale;
  float softcap;
  int32_t threads;
  int32_t reserved;
} couplet_attention_weights_params;

COUPLET_STATIC_ASSERT(sizeof(couplet_table_params) == 32, "tables");
COUPLET_STATIC_ASSERT(sizeof(couplet_kmeans_params) == 136, "kmeans parameters");
COUPLET_STATIC_ASSERT(sizeof(couplet_encode_run) == 56, "encode runs");
COUPLET_STATIC_ASSERT(sizeof(couplet_encode_params) == 112, "encode parameters");
COUPLET_STATIC_ASSERT(sizeof(couplet_decode_params) == 96, "decode parameters");
COUPLET_STATIC_ASSERT(sizeof(couplet_dense_rows) == 56, "dense rows");
COUPLET_STATIC_ASSERT(sizeof(couplet_attend_sequence) == 88, "attend sequence");
COUPLET_STATIC_ASSERT(sizeof(couplet_attend_params) == 136, "attend parameters");
COUPLET_STATIC_ASSERT(sizeof(couplet_store_run) == 64, "store runs");
COUPLET_STATIC_ASSERT(sizeof(couplet_store_params) == 32, "store parameters");
COUPLET_STATIC_ASSERT(sizeof(couplet_mix_run) == 32, "mix runs");
COUPLET_STATIC_ASSERT(sizeof(couplet_mix_params) == 48, "mix parameters");
COUPLET_STATIC_ASSERT(sizeof(couplet_reorder_run) == 56, "reorder runs");
COUPLET_STATIC_ASSERT(sizeof(couplet_reorder_params) == 32, "reorder parameters");

#ifdef __cplusplus
}
#endif
#endif
