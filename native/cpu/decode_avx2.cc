#define COUPLET_ISA avx2
#include "decode_body.h"

namespace couplet::cpu {

const DecodeBody decode_avx2 = {.name = "avx2", .rows = avx2::rows};

}  // namespace couplet::cpu
