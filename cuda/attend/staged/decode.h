// Kernel and launcher of staged, for the translation units that make them.
#pragma once

#include "block.h"
#include "launch.h"

namespace couplet::cuda::attend::staged {

// ---- kernel ------------------------------------------------------------------------------------------------------------------
// Every codec of values is in every kernel; keys' are not, because what the bodies share would be kept in registers through all of them.
// `most`: pages of a chapter.
template <int Channels, int Bits, bool Interleaved, int Quads>
__global__ void __launch_bounds__(threads, 1) decode([[maybe_unused]] Step const step, [[maybe_unused]] int most) {
  if (gpu::large_shared) run_segments<Codec<Channels, Bits>, Interleaved, Quads>(step, most);
}

// ---- launchers ---------------------------------------------------------------------------------------------------------------
// Pages of a chapter: as many as fit beside the tables, the same for each warp. 0 where none do.
template <int Quads>
int chapter_pages(const couplet_attend_params& params) {
  auto const available = static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  int const bits = std::max(params.key_codec.code_bits, params.value_codec.code_bits);
  int pages = most_pages;
  while (pages > 0 && shared_bytes<Quads>(bits, pages) > available) pages -= warps;
  return pages;
}

// Calls visit with the codec's type; `otherwise` where there is no such body.
template <class T, class Visit>
T with_codec(couplet_codec codec, T otherwise, Visit visit) {
  if (codec.code_bits == 10 && codec.group_channels == 8) return visit(Codec<8, 10>());
  if (codec.code_bits != 8) return otherwise;
  if (codec.group_channels == 8) return visit(Codec<8, 8>());
  if (codec.group_channels == 4) return visit(Codec<4, 8>());
  if (codec.group_channels == 2) return visit(Codec<2, 8>());
  return otherwise;
}

// Calls visit(kernel) for the body of a shape; `otherwise` where there is none.
template <int Quads, class T, class Visit>
T with_body(const couplet_attend_params& params, T otherwise, Visit visit) {
  Angles const angles = angles_of(params.rotary);
  bool const interleaved = angles.pairs > 0 && angles.kind == COUPLET_ROTARY_INTERLEAVED;
  return with_codec(params.key_codec, otherwise, [&](auto codec) {
    using C = decltype(codec);
    return interleaved ? visit(decode<C::channels, C::bits, true, Quads>)
                       : visit(decode<C::channels, C::bits, false, Quads>);
  });
}

template <int Quads>
bool has_body(const couplet_attend_params& params) {
  return chapter_pages<Quads>(params) > 0 && gpu::has_dynamic_shared_begin() &&
         with_codec(params.value_codec, false, [](auto) { return true; }) &&
         with_body<Quads>(params, false, [](auto kernel) { return gpu::has_large_shared_body(kernel); });
}

template <int Quads>
cudaError_t launch(const Step& step, cudaStream_t stream) {
  int const bits = std::max(step.params.key_codec.code_bits, step.params.value_codec.code_bits);
  int const pages = chapter_pages<Quads>(step.params);
  return with_body<Quads>(step.params, cudaErrorInvalidValue, [&](auto kernel) {
    return gpu::launch(kernel, step.blocks, threads, shared_bytes<Quads>(bits, pages), stream, step, pages);
  });
}

}  // namespace couplet::cuda::attend::staged
