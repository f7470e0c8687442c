// Reading JavaScript values. Every reader throws one sentence, "Expected X for `name` but received Y", with
// ERR_COUPLET_INVALID_ARGUMENT: a TypeError for the wrong kind of value, a RangeError for one out of range.
// JS thread only. The facade hands over plain objects, so reading a member runs no foreign code.
#pragma once

#include <napi.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace couplet::binding {

// The elements of a typed array. The memory stays where it is as long as the array is reachable (Worker::pin) and nobody
// transfers its buffer; data is NULL only when length is 0 or there is no array.
template <class T>
struct View {
  T* data = nullptr;
  size_t length = 0;
  Napi::Value array;  // what was read, for pinning
  const char* name = "";
  explicit operator bool() const { return !array.IsEmpty(); }
};

// "the number 3", "a Float32Array of 12 elements", "undefined": the Y of the sentence.
std::string describe(Napi::Value value);

// right_kind: the value is only out of range.
[[noreturn]] void throw_expected(Napi::Env env, const std::string& expected, const char* name, Napi::Value received,
                                 bool right_kind = false);

// Readers of one value. `name` must outlive the call that it is used in: give literals.
int64_t read_integer(Napi::Value value, const char* name, int64_t least, int64_t most);  // within +-2^53
double read_number(Napi::Value value, const char* name, double least, double most);      // NaN is refused
bool read_boolean(Napi::Value value, const char* name);
std::string read_string(Napi::Value value, const char* name);
uint64_t read_seed(Napi::Value value, const char* name);  // integer number >= 0, or bigint modulo 2^64
Napi::Function read_function(Napi::Value value, const char* name);

// T: float, double, int8_t, uint8_t (Buffer too), int16_t, uint16_t, int32_t, uint32_t, int64_t, uint64_t.
// Refused: another type, fewer than `least_length` elements, a detached buffer, a resizable or growable one.
// An array over a SharedArrayBuffer is taken as it is: its memory can be neither detached nor freed during a call.
template <class T>
View<T> read_array(Napi::Value value, const char* name, size_t least_length);

// The members of an options object. A member that is absent and one that is undefined are the same.
class Options {
 public:
  explicit Options(Napi::Value value, const char* name = "options");

  Napi::Env env() const { return object_.Env(); }
  Napi::Value get(const char* name) const { return object_.Get(name); }
  bool has(const char* name) const { return !get(name).IsUndefined(); }

  template <class Integer = int32_t>
  Integer integer(const char* name, Integer least, Integer most = std::numeric_limits<Integer>::max()) const {
    return static_cast<Integer>(read_integer(get(name), name, least, most));
  }
  template <class Integer = int32_t>
  Integer integer_or(const char* name, Integer otherwise, Integer least,
                     Integer most = std::numeric_limits<Integer>::max()) const {
    return has(name) ? integer<Integer>(name, least, most) : otherwise;
  }
  double number(const char* name, double least, double most) const { return read_number(get(name), name, least, most); }
  double number_or(const char* name, double otherwise, double least, double most) const {
    return has(name) ? number(name, least, most) : otherwise;
  }
  bool boolean_or(const char* name, bool otherwise) const {
    return has(name) ? read_boolean(get(name), name) : otherwise;
  }
  std::string string(const char* name) const { return read_string(get(name), name); }
  std::string string_or(const char* name, const char* otherwise) const { return has(name) ? string(name) : otherwise; }
  uint64_t seed_or(const char* name, uint64_t otherwise) const {
    return has(name) ? read_seed(get(name), name) : otherwise;
  }

  template <class T>
  View<T> array(const char* name, size_t least_length = 0) const {
    return read_array<T>(get(name), name, least_length);
  }
  // An empty View when it is absent.
  template <class T>
  View<T> array_or_none(const char* name, size_t least_length = 0) const {
    return has(name) ? array<T>(name, least_length) : View<T>{};
  }
  Options object(const char* name) const { return Options(get(name), name); }
  Napi::Array list(const char* name) const;  // a JavaScript array

 private:
  Napi::Object object_;
};

// a * b * c ... as a size, or the largest size when it does not fit: a minimum length that no array reaches.
size_t product(std::initializer_list<int64_t> factors);

// The element after the last one that a strided view reaches: 0 when a count is 0, else 1 + sum of (count - 1) * stride.
// Strides are >= 0; the largest size when it does not fit.
struct Axis {
  int64_t count;
  int64_t stride;
};
size_t extent(std::initializer_list<Axis> axes);

}  // namespace couplet::binding
