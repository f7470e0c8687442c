// The entries of each operation on a GPU, defined beside its kernels, and the errors that they share.
#pragma once

#include "../native/abi/backend.h"
#include "gpu.h"

namespace couplet::cuda {

extern const couplet_table_entries table_entries;
extern const couplet_rotary_entries rotary_entries;
extern const couplet_kmeans_entries kmeans_entries;
extern const couplet_encode_entries encode_entries;
extern const couplet_decode_entries decode_entries;
extern const couplet_attend_entries attend_entries;
extern const couplet_attention_weights_entries attention_weights_entries;
extern const couplet_store_entries store_entries;
extern const couplet_mix_entries mix_entries;
extern const couplet_reorder_entries reorder_entries;
extern const couplet_device_entries device_entries;

// COUPLET_OK, or the error in the report with its CUDA name and number. `what` says what was being done: "copying 64 bytes".
couplet_status status_of(cudaError_t error, couplet_report* report, const char* what);

}  // namespace couplet::cuda
