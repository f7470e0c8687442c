// Pages of codes for many sequences: memory and bookkeeping, no arithmetic. Used by native/binding and native/onnxruntime.
//
// Coded tokens live in pages, full-precision tokens (sinks, window) in raw blocks; both are reference counted, taken from one
// byte budget, and copied when a shared one is about to be written. New tokens enter through a step:
//   begin (reserves every byte the step needs, or changes nothing) -> attend or append, once per layer -> commit or abort.
// A token is coded when it leaves the window. Until commit nothing that the sequence held before is overwritten, so a step
// that fails or is aborted leaves its sequences as they were.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "../common/device.h"

namespace couplet {

enum class Prefill { exact, coded };  // how the new tokens of a step meet each other; `exact` is what generation uses

// Neighbouring kv heads of a layer that share a pair of codecs.
struct HeadCodecs {
  int32_t heads = 0;
  couplet_codec key{}, value{};

  bool operator==(const HeadCodecs& other) const {
    auto const alike = [](couplet_codec one, couplet_codec another) {
      return one.group_channels == another.group_channels && one.code_bits == another.code_bits;
    };
    return heads == other.heads && alike(key, other.key) && alike(value, other.value);
  }
};

// The tables of a whole model on one device. Shared by caches, immutable.
class Codebook {
 public:
  struct Shape {
    int32_t layers = 0, kv_heads = 0, head_dim = 0;
    std::vector<std::vector<HeadCodecs>> codecs;  // [layers], from head 0 on; the heads of a layer add up to kv_heads
    static Shape uniform(int32_t layers, int32_t kv_heads, int32_t head_dim, couplet_codec key, couplet_codec value) {
      return {layers, kv_heads, head_dim,
              std::vector(static_cast<size_t>(layers), std::vector{HeadCodecs{kv_heads, key, value}})};
    }
  };
  // What backends see of a layer: heads with tables, pages and calls of their own.
  struct Part {
    int32_t first_head = 0;
    HeadCodecs codecs;
    couplet_table* key = nullptr;
    couplet_table* value = nullptr;
  };
  // Of a layer, what a codebook is made of: copied. Parts one after another, float32.
  struct Source {
    const float* tables[2] = {};  // of keys and values, [heads][groups][2^code_bits][group_channels]
    const float* metrics[2] =
        {};  // [heads][groups][group_channels][group_channels], as couplet_table_params has it, or NULL
    // Both or none: values enter as x M and what attention makes of them leaves as x M'. [kv_heads][head_dim][head_dim]
    const float* value_mix = nullptr;
    const float* value_unmix = nullptr;
    // Keys are stored, and queries meet them, with channel key_order[c] at place c: [head_dim], every channel once; or NULL.
    const int32_t* key_order = nullptr;
  };
  struct KeyOrder {
    const int32_t* channels = nullptr;  // in the memory of the device, or NULL
    std::vector<int32_t> on_host;
  };
  // In the memory of the device, or NULL.
  struct Mixing {
    const float* mix = nullptr;
    const float* unmix = nullptr;
  };
  static couplet_status create(Device device, const Shape& shape, std::span<const Source> sources,
                               std::shared_ptr<const Codebook>* out, couplet_report* report);
  ~Codebook();
  Codebook(const Codebook&) = delete;
  Codebook& operator=(const Codebook&) = delete;
  Device device() const { return device_; }
  const Shape& shape() const { return shape_; }
  std::span<const Part> layer(int32_t index) const { return layers_[static_cast<size_t>(index)]; }
  const KeyOrder& key_order(int32_t layer) const { return key_orders_[static_cast<size_t>(layer)]; }
  Mixing mixing(int32_t layer) const { return mixings_[static_cast<size_t>(layer)]; }
  size_t bytes() const { return bytes_; }

 private:
  Codebook() = default;
  Device device_;
  Shape shape_;
  couplet_status keep(const void* from, size_t bytes, const void** place, couplet_report* report);
  couplet_status keep_mixing(const Source& source, Mixing* mixing, couplet_report* report);
  couplet_status keep_order(const Source& source, KeyOrder* order, couplet_report* report);

