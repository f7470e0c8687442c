#include "backend.h"

#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace couplet::cpu {
namespace {

void* allocate(size_t bytes) {
  size_t const rounded = (bytes + COUPLET_PAGE_ALIGNMENT - 1) / COUPLET_PAGE_ALIGNMENT * COUPLET_PAGE_ALIGNMENT;
  return std::aligned_alloc(COUPLET_PAGE_ALIGNMENT, rounded ? rounded : COUPLET_PAGE_ALIGNMENT);
}

void release(void* memory, size_t) { std::free(memory); }

couplet_status copy(void* to, const void* from, size_t bytes, void*, couplet_report*) {
  std::memcpy(to, from, bytes);
  return COUPLET_OK;
}

const char* variant() { return isa_name(isa()); }

}  // namespace

const couplet_backend* backend() {
  static couplet_backend const cpu = {
      .abi_version = COUPLET_ABI_VERSION,
      .layout_version = COUPLET_LAYOUT_VERSION,
      .struct_bytes = sizeof(couplet_backend),
      .name = "cpu",
      .variant = variant,
      .memory = {.allocate = allocate, .release = release, .copy = copy},
      .table = table_entries,
      .rotary = rotary_entries,
      .kmeans = kmeans_entries,
      .encode = encode_entries,
      .decode = decode_entries,
      .attend = attend_entries,
      .attention_weights = attention_weights_entries,
  };
  return &cpu;
}

}  // namespace couplet::cpu
