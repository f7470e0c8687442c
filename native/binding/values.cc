#include "values.h"

#include <cmath>
#include <cstdio>

#include "error.h"

namespace couplet::binding {
namespace {

constexpr int64_t largest_safe_integer = (int64_t{1} << 53) - 1;

struct ArrayKind {
  const char* name;
  const char* article;
};

ArrayKind array_kind(napi_typedarray_type type) {
  switch (type) {
    case napi_int8_array: return {"Int8Array", "an "};
    case napi_uint8_array: return {"Uint8Array", "a "};
    case napi_uint8_clamped_array: return {"Uint8ClampedArray", "a "};
    case napi_int16_array: return {"Int16Array", "an "};
    case napi_uint16_array: return {"Uint16Array", "a "};
    case napi_int32_array: return {"Int32Array", "an "};
    case napi_uint32_array: return {"Uint32Array", "a "};
    case napi_float32_array: return {"Float32Array", "a "};
    case napi_float64_array: return {"Float64Array", "a "};
    case napi_bigint64_array: return {"BigInt64Array", "a "};
    case napi_biguint64_array: return {"BigUint64Array", "a "};
    default: return {"typed array of a newer kind", "a "};
  }
}

template <class T>
constexpr napi_typedarray_type type_of() {
  if constexpr (std::is_same_v<T, float>) return napi_float32_array;
  if constexpr (std::is_same_v<T, double>) return napi_float64_array;
  if constexpr (std::is_same_v<T, int8_t>) return napi_int8_array;
  if constexpr (std::is_same_v<T, uint8_t>) return napi_uint8_array;
  if constexpr (std::is_same_v<T, int16_t>) return napi_int16_array;
  if constexpr (std::is_same_v<T, uint16_t>) return napi_uint16_array;
  if constexpr (std::is_same_v<T, int32_t>) return napi_int32_array;
  if constexpr (std::is_same_v<T, uint32_t>) return napi_uint32_array;
  if constexpr (std::is_same_v<T, int64_t>) return napi_bigint64_array;
  if constexpr (std::is_same_v<T, uint64_t>) return napi_biguint64_array;
}

struct ArrayInfo {
  napi_typedarray_type type;
  size_t length = 0;
  void* data = nullptr;
  napi_value buffer;
};

// False for a kind that this Node-API does not know (Float16Array before Node 24).
bool array_info(Napi::Value array, ArrayInfo* info) {
  size_t offset = 0;
  return napi_get_typedarray_info(array.Env(), array, &info->type, &info->length, &info->data, &info->buffer,
                                  &offset) == napi_ok;
}

// true: the length of its memory can change under a running call.
bool changes_size(Napi::Object buffer) {
  return buffer.Get("resizable").ToBoolean() || buffer.Get("growable").ToBoolean();
}

std::string describe_array(Napi::Value array) {
  ArrayInfo info;
  if (!array_info(array, &info)) return "a typed array of a newer kind";
  ArrayKind const kind = array_kind(info.type);
  bool detached = false;
  napi_is_detached_arraybuffer(array.Env(), info.buffer, &detached);
  std::string text = std::string(kind.article) + kind.name;
  if (detached) return text + " whose buffer is detached";
  text += " of " + std::to_string(info.length) + (info.length == 1 ? " element" : " elements");
  return changes_size(Napi::Object(array.Env(), info.buffer)) ? text + " over a resizable buffer" : text;
}

std::string number_text(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.17g", value);
  for (int digits = 1; digits < 17; ++digits) {  // the shortest text that reads back as the same number
    char shorter[40];
    std::snprintf(shorter, sizeof shorter, "%.*g", digits, value);
    if (std::strtod(shorter, nullptr) == value) return shorter;
  }
  return text;
}

std::string range_text(const std::string& kind, const std::string& least, const std::string& most) {
  return kind + " from " + least + " to " + most;
}

}  // namespace

std::string describe(Napi::Value value) {
  if (value.IsEmpty() || value.IsUndefined()) return "undefined";
  if (value.IsNull()) return "null";
  if (value.IsBoolean()) return value.As<Napi::Boolean>() ? "true" : "false";
  if (value.IsNumber()) {
    double const number = value.As<Napi::Number>().DoubleValue();
    if (std::isnan(number)) return "NaN";
    if (std::isinf(number)) return number > 0 ? "Infinity" : "-Infinity";
    return number_text(number);
  }
  if (value.IsString()) {
    std::string const text = value.As<Napi::String>().Utf8Value();
    return "\"" + (text.size() > 40 ? text.substr(0, 40) + "..." : text) + "\"";
  }
  if (value.IsBigInt()) return "a bigint";
  if (value.IsSymbol()) return "a symbol";
  if (value.IsFunction()) return "a function";
  if (value.IsTypedArray()) return describe_array(value);
  if (value.IsArrayBuffer()) return "an ArrayBuffer";
  if (value.IsArray()) return "an array";
  return "an object";
}

void throw_expected(Napi::Env env, const std::string& expected, const char* name, Napi::Value received,
                    bool right_kind) {
  std::string const message = "Expected " + expected + " for `" + name + "` but received " + describe(received);
  throw right_kind ? range_error(env, message) : type_error(env, message);
}

int64_t read_integer(Napi::Value value, const char* name, int64_t least, int64_t most) {
  least = std::max(least, -largest_safe_integer);
  most = std::min(most, largest_safe_integer);
  if (value.IsNumber()) {
    double const number = value.As<Napi::Number>().DoubleValue();
    if (number == std::trunc(number) && number >= static_cast<double>(least) && number <= static_cast<double>(most))
      return static_cast<int64_t>(number);
  }
  throw_expected(value.Env(), range_text("an integer", std::to_string(least), std::to_string(most)), name, value,
                 value.IsNumber());
}

double read_number(Napi::Value value, const char* name, double least, double most) {
  if (value.IsNumber()) {
    double const number = value.As<Napi::Number>().DoubleValue();
    if (number >= least && number <= most) return number;
  }
  throw_expected(value.Env(), range_text("a number", number_text(least), number_text(most)), name, value,
                 value.IsNumber());
}

bool read_boolean(Napi::Value value, const char* name) {
  if (!value.IsBoolean()) throw_expected(value.Env(), "a boolean", name, value);
  return value.As<Napi::Boolean>();
}

std::string read_string(Napi::Value value, const char* name) {
  if (!value.IsString()) throw_expected(value.Env(), "a string", name, value);
  return value.As<Napi::String>().Utf8Value();
}

uint64_t read_seed(Napi::Value value, const char* name) {
  if (value.IsBigInt()) {
    bool lossless = false;  // a seed is 64 bits; more are dropped, as BigInt.asUintN(64, seed) does
    return value.As<Napi::BigInt>().Uint64Value(&lossless);
  }
  return static_cast<uint64_t>(read_integer(value, name, 0, largest_safe_integer));
}

Napi::Function read_function(Napi::Value value, const char* name) {
  if (!value.IsFunction()) throw_expected(value.Env(), "a function", name, value);
  return value.As<Napi::Function>();
}

template <class T>
View<T> read_array(Napi::Value value, const char* name, size_t least_length) {
  ArrayInfo info;
  ArrayKind const kind = array_kind(type_of<T>());
  if (!value.IsTypedArray() || !array_info(value, &info) || info.type != type_of<T>())
    throw_expected(value.Env(), std::string(kind.article) + kind.name, name, value);
  bool detached = false;
  napi_is_detached_arraybuffer(value.Env(), info.buffer, &detached);
  if (detached || info.length < least_length) {
    std::string const least = least_length == std::numeric_limits<size_t>::max()
                                  ? "more elements than fit in memory"
                                  : std::to_string(least_length) + " or more elements";
    throw_expected(value.Env(), std::string(kind.article) + kind.name + " of " + least, name, value, true);
  }
  if (changes_size(Napi::Object(value.Env(), info.buffer)))
    throw_expected(value.Env(), std::string(kind.article) + kind.name + " over a buffer of fixed length", name, value,
                   true);
  return {static_cast<T*>(info.data), info.length, value, name};
}

template View<float> read_array(Napi::Value, const char*, size_t);
template View<double> read_array(Napi::Value, const char*, size_t);
template View<int8_t> read_array(Napi::Value, const char*, size_t);
template View<uint8_t> read_array(Napi::Value, const char*, size_t);
template View<int16_t> read_array(Napi::Value, const char*, size_t);
template View<uint16_t> read_array(Napi::Value, const char*, size_t);
template View<int32_t> read_array(Napi::Value, const char*, size_t);
template View<uint32_t> read_array(Napi::Value, const char*, size_t);
template View<int64_t> read_array(Napi::Value, const char*, size_t);
template View<uint64_t> read_array(Napi::Value, const char*, size_t);

Options::Options(Napi::Value value, const char* name) {
  if (!value.IsObject() || value.IsFunction() || value.IsArray() || value.IsTypedArray())
    throw_expected(value.Env(), "an object", name, value);
  object_ = value.As<Napi::Object>();
}

Napi::Array Options::list(const char* name) const {
  Napi::Value const value = get(name);
  if (!value.IsArray()) throw_expected(env(), "an array", name, value);
  return value.As<Napi::Array>();
}

size_t product(std::initializer_list<int64_t> factors) {
  size_t result = 1;
  for (int64_t factor : factors)
    if (__builtin_mul_overflow(result, static_cast<size_t>(factor), &result)) return std::numeric_limits<size_t>::max();
  return result;
}

size_t extent(std::initializer_list<Axis> axes) {
  size_t last = 0;
  for (Axis const& axis : axes) {
    if (axis.count == 0) return 0;
    size_t reach = 0;
    if (__builtin_mul_overflow(static_cast<size_t>(axis.count - 1), static_cast<size_t>(axis.stride), &reach) ||
        __builtin_add_overflow(last, reach, &last))
      return std::numeric_limits<size_t>::max();
  }
  return last == std::numeric_limits<size_t>::max() ? last : last + 1;
}

}  // namespace couplet::binding
