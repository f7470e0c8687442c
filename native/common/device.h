// Where something lives: one device of one backend.
#pragma once

#include "../abi/backend.h"

namespace couplet {

struct Device {
  const couplet_backend* backend = nullptr;
  int32_t index = 0;

  Device() = default;
  Device(const couplet_backend* chosen, int32_t chosen_index = 0) : backend(chosen), index(chosen_index) {}

  // Before every other entry of the backend: those work on the device that the calling thread selected last.
  couplet_status select(couplet_report* report) const { return backend->device.select(index, report); }
  bool is_host() const { return backend->memory.is_host != 0; }
  bool operator==(const Device&) const = default;
};

}  // namespace couplet
