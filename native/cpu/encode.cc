// encode: rows -> the nearest centroid of every group -> codes in pages.
#include "encode.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "../common/metric.h"
#include "../common/not_finite.h"
#include "backend.h"
#include "half.h"
#include "isa.h"
#include "pack.h"
#include "pages.h"
#include "pool.h"

namespace couplet::cpu {
namespace {

// One subtraction and fma: a channel of a centroid against a channel of a token. A core does about 30 of them a nanosecond.
constexpr int64_t pairs_of_a_thread = int64_t{1} << 21;  // waking another thread (10 us) pays from here on
constexpr int64_t pairs_of_a_task = int64_t{1} << 20;
constexpr int32_t scan_tokens = 64;  // tokens whose rows are one task of the scan for NaN

int64_t pairs_of(const couplet_encode_params& p) {
  return int64_t{p.tokens} * p.kv_heads * p.head_dim * couplet_codec_centroids(p.codec);
}

int threads_of(const couplet_encode_params& p) {
  int64_t const useful = pairs_of(p) / pairs_of_a_thread + 1;
  return static_cast<int>(std::min<int64_t>(resolve_threads(p.threads), useful));
}

int64_t element_bytes(const couplet_encode_params& p) { return p.dtype == COUPLET_FLOAT16 ? 2 : 4; }

// Channel 0 of a kv head of the i-th token of the call.
const uint8_t* row_of(const couplet_encode_params& p, int64_t token, int32_t kv_head) {
  return static_cast<const uint8_t*>(p.rows) + (token * p.token_stride + kv_head * p.head_stride) * element_bytes(p);
}

bool is_finite_at(const uint8_t* row, int32_t channel, bool half) {
  return half ? std::isfinite(half_to_float(reinterpret_cast<const uint16_t*>(row)[channel]))
              : std::isfinite(reinterpret_cast<const float*>(row)[channel]);
}

// Reports the first value that is not finite, by token, then kv head, then channel.
couplet_status report_not_finite(const couplet_encode_params& p, int64_t tokens_before, couplet_report* report) {
  bool const half = p.dtype == COUPLET_FLOAT16;
  for (int32_t token = 0; token < p.tokens; ++token)
    for (int32_t kv_head = 0; kv_head < p.kv_heads; ++kv_head)
      for (int32_t channel = 0; channel < p.head_dim; ++channel)
        if (!is_finite_at(row_of(p, token, kv_head), channel, half))
          return rows_not_finite(report, tokens_before + token, kv_head, channel);
  return fail(report, COUPLET_INTERNAL, {}, "The values of `rows` changed while they were read");
}

bool all_finite(const NearestBody& body, const couplet_encode_params& p, int threads) {
  std::atomic<bool> finite{true};
  parallel_for(threads, (int64_t{p.tokens} + scan_tokens - 1) / scan_tokens, [&](int64_t task, int) {
    int64_t const end = std::min<int64_t>(p.tokens, (task + 1) * scan_tokens);
    for (int64_t token = task * scan_tokens; token < end; ++token)
      for (int32_t kv_head = 0; kv_head < p.kv_heads; ++kv_head)
        if (!body.finite(row_of(p, token, kv_head), p.head_dim, p.dtype == COUPLET_FLOAT16))
          finite.store(false, std::memory_order_relaxed);
  });
  return finite.load();
}

// In registers of `lanes`: tokens rounded up times centroids, against tokens times centroids rounded up. Turning rows into a
// tile is worth about one centroid; reducing the lanes of one token to a code about four.
bool few_tokens(const NearestBody& body, const couplet_encode_params& p, int32_t tokens) {
  if (!p.table->columns) return false;
  int64_t const centroids = p.table->centroids;
  int64_t const across_tokens = (tokens + body.lanes - 1) / body.lanes * (centroids + 1);
  int64_t const across_centroids = tokens * (centroids / body.lanes + 4);
  return across_centroids < across_tokens;
}

// Slots [first_slot, first_slot + tokens) of one page and kv head, groups [first_group, end_group).
struct Job {
  const uint8_t* rows;
  uint8_t* page;
  int32_t kv_head;
  int32_t first_slot;
  int32_t tokens;
  int32_t first_group;
  int32_t end_group;
};

// A group of some tokens under its metric: float32 [tokens][group_channels] to `out`.
void measure(const couplet_encode_params& p, const float* metric, const uint8_t* rows, int32_t tokens, float* out) {
  int32_t const channels = p.codec.group_channels;
  float wide[COUPLET_MAX_HEAD_DIM];
  for (int32_t token = 0; token < tokens; ++token, out += channels) {
    const uint8_t* const row = rows + token * p.token_stride * element_bytes(p);
    const float* point = reinterpret_cast<const float*>(row);
    if (p.dtype == COUPLET_FLOAT16) {
      for (int32_t c = 0; c < channels; ++c) wide[c] = half_to_float(reinterpret_cast<const uint16_t*>(row)[c]);
      point = wide;
    }
    for (int32_t c = 0; c < channels; ++c) out[c] = measured_channel(metric, channels, c, point);
  }
}

void encode_job(const NearestBody& body, const couplet_encode_params& p, const Job& job) {
  const couplet_table& table = *p.table;
  int64_t const row_bytes = couplet_row_bytes(p.codec, p.page_tokens);
  int32_t const step = tile_tokens(p.codec.group_channels);
  uint16_t codes[64];
  alignas(64) float measured[tile_floats];
  for (int32_t group = job.first_group; group < job.end_group; ++group)
    for (int32_t done = 0; done < job.tokens; done += step) {
      NearestGroup nearest = {
          .rows = job.rows + (done * p.token_stride + int64_t{group} * p.codec.group_channels) * element_bytes(p),
          .token_stride = p.token_stride,
          .table = table.measured + group_offset(table, job.kv_head, group),
          .columns = table.columns ? table.columns + group_offset(table, job.kv_head, group) : nullptr,
          .tokens = std::min(step, job.tokens - done),
          .channels = p.codec.group_channels,
          .centroids = table.centroids,
          .half = p.dtype == COUPLET_FLOAT16,
      };
      if (table.metric) {
        measure(p, table.metric + metric_offset(table, job.kv_head, group), static_cast<const uint8_t*>(nearest.rows),
                nearest.tokens, measured);
        nearest.rows = measured;
        nearest.token_stride = nearest.channels;
        nearest.half = false;
      }
      (few_tokens(body, p, nearest.tokens) ? body.across_centroids : body.across_tokens)(nearest, codes);
      pack_codes(job.page + group * row_bytes, p.codec.code_bits, job.first_slot + done, nearest.tokens, codes);
    }
}

// A task is some groups of one kv head in one page: rows of the packed format are written by one task each. Tasks that
// follow each other share their centroids, not their tokens.
couplet_status encode_run(const NearestBody& body, const couplet_encode_params& p, int64_t tokens_before,
                          couplet_report* report) {
  if (p.tokens == 0) return COUPLET_OK;
  int const threads = threads_of(p);
  if (!all_finite(body, p, threads)) return report_not_finite(p, tokens_before, report);

  PageRange const pages = page_range(p.first_token, p.tokens, p.page_tokens);
  int64_t const pairs_of_a_group = int64_t{std::min(p.tokens, p.page_tokens)} * group_stride(*p.table);
  int32_t const groups = p.table->groups;
  int32_t const cache_line_groups = (16 + p.codec.group_channels - 1) / p.codec.group_channels;
  int32_t const task_groups = static_cast<int32_t>(
      std::clamp<int64_t>(pairs_of_a_task / pairs_of_a_group, std::min(cache_line_groups, groups), groups));
  int64_t const head_tasks = (groups + task_groups - 1) / task_groups;

  parallel_for(threads, p.kv_heads * head_tasks * pages.count, [&](int64_t task, int) {
    int64_t const page = pages.first + task % pages.count;
    int32_t const first_group = static_cast<int32_t>(task / pages.count % head_tasks) * task_groups;
    int32_t const kv_head = static_cast<int32_t>(task / pages.count / head_tasks);
    int64_t const begin = std::max(p.first_token, page * p.page_tokens);
    int64_t const end = std::min(p.first_token + p.tokens, (page + 1) * p.page_tokens);
    Job const job = {
        .rows = row_of(p, begin - p.first_token, kv_head),
        .page = p.pages[page] + p.page_offset + kv_head * p.page_stride,
        .kv_head = kv_head,
        .first_slot = static_cast<int32_t>(begin - page * p.page_tokens),
        .tokens = static_cast<int32_t>(end - begin),
        .first_group = first_group,
        .end_group = std::min(first_group + task_groups, groups),
    };
    encode_job(body, p, job);
  });
  return COUPLET_OK;
}

const NearestBody& chosen_body() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512: return nearest_avx512;
    case Isa::avx2: return nearest_avx2;
    default: break;
  }
#endif
  return nearest_portable;
}

