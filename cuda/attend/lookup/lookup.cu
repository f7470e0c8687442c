// Which channels of a group lookup has a body for on this device, and the way to it.
#include "launch.h"

namespace couplet::cuda::attend {

// ---- launchers -------------------------------------------------------------------------------------------------------------
bool has_lookup(int channels) {
  return channels == 4 ? lookup::channels4::has_body() : channels == 8 && lookup::channels8::has_body();
}

cudaError_t launch_lookup(const Step& step, cudaStream_t stream) {
  return step.params.key_codec.group_channels == 4 ? lookup::channels4::launch(step, stream)
                                                   : lookup::channels8::launch(step, stream);
}

}  // namespace couplet::cuda::attend
