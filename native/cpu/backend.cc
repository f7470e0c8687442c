#include "backend.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../common/report.h"
#include "isa.h"
#include "pool.h"

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

couplet_status upload(void* to, const void* from, size_t bytes, void* stream, couplet_report* report) {
  return copy(to, from, bytes, stream, report);
}

couplet_status synchronize(void*, couplet_report*) { return COUPLET_OK; }

const char* variant() { return isa_name(isa()); }

int32_t count() { return 1; }

couplet_status select(int32_t index, couplet_report* report) {
  if (index == 0) return COUPLET_OK;
  return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected 0 for `deviceIndex` of the CPU but received %d", index);
}

couplet_status describe(int32_t index, couplet_device_info* info, couplet_report* report) {
  if (couplet_status const status = select(index, report)) return status;
  int64_t const page_bytes = sysconf(_SC_PAGESIZE);
  *info = {};
  info->memory_bytes = sysconf(_SC_PHYS_PAGES) * page_bytes;
  info->free_bytes = sysconf(_SC_AVPHYS_PAGES) * page_bytes;
  info->multiprocessors = core_count();
  std::snprintf(info->name, sizeof info->name, "CPU");
  std::snprintf(info->architecture, sizeof info->architecture, "%s", variant());
  return COUPLET_OK;
}

}  // namespace

const couplet_backend* backend() {
  static couplet_backend const cpu = {
      .abi_version = COUPLET_ABI_VERSION,
      .layout_version = COUPLET_LAYOUT_VERSION,
      .struct_bytes = sizeof(couplet_backend),
      .name = "cpu",
      .variant = variant,
      .device = {.count = count, .select = select, .describe = describe},
      .memory = {.is_host = 1,
                 .allocate = allocate,
                 .release = release,
                 .allocate_staging = allocate,
                 .release_staging = release,
                 .copy = copy,
                 .upload = upload,
                 .synchronize = synchronize},
      .table = table_entries,
      .rotary = rotary_entries,
      .kmeans = kmeans_entries,
      .encode = encode_entries,
      .decode = decode_entries,
      .attend = attend_entries,
      .attention_weights = attention_weights_entries,
      .store = store_entries,
      .mix = mix_entries,
      .reorder = reorder_entries,
  };
  return &cpu;
}

}  // namespace couplet::cpu
