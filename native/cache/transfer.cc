// A sequence from one cache to another: blocks are the same bytes on every device.
#include <new>

#include "state.h"

namespace couplet {
namespace {

couplet_status check_alike(const Cache& from, const Cache& to, const Codebook* from_codes, const Codebook* to_codes,
                           couplet_report* report) {
  const CacheConfig& a = from.config();
  const CacheConfig& b = to.config();
  bool const same_codes =
      !from_codes == !to_codes && (!from_codes || from_codes->shape().codecs == to_codes->shape().codecs);
  if (a.layers == b.layers && a.kv_heads == b.kv_heads && a.head_dim == b.head_dim && a.sinks == b.sinks &&
      a.window == b.window && a.page_tokens == b.page_tokens && same_codes)
    return COUPLET_OK;
  return fail(report, COUPLET_MISMATCH, {},
              "Expected a cache of %d layers, %d kv heads, headDim %d, sinks %d, window %d and the same codecs but "
              "received one of %d layers, %d kv heads, headDim %d, sinks %d, window %d%s",
              a.layers, a.kv_heads, a.head_dim, a.sinks, a.window, b.layers, b.kv_heads, b.head_dim, b.sinks, b.window,
              same_codes ? "" : " and others");
}

// Done on return, unless both are on devices of one backend.
couplet_status copy_bytes(Device from, const Block& source, Device to, const Block& target,
                          std::vector<uint8_t>* between, couplet_report* report) {
  auto const bytes = static_cast<size_t>(source.bytes());
  auto const copy = [&](Device by, void* into, const void* out_of) {
    couplet_status const status = by.select(report);
    return status == COUPLET_OK ? by.backend->memory.copy(into, out_of, bytes, nullptr, report) : status;
  };
  if (to.is_host()) return copy(from, target.memory(), source.memory());
  if (from.is_host() || from.backend == to.backend) return copy(to, target.memory(), source.memory());
  between->resize(bytes);
  couplet_status const status = copy(from, between->data(), source.memory());
  return status == COUPLET_OK ? copy(to, target.memory(), between->data()) : status;
}

}  // namespace

// The sequence as another cache will hold it: all its blocks new. Needs that cache's mutex.
couplet_status Cache::State::take_in(const Sequence& source, Sequence* out, couplet_report* report) {
  if (disposed) return fail(report, COUPLET_DISPOSED, {}, "The cache has been disposed; create another one");
  struct List {
    const Region* region;
    const BlockList* from;
    BlockList* to;
  } const lists[] = {{&codes, &source.codes, &out->codes},
                     {&sinks, &source.sinks, &out->sinks},
                     {&window, &source.window, &out->window}};
  int64_t needed = 0;
  for (const List& list : lists)
    for (const BlockRef& block : list.from->blocks) needed += block->bytes();
  if (!pool.fits(needed)) return fail_full(needed, report);
  couplet_status const status = device.select(report);
  if (status != COUPLET_OK) return status;
  out->length = source.length;
  out->coded_end = source.coded_end;
  for (const List& list : lists) {
    list.to->first = list.from->first;
    list.to->blocks.reserve(list.from->blocks.size());
    for (const BlockRef& block : list.from->blocks) {
      BlockRef made = pool.allocate(list.region->kind, block->bytes(), block->tokens());
      if (!made)
        return fail(report, COUPLET_OUT_OF_MEMORY, {}, "The device has no memory for the %lld bytes of the sequence",
                    static_cast<long long>(needed));
      list.to->blocks.push_back(std::move(made));
    }
  }
  pool.note_peak();
  return COUPLET_OK;
}

couplet_status Cache::copy_to(SequenceId id, Cache* to, SequenceId* out, couplet_report* report) {
  State& source = *state_;
  State& target = *to->state_;
  std::shared_ptr<const Codebook> codebooks[2];  // disposed caches have none
  Sequence from, copy;                           // their blocks are dropped under the mutex of their cache
  couplet_status status = COUPLET_OK;
  {
    std::lock_guard const lock(source.mutex);
    Sequence* sequence = nullptr;
    status = source.find_idle(id, &sequence, report);
    if (status != COUPLET_OK) return status;
    codebooks[0] = source.codebook;
    sequence->in_step = true;
    try {
      from = *sequence;
    } catch (const std::bad_alloc&) {
      sequence->in_step = false;
      return fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for another sequence");
    }
  }
  try {
    {
      std::lock_guard const lock(target.mutex);
      codebooks[1] = target.codebook;
      if (target.disposed)
        status = fail(report, COUPLET_DISPOSED, {}, "The cache has been disposed; create another one");
      if (status == COUPLET_OK) status = check_alike(*this, *to, codebooks[0].get(), codebooks[1].get(), report);
      if (status == COUPLET_OK) status = target.take_in(from, &copy, report);
    }
    std::vector<uint8_t> between;
    for (auto const list : {&Sequence::codes, &Sequence::sinks, &Sequence::window})
      for (size_t index = 0; index < (from.*list).blocks.size() && status == COUPLET_OK; ++index)
        status = copy_bytes(source.device, *(from.*list).blocks[index], target.device, *(copy.*list).blocks[index],
                            &between, report);
    if (status == COUPLET_OK) status = target.device.select(report);
    if (status == COUPLET_OK) status = target.device.backend->memory.synchronize(nullptr, report);
  } catch (const std::bad_alloc&) {
    status = fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for a copy of the sequence");
  }
  {
    std::lock_guard const lock(target.mutex);
    if (status == COUPLET_OK && target.disposed)
      status = fail(report, COUPLET_DISPOSED, {}, "The cache has been disposed; create another one");
    if (status == COUPLET_OK) {
      try {
        target.sequences.emplace(target.next_id, std::move(copy));
        *out = target.next_id++;
      } catch (const std::bad_alloc&) {
        status = fail(report, COUPLET_OUT_OF_MEMORY, {}, "No memory for another sequence");
      }
    }
    copy = {};
  }
  std::lock_guard const lock(source.mutex);
  from = {};
  auto const found = source.sequences.find(id);
  found->second.in_step = false;
  if (found->second.abandoned) source.sequences.erase(found);
  return status;
}

}  // namespace couplet
