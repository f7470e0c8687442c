#include "collectives.h"

#include <cuda_fp16.h>

#include <cstring>
#include <memory>

#include "device_state.h"

namespace sim {
namespace {

template <class Visit>
void each_lane(uint32_t mask, Visit visit) {
  for (; mask; mask &= mask - 1) visit(__builtin_ctz(mask));
}

template <class T>
T& operand_of(void* const* operands, int lane) {
  return *static_cast<T*>(operands[lane]);
}

struct Shuffle {
  uint64_t given;
  uint64_t received;
  int source;
};

void do_shuffle(void* const* operands, uint32_t mask, Location where) {
  each_lane(mask, [&](int lane) {
    auto& own = operand_of<Shuffle>(operands, lane);
    if (own.source < 0) return;
    if (!(mask >> own.source & 1))
      return fail(where, "lane %d reads lane %d, which is not in the mask %08x", lane, own.source, mask);
    own.received = operand_of<Shuffle>(operands, own.source).given;
  });
}

struct Reduce {
  uint32_t value;
  Reduction reduction;
};

uint32_t combine(Reduction reduction, uint32_t left, uint32_t right) {
  auto const signed_left = static_cast<int32_t>(left);
  auto const signed_right = static_cast<int32_t>(right);
  switch (reduction) {
    case Reduction::add: return left + right;
    case Reduction::minimum: return left < right ? left : right;
    case Reduction::maximum: return left > right ? left : right;
    case Reduction::minimum_signed: return signed_left < signed_right ? left : right;
    case Reduction::maximum_signed: return signed_left > signed_right ? left : right;
    case Reduction::all:
    case Reduction::bit_and: return left & right;
    case Reduction::any:
    case Reduction::ballot:
    case Reduction::bit_or: return left | right;
    case Reduction::bit_xor: return left ^ right;
  }
  return 0;
}

void do_reduce(void* const* operands, uint32_t mask, Location where) {
  int const first = __builtin_ctz(mask);
  auto total = operand_of<Reduce>(operands, first);
  each_lane(mask & (mask - 1), [&](int lane) {
    auto const& own = operand_of<Reduce>(operands, lane);
    if (own.reduction != total.reduction) return fail(where, "lanes %d and %d call different reductions", first, lane);
    total.value = combine(total.reduction, total.value, own.value);
  });
  each_lane(mask, [&](int lane) { operand_of<Reduce>(operands, lane).value = total.value; });
}

struct Match {
  uint64_t value;
  uint32_t equal;
};

void do_match(void* const* operands, uint32_t mask, Location) {
  each_lane(mask, [&](int lane) {
    auto& own = operand_of<Match>(operands, lane);
    own.equal = 0;
    each_lane(mask, [&](int other) {
      own.equal |= uint32_t{operand_of<Match>(operands, other).value == own.value} << other;
    });
  });
}

void do_nothing(void* const*, uint32_t, Location) {}

struct Gather {
  const void* address;
  const void** addresses;
};

void do_gather(void* const* operands, uint32_t mask, Location) {
  each_lane(mask, [&](int lane) {
    for (int from = 0; from < 32; ++from)
      operand_of<Gather>(operands, lane).addresses[from] = operand_of<Gather>(operands, from).address;
  });
}

// Lane 4i + j holds columns 2j and 2j + 1 of row i.
void do_transpose(void* const* operands, uint32_t, Location) {
  uint16_t matrix[8][8];
  for (int lane = 0; lane < 32; ++lane) std::memcpy(&matrix[lane / 4][lane % 4 * 2], operands[lane], sizeof(uint32_t));
  for (int lane = 0; lane < 32; ++lane) {
    int const row = lane / 4;
    int const column = lane % 4 * 2;
    operand_of<uint32_t>(operands, lane) = matrix[column][row] | static_cast<uint32_t>(matrix[column + 1][row]) << 16;
  }
}

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

const float* half_values() {
  static std::unique_ptr<float[]> const values = [] {
    auto table = std::make_unique<float[]>(1 << 16);
    for (uint32_t bits = 0; bits < 1 << 16; ++bits)
      table[bits] = __half2float(__half(__half_raw{static_cast<uint16_t>(bits)}));
    return table;
  }();
  return values.get();
}

struct HalfValue {
  const float* values = half_values();
  float operator()(uint32_t bits) const { return values[bits & 0xffff]; }
};

struct BfloatValue {
  float operator()(uint32_t bits) const {
    uint32_t const wide = bits << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

// d of every lane += a b.
template <int Inner>
void add_product(void* const* operands, const double (&a)[16][Inner], const double (&b)[Inner][8]) {
  double d[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int inner = 0; inner < Inner; ++inner)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][inner] * b[inner][column];
  for (int lane = 0; lane < 32; ++lane) {
    auto const& own = operand_of<Mma>(operands, lane);
    for (int part = 0; part < 4; ++part)
      own.d[part] = static_cast<float>(own.d[part] + d[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2]);
  }
}

template <class Value>
void do_mma(void* const* operands, uint32_t, Location) {
  Value const value;
  double a[16][16];
  double b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    auto const& own = operand_of<Mma>(operands, lane);
    int const major = lane / 4;
    int const minor = lane % 4 * 2;
    for (int part = 0; part < 4; ++part) {
      int const row = major + part % 2 * 8;
      int const column = minor + part / 2 * 8;
      a[row][column] = value(own.a[part]);
      a[row][column + 1] = value(own.a[part] >> 16);
    }
    for (int part = 0; part < 2; ++part) {
      b[minor + part * 8][major] = value(own.b[part]);
      b[minor + part * 8 + 1][major] = value(own.b[part] >> 16);
    }
  }
  add_product(operands, a, b);
}

void do_mma_tf32(void* const* operands, uint32_t, Location) {
  auto const value = [](uint32_t bits) {
    bits &= ~0x1fffu;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  };
  double a[16][8];
  double b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    auto const& own = operand_of<Mma>(operands, lane);
    int const major = lane / 4;
    int const minor = lane % 4;
    for (int part = 0; part < 4; ++part) a[major + part % 2 * 8][minor + part / 2 * 4] = value(own.a[part]);
    for (int part = 0; part < 2; ++part) b[minor + part * 4][major] = value(own.b[part]);
  }
  add_product(operands, a, b);
}

constexpr uint32_t full = ~0u;

}  // namespace

