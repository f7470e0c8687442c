// The CPU backend and the operations it is made of. Each operation defines its entries in its own file.
#pragma once

#include "../abi/backend.h"

namespace couplet::cpu {

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

const couplet_backend* backend();

}  // namespace couplet::cpu
