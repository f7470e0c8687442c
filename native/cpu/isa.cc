#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace couplet::cpu {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return Isa::portable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  return Isa::avx512;
#else
  return Isa::portable;
#endif
}

Isa choose() {
  Isa const best = detect();
  const char* const asked = std::getenv("COUPLET_ISA");
  if (!asked) return best;
  for (Isa candidate : {Isa::portable, Isa::avx2, Isa::avx512})
    if (std::strcmp(asked, isa_name(candidate)) == 0) return candidate < best ? candidate : best;
  return best;
}

}  // namespace

Isa isa() {
  static Isa const chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    default: return "portable";
  }
}

}  // namespace couplet::cpu
