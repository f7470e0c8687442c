#include "decode.h"

namespace couplet::cuda::attend::staged {

template bool has_body<1>(const couplet_attend_params&);
template cudaError_t launch<1>(const Step&, cudaStream_t);

}  // namespace couplet::cuda::attend::staged
