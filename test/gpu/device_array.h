// An array in device memory, for tests: made from a host's, read back into one.
#pragma once

#include <vector>

#include "../../cuda/gpu.h"
#include "../native/check.h"

namespace couplet::test {

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    if (count)
      CHECK(cudaMalloc(&data_, count * sizeof(T)) == cudaSuccess, "no %zu bytes of device memory", count * sizeof(T));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { write(values); }
  DeviceArray(DeviceArray&& other) noexcept : data_(other.data_), count_(other.count_) { other.data_ = nullptr; }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return static_cast<T*>(data_); }
  size_t size() const { return count_; }

  void write(const std::vector<T>& values) {
    if (values.empty()) return;
    cudaError_t const error = cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
    CHECK(error == cudaSuccess, "copying to the device: %s", cudaGetErrorName(error));
  }
  // Waits for all that was given to the default stream.
  std::vector<T> read() const {
    std::vector<T> values(count_);
    if (values.empty()) return values;
    cudaError_t const error = cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost);
    CHECK(error == cudaSuccess, "copying from the device: %s", cudaGetErrorName(error));
    return values;
  }

 private:
  void* data_ = nullptr;
  size_t count_;
};

}  // namespace couplet::test
