#define COUPLET_ISA portable
#include "decode_body.h"

namespace couplet::cpu {

const DecodeBody decode_portable = {.name = "portable", .rows = portable::rows};

}  // namespace couplet::cpu
