#include <cstring>

#include "kernels.h"
#include "operations.h"
#include "tables.h"

namespace couplet::bench {
namespace {

constexpr int32_t checked_tokens = 1024;  // the last ones
constexpr int32_t sides = 2;              // keys and values

// Rows and pages of both sides of a layer: one sequence of all tokens.
class Layer {
 public:
  static constexpr size_t workspace_bytes = 1024;  // what encode asks for, and more; checked in measure

  Layer(const Case& what, cudaStream_t stream)
      : what_(what),
        tokens_(int64_t{what.batch} * what.context),
        pages_((tokens_ + COUPLET_PAGE_TOKENS - 1) / COUPLET_PAGE_TOKENS),
        page_bytes_(what.kv_heads * couplet_page_bytes(what.codec, what.head_dim, COUPLET_PAGE_TOKENS)),
        tables_{{what.codec, what.kv_heads, what.head_dim, 6}, {what.codec, what.kv_heads, what.head_dim, 7}},
        rows_(static_cast<size_t>(sides * tokens_ * row_elements())),
        codes_(static_cast<size_t>(sides * pages_ * page_bytes_)),
        page_table_(static_cast<size_t>(sides * pages_)),
        workspace_(workspace_bytes) {
    if (tokens_ > INT32_MAX) {
      std::fprintf(stderr, "%d x %d tokens are too many for one call\n", what.batch, what.context);
      std::exit(1);
    }
    must(fill_bytes(codes_.data(), codes_.size(), 8, stream), "filling pages");
    must(fill_normals(rows_.data(), rows_.size(), 9, stream), "filling rows");
    std::vector<uint8_t*> page_table;
    for (int64_t page = 0; page < sides * pages_; ++page) page_table.push_back(codes_.data() + page * page_bytes_);
    page_table_.write(page_table);
    must(cudaStreamSynchronize(stream), "filling memory");
  }

  template <class Params>
  Params params(int32_t side) const {
    Params p =
        host_params<Params>(side, rows_.data() + side * tokens_ * row_elements(), page_table_.data() + side * pages_);
    p.table = tables_[side].device.get();
    return p;
  }

  // The bytes that are not as `run` of the CPU backend leaves them, of the last tokens' rows or pages of one side.
  template <class Params, class Run>
  int64_t wrong_bytes(int32_t side, Run run, bool pages) const {
    int64_t const last = std::min<int64_t>(tokens_, checked_tokens);
    int64_t const first = tokens_ - last;
    int64_t const first_page = first / COUPLET_PAGE_TOKENS;
    std::vector<__half> rows(static_cast<size_t>(last * row_elements()));
    std::vector<uint8_t> codes(static_cast<size_t>((pages_ - first_page) * page_bytes_));
    must(cudaMemcpy(rows.data(), rows_.data() + (side * tokens_ + first) * row_elements(), rows.size() * sizeof(__half),
                    cudaMemcpyDeviceToHost),
         "reading back");
    must(cudaMemcpy(codes.data(), codes_.data() + (side * pages_ + first_page) * page_bytes_, codes.size(),
                    cudaMemcpyDeviceToHost),
         "reading back");
    std::vector<__half> const device_rows = rows;
    std::vector<uint8_t> const device_codes = codes;
    // What the call writes is written anew, from nothing.
    if (pages)
      std::fill(codes.begin(), codes.end(), uint8_t{0});
    else
      std::memset(static_cast<void*>(rows.data()), 0xff, rows.size() * sizeof(__half));

    std::vector<uint8_t*> page_table(static_cast<size_t>(first_page), nullptr);
    for (int64_t page = first_page; page < pages_; ++page)
      page_table.push_back(codes.data() + (page - first_page) * page_bytes_);
    Params p = host_params<Params>(side, rows.data(), page_table.data());
    p.table = tables_[side].host.get();
    p.first_token = first;
    p.tokens = static_cast<int32_t>(last);
    couplet_report report{};
    must(run(&p, nullptr, nullptr, &report), report);
    if (!pages) return differing(rows.data(), device_rows.data(), rows.size() * sizeof(__half));
    return differing(codes.data(), device_codes.data(), codes.size());
  }

