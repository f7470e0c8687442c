// The packed format against a writer that sets one bit at a time, float16 conversion, and the sizes that docs/layout.md states.
#include <cmath>
#include <cstring>
#include <vector>

#include "../../native/cpu/pack.h"
#include "../../native/cpu/unpack.h"
#include "codes_reference.h"

namespace {

using couplet::test::Random;
using couplet::test::write_code;

void test_pack(int bits, int page_tokens, Random& random) {
  couplet_codec const codec = {8, bits};
  size_t const row_bytes = static_cast<size_t>(couplet_row_bytes(codec, page_tokens));
  for (int trial = 0; trial < 200; ++trial) {
    int const first = static_cast<int>(random.below(page_tokens + 1));
    int const count = static_cast<int>(random.below(page_tokens - first + 1));
    // Exactly as long as the row, so that a sanitizer sees a byte too much; random before, so that a changed bit shows.
    std::vector<uint8_t> row(row_bytes);
    for (uint8_t& byte : row) byte = static_cast<uint8_t>(random.next());
    std::vector<uint8_t> expected = row;
    std::vector<uint16_t> codes(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
      codes[static_cast<size_t>(i)] = static_cast<uint16_t>(random.below(1 << bits));
      write_code(expected.data(), bits, first + i, codes[static_cast<size_t>(i)]);
    }
    couplet::cpu::pack_codes(row.data(), bits, first, count, codes.data());
    if (!CHECK(row == expected, "pack %d bits, slots %d..%d of %d", bits, first, first + count, page_tokens)) return;

    std::vector<uint16_t> unpacked(static_cast<size_t>(count) + 1, 0xabcd);
    couplet::cpu::unpack_codes(row.data(), bits, first, count, unpacked.data());
    CHECK(unpacked.back() == 0xabcd, "unpack %d bits wrote past %d codes", bits, count);
    unpacked.pop_back();
    if (!CHECK(unpacked == codes, "unpack %d bits, slots %d..%d of %d", bits, first, first + count, page_tokens))
      return;
    for (int i = 0; i < count; ++i)
      CHECK(couplet::cpu::unpack_code(row.data(), bits, first + i) == codes[static_cast<size_t>(i)],
            "unpack_code %d bits", bits);
  }
}

// The worked numbers of docs/layout.md: headDim 128, pages of 64 tokens.
void test_sizes() {
  struct {
    couplet_codec codec;
    int32_t head_dim;
    int64_t row_bytes, page_bytes;
  } const cases[] = {
      {{2, 8}, 128, 64, 4096}, {{4, 8}, 128, 64, 2048},  {{8, 10}, 128, 80, 1280}, {{8, 8}, 128, 64, 1024},
      {{1, 3}, 128, 24, 3072}, {{16, 12}, 128, 96, 768}, {{1, 1}, 128, 8, 1024},   {{7, 5}, 56, 40, 320},
      {{3, 5}, 24, 40, 320},   {{5, 3}, 40, 24, 192},    {{8, 1}, 8, 8, 64},       {{8, 10}, 80, 80, 832},
      {{40, 3}, 80, 24, 64},
  };
  for (auto const& c : cases) {
    CHECK(couplet_row_bytes(c.codec, COUPLET_PAGE_TOKENS) == c.row_bytes, "%dc%db", c.codec.group_channels,
          c.codec.code_bits);
    CHECK(couplet_page_bytes(c.codec, c.head_dim, COUPLET_PAGE_TOKENS) == c.page_bytes, "%dc%db",
          c.codec.group_channels, c.codec.code_bits);
  }
  CHECK(!couplet_codec_valid({3, 8}, 128) && !couplet_codec_valid({0, 8}, 128) && !couplet_codec_valid({8, 0}, 128) &&
            !couplet_codec_valid({8, 13}, 128) && !couplet_codec_valid({256, 8}, 128) &&
            !couplet_codec_valid({-8, 8}, 128),
        "codecs that must be refused");
  CHECK(couplet_codec_valid({256, 12}, 256) && couplet_codec_valid({1, 1}, 8), "codecs at the limits");
}

// The bytes that docs/layout.md draws.
void test_examples() {
  uint16_t const tens[8] = {0x155, 0x2aa, 0x001, 0x3ff};
  uint8_t const ten_bytes[] = {0x55, 0xa9, 0x1a, 0xc0, 0xff};
  uint8_t row[10];
  couplet::cpu::pack_codes(row, 10, 0, 8, tens);
  CHECK(std::memcmp(row, ten_bytes, sizeof ten_bytes) == 0, "10 bits: %02x %02x %02x %02x %02x", row[0], row[1], row[2],
        row[3], row[4]);
  uint16_t const threes[8] = {1, 2, 3, 4, 5, 6, 7, 0};
  uint8_t const three_bytes[] = {0xd1, 0x58, 0x1f};
  couplet::cpu::pack_codes(row, 3, 0, 8, threes);
  CHECK(std::memcmp(row, three_bytes, sizeof three_bytes) == 0, "3 bits: %02x %02x %02x", row[0], row[1], row[2]);
}

void test_half() {
  // Every float16 there is; its neighbours' midpoints round to even.
  for (uint32_t h = 0; h < 0x10000; ++h) {
    uint16_t const half = static_cast<uint16_t>(h);
    uint32_t const exponent = h >> 10 & 31;
    uint32_t const fraction = h & 0x3ff;
    float const value = couplet::cpu::half_to_float(half);
    if (exponent == 31) {
      CHECK(fraction ? std::isnan(value) : std::isinf(value), "half %04x", h);
      continue;
    }
    double const magnitude =
        exponent ? std::ldexp(1024 + fraction, static_cast<int>(exponent) - 25) : std::ldexp(fraction, -24);
    CHECK(value == (h & 0x8000 ? -magnitude : magnitude), "half %04x is %g", h, static_cast<double>(value));
    CHECK(couplet::cpu::float_to_half(value) == half, "half %04x back", h);
    if ((h & 0x7fff) == 0x7bff) continue;
    float const next = couplet::cpu::half_to_float(static_cast<uint16_t>(h + 1));
    float const middle = value / 2 + next / 2;
    CHECK(couplet::cpu::float_to_half(middle) == (h & 1 ? h + 1 : h), "midpoint above half %04x", h);
    CHECK(couplet::cpu::float_to_half(std::nextafter(middle, value)) == h, "below the midpoint above half %04x", h);
    CHECK(couplet::cpu::float_to_half(std::nextafter(middle, next)) == h + 1, "past the midpoint above half %04x", h);
  }
  CHECK(couplet::cpu::float_to_half(65519.996f) == 0x7bff && couplet::cpu::float_to_half(65520.0f) == 0x7c00,
        "largest");
  CHECK(couplet::cpu::float_to_half(-3.4e38f) == 0xfc00 && couplet::cpu::float_to_half(INFINITY) == 0x7c00,
        "infinities");
  CHECK((couplet::cpu::float_to_half(NAN) & 0x7fff) > 0x7c00, "NaN stays NaN");
  CHECK(couplet::cpu::float_to_half(1e-30f) == 0 && couplet::cpu::float_to_half(-0.0f) == 0x8000, "tiny");
}

}  // namespace

int main() {
  Random random(1);
  for (int bits = 1; bits <= COUPLET_MAX_CODE_BITS; ++bits)
    for (int page_tokens : {8, 16, 64, 104, 256}) test_pack(bits, page_tokens, random);
  test_sizes();
  test_examples();
  test_half();
  return couplet::test::finish();
}
