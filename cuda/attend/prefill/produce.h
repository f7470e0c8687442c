// Producers: codes, or rows in full precision, to tiles of float16. A lane has one place of a token, and lane_tokens tokens one after the other; a
// warp has 16 tokens. A lane's angles are turned on from token to token and from tile to tile, in float32, and read anew every 8 tiles.
#pragma once

#include "shape.h"

namespace couplet::cuda::attend::prefill {

// ---- lanes -------------------------------------------------------------------------------------------------------------------
template <int Dim>
struct Lane {
  int place;
  int token;  // its first one in a tile
  int warp;

  __device__ __forceinline__ Lane() {
    using S = Shape<Dim>;
    int const lane = gpu::lane_id();
    warp = static_cast<int>(threadIdx.x) / 32 - consumers;
    place = lane % S::places;
    token = warp * producer_tokens + lane / S::places * S::lane_tokens;
  }
};

// The chunks of a place. Of keys: pairs 8 place on, as x and y of half kind or side by side, and of channels that are not rotated any
// two. Of values: two that meet no other lane's in a bank.
struct Chunks {
  int at[2];
};
template <int Dim>
__device__ __forceinline__ Chunks key_chunks(const Angles& angles, int place) {
  int const rotated = angles.kind == COUPLET_ROTARY_HALF ? angles.pairs / 8 : 0;
  return place < rotated ? Chunks{{place, place + rotated}} : Chunks{{2 * place, 2 * place + 1}};
}
template <int Dim>
__device__ __forceinline__ Chunks value_chunks(int place) {
  return {{place, place + Shape<Dim>::places}};
}

// ---- rotation ----------------------------------------------------------------------------------------------------------------
constexpr int fresh_tiles = rotary_block / tile_tokens;  // after so many, angles are read anew

// Of a place's 8 pairs, without amplitudes: queries have those of keys as well.
template <int Dim>
struct KeyAngles {
  static constexpr int tokens = Shape<Dim>::lane_tokens;
  float2 now[8];   // of the token that is next
  float2 next[8];  // from one token of the lane to the next
  float2 tile[8];  // from its last one in a tile to its first in the tile behind

  __device__ __forceinline__ KeyAngles(const Angles& angles, int place) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int const pair = 8 * place + i;
      bool const rotated = pair < angles.pairs;
      now[i] = {1, 0};
      next[i] = rotated ? angles.offsets[angles.pairs + pair] : float2{1, 0};
      tile[i] = rotated ? angles.offsets[(tile_tokens - tokens + 1) * angles.pairs + pair] : float2{1, 0};
    }
  }
  __device__ __forceinline__ void start(const Angles& angles, int place, int position) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int const pair = 8 * place + i;
      if (pair < angles.pairs)
        now[i] = add_angles(angles.offsets[position % rotary_block * angles.pairs + pair],
                            block_angle(angles, position / rotary_block, pair));
    }
  }
  // Behind the lane's token i.
  __device__ __forceinline__ void advance(int i) {
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) now[pair] = add_angles(now[pair], i + 1 < tokens ? next[pair] : tile[pair]);
  }
};

// The 16 channels of a place, as its two chunks have them.
template <bool Interleaved>
__device__ __forceinline__ void rotate(float (&channels)[16], const float2 (&angles)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float& x = channels[Interleaved ? 2 * i : i];
    float& y = channels[Interleaved ? 2 * i + 1 : i + 8];
    float2 const turned = add_angles({x, y}, angles[i]);
    x = turned.x;
    y = turned.y;
  }
}

__device__ __forceinline__ uint4 packed(const float (&channels)[16], int half) {
  const float* const c = channels + 8 * half;
  return {gpu::cvt_f16x2(c[0], c[1]), gpu::cvt_f16x2(c[2], c[3]), gpu::cvt_f16x2(c[4], c[5]),
          gpu::cvt_f16x2(c[6], c[7])};
}

__device__ __forceinline__ void unpack(uint4 chunk, int half, float (&channels)[16]) {
  uint32_t const words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    float2 const two = __half22float2(half2_of(words[word]));
    channels[8 * half + 2 * word] = two.x;
    channels[8 * half + 2 * word + 1] = two.y;
  }
}

