// The functions that fill the addon's exports, one per file of this room. lib/native/ types what they export.
#pragma once

#include <napi.h>

namespace couplet::binding {

void export_operations(Napi::Env env, Napi::Object exports);   // kmeans, encode, decode, backends
void export_cache(Napi::Env env, Napi::Object exports);        // codebooks, caches, sequences, steps
void export_onnxruntime(Napi::Env env, Napi::Object exports);  // sessions with the attention operator

}  // namespace couplet::binding
