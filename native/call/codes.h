// encode and decode as whole calls: scratch memory, slices, and copies where the arrays are not where the work is.
#pragma once

#include <map>
#include <mutex>

#include "memory.h"

namespace couplet {

// The centroids of one layer and side as a device wants them, and what calls that only enqueue leave behind on it.
class PreparedTables {
 public:
  ~PreparedTables();
  PreparedTables() = default;
  PreparedTables(const PreparedTables&) = delete;
  PreparedTables& operator=(const PreparedTables&) = delete;

  // Once. The calling thread has selected the device.
  couplet_status create(const Device& device, const couplet_table_params& params, couplet_report* report);

  const Device& device() const { return device_; }
  const couplet_table* table() const { return table_; }
  size_t bytes() const { return device_.backend->table.bytes(table_); }

  // What the calls of one stream share: each is behind the one before, so that none meets another's.
  struct Stream {
    DeviceMemory workspace;
    DeviceMemory pages;             // uint8_t* [], the addresses of pages that follow each other
    uint8_t* first_page = nullptr;  // what it was made for
    int64_t page_bytes = 0;
    int64_t page_count = 0;
  };
  std::mutex mutex;                 // held while a call is enqueued
  std::map<void*, Stream> streams;  // by cudaStream_t

 private:
  Device device_;
  couplet_table* table_ = nullptr;
};

// Params is couplet_encode_params or couplet_decode_params. Pages are consecutive, [pages][kv_heads][page_stride], the first being
// page 0 of first_token; params.pages and params.page_offset are not used. On a device of the host everything is on the host.
template <class Params>
struct CodesCall {
  Params params{};
  uint8_t* codes = nullptr;
  bool rows_on_host = true;
  bool codes_on_host = true;
  const couplet_control* control = nullptr;
  int64_t staged_row_bytes = int64_t{16} << 20;  // 3 ms of a copy at 5 GB/s
  int64_t staged_page_bytes = int64_t{8} << 20;  // of all kv heads
};

// Returns when it is done. The calling thread has selected the device. What is the host's passes through scratch on the device, which
// has at most those bytes (8 tokens, or one page, where that is more). When it fails, codes or rows of earlier slices are written.
couplet_status run_codes(const Device& device, const CodesCall<couplet_encode_params>& call, couplet_report* report);
couplet_status run_codes(const Device& device, const CodesCall<couplet_decode_params>& call, couplet_report* report);

// Returns when it is enqueued on `stream`; rows and codes are the device's, params.table is of `tables`. A NaN is not reported.
couplet_status enqueue_codes(PreparedTables& tables, const CodesCall<couplet_encode_params>& call, void* stream,
                             couplet_report* report);
couplet_status enqueue_codes(PreparedTables& tables, const CodesCall<couplet_decode_params>& call, void* stream,
                             couplet_report* report);

}  // namespace couplet
