// Which instruction set the bodies of this process use: asked once, the same for every operation.
#pragma once

namespace couplet::cpu {

enum class Isa { portable, avx2, avx512 };

// The widest set that the processor, the operating system and COUPLET_ISA (portable, avx2 or avx512; it can only lower
// the choice; any other word is ignored) allow. avx2 means AVX2 + FMA + F16C; avx512 means AVX-512 F, BW, DQ and VL besides.
Isa isa();
const char* isa_name(Isa isa);

}  // namespace couplet::cpu