  std::vector<std::vector<Part>> layers_;
  std::vector<Mixing> mixings_;       // [layers]
  std::vector<KeyOrder> key_orders_;  // [layers]
  size_t bytes_ = 0;
};

struct CacheConfig {
  int32_t layers = 0, query_heads = 0, kv_heads = 0, head_dim = 0;
  int32_t sinks = 4;    // first tokens kept in full precision
  int32_t window = 32;  // last tokens kept in full precision; negative: all of them (no codebook is needed then)
  int32_t page_tokens = COUPLET_PAGE_TOKENS;
  int32_t threads = 0;       // 0: all cores
  int64_t budget_bytes = 0;  // pages and raw blocks together; 0: unlimited
};

enum class Place { host, device };

// Where rows lie, and their element type. On the CPU the two places are one, and the type is float32.
struct RowFormat {
  Place place = Place::host;
  int32_t dtype = COUPLET_FLOAT32;
};

// What differs from layer to layer of a model; given with every attend.
struct AttendOptions {
  const couplet_rotary* rotary = nullptr;
  const couplet_rotary* ordered_rotary =
      nullptr;                        // its angles in the key order of the layer, where the codebook has one
  int32_t positions = 0;              // the first that `rotary` has no angles for; 0: not said
  const float* head_sinks = nullptr;  // [query_heads], in the memory of the cache's device
  float scale = 0;                    // 0: 1 / sqrt(head_dim)
  float softcap = 0;
  int32_t local_window = 0;
  const volatile int32_t* cancel = nullptr;  // read between pieces of the work; non-zero: COUPLET_CANCELLED
  RowFormat inputs = {}, outputs = {};       // of all rows of the call
  // A stream of the device, on which the call is enqueued: see Step. NULL: the default stream, and the call waits for it.
  void* stream = nullptr;
};

using SequenceId = int64_t;

struct StepRow {
  SequenceId sequence = 0;
  int32_t tokens = 0;  // new tokens, >= 0; 0 takes part with nothing to do
};

// Rows of the new tokens of one sequence in one layer; element (token, head, channel) at
// [token * token_stride + head * head_stride + channel], strides in elements.
struct StepData {
  const void* queries = nullptr;  // NULL with outputs NULL: append only
  const void* keys = nullptr;     // before rotary
  const void* values = nullptr;
  void* outputs = nullptr;
  int64_t query_token_stride = 0, query_head_stride = 0;
  int64_t key_token_stride = 0, key_head_stride = 0;
  int64_t value_token_stride = 0, value_head_stride = 0;
  int64_t output_token_stride = 0, output_head_stride = 0;
};

struct CacheStatistics {
  int64_t sequences = 0;
  int64_t tokens = 0;  // over all sequences, shared ones counted for each
  int64_t coded_tokens = 0;
  int64_t raw_tokens = 0;
  int64_t page_bytes = 0;  // allocated for codes, padding and unused slots included; shared pages once
  int64_t raw_bytes = 0;   // allocated for full-precision tokens
  int64_t codebook_bytes = 0;
  int64_t bookkeeping_bytes = 0;  // page tables, block headers, scratch, spare blocks: an estimate from below
  int64_t budget_bytes = 0;
  int64_t peak_bytes = 0;  // highest page_bytes + raw_bytes so far
  // 8 * (page_bytes + raw_bytes + codebook_bytes) / (tokens * layers * 2 * kv_heads * head_dim), 0 without tokens
  double bits_per_channel = 0;
};

class Step;

// Safe to call from any thread. A sequence is inside at most one step at a time; anything else asked of it meanwhile
// answers COUPLET_BUSY. Every call answers COUPLET_DISPOSED after dispose, or for a sequence that was dropped.
class Cache : public std::enable_shared_from_this<Cache> {
 public:
  static couplet_status create(Device device, const CacheConfig& config, std::shared_ptr<const Codebook> codebook,
                               std::shared_ptr<Cache>* out, couplet_report* report);
  ~Cache();
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  const CacheConfig& config() const;
  Device device() const;

  couplet_status create_sequence(SequenceId* out, couplet_report* report);
  couplet_status fork(SequenceId from, SequenceId* out, couplet_report* report);
  // Keeps the first `tokens`. A coded token stays coded: after a cut into them the sequence holds fewer than config().window
  // tokens in full precision until enough new ones have come.
  couplet_status truncate(SequenceId sequence, int64_t tokens, couplet_report* report);
  couplet_status reset(SequenceId sequence, couplet_report* report);  // truncate to 0
  couplet_status drop(SequenceId sequence, couplet_report* report);
  void abandon(SequenceId sequence) noexcept;  // drop, when its step ends if it is inside one; for finalizers
  // The same tokens in another cache (or this one, nothing shared) of the same shape and the same codebook, on whatever device: its
  // blocks are the same bytes there. Complete on return; the sequence is busy meanwhile, and `to` is held by the caller.
  couplet_status copy_to(SequenceId sequence, Cache* to, SequenceId* out, couplet_report* report);
  couplet_status length(SequenceId sequence, int64_t* out, couplet_report* report) const;

  couplet_status begin(std::span<const StepRow> rows, Prefill prefill, std::shared_ptr<Step>* out,
                       couplet_report* report);

  CacheStatistics statistics() const;
  int64_t memory_bytes() const;  // page_bytes + raw_bytes, without taking the lock

  // Aborts every open step and frees every sequence; what a running attend uses is freed when that ends. Idempotent.
  void dispose() noexcept;
  bool disposed() const;

 private:
  Cache();
  friend class Step;
  struct State;
  std::unique_ptr<State> state_;
};

// New tokens of some sequences on their way through the layers. Each layer once, in any order, one call at a time.
// Destroying an open step aborts it. After an error inside attend only abort is left.
//
// On a GPU everything of a step is enqueued on the stream of its calls; a call on another stream waits for the one before. A call
// whose outputs are on the device, and that was given a stream, returns when it is enqueued: its rows belong to it until the stream
// has got there, and a NaN or an infinity in them is an error of commit. All other calls are complete on return. commit, abort and
// the end of a step wait for its stream, so that no other stream ever meets unfinished work in the blocks of a sequence, and no memory
// is freed or used again under a kernel.
class Step {
 public:
  ~Step();
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  std::span<const StepRow> rows() const;
  int64_t first_token(size_t row) const;  // length of the row's sequence before the step

  // data: one entry per row. Stores keys and values of the new tokens and, where queries are given, writes outputs.
  couplet_status attend(int32_t layer, std::span<const StepData> data, const AttendOptions& options,
                        couplet_report* report);
  // Waits until all that was enqueued is done, so that commit and abort need not.
  couplet_status synchronize(couplet_report* report);
  couplet_status commit(couplet_report* report);  // refuses while a layer is missing
  void abort() noexcept;  // while attend runs it takes effect when that ends; after commit it does nothing

  const std::shared_ptr<Cache>& cache() const;

 private:
  Step();
  friend class Cache;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace couplet
