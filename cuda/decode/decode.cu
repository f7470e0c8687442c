// decode: codes in pages -> centroids -> rows.
//
// A thread owns 16 bytes of the row (8 or 4 channels) of the 8 tokens of an octet: it reads `code_bits` bytes of codes for each group
// in them, once, and writes 8 vectors. Neighbouring threads own neighbouring vectors, so a warp writes whole rows.
// Centroids come through L1, in the type of the rows where the table has it (float32, float16), so that they are copied and not
// converted: blocks are ordered by kv head, so that an SM reads the table of one head (64 KB of float16 at 8 bits and headDim 128)
// again and again. A copy in shared memory would be written 132 times per head, and its gathers conflict 2.6 times over.
#include <cstdio>
#include <type_traits>

#include "../backend.h"
#include "../device/elements.h"
#include "../device/pages.h"

namespace couplet::cuda {
namespace {

constexpr int block_threads = 128;

struct Call {
  void* rows;
  const void* table;  // [kv_heads][groups][centroids][group_channels], of the type that the kernel says
  Octets octets;
  int64_t token_stride;  // elements
  int64_t head_stride;   // elements
  uint32_t head_blocks;  // blocks of one kv head
  int32_t head_dim;
  int32_t groups;
  int32_t group_channels;
  int32_t code_bits;
};

// Of this thread: units of one kv head are pieces of the row of an octet, the piece running fastest.
struct Unit {
  int32_t kv_head;
  uint32_t octet;
  int32_t piece;
};

// False beyond the last one.
__device__ __forceinline__ bool unit_of_thread(const Call& call, int32_t pieces, Unit& unit) {
  uint32_t const kv_head = blockIdx.x / call.head_blocks;
  uint32_t const index = (blockIdx.x - kv_head * call.head_blocks) * block_threads + threadIdx.x;
  uint32_t const octet = index / static_cast<uint32_t>(pieces);
  unit = {static_cast<int32_t>(kv_head), octet, static_cast<int32_t>(index - octet * static_cast<uint32_t>(pieces))};
  return octet < call.octets.count;
}

// Words 32-bit words at `from`, aligned to as many bytes as they have.
template <int Words>
__device__ __forceinline__ void load_words(const void* from, uint32_t* to) {
  if constexpr (Words == 4) {
    uint4 const four = __ldg(static_cast<const uint4*>(from));
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
  } else if constexpr (Words == 2) {
    uint2 const two = __ldg(static_cast<const uint2*>(from));
    to[0] = two.x;
    to[1] = two.y;
  } else {
    static_assert(Words == 1);
    to[0] = __ldg(static_cast<const uint32_t*>(from));
  }
}

// Channels centroid channels at `from` as Elements, `words` of 32 bits.
template <class Element, int Channels>
__device__ __forceinline__ void load_channels(const Element* from, uint32_t* words) {
  load_words<Channels * sizeof(Element) / 4>(from, words);
}
template <class Element, int Channels>
__device__ __forceinline__ void load_channels(const float* from,
                                              uint32_t* words) requires std::is_same_v<Element, __nv_bfloat16> {
  uint32_t wide[Channels];
#pragma unroll
  for (int c = 0; c < Channels; c += 4) load_words < Channels<4 ? Channels : 4>(from + c, wide + c);
#pragma unroll
  for (int c = 0; c < Channels; c += 2)
    words[c / 2] = gpu::cvt_bf16x2(__uint_as_float(wide[c]), __uint_as_float(wide[c + 1]));
}

// A vector holds `parts` groups of Channels channels, or lies within one group, of which Channels is the vector then.
template <class Element, class Source, int Channels>
__global__ void __launch_bounds__(block_threads) decode_vectors(Call call) {
  constexpr int vector = 16 / sizeof(Element);
  constexpr int parts = vector / Channels;
  int32_t const pieces = call.head_dim / vector;
  Unit unit;
  if (!unit_of_thread(call, pieces, unit)) return;
  int64_t const group_elements = int64_t{call.group_channels} << call.code_bits;
  int32_t const channel = unit.piece * vector;
  int32_t const group = channel / call.group_channels;
  const uint8_t* const codes = call.octets.address(unit.octet, unit.kv_head, group, call.code_bits);
  Octet packed[parts];
#pragma unroll
  for (int part = 0; part < parts; ++part)
    packed[part] = load_octet(codes + int64_t{part} * call.octets.row_bytes, call.code_bits);

  const Source* const table = static_cast<const Source*>(call.table) +
                              (int64_t{unit.kv_head} * call.groups + group) * group_elements +
                              channel % call.group_channels;
  int32_t const token = call.octets.token(unit.octet);
  Element* const row = static_cast<Element*>(call.rows) + unit.kv_head * call.head_stride + channel;
#pragma unroll
  for (int slot = 0; slot < 8; ++slot) {
    uint32_t words[4];
#pragma unroll
    for (int part = 0; part < parts; ++part)
      load_channels<Element, Channels>(
          table + part * group_elements + packed[part].code(slot, call.code_bits) * call.group_channels,
          words + part * 4 / parts);
    if (token + slot >= 0 && token + slot < call.octets.tokens)
      *reinterpret_cast<uint4*>(row + (token + slot) * call.token_stride) = {words[0], words[1], words[2], words[3]};
  }
}

// Any group and any alignment: a thread owns one channel of an octet. Groups of 1 channel too: 8 octets of codes do not fit registers.
template <class Element>
__global__ void __launch_bounds__(block_threads) decode_channels(Call call) {
  Unit unit;
  if (!unit_of_thread(call, call.head_dim, unit)) return;
  int64_t const group_floats = int64_t{call.group_channels} << call.code_bits;
  int32_t const group = unit.piece / call.group_channels;
  Octet const packed = load_octet(call.octets.address(unit.octet, unit.kv_head, group, call.code_bits), call.code_bits);
  const float* const table = static_cast<const float*>(call.table) +
                             (int64_t{unit.kv_head} * call.groups + group) * group_floats +
                             unit.piece % call.group_channels;
  int32_t const token = call.octets.token(unit.octet);
  Element* const row = static_cast<Element*>(call.rows) + unit.kv_head * call.head_stride + unit.piece;
#pragma unroll
  for (int slot = 0; slot < 8; ++slot) {
    if (token + slot < 0 || token + slot >= call.octets.tokens) continue;
    store_element(row + (token + slot) * call.token_stride,
                  __ldg(table + packed.code(slot, call.code_bits) * call.group_channels));
  }
}

// ---- launcher ----------------------------------------------------------------------------------------------------------------
struct Selection {
  void (*kernel)(Call);
  const void* table;
  int32_t channels;  // that a thread owns of a token
  const char* name;
};

template <class Element, class Source>
Selection select_for(const couplet_decode_params& p, const Source* table) {
  constexpr int vector = 16 / sizeof(Element);
  if (rows_are_aligned(p, sizeof(Element))) {
    if (p.codec.group_channels % vector == 0)
      return {decode_vectors<Element, Source, vector>, table, vector, "vectors"};
    if (p.codec.group_channels == 4) return {decode_vectors<Element, Source, 4>, table, vector, "vectors"};
    if (p.codec.group_channels == 2) return {decode_vectors<Element, Source, 2>, table, vector, "vectors"};
  }
  return {decode_channels<Element>, table_of(p.table)->rows, 1, "channels"};
}

Selection select(const couplet_decode_params& p) {
  Table const& table = *table_of(p.table);
  if (p.dtype == COUPLET_FLOAT32) return select_for<float>(p, table.rows);
  if (p.dtype == COUPLET_FLOAT16) return select_for<__half>(p, table.float16_rows);
  return select_for<__nv_bfloat16>(p, table.rows);
}

int64_t head_blocks_of(const couplet_decode_params& p, const Selection& selection, const Octets& octets) {
  int64_t const units = int64_t{octets.count} * (p.head_dim / selection.channels);
  return (units + block_threads - 1) / block_threads;
}

// Whether |big| steps over all `count` rows that are |small| apart.
bool steps_over(int64_t big, int64_t small, int64_t count, int32_t head_dim) {
  auto const magnitude = [](int64_t value) {
    return value < 0 ? -static_cast<__int128>(value) : static_cast<__int128>(value);
  };
  return magnitude(big) >= magnitude(small) * (count - 1) + head_dim;
}

// Rows that overlap would be written in an order that nobody knows.
couplet_status check_disjoint(const couplet_decode_params& p, couplet_report* report) {
  bool const token_major = (p.tokens <= 1 || steps_over(p.token_stride, p.head_stride, p.kv_heads, p.head_dim)) &&
                           (p.kv_heads <= 1 || steps_over(p.head_stride, 0, 1, p.head_dim));
  bool const head_major = (p.kv_heads <= 1 || steps_over(p.head_stride, p.token_stride, p.tokens, p.head_dim)) &&
                          (p.tokens <= 1 || steps_over(p.token_stride, 0, 1, p.head_dim));
  if (token_major || head_major) return COUPLET_OK;
  return fail(report, COUPLET_INVALID_ARGUMENT, {},
              "Expected rows that do not overlap but received `tokenStride` %lld and `headStride` %lld for headDim %d",
              static_cast<long long>(p.token_stride), static_cast<long long>(p.head_stride), p.head_dim);
}

couplet_status check(const couplet_decode_params* params, couplet_report* report) {
  if (couplet_status const status = check_pages(params, report)) return status;
  couplet_decode_params const& p = *params;
  if (couplet_status const status = check_disjoint(p, report)) return status;
  if (p.tokens == 0 || head_blocks_of(p, select(p), octets_of(p)) <= most_blocks / p.kv_heads) return COUPLET_OK;
  return fail(report, COUPLET_INVALID_ARGUMENT, {}, "Expected fewer than %d `tokens` for %d kv heads in one call",
              p.tokens, p.kv_heads);
}

size_t workspace_bytes(const couplet_decode_params*) { return 0; }

couplet_status run(const couplet_decode_params* params, void*, void* stream, couplet_report* report) {
  if (couplet_status const status = check(params, report)) return status;
  couplet_decode_params const& p = *params;
  if (p.tokens == 0) return COUPLET_OK;
  Selection const selection = select(p);
  Octets const octets = octets_of(p);
  int64_t const head_blocks = head_blocks_of(p, selection, octets);
  Call const call = {
      .rows = p.rows,
      .table = selection.table,
      .octets = octets,
      .token_stride = p.token_stride,
      .head_stride = p.head_stride,
      .head_blocks = static_cast<uint32_t>(head_blocks),
      .head_dim = p.head_dim,
      .groups = couplet_codec_groups(p.codec, p.head_dim),
      .group_channels = p.codec.group_channels,
      .code_bits = p.codec.code_bits,
  };
  return status_of(gpu::launch(selection.kernel, static_cast<unsigned>(head_blocks * p.kv_heads), block_threads, 0,
                               static_cast<cudaStream_t>(stream), call),
                   report, "decode");
}

void describe(const couplet_decode_params* params, char* text, size_t text_bytes) {
  if (!text || text_bytes == 0) return;
  text[0] = 0;
  if (check(params, nullptr) != COUPLET_OK) return;
  std::snprintf(text, text_bytes, "decode gpu %dc%db by %s to %s", params->codec.group_channels,
                params->codec.code_bits, select(*params).name, dtype_name(params->dtype));
}

}  // namespace

const couplet_decode_entries decode_entries = {
    .check = check,
    .workspace = workspace_bytes,
    .run = run,
    .describe = describe,
};

}  // namespace couplet::cuda
