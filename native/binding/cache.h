// The handles of native/binding/cache.cc that other files of this room read: caches and open steps. JS thread only.
#pragma once

#include <napi.h>

#include <memory>
#include <vector>

#include "../cache/cache.h"
#include "../call/memory.h"
#include "values.h"

namespace couplet::binding {

// The attend options of every layer of a model, and what they point to.
class LayerOptions {
 public:
  // options: `rotaries`, a list of what lib/native/cache.ts calls NativeRotary or NativeOrderedRotary, and `layers`, a list of objects
  // whose `rotary` and `orderedRotary` are indices into that list.
  LayerOptions(Device device, const CacheConfig& config, const Napi::Object& options);
  ~LayerOptions();
  LayerOptions(const LayerOptions&) = delete;
  LayerOptions& operator=(const LayerOptions&) = delete;

  const std::vector<AttendOptions>& layers() const { return layers_; }

 private:
  struct Rotary {
    couplet_rotary* angles = nullptr;
    int32_t positions = 0, pairs = 0;
  };
  void add_rotary(const Options& given, int32_t head_dim);
  void release();

  Device device_;
  std::vector<Rotary> rotaries_;
  std::vector<DeviceMemory> head_sinks_;
  std::vector<AttendOptions> layers_;
};

// A cache as one environment knows it: shared by the handles of the cache and of its sequences and steps.
class CacheOwner {
 public:
  CacheOwner(Napi::Env env, std::shared_ptr<Cache> cache, std::shared_ptr<const LayerOptions> options)
      : env_(env), cache_(std::move(cache)), options_(std::move(options)) {}
  ~CacheOwner();
  CacheOwner(const CacheOwner&) = delete;
  CacheOwner& operator=(const CacheOwner&) = delete;

  const std::shared_ptr<Cache>& cache() const { return cache_; }
  const std::shared_ptr<const LayerOptions>& options() const { return options_; }
  // Tells V8 what blocks have come and gone in memory of the host since the last time; of a GPU's it knows nothing.
  void report_memory();

 private:
  void report(int64_t bytes);

  Napi::Env env_;
  std::shared_ptr<Cache> cache_;
  std::shared_ptr<const LayerOptions> options_;
  int64_t reported_bytes_ = 0;
};

struct CacheHandle {
  static constexpr napi_type_tag tag{0x7d0c5b1e94f24a6b, 0x9be3a1c4d8f75012};
  static constexpr const char* noun = "a cache";
  std::shared_ptr<CacheOwner> owner;
};

// What a call off the JS thread needs to attend: it may outlive the handle, and the last of them aborts the step.
struct OpenStep {
  std::shared_ptr<const std::vector<AttendOptions>> layers;  // [config.layers]
  std::shared_ptr<Step> step;                                // the first to go: its end waits for what reads the above
};

struct StepHandle {
  static constexpr napi_type_tag tag{0x2f6a90b3c71d4e58, 0x81d7f0259ac34be6};
  static constexpr const char* noun = "a step";
  std::shared_ptr<CacheOwner> owner;
  std::shared_ptr<const OpenStep> step;  // never NULL; after commit or abort its calls answer COUPLET_DISPOSED

  ~StepHandle() {
    step.reset();
    if (owner) owner->report_memory();
  }
};

}  // namespace couplet::binding
