#include "blocks.h"

namespace couplet {

constexpr int64_t least_spare_bytes = int64_t{64} << 20;  // beside half of what is in use

Block::~Block() {
  pool_->count(kind_, -bytes_, -1);
  pool_->give(memory_, bytes_);
}

uint8_t* BlockPool::take(int64_t bytes) {
  auto const fits =
      std::find_if(spares_.rbegin(), spares_.rend(), [&](const Spare& spare) { return spare.bytes == bytes; });
  if (fits != spares_.rend()) {
    uint8_t* const memory = fits->memory;
    *fits = spares_.back();
    spares_.pop_back();
    spare_bytes_ -= bytes;
    return memory;
  }
  if (budget_bytes_ > 0 && used_bytes() + spare_bytes_ + bytes > budget_bytes_) release_spares();
  void* memory = backend_->memory.allocate(static_cast<size_t>(bytes));
  if (!memory && !spares_.empty()) {
    release_spares();
    memory = backend_->memory.allocate(static_cast<size_t>(bytes));
  }
  return static_cast<uint8_t*>(memory);
}

void BlockPool::give(uint8_t* memory, int64_t bytes) noexcept {
  bool const is_kept = !backend_->memory.is_host && spare_bytes_ + bytes <= used_bytes() / 2 + least_spare_bytes &&
                       (budget_bytes_ == 0 || used_bytes() + spare_bytes_ + bytes <= budget_bytes_);
  if (is_kept) try {
      spares_.push_back({memory, bytes});
      spare_bytes_ += bytes;
      return;
    } catch (...) {  // no memory for one more entry: the block is freed
    }
  backend_->memory.release(memory, static_cast<size_t>(bytes));
}

void BlockPool::release_spares() {
  for (const Spare& spare : spares_) backend_->memory.release(spare.memory, static_cast<size_t>(spare.bytes));
  spares_.clear();
  spare_bytes_ = 0;
}

BlockRef BlockPool::allocate(BlockKind kind, int64_t bytes, int32_t tokens) {
  uint8_t* const memory = take(bytes);
  if (!memory) return nullptr;
  count(kind, bytes, 1);
  try {
    return std::make_shared<Block>(this, kind, memory, bytes, tokens);
  } catch (...) {
    count(kind, -bytes, -1);
    give(memory, bytes);
    throw;
  }
}

void BlockPool::count(BlockKind kind, int64_t bytes, int64_t blocks) {
  (kind == BlockKind::codes ? page_bytes_ : raw_bytes_).fetch_add(bytes, std::memory_order_relaxed);
  blocks_.fetch_add(blocks, std::memory_order_relaxed);
}

CodeLayout code_layout(const Codebook::Shape& shape, int32_t page_tokens) {
  CodeLayout layout;
  for (const std::vector<HeadCodecs>& codecs : shape.codecs) {
    CodeLayout::Layer& layer = layout.layers.emplace_back();
    layer.begin = layout.block_bytes;
    for (const HeadCodecs& part : codecs) {
      int64_t const key_stride = couplet_page_bytes(part.key, shape.head_dim, page_tokens);
      int64_t const value_stride = couplet_page_bytes(part.value, shape.head_dim, page_tokens);
      int64_t const value_offset = layout.block_bytes + part.heads * key_stride;
      layer.parts.push_back({layout.block_bytes, key_stride, value_offset, value_stride});
      layout.block_bytes = value_offset + part.heads * value_stride;
    }
    layer.end = layout.block_bytes;
  }
  return layout;
}

void BlockList::keep(int64_t begin, int64_t end) {
  begin = std::clamp(begin, first, this->end());
  end = std::clamp(end, begin, this->end());
  blocks.erase(blocks.begin() + (end - first), blocks.end());
  blocks.erase(blocks.begin(), blocks.begin() + (begin - first));
  first = begin;
}

Tail plan_tail(const BlockList& list, const Region& region, int64_t write_begin, int64_t write_end, int64_t live_begin,
               int64_t live_end) {
  Tail tail;
  if (write_begin >= write_end) return tail;
  tail.first = region.index(write_begin);
  tail.blocks.resize(static_cast<size_t>(region.index(write_end - 1) - tail.first + 1));
  if (!list.holds(tail.first)) return tail;
  const BlockRef& held = list.at(tail.first);
  if (held.use_count() == 1) {
    tail.blocks.front() = held;
  } else if (std::max(live_begin, region.first_token(tail.first)) < live_end) {
    tail.original = held;
  }
  return tail;
}

void reserve_tail(BlockList* list, const Tail& tail) { list->blocks.reserve(list->blocks.size() + tail.blocks.size()); }

void apply_tail(BlockList* list, Tail* tail) {
  if (tail->blocks.empty()) return;
  list->keep(list->first, tail->first);
  if (list->end() != tail->first) list->blocks.clear();  // what lay between has been coded
  if (list->blocks.empty()) list->first = tail->first;
  for (BlockRef& block : tail->blocks) list->blocks.push_back(std::move(block));
  *tail = {};
}

}  // namespace couplet
