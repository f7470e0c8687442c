#include <cmath>
#include <new>
#include <utility>

#include "../common/metric.h"
#include "../common/report.h"
#include "cache.h"

namespace couplet {
namespace {

couplet_status check_shape(const Codebook::Shape& shape, std::span<const Codebook::Source> sources,
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
  if (sources.size() != static_cast<size_t>(shape.layers)) {
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected tables of %d layers but received those of %zu",
                shape.layers, sources.size());
  }
  return COUPLET_OK;
}

size_t mixing_bytes(const Codebook::Shape& shape) {
  return static_cast<size_t>(shape.kv_heads * shape.head_dim) * static_cast<size_t>(shape.head_dim) * sizeof(float);
}
size_t order_bytes(const Codebook::Shape& shape) { return static_cast<size_t>(shape.head_dim) * sizeof(int32_t); }

}  // namespace

// A copy in the memory of the device.
couplet_status Codebook::keep(const void* from, size_t bytes, const void** place, couplet_report* report) {
  const couplet_memory_entries& memory = device_.backend->memory;
  void* const made = memory.allocate(bytes);
  if (!made) return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for %zu bytes", bytes);
  *place = made;
  bytes_ += bytes;
  return memory.copy(made, from, bytes, nullptr, report);
}

couplet_status Codebook::keep_order(const Source& source, KeyOrder* order, couplet_report* report) {
  if (!source.key_order) return COUPLET_OK;
  order->on_host.assign(source.key_order, source.key_order + shape_.head_dim);
  std::vector<bool> seen(order->on_host.size());
  for (int32_t const channel : order->on_host) {
    if (channel < 0 || channel >= shape_.head_dim || seen[static_cast<size_t>(channel)])
      return fail(report, COUPLET_INVALID_ARGUMENT, {},
                  "Expected every channel once in the order of keys but received %d", channel);
    seen[static_cast<size_t>(channel)] = true;
  }
  const void* place = nullptr;
  couplet_status const status = keep(source.key_order, order_bytes(shape_), &place, report);
  order->channels = static_cast<const int32_t*>(place);
  return status;
}

// Matrices that are no number would make a value that is none, and nobody could tell where it came from.
couplet_status Codebook::keep_mixing(const Source& source, Mixing* mixing, couplet_report* report) {
  if (!source.value_mix) return COUPLET_OK;
  size_t const bytes = mixing_bytes(shape_);
  for (auto const& [from, to] : {std::pair{source.value_mix, &mixing->mix}, {source.value_unmix, &mixing->unmix}}) {
    for (size_t at = 0; at < bytes / sizeof(float); ++at)
      if (!std::isfinite(from[at]))
        return fail(report, COUPLET_NOT_FINITE, {}, "Expected finite numbers for the mixing of values but received %f",
                    static_cast<double>(from[at]));
    const void* place = nullptr;
    couplet_status const status = keep(from, bytes, &place, report);
    *to = static_cast<const float*>(place);
    if (status != COUPLET_OK) return status;
  }
  return COUPLET_OK;
}

couplet_status Codebook::create(Device device, const Shape& shape, std::span<const Source> sources,
                                std::shared_ptr<const Codebook>* out, couplet_report* report) try {
  couplet_status status = check_shape(shape, sources, report);
  if (status == COUPLET_OK) status = device.select(report);
  if (status != COUPLET_OK) return status;
  std::shared_ptr<Codebook> codebook(new Codebook);
  codebook->device_ = device;
  codebook->shape_ = shape;
  codebook->layers_.resize(static_cast<size_t>(shape.layers));
  codebook->mixings_.resize(static_cast<size_t>(shape.layers));
  codebook->key_orders_.resize(static_cast<size_t>(shape.layers));
  for (int32_t layer = 0; layer < shape.layers; ++layer) {
    auto const index = static_cast<size_t>(layer);
    const float* centroids[] = {sources[index].tables[0], sources[index].tables[1]};
    const float* metrics[] = {sources[index].metrics[0], sources[index].metrics[1]};
    int32_t first_head = 0;
    for (const HeadCodecs& codecs : shape.codecs[index]) {
      Part& part = codebook->layers_[index].emplace_back(Part{first_head, codecs});
      for (int const side : {0, 1}) {
        couplet_codec const codec = side == 0 ? codecs.key : codecs.value;
        couplet_table_params const params = {.centroids = centroids[side],
                                             .kv_heads = codecs.heads,
                                             .head_dim = shape.head_dim,
                                             .codec = codec,
                                             .metric = metrics[side]};
        couplet_table** const table = side == 0 ? &part.key : &part.value;
        status = device.backend->table.create(&params, table, report);
        if (status != COUPLET_OK) {
          if (report) report->layer = layer;
          return status;
        }
        codebook->bytes_ += device.backend->table.bytes(*table);
        if (metrics[side]) metrics[side] += metric_floats(params);
        centroids[side] += int64_t{codecs.heads} * shape.head_dim * couplet_codec_centroids(codec);
      }
      first_head += codecs.heads;
    }
    status = codebook->keep_mixing(sources[index], &codebook->mixings_[index], report);
    if (status == COUPLET_OK) status = codebook->keep_order(sources[index], &codebook->key_orders_[index], report);
    if (status != COUPLET_OK) {
      if (report) report->layer = layer;
      return status;
    }
  }
  *out = std::move(codebook);
  return COUPLET_OK;
} catch (const std::bad_alloc&) {
  return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for the tables of %d layers", shape.layers);
}

Codebook::~Codebook() {
  const couplet_memory_entries& memory = device_.backend->memory;
  for (const Mixing& mixing : mixings_)
    for (const float* const matrices : {mixing.mix, mixing.unmix})
      if (matrices) memory.release(const_cast<float*>(matrices), mixing_bytes(shape_));
  for (const KeyOrder& order : key_orders_)
    if (order.channels) memory.release(const_cast<int32_t*>(order.channels), order_bytes(shape_));
  for (const std::vector<Part>& layer : layers_) {
    for (const Part& part : layer) {
      device_.backend->table.destroy(part.key);
      device_.backend->table.destroy(part.value);
    }
  }
}

}  // namespace couplet
