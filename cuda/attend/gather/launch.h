// The bodies of gather, a translation unit for each number of channels in a group.
#pragma once

#include "../step.h"

namespace couplet::cuda::attend::gather {

template <int Channels>
bool has_body(int head_dim, int quads);
template <int Channels>
cudaError_t launch(const Step& step, cudaStream_t stream);

}  // namespace couplet::cuda::attend::gather