template <int Dim>
__device__ __forceinline__ void store_place(unsigned char* side, int token, Chunks chunks, uint4 first, uint4 second) {
  *reinterpret_cast<uint4*>(side + chunk_at<Dim>(gpu::unknown(token), chunks.at[0])) = first;
  *reinterpret_cast<uint4*>(side + chunk_at<Dim>(gpu::unknown(token), chunks.at[1])) = second;
}

// ---- codes -------------------------------------------------------------------------------------------------------------------
template <int Channels, int Bits>
struct Codec {
  static constexpr int channels = Channels;
  static constexpr int bits = Bits;
  static constexpr int groups = 8 / Channels;           // of a chunk
  static constexpr int words = Bits == 8 ? 1 : 2;       // that hold a lane's codes of a group
  static constexpr int all_words = 2 * groups * words;  // of a place
  static constexpr int row_bytes = tile_tokens * Bits / 8;
  static constexpr int row_words = row_bytes / 4;
};
constexpr int most_words = 8;

// Calls visit with the codec's type.
template <class Visit>
__device__ __forceinline__ void with_codec(couplet_codec codec, Visit visit) {
  if (codec.code_bits == 10)
    visit(Codec<8, 10>());
  else if (codec.group_channels == 8)
    visit(Codec<8, 8>());
  else if (codec.group_channels == 4)
    visit(Codec<4, 8>());
  else
    visit(Codec<2, 8>());
}

// One side of a stretch of codes.
struct Side {
  couplet_codec codec;
  int64_t page_offset;         // of the kv head's codes
  const unsigned char* table;  // float16 [centroids][head_dim], in shared or in device memory
  Chunks chunks;
};

// A lane's codes of one tile: [chunk][group][word]; 0 where there is no page or channel.
template <class C>
__device__ __forceinline__ void load_codes(const Side& side, const uint8_t* page, int head_dim, int token,
                                           uint32_t (&words)[most_words]) {
  int const first = min(gpu::unknown(token) * C::bits / 32, C::row_words - C::words);
#pragma unroll
  for (int i = 0; i < 2 * C::groups; ++i) {
    int const chunk = gpu::unknown(side.chunks.at[i / C::groups]);
    auto const* const row =
        reinterpret_cast<const uint32_t*>(page + side.page_offset + (chunk * C::groups + i % C::groups) * C::row_bytes);
#pragma unroll
    for (int word = 0; word < C::words; ++word)
      words[i * C::words + word] = page && 8 * chunk < head_dim ? __ldg(row + first + word) : 0;
  }
}

// Code of the lane's token i.
template <class C>
__device__ __forceinline__ uint32_t code_of(const uint32_t (&words)[most_words], int row, int token, int i) {
  if constexpr (C::bits == 8) {
    return words[row] >> (8 * ((gpu::unknown(token) + i) % 4)) & 0xff;
  } else {
    int const first = min(token * C::bits / 32, C::row_words - C::words);
    int const bit = (token + i) * C::bits - 32 * first;
    uint64_t const both = static_cast<uint64_t>(words[2 * row + 1]) << 32 | words[2 * row];
    return static_cast<uint32_t>(both >> bit) & ((1u << C::bits) - 1);
  }
}

// The chunk of the lane's token i.
template <class C>
__device__ __forceinline__ uint4 look_up(const Side& side, const uint32_t (&words)[most_words], int head_dim, int half,
                                         int token, int i) {
  int const chunk = gpu::unknown(side.chunks.at[half]);
  if (8 * chunk >= head_dim) return {0, 0, 0, 0};
  const unsigned char* const column = side.table + chunk * 16;
  uint32_t const code_bytes = 2 * static_cast<uint32_t>(head_dim);
  auto const row = [&](int group) {
    return column + group * 2 * C::channels + code_of<C>(words, half * C::groups + group, token, i) * code_bytes;
  };
  if constexpr (C::channels == 8) {
    return *reinterpret_cast<const uint4*>(row(0));
  } else if constexpr (C::channels == 4) {
    uint2 const low = *reinterpret_cast<const uint2*>(row(0));
    uint2 const high = *reinterpret_cast<const uint2*>(row(1));
    return {low.x, low.y, high.x, high.y};
  } else {
    auto const word = [&](int group) { return *reinterpret_cast<const uint32_t*>(row(group)); };
    return {word(0), word(1), word(2), word(3)};
  }
}

