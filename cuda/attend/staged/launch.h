// The bodies of staged, a translation unit for each number of query heads that a block takes.
#pragma once

#include <algorithm>

#include "../step.h"

namespace couplet::cuda::attend::staged {

template <int Quads>
bool has_body(const couplet_attend_params& params);
template <int Quads>
cudaError_t launch(const Step& step, cudaStream_t stream);

}  // namespace couplet::cuda::attend::staged
