// Tables of random centroids, on levels where asked, on both sides: the one that is measured, and the CPU's that it is checked against.
#pragma once

#include <memory>

#include "../../native/cpu/backend.h"
#include "../../test/native/levels.h"
#include "measure.h"

namespace couplet::bench {

struct Tables {
  Tables(couplet_codec codec, int32_t kv_heads, int32_t head_dim, uint64_t seed, bool levels = false) {
    size_t const count = static_cast<size_t>(kv_heads) * static_cast<size_t>(head_dim) *
                         static_cast<size_t>(couplet_codec_centroids(codec));
    std::vector<float> centroids = test::Random(seed).normals(count);
    if (levels) test::put_on_levels(codec, centroids);
    couplet_table_params const params{centroids.data(), kv_heads, head_dim, codec, nullptr};
    couplet_table* table = nullptr;
    couplet_report report{};
    must(cuda::table_entries.create(&params, &table, &report), report);
    device.reset(table);
    must(cpu::table_entries.create(&params, &table, &report), report);
    host.reset(table);
    float16_bytes = 2 * static_cast<double>(count);
  }

  struct FreeOnDevice {
    void operator()(couplet_table* table) const { cuda::table_entries.destroy(table); }
  };
  struct FreeOnHost {
    void operator()(couplet_table* table) const { cpu::table_entries.destroy(table); }
  };
  std::unique_ptr<couplet_table, FreeOnDevice> device;
  std::unique_ptr<couplet_table, FreeOnHost> host;
  double float16_bytes;
};

}  // namespace couplet::bench