// Calls visit(parameters of one run, tokens of the runs before it) until one fails.
template <class Visit>
couplet_status for_each_run(const couplet_encode_params& p, const Visit& visit) {
  if (!p.runs) return visit(p, 0);
  couplet_encode_params single = p;
  single.runs = nullptr;
  for (int32_t index = 0; index < p.run_count; ++index) {
    const couplet_encode_run& run = p.runs[index];
    single.rows = run.rows;
    single.pages = run.pages;
    single.token_stride = run.token_stride;
    single.head_stride = run.head_stride;
    single.first_token = run.first_token;
    single.tokens = run.tokens;
    if (couplet_status const status = visit(single, run.tokens_before)) return status;
  }
  return COUPLET_OK;
}

}  // namespace

couplet_status encode(const NearestBody& body, const couplet_encode_params& p, couplet_report* report) {
  return for_each_run(p, [&](const couplet_encode_params& run, int64_t tokens_before) {
    return encode_run(body, run, tokens_before, report);
  });
}

namespace {

couplet_status check(const couplet_encode_params* params, couplet_report* report) {
  if (!params) return check_pages(params, report);
  return for_each_run(*params, [&](const couplet_encode_params& run, int64_t) { return check_pages(&run, report); });
}

size_t workspace_bytes(const couplet_encode_params*) { return 0; }  // tiles lie on the stacks of the threads

couplet_status run(const couplet_encode_params* params, void*, void*, couplet_report* report) {
  if (couplet_status const status = check(params, report)) return status;
  return encode(chosen_body(), *params, report);
}

void describe(const couplet_encode_params* params, char* text, size_t text_bytes) {
  if (!text || text_bytes == 0) return;
  text[0] = 0;
  if (check(params, nullptr) != COUPLET_OK) return;
  NearestBody const& body = chosen_body();
  int32_t const tokens = std::min({params->tokens, params->page_tokens, tile_tokens(params->codec.group_channels)});
  std::snprintf(text, text_bytes, "encode %s %dc%db across %s", body.name, params->codec.group_channels,
                params->codec.code_bits, few_tokens(body, *params, tokens) ? "centroids" : "tokens");
}

}  // namespace

const couplet_encode_entries encode_entries = {
    .check = check,
    .workspace = workspace_bytes,
    .run = run,
    .describe = describe,
};

}  // namespace couplet::cpu
