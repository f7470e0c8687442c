#include "codes.h"

#include <algorithm>
#include <vector>

#include "../common/control.h"
#include "../common/not_finite.h"

namespace couplet {
namespace {

// Distances are 30 pairs of channels a nanosecond and core at best and 1 at worst: slices of 2 to 70 ms on one thread. A GPU has some
// 10,000 a nanosecond; slices of 1 ms hide the 20 us that it takes to begin one.
constexpr int64_t host_pairs = int64_t{1} << 26;
constexpr int64_t device_pairs = int64_t{1} << 33;
constexpr int64_t host_channels = int64_t{1} << 24;  // of decode, about 1 ns each at worst

const couplet_encode_entries& entries_of(const couplet_backend& backend, const couplet_encode_params&) {
  return backend.encode;
}
const couplet_decode_entries& entries_of(const couplet_backend& backend, const couplet_decode_params&) {
  return backend.decode;
}

// Tokens of a slice that is over soon enough to see a cancel.
int64_t tokens_by_work(const Device& device, const couplet_encode_params& p) {
  int64_t const pairs_of_a_token = int64_t{p.kv_heads} * p.head_dim * couplet_codec_centroids(p.codec);
  int64_t const tokens = (device.is_host() ? host_pairs : device_pairs) / pairs_of_a_token;
  return std::max<int64_t>(tokens / COUPLET_PAGE_TOKENS * COUPLET_PAGE_TOKENS, 8);
}
int64_t tokens_by_work(const Device& device, const couplet_decode_params& p) {
  int64_t const channels_of_a_token = int64_t{p.kv_heads} * p.head_dim;
  return device.is_host() ? std::max<int64_t>(host_channels / channels_of_a_token, 1) : INT32_MAX;
}

template <class Params>
class Run {
 public:
  static constexpr bool is_encode = std::is_same_v<Params, couplet_encode_params>;

  Run(const Device& device, const CodesCall<Params>& call, couplet_report* report)
      : device_(device),
        call_(call),
        entries_(entries_of(*device.backend, call.params)),
        report_(report),
        stages_rows_(call.rows_on_host && !device.is_host()),
        stages_codes_(call.codes_on_host && !device.is_host()),
        element_bytes_(call.params.dtype == COUPLET_FLOAT32 ? 4 : 2),
        token_bytes_(int64_t{call.params.kv_heads} * call.params.head_dim * element_bytes_),
        page_bytes_(call.params.kv_heads * call.params.page_stride) {}

  couplet_status all() {
    Params const& p = call_.params;
    if (p.tokens == 0) return entries_.check(&p, report_);
    int64_t const end = p.first_token + p.tokens;
    int64_t const first_page = p.first_token / p.page_tokens;
    int64_t const end_page = (end - 1) / p.page_tokens + 1;
    int64_t const window_pages =
        stages_codes_ ? std::clamp<int64_t>(call_.staged_page_bytes / page_bytes_, 1, end_page - first_page)
                      : end_page - first_page;
    slice_tokens_ = std::min<int64_t>(p.tokens, tokens_by_work(device_, p));
    if (stages_rows_)
      slice_tokens_ = std::min(slice_tokens_, std::max<int64_t>(call_.staged_row_bytes / token_bytes_ / 8 * 8, 8));
    if (couplet_status const status = reserve(first_page, window_pages)) return status;
    for (int64_t page = first_page; page < end_page; page += window_pages)
      if (couplet_status const status = window(page, std::min(page + window_pages, end_page))) return status;
    return device_.backend->memory.synchronize(nullptr, report_);
  }

 private:
  couplet_status reserve(int64_t first_page, int64_t window_pages) {
    uint8_t* codes = call_.codes + first_page * page_bytes_;
    if (stages_codes_) {
      if (couplet_status const status =
              codes_.allocate(device_, static_cast<size_t>(window_pages * page_bytes_), report_))
        return status;
      codes = codes_.get<uint8_t>();
    }
    if (stages_rows_)
      if (couplet_status const status =
              rows_.allocate(device_, static_cast<size_t>(slice_tokens_ * token_bytes_), report_))
        return status;
    host_pages_.resize(static_cast<size_t>(window_pages));
    for (size_t page = 0; page < host_pages_.size(); ++page)
      host_pages_[page] = codes + static_cast<int64_t>(page) * page_bytes_;
    if (device_.is_host()) return COUPLET_OK;
    size_t const bytes = host_pages_.size() * sizeof(uint8_t*);
    if (couplet_status const status = pages_.allocate(device_, bytes, report_)) return status;
    return copy(pages_.get(), host_pages_.data(), bytes);
  }

