// Native objects that JavaScript holds: plain objects that wrap one, with a type tag, so that none is taken for another.
// JS thread only.
#pragma once

#include <napi.h>

#include <memory>

#include "values.h"

namespace couplet::binding {

// T has `static constexpr napi_type_tag tag` (two random words) and `static constexpr const char* noun` ("a session").
// The object is destroyed on the JS thread when its handle is garbage, or with the environment.
template <class T>
Napi::Value make_handle(Napi::Env env, std::unique_ptr<T> object) {
  auto const destroy = [](napi_env, void* data, void*) { delete static_cast<T*>(data); };
  Napi::Object const handle = Napi::Object::New(env);
  if (napi_type_tag_object(env, handle, &T::tag) != napi_ok ||
      napi_wrap(env, handle, object.get(), destroy, nullptr, nullptr) != napi_ok)
    throw Napi::Error::New(env, std::string("Node could not make a handle for ") + T::noun);
  object.release();
  return handle;
}

// Throws a TypeError "Expected a session for `name` but received Y" for anything else.
template <class T>
T& read_handle(Napi::Value value, const char* name) {
  bool tagged = false;
  void* object = nullptr;
  if (!value.IsObject() || napi_check_object_type_tag(value.Env(), value, &T::tag, &tagged) != napi_ok || !tagged ||
      napi_unwrap(value.Env(), value, &object) != napi_ok)
    throw_expected(value.Env(), T::noun, name, value);
  return *static_cast<T*>(object);
}

}  // namespace couplet::binding
