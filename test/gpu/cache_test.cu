// The cache on a GPU, or on the simulator: the steps of test/native/cache_case.h with rows on either side, waiting or only enqueued;
// reports of what was enqueued; copies between devices; budgets, and memory that ends.
#include <thread>

#include "../../cuda/gpu.h"
#include "../../native/dispatch/dispatch.h"
#include "../native/cache_case.h"

extern "C" const couplet_backend* couplet_backend_entry(couplet_report* report);

namespace couplet::test {
namespace {

const couplet_backend* backend() {
  couplet_report report{};
  static const couplet_backend* const found = couplet_backend_entry(&report);
  CHECK(found, "%s", report.detail);
  return found;
}

void random_steps() {
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "no stream");
  struct Case {
    int32_t sinks, window, page_tokens;
    RowsCase rows;
  };
  RowFormat const host{}, device{Place::device, COUPLET_FLOAT32}, half{Place::device, COUPLET_FLOAT16},
      bfloat{Place::device, COUPLET_BFLOAT16}, host_half{Place::host, COUPLET_FLOAT16};
  uint64_t seed = 1;
  for (const Case& c : {Case{4, 8, 16, {host, host}},
                        {0, 0, 16, {host_half, host_half}},
                        {4, 0, 8, {device, device}},
                        {0, 40, 8, {device, device, stream}},
                        {20, 32, 16, {half, half, stream}},
                        {33, 1, 32, {bfloat, bfloat, stream}},
                        {4, -1, 64, {half, host, stream}},
                        {70, 3, 64, {host, device, stream}}}) {
    CacheConfig config = small_config(c.sinks, c.window);
    config.page_tokens = c.page_tokens;
    // Of values up to 2 in size; queries of a prefill and their keys go through tf32, of 10 bits.
    double const tolerance = c.rows.outputs.dtype == COUPLET_BFLOAT16 ? 2e-2 : 4e-3;
    Harness({backend(), 0}, config, seed++, c.rows).run(24, tolerance);
  }
  CHECK(cudaStreamDestroy(stream) == cudaSuccess, "a stream was not destroyed");
}

}  // namespace
}  // namespace couplet::test

int main() {
  using namespace couplet::test;
  random_steps();
  return finish();
}