  // Pages [page, end_page). Pages that come from the host are uploaded even to be encoded into: codes of other tokens, and the padding,
  // stay as they are.
  couplet_status window(int64_t page, int64_t end_page) {
    Params const& p = call_.params;
    uint8_t* const host_codes = call_.codes + page * page_bytes_;
    auto const codes_bytes = static_cast<size_t>((end_page - page) * page_bytes_);
    if (stages_codes_)
      if (couplet_status const status = copy(codes_.get(), host_codes, codes_bytes)) return status;
    // Where pages are staged, the page table starts anew with each window.
    int64_t const table_page = stages_codes_ ? page : p.first_token / p.page_tokens;
    int64_t const begin = std::max(p.first_token, page * p.page_tokens);
    int64_t const end = std::min(p.first_token + p.tokens, end_page * p.page_tokens);
    for (int64_t token = begin; token < end; token += slice_tokens_) {
      if (cancelled(call_.control)) return fail(report_, COUPLET_CANCELLED, {}, "The operation was aborted");
      int64_t const count = std::min(slice_tokens_, end - token);
      if (couplet_status const status = slice(token, count, token - table_page * p.page_tokens)) return status;
    }
    if constexpr (is_encode)
      if (stages_codes_) return copy(host_codes, codes_.get(), codes_bytes);
    return COUPLET_OK;
  }

  couplet_status slice(int64_t token, int64_t tokens, int64_t table_token) {
    Params p = call_.params;
    auto* rows =
        const_cast<char*>(static_cast<const char*>(p.rows)) + (token - p.first_token) * p.token_stride * element_bytes_;
    p.pages = device_.is_host() ? host_pages_.data() : pages_.get<uint8_t*>();
    p.page_offset = 0;
    p.first_token = table_token;
    p.tokens = static_cast<int32_t>(tokens);
    p.rows = rows;
    auto const row_bytes = static_cast<size_t>(tokens * token_bytes_);
    if (stages_rows_) {
      p.rows = rows_.get();
      p.token_stride = int64_t{p.kv_heads} * p.head_dim;
      p.head_stride = p.head_dim;
      if constexpr (is_encode)
        if (couplet_status const status = copy(rows_.get(), gathered(rows, tokens), row_bytes)) return status;
    }
    if (couplet_status const status = run(p)) return in_call(status, token - call_.params.first_token);
    if constexpr (!is_encode)
      if (stages_rows_) return scatter(rows, tokens);
    return COUPLET_OK;
  }

  couplet_status run(const Params& p) {
    if (couplet_status const status = entries_.check(&p, report_)) return status;
    size_t const bytes = entries_.workspace(&p);
    if (bytes > workspace_.bytes())
      if (couplet_status const status = workspace_.allocate(device_, bytes, report_)) return status;
    if (couplet_status const status = entries_.run(&p, workspace_.get(), nullptr, report_)) return status;
    if constexpr (is_encode) {
      if (device_.is_host()) return COUPLET_OK;
      couplet_report found{};
      if (couplet_status const status = copy(&found, workspace_.get(), sizeof found)) return status;
      if (found.status == COUPLET_NOT_FINITE)
        return rows_not_finite(report_, found.token, found.kv_head, found.channel);
    }
    return COUPLET_OK;
  }

  // A slice counts tokens from its own start; the caller knows only those of the whole call.
  couplet_status in_call(couplet_status status, int64_t first) {
    if (status != COUPLET_NOT_FINITE || first == 0 || report_->token < 0) return status;
    return rows_not_finite(report_, report_->token + first, report_->kv_head, report_->channel);
  }

  bool is_dense() const {
    Params const& p = call_.params;
    return p.head_stride == p.head_dim && p.token_stride == int64_t{p.kv_heads} * p.head_dim;
  }

  // Row by row between the strided rows of the host and the dense ones.
  template <class Copy>
  void each_row(char* rows, int64_t tokens, Copy&& copy_row) {
    Params const& p = call_.params;
    dense_.resize(static_cast<size_t>(tokens * token_bytes_));
    char* dense = dense_.data();
    int64_t const row_bytes = p.head_dim * element_bytes_;
    for (int64_t token = 0; token < tokens; ++token)
      for (int32_t head = 0; head < p.kv_heads; ++head, dense += row_bytes)
        copy_row(dense, rows + (token * p.token_stride + head * p.head_stride) * element_bytes_,
                 static_cast<size_t>(row_bytes));
  }

  const char* gathered(char* rows, int64_t tokens) {
    if (is_dense()) return rows;
    each_row(rows, tokens, [](char* dense, const char* row, size_t bytes) { std::memcpy(dense, row, bytes); });
    return dense_.data();
  }

