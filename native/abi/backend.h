/* The waist: what a backend offers. native/cpu is linked in; libcouplet_cuda.so and libcouplet_sim.so export
 * couplet_backend_entry. Each operation has four entries that share one selection of the body:
 *   check      says whether these parameters can run (COUPLET_OK), and if not, why, in the report
 *   workspace  the scratch bytes that run needs for these parameters (64-byte aligned; may be 0)
 *   run        does it; `stream` is a cudaStream_t for GPU backends and NULL for the CPU
 *   describe   writes the name of the body that would run, such as "attend avx512 8c8b lookup"                        */
#ifndef COUPLET_ABI_BACKEND_H
#define COUPLET_ABI_BACKEND_H

#include "operations.h"

#ifdef __cplusplus
extern "C" {
#endif

#define COUPLET_OPERATION(name)                                                                 \
  typedef struct couplet_##name##_entries {                                                     \
    couplet_status (*check)(const couplet_##name##_params* params, couplet_report* report);     \
    size_t (*workspace)(const couplet_##name##_params* params);                                 \
    couplet_status (*run)(const couplet_##name##_params* params, void* workspace, void* stream, \
                          couplet_report* report);                                              \
    void (*describe)(const couplet_##name##_params* params, char* text, size_t text_bytes);     \
  } couplet_##name##_entries

COUPLET_OPERATION(kmeans);
COUPLET_OPERATION(encode);
COUPLET_OPERATION(decode);
COUPLET_OPERATION(attend);
COUPLET_OPERATION(attention_weights);
COUPLET_OPERATION(store);
COUPLET_OPERATION(mix);
COUPLET_OPERATION(reorder);

typedef struct couplet_table_entries {
  couplet_status (*create)(const couplet_table_params* params, couplet_table** table, couplet_report* report);
  void (*destroy)(couplet_table* table); /* NULL is allowed */
  size_t (*bytes)(const couplet_table* table);
} couplet_table_entries;

typedef struct couplet_rotary_entries {
  couplet_status (*create)(const couplet_rotary_params* params, couplet_rotary** rotary, couplet_report* report);
  /* The same angles for rows whose pairs stand in another order: pair i of a row has those of pair order[i]. order: the host's,
     [rotary_dim / 2], every pair once. `from` may go before what was made of it. */
  couplet_status (*reorder)(const couplet_rotary* from, const int32_t* order, couplet_rotary** rotary,
                            couplet_report* report);
  void (*destroy)(couplet_rotary* rotary); /* NULL is allowed */
  size_t (*bytes)(const couplet_rotary* rotary);
} couplet_rotary_entries;

/* The devices of a backend, 0 to count - 1. Every other entry works on the device that the calling thread selected last (0 at
 * first); tables, angles and memory stay on the device they were made on, and may be destroyed from any. After an error that the
 * device does not recover from, select refuses it with COUPLET_DEVICE_ERROR for the rest of the process. */
typedef struct couplet_device_info {
  int64_t memory_bytes;    /* 0 where it is not known */
  int64_t free_bytes;      /* now */
  int32_t driver_version;  /* 1000 * major + 10 * minor of the CUDA that the driver knows; 0: no driver is needed */
  int32_t runtime_version; /* likewise, of this library */
  int32_t multiprocessors;
  int32_t reserved;
  char name[96];
  char architecture[32]; /* "sm_90", "avx512" */
} couplet_device_info;

typedef struct couplet_device_entries {
  int32_t (*count)(void);
  couplet_status (*select)(int32_t index, couplet_report* report);
  couplet_status (*describe)(int32_t index, couplet_device_info* info, couplet_report* report);
} couplet_device_entries;

/* Memory in which pages live: host memory for the CPU, device memory for a GPU. */
typedef struct couplet_memory_entries {
  int32_t is_host;                 /* whether the host may follow pointers into it */
  void* (*allocate)(size_t bytes); /* 64-byte aligned, not cleared; NULL when there is none */
  void (*release)(void* memory, size_t bytes);
  void* (*allocate_staging)(size_t bytes); /* host memory that `upload` reads from; NULL when there is none */
  void (*release_staging)(void* memory, size_t bytes);
  /* After all work of `stream` so far. Between two places of the device it is only enqueued; where the host is one side, it is
     done on return. */
  couplet_status (*copy)(void* to, const void* from, size_t bytes, void* stream, couplet_report* report);
  /* From staging memory to the device, only enqueued: `from` stays as it is until `stream` has got there. */
  couplet_status (*upload)(void* to, const void* from, size_t bytes, void* stream, couplet_report* report);
  couplet_status (*synchronize)(void* stream, couplet_report* report); /* waits for all work of `stream` so far */
} couplet_memory_entries;

typedef struct couplet_backend {
  uint32_t abi_version;         /* COUPLET_ABI_VERSION */
  uint32_t layout_version;      /* COUPLET_LAYOUT_VERSION */
  size_t struct_bytes;          /* sizeof(couplet_backend) */
  const char* name;             /* "cpu", "cuda", "sim" */
  const char* (*variant)(void); /* what was chosen on this machine: "avx512", "sm_90" */
  couplet_device_entries device;
  couplet_memory_entries memory;
  couplet_table_entries table;
  couplet_rotary_entries rotary;
  couplet_kmeans_entries kmeans;
  couplet_encode_entries encode;
  couplet_decode_entries decode;
  couplet_attend_entries attend;
  couplet_attention_weights_entries attention_weights;
  couplet_store_entries store;
  couplet_mix_entries mix;
  couplet_reorder_entries reorder;
} couplet_backend;

/* Exported by every backend library; NULL with a report when this machine cannot run it. */
typedef const couplet_backend* (*couplet_backend_entry_function)(couplet_report* report);

#ifdef __cplusplus
}
#endif
#endif