int lane() { return static_cast<int>(place->linear % 32); }

uint64_t shuffle(uint32_t mask, uint64_t value, int source, Location where) {
  Shuffle own{value, value, source};
  collective(do_shuffle, mask, &own, where);
  return own.received;
}

uint32_t reduce(Reduction reduction, uint32_t mask, uint32_t value, Location where) {
  Reduce own{value, reduction};
  collective(do_reduce, mask, &own, where);
  return own.value;
}

uint32_t match_any(uint32_t mask, uint64_t value, Location where) {
  Match own{value, 0};
  collective(do_match, mask, &own, where);
  return own.equal;
}

void sync_warp(uint32_t mask, Location where) { collective(do_nothing, mask, nullptr, where, true); }

void gather_addresses(const void* address, const void* (&addresses)[32], Location where) {
  Gather own{address, addresses};
  collective(do_gather, full, &own, where);
}

uint32_t transpose_8x8(uint32_t rows, Location where) {
  collective(do_transpose, full, &rows, where);
  return rows;
}

void mma_m16n8k16(Float16 format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location where) {
  Mma own{d, a, b};
  collective(format == Float16::half ? do_mma<HalfValue> : do_mma<BfloatValue>, full, &own, where);
}

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location where) {
  Mma own{d, a, b};
  collective(do_mma_tf32, full, &own, where);
}

}  // namespace sim
