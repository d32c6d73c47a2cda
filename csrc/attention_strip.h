// A strip of items: which keys it sees, its queries, and its scores.
#pragma once

#include <math.h>

#include "attention.h"
#include "attention_tiles.h"
#include "vector_math.h"

namespace dpo {
namespace DPO_ISA_NS {
namespace {

// Items [first, first + count) of a segment and a key head.
struct Strip {
  const AttentionArgs& args;
  const AttentionSegment& segment;
  int64_t key_head, first, count, group, prefix;
  // Where each item lies; beyond `count` anything that is there.
  int64_t token[kStrip], head[kStrip];

  Strip(const AttentionArgs& a, const AttentionSegment& s, int64_t key_head, int64_t first, int64_t count)
      : args(a),
        segment(s),
        key_head(key_head),
        first(first),
        count(count),
        group(a.query_heads / a.key_heads),
        prefix(prefix_keys(s)) {
    int64_t row = first / group, member = first % group;
    for (int64_t i = 0; i < kStrip; ++i) {
      token[i] = segment.start + (i < count ? row : 0);
      head[i] = key_head * group + member;
      if (++member == group) ++row, member = 0;
    }
  }

  int64_t first_row() const { return first / group; }
  int64_t last_row() const { return (first + count - 1) / group; }
  // First key that a row sees.
  int64_t first_key(int64_t row) const {
    const int64_t position = prefix + row;
    int64_t key = args.window ? larger(0, position - args.window + 1) : 0;
    if (args.chunk) key = larger(key, position / args.chunk * args.chunk);
    return key;
  }
  int64_t begin() const { return first_key(first_row()); }
  int64_t end() const { return prefix + last_row() + 1; }
  // Items from this one on are not before a key.
  int64_t causal_item(int64_t key) const { return clamped((key - prefix) * group - first); }
  // Items from this one on are too far behind a key.
  int64_t far_item(int64_t key) const {
    int64_t item = first + kStrip;
    if (args.window) item = smaller(item, (key + args.window - prefix) * group);
    if (args.chunk) item = smaller(item, ((key / args.chunk + 1) * args.chunk - prefix) * group);
    return clamped(item - first);
  }

  // Of item i: in a tensor with strides, in a contiguous one [T, H, width], in one [H, T, 2].
  int64_t strided(int64_t i, int64_t token_step, int64_t head_step) const {
    return token[i] * token_step + head[i] * head_step;
  }
  int64_t contiguous(int64_t i, int64_t width) const { return (token[i] * args.query_heads + head[i]) * width; }
  int64_t scale(int64_t i) const { return 2 * (head[i] * args.num_tokens + token[i]); }
};

// -inf, inf, -inf, kStrip times each: where an item is below a number and where it is not, as vectors at an offset.
struct Limits {
  float table[3 * kStrip];

  Limits() {
    for (int64_t i = 0; i < 3 * kStrip; ++i) table[i] = i / kStrip == 1 ? INFINITY : -INFINITY;
  }
};

// Scores [n][item] of keys [begin, end) that items do not see become -inf.
template <int NV>
void mask(const Strip& strip, const Limits& limits, int64_t begin, int64_t end, float* scores) {
  const int64_t seen_by_all = strip.first_key(strip.last_row()), seen_by_first = strip.prefix + strip.first_row() + 1;
  for (int64_t key = begin; key < end; ++key) {
    if (key >= seen_by_all && key < seen_by_first) key = smaller(seen_by_first, end);
    if (key >= end) break;
    const float* near = limits.table + kStrip - strip.causal_item(key);
    const float* far = limits.table + 2 * kStrip - strip.far_item(key);
    float* row = scores + (key - begin) * NV * kLanes;
    for (int v = 0; v < NV; ++v) {
      const Vec limit = min(Vec::load(near + v * kLanes), Vec::load(far + v * kLanes));
      min(Vec::load(row + v * kLanes), limit).store(row + v * kLanes);
    }
  }
}

// Scores [n][item] of keys [begin, end), capped and masked; `keys` is the row of the first of them.
template <int NV>
void compute_scores(const Strip& strip, const Limits& limits, const float* keys, int64_t begin, int64_t end,
                    const float* queries, float* scores) {
  const int64_t depth = strip.args.key_dim;
  dot_rows<NV>(keys, padded(depth), end - begin, queries, depth, scores);
  if (strip.args.softcap > 0) {
    const Vec cap = Vec::set(strip.args.softcap);
    for (int64_t i = 0; i < (end - begin) * NV * kLanes; i += kLanes)
      (tanh_(Vec::load(scores + i) / cap) * cap).store(scores + i);
  }
  mask<NV>(strip, limits, begin, end, scores);
}

// Queries of a strip, times the scaling, as [item][d] and as [d][item].
template <int NV, class E>
void load_queries(const Strip& strip, float* rows, float* columns) {
  const AttentionArgs& args = strip.args;
  const int64_t D = padded(args.key_dim);
  const Vec scaling = Vec::set(args.scaling);
  const E* query = static_cast<const E*>(args.query);
  for (int64_t i = 0; i < strip.count; ++i)
    load_row(rows + i * D, query + strip.strided(i, args.query_token, args.query_head), args.key_dim, scaling);
  clear(rows + strip.count * D, (NV * kLanes - strip.count) * D);
  transpose(rows, NV * kLanes, D, columns);
}

// Row of the pack in which key number n of a segment lies.
int64_t key_row(const AttentionSegment& segment, int64_t n) {
  return n < prefix_keys(segment) ? segment.prefix_start + n : segment.start + n - prefix_keys(segment);
}

// Keys and values [begin, end) of a segment, as float, to rows 0.. of `keys` and `values`.
template <class E>
void load_keys(const AttentionArgs& args, const AttentionSegment& segment, int64_t key_head, int64_t begin, int64_t end,
               float* keys, float* values) {
  const E* key = static_cast<const E*>(args.key) + key_head * args.key_head;
  const E* value = static_cast<const E*>(args.value) + key_head * args.value_head;
  const int64_t D = padded(args.key_dim), V = padded(args.value_dim);
  const Vec one = Vec::set(1.0f);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = key_row(segment, n);
    load_row(keys + (n - begin) * D, key + row * args.key_token, args.key_dim, one);
    load_row(values + (n - begin) * V, value + row * args.value_token, args.value_dim, one);
  }
}

// Memory in parts, or without memory how much of it there must be.
struct Parts {
  float* memory;
  int64_t size = 0;

  float* take(int64_t count) {
    float* part = memory == nullptr ? nullptr : memory + size;
    size += count;
    return part;
  }
};

}  // namespace
}  // namespace DPO_ISA_NS
}  // namespace dpo