template <class C, int Dim>
__device__ __forceinline__ void copy_codes(const Side& side, const uint32_t (&words)[most_words], int head_dim,
                                           int token, unsigned char* to) {
#pragma unroll
  for (int i = 0; i < Shape<Dim>::lane_tokens; ++i)
    store_place<Dim>(to, token + i, side.chunks, look_up<C>(side, words, head_dim, 0, token, i),
                     look_up<C>(side, words, head_dim, 1, token, i));
}

template <class C, int Dim, bool Interleaved>
__device__ __forceinline__ void rotate_codes(const Side& side, const uint32_t (&words)[most_words], int head_dim,
                                             KeyAngles<Dim>& angles, int token, unsigned char* to) {
#pragma unroll
  for (int first = 0; first < Shape<Dim>::lane_tokens; first += 2) {
    uint4 chunks[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) chunks[i][half] = look_up<C>(side, words, head_dim, half, token, first + i);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float channels[16];
      unpack(chunks[i][0], 0, channels);
      unpack(chunks[i][1], 1, channels);
      rotate<Interleaved>(channels, angles.now);
      store_place<Dim>(to, token + first + i, side.chunks, packed(channels, 0), packed(channels, 1));
      angles.advance(first + i);
    }
  }
}

// ---- rows in full precision ----------------------------------------------------------------------------------------------------
// The run that the last token was in: one search for many tokens.
struct Run {
  const float* keys = nullptr;  // of token `first`, for the kv head
  const float* values = nullptr;
  int64_t key_stride = 0;
  int64_t value_stride = 0;
  int first = 0;
  int end = 0;

  __device__ __forceinline__ DenseToken token(const couplet_attend_sequence& sequence, int position, int kv_head) {
    if (position < first || position >= end) find(sequence, position, kv_head);
    if (position < first || position >= end) return {nullptr, nullptr};
    int64_t const i = position - first;
    return {keys + i * key_stride, values + i * value_stride};
  }
  __device__ __forceinline__ void find(const couplet_attend_sequence& sequence, int position, int kv_head) {
    for (int run = 0; run < sequence.dense_count; ++run) {
      const couplet_dense_rows& rows = sequence.dense[run];
      if (position < rows.first_token || position >= rows.first_token + rows.tokens) continue;
      keys = rows.keys + kv_head * rows.key_head_stride;
      values = rows.values + kv_head * rows.value_head_stride;
      key_stride = rows.key_token_stride;
      value_stride = rows.value_token_stride;
      first = rows.first_token;
      end = rows.first_token + rows.tokens;
      return;
    }
  }
};

// Zeros where there is no row or no channel.
__device__ __forceinline__ void load_place(const float* row, Chunks chunks, int head_dim, float (&channels)[16]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* const from = row + 8 * chunks.at[half];
    bool const there = row && 8 * chunks.at[half] < head_dim;
    float* const to = channels + 8 * half;
    if (there && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      float4 const low = __ldg(reinterpret_cast<const float4*>(from));
      float4 const high = __ldg(reinterpret_cast<const float4*>(from) + 1);
      to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
      to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
    } else {
#pragma unroll
      for (int channel = 0; channel < 8; ++channel) to[channel] = there ? __ldg(from + channel) : 0;
    }
  }
}

__device__ __forceinline__ const float* row_of(const float* row, int token) {
  return reinterpret_cast<const float*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(row), token));
}

__device__ __forceinline__ uint32_t reaches(uint4 chunk, uint32_t least) {
  return reaches(chunk.x, least) | reaches(chunk.y, least) | reaches(chunk.z, least) | reaches(chunk.w, least);
}

