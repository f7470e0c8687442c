// The functions that fill the addon's exports, one per file of this room. lib/native/ types what they export.
#pragma once

#include <napi.h>

namespace couplet::binding {

void export_capabilities(Napi::Env env, Napi::Object exports);  // versions, backends, devices
void export_device(Napi::Env env, Napi::Object exports);        // memory of devices
void export_kmeans(Napi::Env env, Napi::Object exports);
void export_codes(Napi::Env env, Napi::Object exports);        // encode, decode, tables for them
void export_cache(Napi::Env env, Napi::Object exports);        // codebooks, caches, sequences, steps
void export_onnxruntime(Napi::Env env, Napi::Object exports);  // sessions with the attention operator

}  // namespace couplet::binding
