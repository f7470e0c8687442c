/* The packed format: one struct, one size function, one version. docs/layout.md draws it.
 *
 * A page holds the codes of `page_tokens` tokens of one layer, one side (key or value) and one kv head, group after group:
 *   row g (group g) = page_tokens codes of code_bits bits each, a little-endian bit stream: code of token slot s occupies
 *   bits [s * code_bits, (s + 1) * code_bits) of the row, bit i of the row being bit (i % 8) of byte i / 8.
 * page_tokens is a multiple of 8, so every row is a whole number of bytes and no bit is wasted inside a page.
 */
#ifndef COUPLET_ABI_LAYOUT_H
#define COUPLET_ABI_LAYOUT_H

#include "status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define COUPLET_LAYOUT_VERSION 1u
#define COUPLET_PAGE_TOKENS 64    /* tokens of a page unless said otherwise */
#define COUPLET_PAGE_ALIGNMENT 64 /* bytes; pages start on a cache line */
#define COUPLET_MAX_CODE_BITS 12
#define COUPLET_MIN_HEAD_DIM 8 /* encode and decode; attend asks for 32 to 256 in steps of 8 */
#define COUPLET_MAX_HEAD_DIM 256

/* cq-<group_channels>c<code_bits>b */
typedef struct couplet_codec {
  int32_t group_channels; /* channels coupled in one group; divides head_dim */
  int32_t code_bits;      /* 1 to 12; a group has 2^code_bits centroids */
} couplet_codec;

COUPLET_STATIC_ASSERT(sizeof(couplet_codec) == 8, "couplet_codec is 8 bytes");

static inline int32_t couplet_codec_centroids(couplet_codec codec) { return (int32_t)1 << codec.code_bits; }
static inline int32_t couplet_codec_groups(couplet_codec codec, int32_t head_dim) {
  return head_dim / codec.group_channels;
}

static inline int couplet_codec_valid(couplet_codec codec, int32_t head_dim) {
  return codec.code_bits >= 1 && codec.code_bits <= COUPLET_MAX_CODE_BITS && codec.group_channels >= 1 &&
         codec.group_channels <= head_dim && head_dim % codec.group_channels == 0;
}

/* Bytes of one group's codes of one page. */
static inline int64_t couplet_row_bytes(couplet_codec codec, int32_t page_tokens) {
  return (int64_t)page_tokens * codec.code_bits / 8;
}

/* Bytes from one page to the next: its rows, rounded up to COUPLET_PAGE_ALIGNMENT (the only padding there is). */
static inline int64_t couplet_page_bytes(couplet_codec codec, int32_t head_dim, int32_t page_tokens) {
  int64_t const bytes = couplet_codec_groups(codec, head_dim) * couplet_row_bytes(codec, page_tokens);
  return (bytes + COUPLET_PAGE_ALIGNMENT - 1) / COUPLET_PAGE_ALIGNMENT * COUPLET_PAGE_ALIGNMENT;
}

#ifdef __cplusplus
}
#endif
#endif
