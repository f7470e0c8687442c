// Between the translation units of prefill.
#pragma once

#include "../step.h"

namespace couplet::cuda::attend::prefill {

bool has_half(const couplet_attend_params& params);  // whether tiles of float16 have a body for this shape
cudaError_t launch_half(const Step& step, cudaStream_t stream);

int wide_rows(int head_dim);                                     // of a row block of the wide body
cudaError_t launch_wide(const Step& step, cudaStream_t stream);  // all sequences, or those that step.wide marks

}  // namespace couplet::cuda::attend::prefill
