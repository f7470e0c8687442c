// One layer of a step, for the files of this room alone: layer.cc has its work, in order, layer_rows.cc what comes to the device and
// leaves it, layer_arrays.cc what launches read.
#pragma once

#include "state.h"

namespace couplet {

inline size_t element_bytes(int32_t dtype) { return dtype == COUPLET_FLOAT32 ? 4 : 2; }

inline const void* advance(const void* rows, int64_t elements, int32_t dtype) {
  return static_cast<const uint8_t*>(rows) + elements * static_cast<int64_t>(element_bytes(dtype));
}

struct Strides {  // elements
  int64_t token, head;
};

class Step::State::Layer {
 public:
  Layer(Step::State* step, int32_t layer, std::span<const StepData> data, const AttendOptions& options,
        couplet_report* report)
      : step_(*step),
        owner_(step->owner()),
        backend_(*owner_.device.backend),
        layer_(layer),
        data_(data),
        options_(options),
        report_(report ? report : &own_report_),
        is_host_(owner_.device.is_host()),
        uploads_(!is_host_ && options.inputs.place == Place::host),
        downloads_(!is_host_ && options.outputs.place == Place::host),
        placed_(data.begin(), data.end()) {
    if (const Codebook* const codebook = step->codebook.get()) {
      parts_ = codebook->layer(layer);
      mixing_ = codebook->mixing(layer);
      key_order_ = codebook->key_order(layer).channels;
    }
    part_arrays_.resize(std::max<size_t>(1, parts_.size()));
  }

  couplet_status run();

 private:
  couplet_status bring_tables();
  couplet_status bring_rows();
  couplet_status bring_arrays();
  couplet_status copy_shared();
  couplet_status store_rows();
  couplet_status encode_leaving();
  couplet_status attend();
  couplet_status unmix_outputs() { return mix(true); }
  couplet_status take_outputs();

  void place(Bump* bump);
  void place_reordered(Bump* bump);
  void gather_stored();
  void gather_leaving();
  void gather_dense(const StepRowState& row, const StepData& data);
  void gather_queries(const StepRowState& row, const StepData& data, int64_t begin, int64_t end, size_t dense_begin,
                      size_t dense_end);
  void gather_attended();
  couplet_status store(const couplet_store_run* runs, size_t count, int32_t dtype, ReportSlot slot);
  void gather_mixed();
  couplet_status reorder();
  couplet_status mix(bool is_output);
  template <class Entries, class Params>
  couplet_status call(const Entries& entries, const Params& params, ReportSlot slot, size_t part = 0);
  couplet_status encode(size_t part, int side, bool is_held);
  couplet_attend_params attend_params(size_t part) const;

  bool cancelled() const { return options_.cancel && *options_.cancel; }
  couplet_status upload(void* to, const void* from, size_t bytes) const {
    return backend_.memory.upload(to, from, bytes, step_.stream, report_);
  }
  const float* block_rows(const Piece& piece, bool is_key) const {
    const RawLayout& layout = owner_.raw_layout;
    return (is_key ? layout.keys(*piece.block, layer_) : layout.values(*piece.block, layer_)) +
           piece.slot * layout.head_dim;
  }
  // Keys or values of the new tokens from `position` on; float32 once they are placed.
  static const void* given_rows(const StepData& data, bool is_key, int64_t token, int32_t dtype) {
    return is_key ? advance(data.keys, token * data.key_token_stride, dtype)
                  : advance(data.values, token * data.value_token_stride, dtype);
  }
  static Strides given_strides(const StepData& data, bool is_key) {
    return is_key ? Strides{data.key_token_stride, data.key_head_stride}
                  : Strides{data.value_token_stride, data.value_head_stride};
  }

  Step::State& step_;
  Cache::State& owner_;
  const couplet_backend& backend_;
  int32_t const layer_;
  std::span<const StepData> const data_;
  const AttendOptions& options_;
  couplet_report own_report_{};
  couplet_report* const report_;
  bool const is_host_, uploads_, downloads_;

  std::vector<StepData> placed_;  // `data_` as the device reaches it, keys and values in float32
  size_t uploaded_bytes_ = 0;     // of memory.rows, from its start
  float* gathered_[2] = {};       // keys and values of tokens that leave the window, from several blocks

  // On the host, of all heads; what launches are given lies in memory.arrays, there for each part from its first head on.
  std::vector<couplet_reorder_run> reorder_;  // keys and queries as they came
  std::vector<couplet_store_run> convert_, keep_;
  std::vector<couplet_mix_run> mixed_[2];               // values that came, outputs
  std::vector<couplet_encode_run> held_[2], fresh_[2];  // keys, values
  std::vector<couplet_dense_rows> dense_;
  std::vector<couplet_attend_sequence> sequences_;
  std::vector<size_t> dense_begins_;  // of each sequence
  struct Slice {
    size_t begin, end;  // in sequences_
    int32_t most_queries;
  };
  std::vector<Slice> slices_;
  struct PartArrays {
    couplet_encode_run *held[2], *fresh[2];
    couplet_dense_rows* dense;
    couplet_attend_sequence* sequences;
  };
  couplet_reorder_run* reorder_array_ = nullptr;
  couplet_store_run *convert_array_ = nullptr, *keep_array_ = nullptr;
  couplet_mix_run* mixed_arrays_[2] = {};
  std::vector<PartArrays> part_arrays_;

  // Without a codebook all heads are one part, and nothing is coded.
  std::span<const Codebook::Part> parts_;
  Codebook::Mixing mixing_;
  const int32_t* key_order_ = nullptr;
  int32_t first_head(size_t part) const { return parts_.empty() ? 0 : parts_[part].first_head; }
  int32_t heads(size_t part) const { return parts_.empty() ? owner_.config.kv_heads : parts_[part].codecs.heads; }
};

}  // namespace couplet
