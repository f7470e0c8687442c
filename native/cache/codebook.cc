#include <new>

#include "../common/report.h"
#include "cache.h"

namespace couplet {
namespace {

couplet_status check_shape(const Codebook::Shape& shape, size_t key_tables, size_t value_tables,
                           couplet_report* report) {
  if (shape.layers < 1 || shape.kv_heads < 1 || shape.head_dim < COUPLET_MIN_HEAD_DIM ||
      shape.head_dim > COUPLET_MAX_HEAD_DIM) {
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected at least one layer, at least one kv head and a headDim of %d to %d but received %d layers, "
                "%d kv heads, "
                "headDim %d",
                COUPLET_MIN_HEAD_DIM, COUPLET_MAX_HEAD_DIM, shape.layers, shape.kv_heads, shape.head_dim);
  }
  for (couplet_codec codec : {shape.key_codec, shape.value_codec}) {
    if (couplet_codec_valid(codec, shape.head_dim)) continue;
    return fail(report, COUPLET_INVALID_ARGUMENT, {},
                "Expected a codec of 1 to %d code bits whose group channels divide headDim %d but received cq-%dc%db",
                COUPLET_MAX_CODE_BITS, shape.head_dim, codec.group_channels, codec.code_bits);
  }
  if (key_tables != static_cast<size_t>(shape.layers) || value_tables != static_cast<size_t>(shape.layers)) {
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected %d key and %d value tables but received %zu and %zu",
                shape.layers, shape.layers, key_tables, value_tables);
  }
  return COUPLET_OK;
}

}  // namespace

couplet_status Codebook::create(Device device, const Shape& shape, std::span<const float* const> key_tables,
                                std::span<const float* const> value_tables, std::shared_ptr<const Codebook>* out,
                                couplet_report* report) try {
  couplet_status status = check_shape(shape, key_tables.size(), value_tables.size(), report);
  if (status == COUPLET_OK) status = device.select(report);
  if (status != COUPLET_OK) return status;
  std::shared_ptr<Codebook> codebook(new Codebook);
  codebook->device_ = device;
  codebook->shape_ = shape;
  codebook->layers_.resize(static_cast<size_t>(shape.layers));
  for (int32_t layer = 0; layer < shape.layers; ++layer) {
    LayerTables& tables = codebook->layers_[static_cast<size_t>(layer)];
    for (bool is_key : {true, false}) {
      couplet_table_params const params = {
          .centroids = (is_key ? key_tables : value_tables)[static_cast<size_t>(layer)],
          .kv_heads = shape.kv_heads,
          .head_dim = shape.head_dim,
          .codec = is_key ? shape.key_codec : shape.value_codec};
      couplet_table** const table = is_key ? &tables.key : &tables.value;
      status = device.backend->table.create(&params, table, report);
      if (status != COUPLET_OK) {
        if (report) report->layer = layer;
        return status;
      }
      codebook->bytes_ += device.backend->table.bytes(*table);
    }
  }
  *out = std::move(codebook);
  return COUPLET_OK;
} catch (const std::bad_alloc&) {
  return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for the tables of %d layers", shape.layers);
}

Codebook::~Codebook() {
  for (const LayerTables& tables : layers_) {
    device_.backend->table.destroy(tables.key);
    device_.backend->table.destroy(tables.value);
  }
}

}  // namespace couplet
