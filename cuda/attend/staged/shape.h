// Decode attention on codes whose tables do not fit into shared memory together, or whose keys and values are coded differently: tables come
// through shared memory a slab at a time, while the logits of some thousand tokens wait there. docs/kernels-attend.md has the argument.
//
//   chunk    8 channels, 16 bytes in float16: 1, 2 or 4 groups
//   slab     8 chunks: the 128 bytes of all banks. Of keys, 4 places; of values, 8 chunks in a row
//   place    two chunks of keys that one lane looks up: a chunk and the one it is rotated with (kind half), or two neighbours
//   stage    the slabs that are in shared memory together: 1 with codes of 10 bits, 2 with codes of 8
//   chapter  the pages whose logits are in shared memory together. All slabs of keys are taken over them, the powers, all slabs of values
//
//   keys     are the A operand, rows = tokens, k = channels. Lane (g, t), with g = lane / 4 and t = lane % 4, has tokens 8g to 8g + 7 of a
//            page, two in each of 4 tiles (rows g and g + 8), and place t of the slab. Lanes with odd g look up their two chunks the other way
//            round, so that the 8 lanes of a phase of 16-byte loads never meet in a bank
//   queries  are the B operand: columns 0-3 are 4 heads for rows with even g, columns 4-7 the same for odd ones
//   values   are the A operand, rows = (word of a chunk, chunk g), k = (token, channel of a word): what a lookup returns is the operand.
//            Lane (g, t) has chunk g and tokens 16t to 16t + 15 of a page, two at a time
//   powers   are the B operand, columns = (channel of a word, head), k as above
#pragma once

#include <type_traits>

#include "../step.h"

namespace couplet::cuda::attend::staged {

inline constexpr int page_tokens = 64;
inline constexpr int warps = 16;  // 128 registers each: what a lane needs is small, because only one slab is under way
inline constexpr int threads = warps * 32;
inline constexpr int most_pages = 128;  // of a chapter

inline constexpr float nothing = -1e30f;  // the maximum of no logits
inline constexpr float unseen = -1e38f;   // the logit of a token that is not seen: 2^(unseen - nothing) is 0
inline constexpr float headroom = 10;     // powers stay below 2^10, far below the end of float16

// Bytes from one code's rows to the next. Rows of values lie 16 bytes apart modulo 128, so that the 4 lanes that need one chunk of 4 tokens
// meet in a bank by chance (2.6 of 8 lanes) and not always (4).
inline constexpr int key_stride = 128;
inline constexpr int value_stride = 144;

template <int Channels, int Bits>
struct Codec {
  static_assert(Bits == 8 || Bits == 10);
  static constexpr int channels = Channels;
  static constexpr int bits = Bits;
  static constexpr int centroids = 1 << Bits;
  static constexpr int groups = 8 / Channels;      // of a chunk
  static constexpr int words = Channels / 2;       // of a group, 4 bytes each
  static constexpr int slabs = Bits == 8 ? 2 : 1;  // of a stage
};

// Bytes of shared memory that tables of codes of `bits` need; angles and query operands lie behind those of keys.
inline constexpr int slab_angle_bytes = page_tokens * 4 * 32;  // [token][place] cosines and sines of 8 pairs, float16
inline constexpr int angle_row_bytes = 2 * 8 * 4 * 16;         // from one token to the next of a lane's
inline constexpr int operand_words = 4 * 4 * 2 * 4;            // of 4 heads: [head][place][chunk][word]
__host__ __device__ constexpr int key_bytes(int bits) {
  return (bits == 8 ? 2 : 1) * ((1 << bits) * key_stride + slab_angle_bytes);
}
__host__ __device__ constexpr int table_bytes(int bits, int quads) {
  int const keys = key_bytes(bits) + warps * quads * operand_words * 4;
  int const values = (bits == 8 ? 2 : 1) * (1 << bits) * value_stride;
  return keys > values ? keys : values;
}

// The thread's index, for loops of the whole block: see gpu::unknown.
__device__ __forceinline__ int thread_here() { return gpu::unknown(static_cast<int>(threadIdx.x)); }

// ---- places --------------------------------------------------------------------------------------------------------------------
struct Places {
  int rotated;  // places whose two chunks are rotated with each other: kind half
  int count;

  __device__ __forceinline__ explicit Places(const Step& step)
      : rotated(step.angles.kind == COUPLET_ROTARY_HALF ? step.angles.pairs / 8 : 0),
        count(step.params.head_dim / 16) {}
  __device__ __forceinline__ int chunk(int place, int upper) const {
    return place < rotated ? place + upper * rotated : 2 * place + upper;
  }
};

__host__ __device__ inline int slabs_of(int head_dim) { return blocks_of(head_dim, 64); }

// ---- shared memory -------------------------------------------------------------------------------------------------------------
// Behind the tables: this, and logits [heads][chapter tokens + 4] in the order of plane_of(), whose runs of 8 become 8 powers in float16.
template <int Quads>
struct alignas(16) Fixed {
  static constexpr int heads = 4 * Quads;
  float queries[heads][COUPLET_MAX_HEAD_DIM];  // scaled; from load_query on rotated by the position in its block of 512
  float weighted[heads][COUPLET_MAX_HEAD_DIM];  // of the segment so far
  float2 total[heads];                          // maximum, sum
  float factors[heads];                         // what the sums before the chapter shrink by
  float2 sums[warps][heads];                    // of a warp
  const uint8_t* pages[most_pages];             // of the chapter
  int at;                                       // the next segment's first unit
  int end;                                      // of the block's range
  Segment segment;
  const uint8_t* const* sequence_pages;
};

template <int Quads>
struct Shared {
  unsigned char* tables;  // dynamic shared memory begins here
  Fixed<Quads>* fixed;
  float* logits;
  int plane;  // floats from one head to the next
  int pages;  // of a chapter at most

  __device__ __forceinline__ Shared(const Step& step, unsigned char* dynamic, int most)
      : tables(dynamic),
        fixed(reinterpret_cast<Fixed<Quads>*>(
            dynamic + table_bytes(max(step.params.key_codec.code_bits, step.params.value_codec.code_bits), Quads))),
        logits(reinterpret_cast<float*>(fixed + 1)),
        plane(most * page_tokens + 4),
        pages(most) {}
  // Heads 0 and 2, and 1 and 3, side by side: a warp writes both at once, and they lie 16 bytes apart modulo 128.
  __device__ __forceinline__ float* logits_of(int head) const {
    return logits + (head / 4 * 4 + head % 2 * 2 + head / 2 % 2) * plane;
  }
  __device__ __forceinline__ float* results() const { return reinterpret_cast<float*>(tables); }
};
template <int Quads>
constexpr size_t shared_bytes(int bits, int pages) {
  return static_cast<size_t>(table_bytes(bits, Quads)) + sizeof(Fixed<Quads>) +
         4 * static_cast<size_t>(Quads) * (static_cast<size_t>(pages) * page_tokens + 4) * sizeof(float);
}

// The pages of a chapter and what is seen of them.
struct Chapter {
  int first;  // page of the sequence
  int pages;
  Interval seen;  // positions
};

}  // namespace couplet::cuda::attend::staged
