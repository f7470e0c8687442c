/* Status codes and reports: how every native room says what went wrong. Nothing here allocates or throws. */
#ifndef COUPLET_ABI_STATUS_H
#define COUPLET_ABI_STATUS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define COUPLET_STATIC_ASSERT(condition, text) static_assert(condition, text)
extern "C" {
#else
#define COUPLET_STATIC_ASSERT(condition, text) _Static_assert(condition, text)
#endif

/* Raised by one whenever a struct, an entry or the packed layout changes meaning. */
#define COUPLET_ABI_VERSION 1u

/* The binding turns each into the error code in the comment. */
typedef enum couplet_status {
  COUPLET_OK = 0,
  COUPLET_INVALID_ARGUMENT = 1,    /* ERR_COUPLET_INVALID_ARGUMENT */
  COUPLET_OUT_OF_MEMORY = 2,       /* ERR_COUPLET_OUT_OF_MEMORY: the operating system or the device said no */
  COUPLET_NOT_FINITE = 3,          /* ERR_COUPLET_NOT_FINITE: a NaN or an infinity in the input */
  COUPLET_CANCELLED = 4,           /* AbortError, code ABORT_ERR */
  COUPLET_CACHE_FULL = 5,          /* ERR_COUPLET_CACHE_FULL: the byte budget of a cache is spent */
  COUPLET_UNSUPPORTED = 6,         /* ERR_COUPLET_UNSUPPORTED */
  COUPLET_BACKEND_UNAVAILABLE = 7, /* ERR_COUPLET_BACKEND_UNAVAILABLE */
  COUPLET_DEVICE_ERROR = 8,        /* ERR_COUPLET_DEVICE: the device reported an error, native_code holds its number */
  COUPLET_BUSY = 9,                /* ERR_COUPLET_BUSY: a sequence is inside an open step */
  COUPLET_DISPOSED = 10,           /* ERR_COUPLET_DISPOSED */
  COUPLET_MISMATCH = 11,           /* ERR_COUPLET_CODEBOOK_MISMATCH */
  COUPLET_ONNXRUNTIME = 12,        /* ERR_COUPLET_ONNXRUNTIME: onnxruntime is missing, unsuitable, or failed */
  COUPLET_INTERNAL = 13            /* ERR_COUPLET_INTERNAL: a defect of couplet's own */
} couplet_status;

/* Where and why. Fields that do not apply are -1; detail is one English sentence without its final stop. */
typedef struct couplet_report {
  int64_t token;  /* index of the token, or of the point for kmeans */
  int32_t status; /* a couplet_status */
  int32_t layer;
  int32_t kv_head; /* kv head, or problem for kmeans */
  int32_t channel;
  int32_t native_code; /* errno, CUDA error, OrtErrorCode */
  int32_t reserved;
  char detail[224];
} couplet_report;

COUPLET_STATIC_ASSERT(sizeof(couplet_report) == 256, "couplet_report is 256 bytes");

/* Progress and cancellation of a long operation; either pointer may be NULL.
   cancel is read often (at least every 50 ms of work on every thread); non-zero stops the operation.
   progress is called from worker threads, one call at a time. */
typedef struct couplet_control {
  const volatile int32_t* cancel;
  void (*progress)(void* user, int64_t done, int64_t total, int32_t problem, int32_t iteration);
  void* user;
} couplet_control;

typedef enum couplet_dtype { COUPLET_FLOAT32 = 0, COUPLET_FLOAT16 = 1, COUPLET_BFLOAT16 = 2 } couplet_dtype;

#ifdef __cplusplus
}
#endif
#endif
