#include "../decode.h"
#include "keys.h"
#include "values.h"

namespace couplet::cuda::attend::lookup::channels8 {

bool has_body() { return gpu::has_dynamic_shared_begin() && lookup::has_body<LevelShared>(); }
cudaError_t launch(const Step& step, cudaStream_t stream) {
  return step.value_levels ? lookup::launch<LevelShared>(step, stream) : lookup::launch<Shared>(step, stream);
}

}  // namespace couplet::cuda::attend::lookup::channels8