  couplet_status scatter(char* rows, int64_t tokens) {
    auto const bytes = static_cast<size_t>(tokens * token_bytes_);
    if (is_dense()) return copy(rows, rows_.get(), bytes);
    dense_.resize(bytes);
    if (couplet_status const status = copy(dense_.data(), rows_.get(), bytes)) return status;
    each_row(rows, tokens, [](const char* dense, char* row, size_t size) { std::memcpy(row, dense, size); });
    return COUPLET_OK;
  }

  couplet_status copy(void* to, const void* from, size_t bytes) {
    return device_.backend->memory.copy(to, from, bytes, nullptr, report_);
  }

  const Device& device_;
  const CodesCall<Params>& call_;
  decltype(entries_of(std::declval<couplet_backend>(), std::declval<Params>())) entries_;
  couplet_report* const report_;
  bool const stages_rows_;
  bool const stages_codes_;
  int64_t const element_bytes_;
  int64_t const token_bytes_;  // of a dense row, all kv heads
  int64_t const page_bytes_;   // all kv heads
  int64_t slice_tokens_ = 0;
  std::vector<uint8_t*> host_pages_;
  std::vector<char> dense_;
  DeviceMemory rows_, codes_, pages_, workspace_;
};

// The addresses of the pages of this call, in device memory: as they are where an earlier call left them.
template <class Params>
couplet_status find_pages(const Device& device, const CodesCall<Params>& call, PreparedTables::Stream& shared,
                          void* stream, couplet_report* report) {
  Params const& p = call.params;
  int64_t const page_bytes = p.kv_heads * p.page_stride;
  int64_t const page_count = (p.first_token + p.tokens - 1) / p.page_tokens + 1;
  if (shared.first_page == call.codes && shared.page_bytes == page_bytes && shared.page_count >= page_count)
    return COUPLET_OK;
  std::vector<uint8_t*> pages(static_cast<size_t>(page_count));
  for (size_t page = 0; page < pages.size(); ++page) pages[page] = call.codes + static_cast<int64_t>(page) * page_bytes;
  size_t const bytes = pages.size() * sizeof(uint8_t*);
  shared.first_page = nullptr;
  if (shared.pages.bytes() < bytes)
    if (couplet_status const status = shared.pages.allocate(device, bytes, report)) return status;
  if (couplet_status const status =
          device.backend->memory.copy(shared.pages.get(), pages.data(), bytes, stream, report))
    return status;
  shared.first_page = call.codes;
  shared.page_bytes = page_bytes;
  shared.page_count = page_count;
  return COUPLET_OK;
}

template <class Params>
couplet_status enqueue(PreparedTables& tables, const CodesCall<Params>& call, void* stream, couplet_report* report) {
  const Device& device = tables.device();
  auto const& entries = entries_of(*device.backend, call.params);
  Params p = call.params;
  if (p.tokens == 0) return entries.check(&p, report);
  std::lock_guard const lock(tables.mutex);
  PreparedTables::Stream& shared = tables.streams[stream];
  if (couplet_status const status = find_pages(device, call, shared, stream, report)) return status;
  p.pages = shared.pages.template get<uint8_t*>();
  p.page_offset = 0;
  if (couplet_status const status = entries.check(&p, report)) return status;
  size_t const bytes = entries.workspace(&p);
  if (shared.workspace.bytes() < bytes)
    if (couplet_status const status = shared.workspace.allocate(device, bytes, report)) return status;
  return entries.run(&p, shared.workspace.get(), stream, report);
}

}  // namespace

PreparedTables::~PreparedTables() {
  if (table_) device_.backend->table.destroy(table_);
}

couplet_status PreparedTables::create(const Device& device, const couplet_table_params& params,
                                      couplet_report* report) {
  device_ = device;
  return device.backend->table.create(&params, &table_, report);
}

couplet_status run_codes(const Device& device, const CodesCall<couplet_encode_params>& call, couplet_report* report) {
  return Run(device, call, report).all();
}
couplet_status run_codes(const Device& device, const CodesCall<couplet_decode_params>& call, couplet_report* report) {
  return Run(device, call, report).all();
}
couplet_status enqueue_codes(PreparedTables& tables, const CodesCall<couplet_encode_params>& call, void* stream,
                             couplet_report* report) {
  return enqueue(tables, call, stream, report);
}
couplet_status enqueue_codes(PreparedTables& tables, const CodesCall<couplet_decode_params>& call, void* stream,
                             couplet_report* report) {
  return enqueue(tables, call, stream, report);
}

}  // namespace couplet
