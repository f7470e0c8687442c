// A backend in plain double precision that trusts nobody: it follows the sentences of native/abi word by word, counts what is
// allocated, and checks what the cache asks of it. Independent of native/cpu.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "../../native/abi/backend.h"
#include "../../native/common/report.h"
#include "check.h"

namespace couplet::test {

inline std::atomic<int64_t> allocated_bytes{0};
inline std::atomic<int64_t> allocations_left{INT64_MAX};  // the allocation after these fails
inline std::atomic<int64_t> encoded_tokens{0};

struct FakeTable {
  couplet_codec codec;
  int32_t kv_heads, head_dim;
  std::vector<float> centroids;  // [kv_heads][groups][2^code_bits][group_channels]

  const float* centroid(int32_t head, int32_t group, int32_t code) const {
    int64_t const groups = couplet_codec_groups(codec, head_dim);
    return centroids.data() + ((head * groups + group) * couplet_codec_centroids(codec) + code) *
                                  static_cast<int64_t>(codec.group_channels);
  }
  int32_t nearest(int32_t head, int32_t group, const float* row) const {
    int32_t best = 0;
    double best_distance = std::numeric_limits<double>::infinity();
    for (int32_t code = 0; code < couplet_codec_centroids(codec); ++code) {
      double distance = 0;
      for (int32_t channel = 0; channel < codec.group_channels; ++channel) {
        double const difference = double{row[channel]} - centroid(head, group, code)[channel];
        distance += difference * difference;
      }
      if (distance < best_distance) best = code, best_distance = distance;
    }
    return best;
  }
};

inline const FakeTable* fake_table(const couplet_table* table) { return reinterpret_cast<const FakeTable*>(table); }

struct Bits {  // code of slot s of one group's row
  static int32_t read(const uint8_t* row, int64_t slot, int32_t bits) {
    int32_t code = 0;
    for (int32_t i = 0; i < bits; ++i) {
      int64_t const bit = slot * bits + i;
      code |= ((row[bit / 8] >> (bit % 8)) & 1) << i;
    }
    return code;
  }
  static void write(uint8_t* row, int64_t slot, int32_t bits, int32_t code) {
    for (int32_t i = 0; i < bits; ++i) {
      int64_t const bit = slot * bits + i;
      uint8_t const mask = static_cast<uint8_t>(1u << (bit % 8));
      row[bit / 8] = static_cast<uint8_t>((code >> i) & 1 ? row[bit / 8] | mask : row[bit / 8] & ~mask);
    }
  }
};

inline void* fake_allocate(size_t bytes) {
  if (allocations_left.fetch_sub(1) <= 0) return nullptr;
  void* const memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  std::memset(memory, 0xa5, bytes);  // nobody may rely on cleared memory
  allocated_bytes += static_cast<int64_t>(bytes);
  return memory;
}

inline void fake_release(void* memory, size_t bytes) {
  std::memset(memory, 0xdd, bytes);
  allocated_bytes -= static_cast<int64_t>(bytes);
  std::free(memory);
}

inline couplet_status fake_copy(void* to, const void* from, size_t bytes, void*, couplet_report*) {
  std::memcpy(to, from, bytes);
  return COUPLET_OK;
}

inline couplet_status fake_create_table(const couplet_table_params* params, couplet_table** out, couplet_report*) {
  size_t const floats = static_cast<size_t>(params->kv_heads) * static_cast<size_t>(params->head_dim) *
                        static_cast<size_t>(couplet_codec_centroids(params->codec));
  auto* const table = new FakeTable{params->codec, params->kv_heads, params->head_dim,
                                    std::vector<float>(params->centroids, params->centroids + floats)};
  *out = reinterpret_cast<couplet_table*>(table);
  return COUPLET_OK;
}

inline couplet_status fake_encode_run(const couplet_encode_params* p, int64_t tokens_before, couplet_report* report) {
  const FakeTable* const table = fake_table(p->table);
  int32_t const group_channels = p->codec.group_channels;
  for (int32_t i = 0; i < p->tokens; ++i) {
    int64_t const token = p->first_token + i;
    for (int32_t head = 0; head < p->kv_heads; ++head) {
      const float* const row = static_cast<const float*>(p->rows) + i * p->token_stride + head * p->head_stride;
      uint8_t* const page = p->pages[token / p->page_tokens] + p->page_offset + head * p->page_stride;
      for (int32_t channel = 0; channel < p->head_dim; ++channel) {
        if (std::isfinite(row[channel])) continue;
        return fail(report, COUPLET_NOT_FINITE, {.kv_head = head, .token = tokens_before + i, .channel = channel},
                    "Not finite");
      }
      for (int32_t group = 0; group < couplet_codec_groups(p->codec, p->head_dim); ++group) {
        Bits::write(page + group * couplet_row_bytes(p->codec, p->page_tokens), token % p->page_tokens,
                    p->codec.code_bits, table->nearest(head, group, row + group * group_channels));
      }
    }
  }
  encoded_tokens += p->tokens;
  return COUPLET_OK;
}

inline couplet_status fake_encode(const couplet_encode_params* p, void*, void*, couplet_report* report) {
  if (!p->runs) return fake_encode_run(p, 0, report);
  int64_t tokens_before = 0;
  std::vector<const uint8_t*> octets;  // that an earlier run has written
  for (int32_t index = 0; index < p->run_count; ++index) {
    const couplet_encode_run& run = p->runs[index];
    CHECK(run.tokens_before == tokens_before && run.tokens > 0 && run.tokens <= p->tokens, "run %d of %d tokens", index,
          run.tokens);
    tokens_before += run.tokens;
    for (int64_t octet = run.first_token / 8; octet <= (run.first_token + run.tokens - 1) / 8; ++octet) {
      const uint8_t* const place = run.pages[octet * 8 / p->page_tokens] + octet * 8 % p->page_tokens;
      CHECK(std::find(octets.begin(), octets.end(), place) == octets.end(), "two runs write one octet");
      octets.push_back(place);
    }
    couplet_encode_params single = *p;
    single.rows = run.rows;
    single.pages = run.pages;
    single.token_stride = run.token_stride;
    single.head_stride = run.head_stride;
    single.first_token = run.first_token;
    single.tokens = run.tokens;
    if (couplet_status const status = fake_encode_run(&single, run.tokens_before, report)) return status;
  }
  return COUPLET_OK;
}

inline couplet_status fake_store(const couplet_store_params* p, void*, void*, couplet_report* report) {
  int64_t first_token = 0;
  for (int32_t index = 0; index < p->run_count; ++index) {
    const couplet_store_run& run = p->runs[index];
    CHECK(run.first_token == first_token && run.tokens > 0 && run.tokens <= p->most_tokens, "run %d of %d tokens",
          index, run.tokens);
    CHECK(p->dtype == COUPLET_FLOAT32, "dtype %d", p->dtype);
    first_token += run.tokens;
    for (int32_t i = 0; i < run.tokens; ++i)
      for (int32_t head = 0; head < p->kv_heads; ++head)
        for (int32_t channel = 0; channel < p->head_dim; ++channel) {
          float const value =
              static_cast<const float*>(run.rows)[i * run.token_stride + head * run.head_stride + channel];
          if (!std::isfinite(value))
            return fail(report, COUPLET_NOT_FINITE, {.kv_head = head, .token = run.first_token + i, .channel = channel},
                        "Not finite");
          run.stored[i * run.stored_token_stride + head * run.stored_head_stride + channel] = value;
        }
  }
  return COUPLET_OK;
}

inline couplet_status fake_mix(const couplet_mix_params* p, void*, void*, couplet_report*) {
  CHECK(p->dtype == COUPLET_FLOAT32, "dtype %d", p->dtype);
  for (int32_t index = 0; index < p->run_count; ++index) {
    const couplet_mix_run& run = p->runs[index];
    CHECK(run.tokens > 0 && run.tokens <= p->most_tokens, "run %d of %d tokens", index, run.tokens);
    for (int32_t i = 0; i < run.tokens; ++i)
      for (int32_t head = 0; head < p->heads; ++head) {
        float* const row = static_cast<float*>(run.rows) + i * run.token_stride + head * run.head_stride;
        const float* const matrix =
            p->matrices + int64_t{head / (p->heads / p->matrix_heads)} * p->head_dim * p->head_dim;
        std::vector<double> mixed(static_cast<size_t>(p->head_dim));
        for (int32_t from = 0; from < p->head_dim; ++from)
          for (int32_t to = 0; to < p->head_dim; ++to)
            mixed[static_cast<size_t>(to)] += double{row[from]} * double{matrix[from * p->head_dim + to]};
        for (int32_t to = 0; to < p->head_dim; ++to) row[to] = static_cast<float>(mixed[static_cast<size_t>(to)]);
      }
  }
  return COUPLET_OK;
}

inline couplet_status fake_reorder(const couplet_reorder_params* p, void*, void*, couplet_report*) {
  CHECK(p->dtype == COUPLET_FLOAT32, "dtype %d", p->dtype);
  for (int32_t index = 0; index < p->run_count; ++index) {
    const couplet_reorder_run& run = p->runs[index];
    CHECK(run.tokens > 0 && run.tokens * run.heads <= p->most_rows, "run %d of %d tokens", index, run.tokens);
    for (int32_t i = 0; i < run.tokens; ++i)
      for (int32_t head = 0; head < run.heads; ++head)
        for (int32_t channel = 0; channel < p->head_dim; ++channel)
          static_cast<float*>(
              run.reordered)[i * run.reordered_token_stride + head * run.reordered_head_stride + channel] =
              static_cast<const float*>(run.rows)[i * run.token_stride + head * run.head_stride + p->order[channel]];
  }
  return COUPLET_OK;
}

// One row of a token as a query of this sequence reads it; false when nothing holds it.
inline bool fake_read(const couplet_attend_params& p, const couplet_attend_sequence& sequence, int64_t query,
                      int64_t token, int32_t head, bool is_key, double* out) {
  if (token >= sequence.coded_begin && token < sequence.coded_end && token < query - sequence.window + 1) {
    const FakeTable* const table = fake_table(is_key ? p.key_table : p.value_table);
    couplet_codec const codec = table->codec;
    const uint8_t* const page =
        sequence.pages[token / p.page_tokens] +
        (is_key ? p.key_page_offset + head * p.key_page_stride : p.value_page_offset + head * p.value_page_stride);
    for (int32_t channel = 0; channel < p.head_dim; ++channel) {
      int32_t const group = channel / codec.group_channels;
      int32_t const code =
          Bits::read(page + group * couplet_row_bytes(codec, p.page_tokens), token % p.page_tokens, codec.code_bits);
      out[channel] = table->centroid(head, group, code)[channel % codec.group_channels];
    }
    return true;
  }
  for (int32_t run = 0; run < sequence.dense_count; ++run) {
    const couplet_dense_rows& dense = sequence.dense[run];
    int64_t const i = token - dense.first_token;
    if (i < 0 || i >= dense.tokens) continue;
    const float* const row = is_key ? dense.keys + i * dense.key_token_stride + head * dense.key_head_stride
                                    : dense.values + i * dense.value_token_stride + head * dense.value_head_stride;
    for (int32_t channel = 0; channel < p.head_dim; ++channel) out[channel] = row[channel];
    return true;
  }
  return false;
}

inline couplet_status fake_attend(const couplet_attend_params* p, void*, void*, couplet_report*) {
  std::vector<double> row(static_cast<size_t>(p->head_dim)), sum(row.size()), logits;
  for (int32_t s = 0; s < p->sequence_count; ++s) {
    const couplet_attend_sequence& sequence = p->sequences[s];
    int64_t covered = 0;
    for (int32_t run = 0; run < sequence.dense_count; ++run) {
      CHECK(sequence.dense[run].first_token >= covered && sequence.dense[run].tokens > 0, "dense runs ascend");
      covered = sequence.dense[run].first_token + sequence.dense[run].tokens;
    }
    for (int32_t i = 0; i < sequence.query_tokens; ++i) {
      int64_t const query = sequence.first_query + i;
      for (int32_t query_head = 0; query_head < p->query_heads; ++query_head) {
        int32_t const head = query_head / (p->query_heads / p->kv_heads);
        const float* const q = static_cast<const float*>(sequence.queries) + i * sequence.query_token_stride +
                               query_head * sequence.query_head_stride;
        float* const out = static_cast<float*>(sequence.outputs) + i * sequence.output_token_stride +
                           query_head * sequence.output_head_stride;
        int64_t const first = p->local_window ? std::max<int64_t>(0, query - p->local_window + 1) : 0;
        logits.clear();
        double largest = -std::numeric_limits<double>::infinity(), total = 0;
        for (int64_t token = first; token <= query; ++token) {
          if (!CHECK(fake_read(*p, sequence, query, token, head, true, row.data()), "nothing holds token %lld",
                     static_cast<long long>(token))) {
            return COUPLET_INTERNAL;
          }
          double dot = 0;
          for (int32_t channel = 0; channel < p->head_dim; ++channel)
            dot += row[static_cast<size_t>(channel)] * q[channel];
          logits.push_back(dot * p->scale);
          largest = std::max(largest, logits.back());
        }
        std::fill(sum.begin(), sum.end(), 0);
        for (int64_t token = first; token <= query; ++token) {
          double const weight = std::exp(logits[static_cast<size_t>(token - first)] - largest);
          total += weight;
          fake_read(*p, sequence, query, token, head, false, row.data());
          for (size_t channel = 0; channel < row.size(); ++channel) sum[channel] += weight * row[channel];
        }
        for (size_t channel = 0; channel < row.size(); ++channel)
          out[channel] = static_cast<float>(sum[channel] / total);
      }
    }
  }
  return COUPLET_OK;
}

inline const couplet_backend* fake_backend() {
  static couplet_backend const fake = [] {
    couplet_backend backend = {};
    backend.abi_version = COUPLET_ABI_VERSION;
    backend.layout_version = COUPLET_LAYOUT_VERSION;
    backend.struct_bytes = sizeof(couplet_backend);
    backend.name = "fake";
    backend.device = {
        .count = [] { return 1; }, .select = [](int32_t, couplet_report*) { return COUPLET_OK; }, .describe = nullptr};
    backend.memory = {.is_host = 1,
                      .allocate = fake_allocate,
                      .release = fake_release,
                      .allocate_staging = fake_allocate,
                      .release_staging = fake_release,
                      .copy = fake_copy,
                      .upload = fake_copy,
                      .synchronize = [](void*, couplet_report*) { return COUPLET_OK; }};
    backend.table = {
        .create = fake_create_table,
        .destroy = [](couplet_table* table) { delete reinterpret_cast<FakeTable*>(table); },
        .bytes = [](const couplet_table* table) { return fake_table(table)->centroids.size() * sizeof(float); }};
    backend.encode = {.check = [](const couplet_encode_params*, couplet_report*) { return COUPLET_OK; },
                      .workspace = [](const couplet_encode_params*) -> size_t { return 64; },
                      .run = fake_encode,
                      .describe = nullptr};
    backend.attend = {.check = [](const couplet_attend_params*, couplet_report*) { return COUPLET_OK; },
                      .workspace = [](const couplet_attend_params*) -> size_t { return 1024; },
                      .run = fake_attend,
                      .describe = nullptr};
    backend.store = {.check = [](const couplet_store_params*, couplet_report*) { return COUPLET_OK; },
                     .workspace = [](const couplet_store_params*) -> size_t { return 64; },
                     .run = fake_store,
                     .describe = nullptr};
    backend.mix = {.check = [](const couplet_mix_params*, couplet_report*) { return COUPLET_OK; },
                   .workspace = [](const couplet_mix_params*) -> size_t { return 0; },
                   .run = fake_mix,
                   .describe = nullptr};
    backend.reorder = {.check = [](const couplet_reorder_params*, couplet_report*) { return COUPLET_OK; },
                       .workspace = [](const couplet_reorder_params*) -> size_t { return 0; },
                       .run = fake_reorder,
                       .describe = nullptr};
    return backend;
  }();
  return &fake;
}

// A call that leaves what it has to report in its workspace, as those of a GPU do.
template <auto run, class Params>
couplet_status fake_enqueued(const Params* params, void* workspace, void* stream, couplet_report*) {
  couplet_report found{};
  run(params, workspace, stream, &found);
  std::memcpy(workspace, &found, sizeof found);
  return COUPLET_OK;
}

// The same in memory that the cache takes for a device's: everything is uploaded, enqueued and downloaded.
inline const couplet_backend* fake_device_backend() {
  static couplet_backend const fake = [] {
    couplet_backend backend = *fake_backend();
    backend.name = "fake device";
    backend.memory.is_host = 0;
    backend.encode.workspace = [](const couplet_encode_params*) { return sizeof(couplet_report); };
    backend.encode.run = fake_enqueued<fake_encode, couplet_encode_params>;
    backend.store.workspace = [](const couplet_store_params*) { return sizeof(couplet_report); };
    backend.store.run = fake_enqueued<fake_store, couplet_store_params>;
    return backend;
  }();
  return &fake;
}

}  // namespace couplet::test
