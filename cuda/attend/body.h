// The bodies of decode attention by name. The entries of attend take the first that can take a call; bench/cuda climbs from the last.
#pragma once

#include <cstddef>

#include "../../native/abi/operations.h"

namespace couplet::cuda::attend {

enum class Body { lookup, gather, staged, general };
inline constexpr Body bodies[] = {Body::lookup, Body::gather, Body::staged, Body::general};  // general takes any call

bool can_take(Body body, const couplet_attend_params& params);

// Of a body that can take the call.
const char* name_of(Body body, const couplet_attend_params& params);

// As the entries of attend, with such a body.
size_t workspace(Body body, const couplet_attend_params& params);
couplet_status run(Body body, const couplet_attend_params& params, void* memory, void* stream, couplet_report* report);

}  // namespace couplet::cuda::attend
