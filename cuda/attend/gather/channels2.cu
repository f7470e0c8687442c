#include "decode.h"

namespace couplet::cuda::attend::gather {

template bool has_body<2>(int head_dim, int quads);
template cudaError_t launch<2>(const Step& step, cudaStream_t stream);

}  // namespace couplet::cuda::attend::gather