  void* workspace() const { return workspace_.data(); }
  void spoil_rows() const {
    must(cudaMemset(rows_.data(), 0xff, rows_.size() * sizeof(__half)), "spoiling rows");
    must(cudaDeviceSynchronize(), "spoiling rows");
  }
  void clear_codes() const {
    must(cudaMemset(codes_.data(), 0, codes_.size()), "clearing pages");
    must(cudaDeviceSynchronize(), "clearing pages");
  }

  // Rows, codes and both tables once.
  double bytes() const {
    double const code_bytes = couplet_codec_groups(what_.codec, what_.head_dim) * what_.codec.code_bits / 8.0;
    return sides * (static_cast<double>(tokens_) * what_.kv_heads * (2 * what_.head_dim + code_bytes) +
                    tables_[0].float16_bytes);
  }
  double lookup_bytes() const { return 2.0 * sides * static_cast<double>(tokens_) * what_.kv_heads * what_.head_dim; }

 private:
  int64_t row_elements() const { return int64_t{what_.kv_heads} * what_.head_dim; }

  template <class Params, class Rows, class Pages>
  Params host_params(int32_t, Rows* rows, Pages* pages) const {
    Params p{};
    p.rows = rows;
    p.pages = pages;
    p.token_stride = row_elements();
    p.head_stride = what_.head_dim;
    p.page_stride = page_bytes_ / what_.kv_heads;
    p.tokens = static_cast<int32_t>(tokens_);
    p.kv_heads = what_.kv_heads;
    p.head_dim = what_.head_dim;
    p.page_tokens = COUPLET_PAGE_TOKENS;
    p.dtype = COUPLET_FLOAT16;
    p.codec = what_.codec;
    return p;
  }

  static int64_t differing(const void* left, const void* right, size_t bytes) {
    int64_t count = 0;
    for (size_t i = 0; i < bytes; ++i)
      count += static_cast<const uint8_t*>(left)[i] != static_cast<const uint8_t*>(right)[i];
    return count;
  }

  Case const what_;
  int64_t const tokens_;
  int64_t const pages_;  // of one side
  int64_t const page_bytes_;
  Tables const tables_[sides];
  DeviceArray<__half> const rows_;    // [sides][tokens][kv_heads][head_dim]
  DeviceArray<uint8_t> const codes_;  // [sides][pages][page_bytes]
  DeviceArray<uint8_t*> page_table_;  // [sides][pages]
  DeviceArray<uint8_t> const workspace_;
};

// Both calls of a layer, checked and timed. Params and entries are those of encode or of decode.
template <class Params, class Entries>
void measure(const Case& what, const Layer& layer, const Entries& device, const Entries& host, bool pages, Meter& meter,
             Report& report) {
  Params const params[sides] = {layer.params<Params>(0), layer.params<Params>(1)};
  couplet_report failure{};
  if (device.workspace(&params[0]) > Layer::workspace_bytes) must(cudaErrorInvalidValue, "a larger workspace");
  auto const run = [&](cudaStream_t stream) {
    for (const Params& side : params) must(device.run(&side, layer.workspace(), stream, &failure), failure);
  };
  run(meter.stream());
  meter.wait();
  Result result{};
  char body[128] = "";
  device.describe(&params[0], body, sizeof body);
  result.body = body;
  result.check = "bytes that differ from the CPU backend's, of the last 1024 tokens";
  for (int32_t side = 0; side < sides; ++side)
    result.error += static_cast<double>(layer.wrong_bytes<Params>(side, host.run, pages));
  if (result.error > 0) return report.refuse(what, result);
  result.timing = meter.time(run);
  result.bytes = layer.bytes();
  result.lookup_bytes = pages ? 0 : layer.lookup_bytes();
  report.add(what, result);
}

}  // namespace

void encode(const Case& what, Meter& meter, Report& report) {
  Layer const layer(what, meter.stream());
  layer.clear_codes();
  measure<couplet_encode_params>(what, layer, cuda::encode_entries, cpu::encode_entries, true, meter, report);
}

void decode(const Case& what, Meter& meter, Report& report) {
  Layer const layer(what, meter.stream());
  layer.spoil_rows();
  measure<couplet_decode_params>(what, layer, cuda::decode_entries, cpu::decode_entries, false, meter, report);
}

}  // namespace couplet::bench
