// What a warp does together: exchanges of registers, votes, and the emulation of matrix instructions.
#pragma once

#include <cstdint>

#include "scheduler.h"

namespace sim {

int lane();

// The value of lane `source`, or the lane's own when `source` is negative.
uint64_t shuffle(uint32_t mask, uint64_t value, int source, Location where);

enum class Reduction {
  any,
  all,
  ballot,
  add,
  minimum,
  maximum,
  minimum_signed,
  maximum_signed,
  bit_and,
  bit_or,
  bit_xor
};
uint32_t reduce(Reduction reduction, uint32_t mask, uint32_t value, Location where);
uint32_t match_any(uint32_t mask, uint64_t value, Location where);

void sync_warp(uint32_t mask, Location where);

// addresses[i] becomes the address that lane i brought; all 32 lanes take part.
void gather_addresses(const void* address, const void* (&addresses)[32], Location where);

uint32_t transpose_8x8(uint32_t rows, Location where);  // movmatrix

// d += a b with 16-bit floats in a and b; fragments as in gpu.h. Products are exact and summed in double.
enum class Float16 { half, bfloat };
void mma_m16n8k16(Float16 format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location where);
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location where);

}  // namespace sim
