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
  if (shape.codecs.size() != static_cast<size_t>(shape.layers)) {
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected codecs of %d layers but received those of %zu",
                shape.layers, shape.codecs.size());
  }
  for (int32_t layer = 0; layer < shape.layers; ++layer) {
    int64_t heads = 0;
    bool has_empty = false;
    for (const HeadCodecs& part : shape.codecs[static_cast<size_t>(layer)]) {
      for (couplet_codec codec : {part.key, part.value}) {
        if (couplet_codec_valid(codec, shape.head_dim)) continue;
        return fail(
            report, COUPLET_INVALID_ARGUMENT, {.layer = layer},
            "Expected a codec of 1 to %d code bits whose group channels divide headDim %d but received cq-%dc%db",
            COUPLET_MAX_CODE_BITS, shape.head_dim, codec.group_channels, codec.code_bits);
      }
      heads += part.heads;
      has_empty = has_empty || part.heads < 1;
    }
    if (heads == shape.kv_heads && !has_empty) continue;
    return fail(report, COUPLET_INVALID_ARGUMENT, {.layer = layer},
                "Expected parts of at least one head, of %d together, in layer %d but received %lld%s", shape.kv_heads,
                layer, static_cast<long long>(heads), has_empty ? " with an empty part" : "");
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
    auto const index = static_cast<size_t>(layer);
    const float* centroids[] = {key_tables[index], value_tables[index]};
    int32_t first_head = 0;
    for (const HeadCodecs& codecs : shape.codecs[index]) {
      Part& part = codebook->layers_[index].emplace_back(Part{first_head, codecs});
      for (int const side : {0, 1}) {
        couplet_codec const codec = side == 0 ? codecs.key : codecs.value;
        couplet_table_params const params = {
            .centroids = centroids[side], .kv_heads = codecs.heads, .head_dim = shape.head_dim, .codec = codec, .metric = nullptr};
        couplet_table** const table = side == 0 ? &part.key : &part.value;
        status = device.backend->table.create(&params, table, report);
        if (status != COUPLET_OK) {
          if (report) report->layer = layer;
          return status;
        }
        codebook->bytes_ += device.backend->table.bytes(*table);
        centroids[side] += int64_t{codecs.heads} * shape.head_dim * couplet_codec_centroids(codec);
      }
      first_head += codecs.heads;
    }
  }
  *out = std::move(codebook);
  return COUPLET_OK;
} catch (const std::bad_alloc&) {
  return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for the tables of %d layers", shape.layers);
}

Codebook::~Codebook() {
  for (const std::vector<Part>& layer : layers_) {
    for (const Part& part : layer) {
      device_.backend->table.destroy(part.key);
      device_.backend->table.destroy(part.value);
    }
  }
}

}  // namespace couplet