// `own`: of token gpu::lane_id() of the warp's 16. Not 0 where a key is too large for float16.
template <int Dim>
__device__ __forceinline__ uint32_t take_keys(const Step& step, const float* own, const Lane<Dim>& lane,
                                              KeyAngles<Dim>& angles, unsigned char* to) {
  bool const interleaved = step.angles.kind != COUPLET_ROTARY_HALF;
  Chunks const chunks = key_chunks<Dim>(step.angles, lane.place);
  constexpr int tokens = Shape<Dim>::lane_tokens;
  uint32_t beyond = 0;
#pragma unroll
  for (int first = 0; first < tokens; first += 2) {
    float channels[2][16];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      load_place(row_of(own, lane.token % producer_tokens + first + i), chunks, step.params.head_dim, channels[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (interleaved)
        rotate<true>(channels[i], angles.now);
      else
        rotate<false>(channels[i], angles.now);
      angles.advance(first + i);
      uint4 const low = packed(channels[i], 0);
      uint4 const high = packed(channels[i], 1);
      beyond |= reaches(low, most_key) | reaches(high, most_key);
      store_place<Dim>(to, lane.token + first + i, chunks, low, high);
    }
  }
  return beyond;
}

// Not 0 where a value is too large for float16, or the largest of all 16 tokens is too small.
template <int Dim>
__device__ __forceinline__ uint32_t take_values(const Step& step, const float* own, const Lane<Dim>& lane,
                                                unsigned char* to) {
  Chunks const chunks = value_chunks<Dim>(lane.place);
  constexpr int tokens = Shape<Dim>::lane_tokens;
  uint32_t beyond = 0;
  uint32_t enough = 0;
  uint32_t any = 0;  // bits of what is not 0
#pragma unroll
  for (int first = 0; first < tokens; first += 2) {
    float channels[2][16];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      load_place(row_of(own, lane.token % producer_tokens + first + i), chunks, step.params.head_dim, channels[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (float channel : channels[i]) any |= __float_as_uint(channel) << 1;
      uint4 const low = packed(channels[i], 0);
      uint4 const high = packed(channels[i], 1);
      beyond |= reaches(low, most_value) | reaches(high, most_value);
      enough |= reaches(low, least_value) | reaches(high, least_value);
      store_place<Dim>(to, lane.token + first + i, chunks, low, high);
    }
  }
  bool const small = __any_sync(~0u, any != 0) && !__any_sync(~0u, enough != 0);
  return beyond | (small ? 1 : 0);
}

// ---- stretches -----------------------------------------------------------------------------------------------------------------
// Stages go round through all tiles of all tasks.
template <int Dim>
struct Producer {
  const Step& step;
  Shared<Dim>& shared;
  bool const rotates;
  bool const tables_fit;
  Lane<Dim> const lane;
  KeyAngles<Dim> angles;
  unsigned count = 0;   // tiles so far
  int table_head = -1;  // whose tables are in shared memory

  __device__ __forceinline__ Producer(const Step& step, Shared<Dim>& shared, bool tables_fit)
      : step(step),
        shared(shared),
        rotates(step.angles.pairs > 0),
        tables_fit(tables_fit),
        angles(step.angles, lane.place) {}

  __device__ __forceinline__ typename Shared<Dim>::Tile& begin_tile(int index, int begin) {
    if (rotates && index % fresh_tiles == 0) angles.start(step.angles, lane.place, begin + lane.token);
    if (count >= stages) gpu::wait(shared.emptied[count % stages], (count / stages - 1) & 1);
    return shared.tiles[count % stages];
  }
  __device__ __forceinline__ void end_tile(uint32_t there) {
    if (gpu::lane_id() == 0) shared.there[count % stages][lane.warp] = static_cast<uint16_t>(there);
    __syncwarp();
    if (gpu::lane_id() == 0) gpu::arrive(shared.filled[count % stages]);
    ++count;
  }

  // Copies the kv head's tables into shared memory; all producers are done with those before.
  __device__ __forceinline__ void load_tables(int kv_head) {
    int const bytes = 256 * 2 * step.params.head_dim;
    gpu::barrier_sync(producer_barrier, producer_threads);
    if (kv_head != table_head) {
      auto const* const keys = reinterpret_cast<const unsigned char*>(step.key_by_code) + int64_t{kv_head} * bytes;
      auto const* const values = reinterpret_cast<const unsigned char*>(step.value_by_code) + int64_t{kv_head} * bytes;
      int const thread = static_cast<int>(threadIdx.x) - consumers * 32;
#pragma unroll 4
      for (int at = thread * 16; at < bytes; at += producer_threads * 16) {
        gpu::cp_async<16>(shared.tables + at, keys + at);
        gpu::cp_async<16>(shared.tables + bytes + at, values + at);
      }
      gpu::cp_async_commit();
      gpu::cp_async_wait<0>();
      table_head = kv_head;
    }
    gpu::barrier_sync(producer_barrier, producer_threads);
  }

  __device__ __forceinline__ const unsigned char* table_of(const __half* by_code, couplet_codec codec, int kv_head,
                                                           int place_in_shared) {
    int64_t const bytes = int64_t{2 * step.params.head_dim} << codec.code_bits;
    return tables_fit ? shared.tables + place_in_shared * bytes
                      : reinterpret_cast<const unsigned char*>(by_code) + kv_head * bytes;
  }

  __device__ __forceinline__ void take_codes(const Task& task, Interval positions) {
    const couplet_attend_params& params = step.params;
    int const kv_head = task.kv_head;
    int const head_dim = params.head_dim;
    if (tables_fit) load_tables(kv_head);
    Side const keys{params.key_codec, params.key_page_offset + kv_head * params.key_page_stride,
                    table_of(step.key_by_code, params.key_codec, kv_head, 0), key_chunks<Dim>(step.angles, lane.place)};
    Side const values{params.value_codec, params.value_page_offset + kv_head * params.value_page_stride,
                      table_of(step.value_by_code, params.value_codec, kv_head, 1), value_chunks<Dim>(lane.place)};
    const uint8_t* const* const pages = task.sequence->pages + positions.begin / tile_tokens;
    int const tiles = blocks_of(positions.end - positions.begin, tile_tokens);
    const uint8_t* some_pages = nullptr;  // a lane has one of 32
    auto const page_of = [&](int tile) {
      if (tile % 32 == 0) some_pages = tile + gpu::lane_id() < tiles ? pages[tile + gpu::lane_id()] : nullptr;
      return reinterpret_cast<const uint8_t*>(
          __shfl_sync(~0u, reinterpret_cast<unsigned long long>(some_pages), tile % 32));
    };
    uint32_t key_words[most_words]{};
    uint32_t value_words[most_words]{};
    auto const load = [&](const Side& side, const uint8_t* page, uint32_t(&words)[most_words]) {
      with_codec(side.codec, [&](auto codec) { load_codes<decltype(codec)>(side, page, head_dim, lane.token, words); });
    };
    const uint8_t* page = page_of(0);
    load(keys, page, key_words);
    load(values, page, value_words);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      uint32_t const there = page ? 0xffff : 0;
      auto& to = begin_tile(tile, positions.begin + tile * tile_tokens);
      page = tile + 1 < tiles ? page_of(tile + 1) : nullptr;
      with_codec(keys.codec, [&](auto codec) {
        using C = decltype(codec);
        if (!rotates)
          copy_codes<C, Dim>(keys, key_words, head_dim, lane.token, to.keys);
        else if (step.angles.kind == COUPLET_ROTARY_HALF)
          rotate_codes<C, Dim, false>(keys, key_words, head_dim, angles, lane.token, to.keys);
        else
          rotate_codes<C, Dim, true>(keys, key_words, head_dim, angles, lane.token, to.keys);
      });
      load(keys, page, key_words);
      with_codec(values.codec, [&](auto codec) {
        copy_codes<decltype(codec), Dim>(values, value_words, head_dim, lane.token, to.values);
      });
      load(values, page, value_words);
      end_tile(there);
    }
  }

  __device__ __forceinline__ void take_rows(const Task& task, Interval positions) {
    const couplet_attend_sequence& sequence = *task.sequence;
    Run run;
    int const tiles = blocks_of(positions.end - positions.begin, tile_tokens);
    uint32_t beyond = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      int const begin = positions.begin + tile * tile_tokens;
      int const position = begin + lane.warp * producer_tokens + gpu::lane_id();
      DenseToken own{nullptr, nullptr};
      if (gpu::lane_id() < producer_tokens && position < positions.end)
        own = run.token(sequence, position, task.kv_head);
      uint32_t const there = __ballot_sync(~0u, own.key != nullptr);
      auto& to = begin_tile(tile, begin);
      beyond |= take_keys<Dim>(step, own.key, lane, angles, to.keys);
      beyond |= take_values<Dim>(step, own.value, lane, to.values);
      end_tile(there);
    }
    if (__any_sync(~0u, beyond != 0) && gpu::lane_id() == 0) leave_to_wide(step, task);
  }
};

template <int Dim>
__device__ __forceinline__ void run_producer(const Step& step, Shared<Dim>& shared, bool tables_fit) {
  Producer<Dim> producer(step, shared, tables_fit);
  Task& task = shared.tasks[threadIdx.x / 32];
  for_each_task(step, task, [&] {
#pragma unroll 1
    for (int part = 0; part < 3; ++part) {
      Interval const positions = task.stretch(part);
      if (positions.begin >= positions.end) continue;
      if (part == 1)
        producer.take_codes(task, positions);
      else
        producer.take_rows(task, positions);
    }
  });
}

}  // namespace couplet::cuda::attend::prefill
