// The bodies of lookup, a translation unit for each number of channels in a group.
#pragma once

#include "../step.h"

namespace couplet::cuda::attend::lookup {

namespace channels4 {
bool has_body();
cudaError_t launch(const Step& step, cudaStream_t stream);
}  // namespace channels4

namespace channels8 {
bool has_body();
cudaError_t launch(const Step& step, cudaStream_t stream);
}  // namespace channels8

}  // namespace couplet::cuda::attend::lookup
