// Which shapes gather has a body for, and the way to it.
#include "../../table.h"
#include "launch.h"

namespace couplet::cuda::attend {
namespace {

int quads_of(const couplet_attend_params& params) { return params.query_heads / params.kv_heads > 4 ? 2 : 1; }

// Calls visit with the number of channels as a constant; `otherwise` where there is no such body.
template <class T, class Visit>
T with_channels(int channels, T otherwise, Visit visit) {
  switch (channels) {
    case 2: return visit(std::integral_constant<int, 2>());
    case 4: return visit(std::integral_constant<int, 4>());
    case 8: return visit(std::integral_constant<int, 8>());
    default: return otherwise;
  }
}

}  // namespace

// ---- launchers -------------------------------------------------------------------------------------------------------------
int gather_rows(const couplet_attend_params& params) { return 4 * quads_of(params); }

bool has_gather(const couplet_attend_params& params) {
  couplet_codec const codec = params.key_codec;
  bool const shape =
      codec.code_bits == 8 && params.value_codec.code_bits == 8 &&
      codec.group_channels == params.value_codec.group_channels && params.page_tokens == 64 &&
      params.head_dim % 16 == 0 && params.head_dim <= 128 &&
      (params.key_page_offset | params.key_page_stride | params.value_page_offset | params.value_page_stride) % 16 == 0;
  bool const tables = params.key_table && params.value_table && table_of(params.key_table)->by_code &&
                      table_of(params.value_table)->by_code;
  Angles const angles = angles_of(params.rotary);
  bool const rotary =
      angles.pairs == 0 || (angles.offsets && angles.kind == COUPLET_ROTARY_HALF && angles.pairs % 8 == 0 &&
                            rotary_of(params.rotary)->positions <= rotary_block * rotary_blocks);
  return shape && tables && rotary && with_channels(codec.group_channels, false, [&](auto channels) {
           return gather::has_body<channels()>(params.head_dim, quads_of(params));
         });
}

cudaError_t launch_gather(const Step& step, cudaStream_t stream) {
  return with_channels(step.params.key_codec.group_channels, cudaErrorInvalidValue,
                       [&](auto channels) { return gather::launch<channels()>(step, stream); });
}

}  // namespace couplet::cuda::attend
