// DeviceBuffer: allocated, written, read and freed. lib/native/device.ts types what this exports.
#include "device.h"

#include "exports.h"
#include "handles.h"

namespace couplet::binding {

// ---- handles ------------------------------------------------------------------------------------------------------

// V8 hears of memory that it does not see, so that garbage which holds some is collected in time.
DeviceBufferHandle::DeviceBufferHandle(Napi::Env env, DeviceMemory allocated)
    : memory(std::make_shared<const DeviceMemory>(std::move(allocated))), env_(env) {
  Napi::MemoryManagement::AdjustExternalMemory(env_, static_cast<int64_t>(memory->bytes()));
}

void DeviceBufferHandle::dispose() {
  if (memory) Napi::MemoryManagement::AdjustExternalMemory(env_, -static_cast<int64_t>(memory->bytes()));
  memory.reset();
}

namespace {

std::shared_ptr<const DeviceMemory> read_buffer(Napi::Value value, const char* name) {
  std::shared_ptr<const DeviceMemory> memory = read_handle<DeviceBufferHandle>(value, name).memory;
  if (!memory) throw disposed_error(value.Env(), "DeviceBuffer");
  return memory;
}

uint64_t read_address(Napi::Value value, const char* name) {
  bool lossless = false;
  uint64_t const address = value.IsBigInt() ? value.As<Napi::BigInt>().Uint64Value(&lossless) : 0;
  if (!lossless) throw_expected(value.Env(), "a bigint from 0 to 2 ** 64 - 1", name, value, value.IsBigInt());
  return address;
}

}  // namespace

MemoryView read_memory(Napi::Value value, const char* name, size_t least_bytes, size_t alignment) {
  Napi::Env const env = value.Env();
  MemoryView view;
  bool is_buffer = false;
  napi_check_object_type_tag(env, value, &DeviceBufferHandle::tag, &is_buffer);
  if (is_buffer) {
    view.owner = read_buffer(value, name);
    view.address = view.owner->get();
    view.bytes = view.owner->bytes();
  } else {
    Options const raw(value, name);
    view.address = reinterpret_cast<void*>(read_address(raw.get("address"), "address"));
    view.bytes = static_cast<size_t>(raw.integer<int64_t>("bytes", 0));
    if (!view.address) throw range_error(env, "Expected an address other than 0 for `address` but received 0");
  }
  std::string const received = "` but received memory of " + std::to_string(view.bytes) + " bytes";
  if (view.bytes < least_bytes)
    throw range_error(env,
                      "Expected memory of " + std::to_string(least_bytes) + " or more bytes for `" + name + received);
  if (reinterpret_cast<uintptr_t>(view.address) % alignment != 0)
    throw range_error(env, "Expected an address that is a multiple of " + std::to_string(alignment) + " for `" + name +
                               received + " elsewhere");
  return view;
}

void* read_stream(Napi::Value value, const char* name) { return reinterpret_cast<void*>(read_address(value, name)); }

// ---- calls on a device --------------------------------------------------------------------------------------------

DeviceWorker::DeviceWorker(const Options& options) : Worker(options.env()), request_(read_device_request(options)) {
  has_stream_ = options.has("stream");
  if (has_stream_) stream_ = read_stream(options.get("stream"), "stream");
}

void* DeviceWorker::keep_memory(Napi::Value value, const char* name, size_t least_bytes, size_t alignment) {
  MemoryView view = read_memory(value, name, least_bytes, alignment);
  if (view.owner) {
    expect_device(name, view.owner->device());
    kept_.push_back(std::move(view.owner));
  }
  return view.address;
}

couplet_status DeviceWorker::execute(couplet_report* report) {
  Device device;
  if (couplet_status const status = request_.find(&device, report)) return status;
  for (Expected const& expected : expected_)
    if (!(expected.device == device))
      return fail(report, COUPLET_INVALID_ARGUMENT, {},
                  "Expected what is on device %d of %s for `%s` but received what is on device %d of %s", device.index,
                  device.backend->name, expected.name, expected.device.index, expected.device.backend->name);
  if (has_stream_ && device.is_host())
    return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected no `stream` for the CPU but received one");
  return run(device, report);
}

namespace {

// ---- DeviceBuffer -------------------------------------------------------------------------------------------------

class AllocateWorker : public DeviceWorker {
 public:
  explicit AllocateWorker(const Options& options)
      : DeviceWorker(options), bytes_(static_cast<size_t>(options.integer<int64_t>("bytes", 1))) {}

