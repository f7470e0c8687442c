// Sequences with several queries: on tiles of float16 where their shape allows, and what those cannot hold in tf32.
#include "../step.h"
#include "launch.h"
#include "shape.h"

namespace couplet::cuda::attend {

// ---- launchers -------------------------------------------------------------------------------------------------------------
bool has_half_prefill(const couplet_attend_params& params) { return prefill::has_half(params); }

int prefill_rows(const couplet_attend_params& params) {
  return prefill::has_half(params) ? prefill::rows : prefill::wide_rows(params.head_dim);
}

cudaError_t launch_prefill(const Step& step, cudaStream_t stream) {
  if (step.wide)
    if (cudaError_t const error = prefill::launch_half(step, stream)) return error;
  return prefill::launch_wide(step, stream);
}

}  // namespace couplet::cuda::attend
