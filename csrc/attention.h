// Attention over a pack: the C interface and what it hands to the kernels of an instruction set.
//
// A pack is T tokens in segments that follow each other. Queries of a segment attend, causally and aligned at the last
// one, to its keys: rows prefix_start..prefix_stop of the pack, the beginning of an earlier segment, then its own.
//
// Letters: T tokens, H query heads, K key heads, G = H / K, D width of keys, V width of values, N keys of a segment.
// An item is one query row of one query head of a group, number row * G + head: all items share their keys.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace dpo {

struct AttentionArgs {
  const void* query;        // [T, H, D] of `dtype`, unit stride along D, as all inputs along their last dimension
  const void* key;          // [T, K, D]
  const void* value;        // [T, K, V]
  const float* sinks;       // [H] or null
  const int64_t* segments;  // [num_segments, 4]: start, stop, prefix_start, prefix_stop
  void* output;             // [T, H, V] contiguous: written by forward, read by backward
  float* scales;            // [H, T, 2] the largest score of a row and 1 / the sum of e^(score - largest): likewise
  const void* grad_output;  // [T, H, V]; this and the rest for backward alone
  void* grad_query;         // [T, H, D] contiguous
  void* grad_key;           // [T, K, D] contiguous
  void* grad_value;         // [T, K, V] contiguous
  float* grad_sinks;        // [H] or null
  void* scratch;            // as much as dpo_attention_..._scratch says
  int64_t num_segments, num_tokens, query_heads, key_heads, key_dim, value_dim;
  int64_t query_token, query_head, key_token, key_head, value_token, value_head, grad_token, grad_head;  // strides
  int64_t window;  // a row sees this many keys, itself included; 0: all
  int64_t chunk;   // a row sees no key before its chunk of this many; 0: all
  float scaling;
  float softcap;  // 0: none
  int32_t dtype;  // 0 float, 1 bf16, 2 fp16
  int32_t threads;
  int32_t failed;  // written: 1 when there is no memory for the lists of tasks
  int32_t unused;
};

struct AttentionSegment {
  int64_t start, stop, prefix_start, prefix_stop;
};

static inline int64_t prefix_keys(const AttentionSegment& segment) {
  return segment.prefix_stop - segment.prefix_start;
}
static inline int64_t num_queries(const AttentionSegment& segment) { return segment.stop - segment.start; }
static inline int64_t num_keys(const AttentionSegment& segment) { return prefix_keys(segment) + num_queries(segment); }

// Some items of a segment and a key head.
struct ForwardTask {
  AttentionSegment segment;
  int64_t key_head, first_item, last_item;
};

// All that adds to the gradients of one key head of a segment with keys of its own, and of those that share them: the
// sharing ones by length of their prefix, then the segment itself.
struct BackwardTask {
  const AttentionSegment* segments;
  int64_t num_segments, max_keys, key_head;
  double* grad_sinks;  // [G], to be overwritten; or null
};

struct AttentionKernels {
  int64_t strip;                                                    // items that are computed at a time
  int64_t (*forward_scratch)(const AttentionArgs&, int64_t keys);   // floats
  int64_t (*backward_scratch)(const AttentionArgs&, int64_t keys);  // floats
  void (*forward)(const AttentionArgs&, const ForwardTask&, float* scratch);
  void (*backward)(const AttentionArgs&, const BackwardTask&, float* scratch);
};

DPO_DECLARE_TABLES(AttentionKernels, attention_kernels)

}  // namespace dpo