 protected:
  couplet_status run(const Device& device, couplet_report* report) override {
    return memory_.allocate(device, bytes_, report);
  }
  Napi::Value result(Napi::Env env) override {
    return make_handle(env, std::make_unique<DeviceBufferHandle>(env, std::move(memory_)));
  }

 private:
  size_t const bytes_;
  DeviceMemory memory_;
};

// Between `array` and the bytes of `buffer` from `offset` on.
class CopyWorker : public Worker {
 public:
  CopyWorker(const Options& options, bool writes)
      : Worker(options.env()), memory_(read_buffer(options.get("buffer"), "buffer")), writes_(writes) {
    View<uint8_t> const array = options.array<uint8_t>("array");
    offset_ = static_cast<size_t>(options.integer_or<int64_t>("offset", 0, 0));
    if (offset_ > memory_->bytes() || array.length > memory_->bytes() - offset_)
      throw range_error(env(), "Expected " + std::to_string(array.length) + " bytes from `offset` " +
                                   std::to_string(offset_) + " on to lie within the DeviceBuffer but it has " +
                                   std::to_string(memory_->bytes()));
    bytes_ = array.length;
    array_ = pin(array);
    has_stream_ = options.has("stream");
    if (has_stream_) stream_ = read_stream(options.get("stream"), "stream");
  }

 protected:
  couplet_status execute(couplet_report* report) override {
    const Device& device = memory_->device();
    if (has_stream_ && device.is_host())
      return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected no `stream` for the CPU but received one");
    if (couplet_status const status = device.select(report)) return status;
    if (bytes_ == 0) return COUPLET_OK;
    char* const place = memory_->get<char>() + offset_;
    return writes_ ? device.backend->memory.copy(place, array_, bytes_, stream_, report)
                   : device.backend->memory.copy(array_, place, bytes_, stream_, report);
  }

 private:
  std::shared_ptr<const DeviceMemory> const memory_;
  bool const writes_;
  uint8_t* array_ = nullptr;
  size_t bytes_ = 0;
  size_t offset_ = 0;
  void* stream_ = nullptr;
  bool has_stream_ = false;
};

struct WriteWorker : CopyWorker {
  explicit WriteWorker(const Options& options) : CopyWorker(options, true) {}
};
struct ReadWorker : CopyWorker {
  explicit ReadWorker(const Options& options) : CopyWorker(options, false) {}
};

Napi::Value describe_buffer(const Napi::CallbackInfo& info) {
  Napi::Env const env = info.Env();
  auto const memory = read_buffer(info[0], "buffer");
  Napi::Object const result = Napi::Object::New(env);
  result.Set("address", Napi::BigInt::New(env, static_cast<uint64_t>(reinterpret_cast<uintptr_t>(memory->get()))));
  result.Set("bytes", Napi::Number::New(env, static_cast<double>(memory->bytes())));
  result.Set("device", Napi::String::New(env, memory->device().backend->name));
  result.Set("deviceIndex", Napi::Number::New(env, memory->device().index));
  return result;
}

Napi::Value dispose_buffer(const Napi::CallbackInfo& info) {
  read_handle<DeviceBufferHandle>(info[0], "buffer").dispose();
  return info.Env().Undefined();
}

}  // namespace

void export_device(Napi::Env env, Napi::Object exports) {
  exports.Set("allocateBuffer", Napi::Function::New(env, promise_form<AllocateWorker>, "allocateBuffer"));
  exports.Set("allocateBufferSync", Napi::Function::New(env, sync_form<AllocateWorker>, "allocateBufferSync"));
  exports.Set("describeBuffer", Napi::Function::New(env, describe_buffer, "describeBuffer"));
  exports.Set("writeBuffer", Napi::Function::New(env, promise_form<WriteWorker>, "writeBuffer"));
  exports.Set("writeBufferSync", Napi::Function::New(env, sync_form<WriteWorker>, "writeBufferSync"));
  exports.Set("readBuffer", Napi::Function::New(env, promise_form<ReadWorker>, "readBuffer"));
  exports.Set("readBufferSync", Napi::Function::New(env, sync_form<ReadWorker>, "readBufferSync"));
  exports.Set("disposeBuffer", Napi::Function::New(env, dispose_buffer, "disposeBuffer"));
}

}  // namespace couplet::binding
