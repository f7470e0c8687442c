// Memory of a cache: reference-counted blocks from one byte budget, and lists of them that cover positions of a sequence.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cache.h"

namespace couplet {

enum class BlockKind { codes, raw };

inline constexpr int32_t raw_block_tokens = 16;

class BlockPool;

// Memory for the tokens of one stretch of positions, all layers, both sides, all kv heads.
class Block {
 public:
  Block(BlockPool* pool, BlockKind kind, uint8_t* memory, int64_t bytes, int32_t tokens)
      : pool_(pool), memory_(memory), bytes_(bytes), tokens_(tokens), kind_(kind) {}
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  uint8_t* memory() const { return memory_; }
  int64_t bytes() const { return bytes_; }
  int32_t tokens() const { return tokens_; }  // capacity
  BlockKind kind() const { return kind_; }

 private:
  BlockPool* pool_;
  uint8_t* memory_;
  int64_t bytes_;
  int32_t tokens_;
  BlockKind kind_;
};

// Copied and dropped only under the mutex of the cache, so use_count() is exact there.
using BlockRef = std::shared_ptr<Block>;

// Counts every byte that backend.memory was asked for. Changed only under the mutex of the cache; read from anywhere.
// A device waits for all of its work when memory is freed, and takes its time to allocate, so that blocks of a device are kept for
// the next ones of their size: while they and the blocks in use stay within the budget, and there are not many more than windows
// that move on need.
class BlockPool {
 public:
  BlockPool(const couplet_backend* backend, int64_t budget_bytes) : backend_(backend), budget_bytes_(budget_bytes) {}
  ~BlockPool() { release_spares(); }
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  int64_t budget_bytes() const { return budget_bytes_; }
  int64_t used_bytes() const { return page_bytes() + raw_bytes(); }
  int64_t page_bytes() const { return page_bytes_.load(std::memory_order_relaxed); }
  int64_t raw_bytes() const { return raw_bytes_.load(std::memory_order_relaxed); }
  int64_t peak_bytes() const { return peak_bytes_.load(std::memory_order_relaxed); }
  int64_t blocks() const { return blocks_.load(std::memory_order_relaxed); }

  bool fits(int64_t bytes) const { return budget_bytes_ == 0 || bytes <= budget_bytes_ - used_bytes(); }
  BlockRef allocate(BlockKind kind, int64_t bytes, int32_t tokens);  // NULL when the system has no memory
  int64_t spare_bytes() const { return spare_bytes_; }
  void release_spares();
  void note_peak() { peak_bytes_.store(std::max(peak_bytes(), used_bytes()), std::memory_order_relaxed); }

 private:
  friend class Block;
  void count(BlockKind kind, int64_t bytes, int64_t blocks);
  uint8_t* take(int64_t bytes);
  void give(uint8_t* memory, int64_t bytes) noexcept;

  struct Spare {
    uint8_t* memory;
    int64_t bytes;
  };
  const couplet_backend* backend_;
  int64_t budget_bytes_;
  std::vector<Spare> spares_;
  int64_t spare_bytes_ = 0;
  std::atomic<int64_t> page_bytes_{0}, raw_bytes_{0}, peak_bytes_{0}, blocks_{0};
};

// Where each layer, part and side lies inside a block of codes. Computed once; attend and encode get these numbers.
struct CodeLayout {
  struct Part {  // bytes
    int64_t key_offset = 0;
    int64_t key_page_stride = 0;  // from one kv head's page to the next
    int64_t value_offset = 0;
    int64_t value_page_stride = 0;
  };
  struct Layer {
    int64_t begin = 0, end = 0;  // bytes
    std::vector<Part> parts;     // as those of the codebook
  };
  int64_t block_bytes = 0;
  std::vector<Layer> layers;
};
CodeLayout code_layout(const Codebook::Shape& shape, int32_t page_tokens);

// A raw block is float32 [layers][key, value][kv_heads][tokens of the block][head_dim]; keys are as before rotary,
// in the key order of the codebook, and values as it mixes them.
struct RawLayout {
  int32_t layers = 0, kv_heads = 0, head_dim = 0;
  int64_t side_floats(int32_t tokens) const { return static_cast<int64_t>(kv_heads) * tokens * head_dim; }
  int64_t block_bytes(int32_t tokens) const {
    return layers * 2 * side_floats(tokens) * static_cast<int64_t>(sizeof(float));
  }
  int64_t head_stride(const Block& block) const { return static_cast<int64_t>(block.tokens()) * head_dim; }
  float* keys(const Block& block, int32_t layer) const {
    return reinterpret_cast<float*>(block.memory()) + 2 * layer * side_floats(block.tokens());
  }
  float* values(const Block& block, int32_t layer) const { return keys(block, layer) + side_floats(block.tokens()); }
};

// Positions [begin, end) cut into blocks of block_tokens; the last one is shorter when end says so.
struct Region {
  BlockKind kind = BlockKind::raw;
  int64_t begin = 0;
  int64_t end = INT64_MAX;
  int32_t block_tokens = raw_block_tokens;

  int64_t index(int64_t token) const { return (token - begin) / block_tokens; }
  int64_t first_token(int64_t index) const { return begin + index * block_tokens; }
  int64_t blocks_until(int64_t token) const {  // blocks that cover [begin, token)
    return token <= begin ? 0 : index(token - 1) + 1;
  }
  int32_t capacity(int64_t index) const {
    return static_cast<int32_t>(std::min<int64_t>(block_tokens, end - first_token(index)));
  }
};

// Blocks first, first + 1, ... of a region.
struct BlockList {
  int64_t first = 0;
  std::vector<BlockRef> blocks;

  int64_t end() const { return first + static_cast<int64_t>(blocks.size()); }
  bool holds(int64_t index) const { return index >= first && index < end(); }
  const BlockRef& at(int64_t index) const { return blocks[static_cast<size_t>(index - first)]; }
  void keep(int64_t begin, int64_t end);  // drops every block outside [begin, end)
};

// What a step puts in place of the end of a list when it commits: blocks first, first + 1, ... of the same region.
struct Tail {
  int64_t first = 0;
  std::vector<BlockRef> blocks;  // between plan and fill, NULL where a new block is needed
  BlockRef original;             // shared block whose live tokens must be copied into blocks[0], or NULL

  int64_t end() const { return first + static_cast<int64_t>(blocks.size()); }
  Block& at(int64_t index) const { return *blocks[static_cast<size_t>(index - first)]; }
};

// The tail for writing positions [write_begin, write_end), of which none is live yet. Tokens [live_begin, live_end) are live
// and stay as they are: their block is written in place when this list alone holds it, and copied otherwise.
Tail plan_tail(const BlockList& list, const Region& region, int64_t write_begin, int64_t write_end, int64_t live_begin,
               int64_t live_end);

// Replaces the end of the list. Never throws when `list.blocks` has room (reserve_tail).
void reserve_tail(BlockList* list, const Tail& tail);
void apply_tail(BlockList* list, Tail* tail);

}  // namespace couplet
