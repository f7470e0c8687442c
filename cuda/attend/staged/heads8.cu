#include "decode.h"

namespace couplet::cuda::attend::staged {

template bool has_body<2>(const couplet_attend_params&);
template cudaError_t launch<2>(const Step&, cudaStream_t);

}  // namespace couplet::cuda::attend::staged
