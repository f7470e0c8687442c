// Which shapes staged has a body for, and the way to it.
#include "../../table.h"
#include "launch.h"

namespace couplet::cuda::attend {
namespace {

int quads_of(const couplet_attend_params& params) { return params.query_heads / params.kv_heads > 4 ? 2 : 1; }

}  // namespace

// ---- launchers -------------------------------------------------------------------------------------------------------------
int staged_rows(const couplet_attend_params& params) { return 4 * quads_of(params); }

bool has_staged(const couplet_attend_params& params) {
  bool const shape =
      params.page_tokens == 64 && params.head_dim % 16 == 0 &&
      (params.key_page_offset | params.key_page_stride | params.value_page_offset | params.value_page_stride) % 16 == 0;
  bool const tables = params.key_table && params.value_table && table_of(params.key_table)->by_code &&
                      table_of(params.value_table)->by_code;
  Angles const angles = angles_of(params.rotary);
  bool const rotary =
      angles.pairs == 0 || (angles.offsets && angles.pairs % (angles.kind == COUPLET_ROTARY_HALF ? 8 : 2) == 0 &&
                            rotary_of(params.rotary)->positions <= rotary_block * rotary_blocks);
  return shape && tables && rotary &&
         (quads_of(params) == 1 ? staged::has_body<1>(params) : staged::has_body<2>(params));
}

cudaError_t launch_staged(const Step& step, cudaStream_t stream) {
  return step.block_rows == 4 ? staged::launch<1>(step, stream) : staged::launch<2>(step, stream);
}

}  // namespace couplet::cuda::attend
