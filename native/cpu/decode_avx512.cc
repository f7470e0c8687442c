#define COUPLET_ISA avx512
#include "decode_body.h"

namespace couplet::cpu {

const DecodeBody decode_avx512 = {.name = "avx512", .rows = avx512::rows};

}  // namespace couplet::cpu
