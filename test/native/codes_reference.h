// What encode and decode are held against: pages written and read one bit at a time, as native/abi/layout.h says, and random
// shapes that reach every codec, stride and page size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "../../native/cpu/backend.h"
#include "../../native/cpu/half.h"
#include "../../native/cpu/isa.h"
#include "check.h"

namespace couplet::test {

// Bit i of the row is bit (i % 8) of byte i / 8.
inline void write_code(uint8_t* row, int bits, int64_t slot, int code) {
  for (int b = 0; b < bits; ++b) {
    int64_t const i = slot * bits + b;
    uint8_t const bit = static_cast<uint8_t>(1u << (i % 8));
    row[i / 8] = static_cast<uint8_t>((code >> b & 1) ? (row[i / 8] | bit) : (row[i / 8] & ~bit));
  }
}

inline int read_code(const uint8_t* row, int bits, int64_t slot) {
  int code = 0;
  for (int b = 0; b < bits; ++b) {
    int64_t const i = slot * bits + b;
    code |= (row[i / 8] >> (i % 8) & 1) << b;
  }
  return code;
}

struct Shape {
  couplet_codec codec{};
  int32_t kv_heads = 1, head_dim = 0, tokens = 0, page_tokens = 64;
  int64_t first_token = 0;
  bool half = false;

  int32_t groups() const { return head_dim / codec.group_channels; }
  int32_t centroids() const { return 1 << codec.code_bits; }
  int64_t pages() const { return (first_token + tokens + page_tokens - 1) / page_tokens; }

  std::string text() const {
    return std::to_string(codec.group_channels) + "c" + std::to_string(codec.code_bits) + "b, headDim " +
           std::to_string(head_dim) + ", " + std::to_string(kv_heads) + " kv heads, " + std::to_string(tokens) +
           " tokens from " + std::to_string(first_token) + ", pages of " + std::to_string(page_tokens) +
           (half ? ", float16" : ", float32");
  }
};

// Any codec; the larger tables with fewer heads and tokens, so that the slowest body and the reference stay quick.
inline Shape random_shape(Random& random) {
  static constexpr int32_t channels[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 17, 24, 32, 64, 96, 128, 129, 256};
  static constexpr int32_t page_sizes[] = {8, 16, 64, 64, 104, 256};
  Shape shape;
  shape.codec.group_channels = channels[random.below(std::size(channels))];
  shape.codec.code_bits = static_cast<int32_t>(1 + random.below(COUPLET_MAX_CODE_BITS));
  int32_t const least = (COUPLET_MIN_HEAD_DIM + shape.codec.group_channels - 1) / shape.codec.group_channels;
  int32_t const most = std::min(COUPLET_MAX_HEAD_DIM, 64 + shape.codec.group_channels) / shape.codec.group_channels;
  shape.head_dim = static_cast<int32_t>(least + random.below(most - least + 1)) * shape.codec.group_channels;
  int64_t const budget = 4'000'000 / (int64_t{shape.head_dim} << shape.codec.code_bits);  // tokens * kv_heads
  shape.kv_heads = static_cast<int32_t>(1 + random.below(std::clamp<int64_t>(budget / 4, 1, 5)));
  shape.tokens = static_cast<int32_t>(random.below(std::clamp<int64_t>(budget / shape.kv_heads, 2, 300) + 1));
  shape.page_tokens = page_sizes[random.below(std::size(page_sizes))];
  shape.first_token = random.below(200);
  shape.half = random.below(2) != 0;
  return shape;
}

struct TableDeleter {
  void operator()(couplet_table* table) const { cpu::table_entries.destroy(table); }
};
using Table = std::unique_ptr<couplet_table, TableDeleter>;

inline size_t table_floats(const Shape& shape) {
  return static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.head_dim) *
         static_cast<size_t>(shape.centroids());
}

// A matrix for every kv head and group: random ones, some of them singular, whose entries have few bits.
inline std::vector<float> random_metric(const Shape& shape, Random& random) {
  int32_t const channels = shape.codec.group_channels;
  std::vector<float> metric(static_cast<size_t>(shape.kv_heads * shape.head_dim * channels));
  for (float& entry : metric) entry = static_cast<float>(random.below(9)) / 4 - 1;
  return metric;
}

// metric: empty, or as couplet_table_params has it
inline Table make_table(const Shape& shape, const std::vector<float>& centroids,
                        const std::vector<float>& metric = {}) {
  couplet_table_params const params = {centroids.data(), shape.kv_heads, shape.head_dim, shape.codec,
                                       metric.empty() ? nullptr : metric.data()};
  couplet_table* table = nullptr;
  couplet_report report{};
  CHECK(cpu::table_entries.create(&params, &table, &report) == COUPLET_OK, "%s", report.detail);
  return Table(table);
}

// Memory of pages, each kv head's codes page_stride bytes after the other's. Starts random: a changed bit shows.
class Pages {
 public:
  Pages(const Shape& shape, Random& random)
      : shape_(shape),
        row_bytes_(couplet_row_bytes(shape.codec, shape.page_tokens)),
        offset_(random.below(3) * 64),
        stride_(shape.groups() * row_bytes_ + random.below(3) * 8) {
    for (int64_t p = 0; p < shape.pages(); ++p) {
      memory_.emplace_back(static_cast<size_t>(offset_ + (shape.kv_heads - 1) * stride_ + shape.groups() * row_bytes_));
      for (uint8_t& byte : memory_.back()) byte = static_cast<uint8_t>(random.next());
    }
    connect();
  }
  Pages(const Pages& other)
      : shape_(other.shape_),
        row_bytes_(other.row_bytes_),
        offset_(other.offset_),
        stride_(other.stride_),
        memory_(other.memory_) {
    connect();
  }
  Pages& operator=(const Pages&) = delete;

  uint8_t* const* pointers() const { return pointers_.data(); }
  int64_t offset() const { return offset_; }
  int64_t stride() const { return stride_; }
  bool operator==(const Pages& other) const { return memory_ == other.memory_; }

  uint8_t* row(int64_t token, int32_t kv_head, int32_t group) const {
    return pointers_[static_cast<size_t>(token / shape_.page_tokens)] + offset_ + kv_head * stride_ +
           group * row_bytes_;
  }
  void write(int64_t token, int32_t kv_head, int32_t group, int code) {
    write_code(row(token, kv_head, group), shape_.codec.code_bits, token % shape_.page_tokens, code);
  }
  int read(int64_t token, int32_t kv_head, int32_t group) const {
    return read_code(row(token, kv_head, group), shape_.codec.code_bits, token % shape_.page_tokens);
  }

 private:
  void connect() {
    for (auto& page : memory_) pointers_.push_back(page.data());
  }
  Shape shape_;
  int64_t row_bytes_, offset_, stride_;
  std::vector<std::vector<uint8_t>> memory_;
  std::vector<uint8_t*> pointers_;
};

// Rows in float32 or float16 at some stride: token-major, head-major or backwards. What lies between rows is NaN.
class Rows {
 public:
  Rows(const Shape& shape, Random& random) : shape_(shape) {
    int64_t const gap = random.below(2) * (1 + random.below(7));
    if (random.below(2)) {
      head_stride_ = shape.head_dim + gap;
      token_stride_ = head_stride_ * shape.kv_heads + random.below(2) * gap;
    } else {
      token_stride_ = shape.head_dim + gap;
      head_stride_ = token_stride_ * std::max(1, shape.tokens) + random.below(2) * gap;
    }
    int64_t const count =
        token_stride_ * std::max(0, shape.tokens - 1) + head_stride_ * (shape.kv_heads - 1) + shape.head_dim;
    if (random.below(4) == 0) {
      origin_ = token_stride_ * std::max(0, shape.tokens - 1);
      token_stride_ = -token_stride_;
    }
    if (shape.half)
      halves_.assign(static_cast<size_t>(count), 0x7e00);
    else
      floats_.assign(static_cast<size_t>(count), NAN);
  }

  void* data() { return shape_.half ? static_cast<void*>(halves_.data() + origin_) : floats_.data() + origin_; }
  int64_t token_stride() const { return token_stride_; }
  int64_t head_stride() const { return head_stride_; }
  int32_t dtype() const { return shape_.half ? COUPLET_FLOAT16 : COUPLET_FLOAT32; }

  float get(int64_t token, int32_t kv_head, int32_t channel) const {
    size_t const i = at(token, kv_head, channel);
    return shape_.half ? cpu::half_to_float(halves_[i]) : floats_[i];
  }
  void set(int64_t token, int32_t kv_head, int32_t channel, float value) {
    size_t const i = at(token, kv_head, channel);
    if (shape_.half)
      halves_[i] = cpu::float_to_half(value);
    else
      floats_[i] = value;
  }
  // Elements that belong to no row and are no longer the NaN that they were.
  int64_t touched_gaps() const {
    std::vector<bool> row(shape_.half ? halves_.size() : floats_.size());
    for (int32_t token = 0; token < shape_.tokens; ++token)
      for (int32_t head = 0; head < shape_.kv_heads; ++head)
        for (int32_t c = 0; c < shape_.head_dim; ++c) row[at(token, head, c)] = true;
    int64_t touched = 0;
    for (size_t i = 0; i < row.size(); ++i)
      touched += !row[i] && (shape_.half ? halves_[i] != 0x7e00 : !std::isnan(floats_[i]));
    return touched;
  }

 private:
  size_t at(int64_t token, int32_t kv_head, int32_t channel) const {
    return static_cast<size_t>(origin_ + token * token_stride_ + kv_head * head_stride_ + channel);
  }
  Shape shape_;
  int64_t token_stride_, head_stride_, origin_ = 0;
  std::vector<float> floats_;
  std::vector<uint16_t> halves_;
};

template <class Params>
Params params_of(const Shape& shape, const couplet_table* table, Rows& rows, const Pages& pages, int threads) {
  Params params{};
  params.rows = rows.data();
  params.table = table;
  params.pages = pages.pointers();
  params.token_stride = rows.token_stride();
  params.head_stride = rows.head_stride();
  params.page_offset = pages.offset();
  params.page_stride = pages.stride();
  params.first_token = shape.first_token;
  params.tokens = shape.tokens;
  params.kv_heads = shape.kv_heads;
  params.head_dim = shape.head_dim;
  params.page_tokens = shape.page_tokens;
  params.dtype = rows.dtype();
  params.threads = threads;
  params.codec = shape.codec;
  return params;
}

// The bodies that this machine (and COUPLET_ISA) allows, the portable one first.
template <class Body>
std::vector<const Body*> runnable([[maybe_unused]] const Body& portable, [[maybe_unused]] const Body* avx2,
                                  [[maybe_unused]] const Body* avx512) {
  std::vector<const Body*> bodies = {&portable};
  if (cpu::isa() >= cpu::Isa::avx2) bodies.push_back(avx2);
  if (cpu::isa() >= cpu::Isa::avx512) bodies.push_back(avx512);
  return bodies;
}

}  // namespace couplet::test
