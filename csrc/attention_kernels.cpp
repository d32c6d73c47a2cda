// Attention of some items of a segment, forward and backward; compiled once per instruction set.
//
// Items lie along the lanes of vectors and keys along rows, so that softmax needs no sum across lanes and keys and
// values are read row by row. A strip is the items that are computed at a time, a block the keys: no more scores are
// held.
#include <float.h>
#include <math.h>

#include "attention.h"
#include "attention_strip.h"
#include "attention_tiles.h"
#include "simd.h"
#include "vector_math.h"

namespace dpo {
namespace DPO_ISA_NS {
namespace {

constexpr int64_t kForwardBlock = 256, kBackwardBlock = 128;

struct ForwardScratch {
  int64_t D, V;
  float *keys, *values, *rows, *queries, *scores, *sums;

  ForwardScratch(const AttentionArgs& args, int64_t num_keys, Parts& parts)
      : D(padded(args.key_dim)), V(padded(args.value_dim)) {
    keys = parts.take(num_keys * D);
    values = parts.take(num_keys * V);
    rows = parts.take(kStrip * larger(D, V));
    queries = parts.take(kStrip * D);
    scores = parts.take(kStrip * kForwardBlock);
    sums = parts.take(kStrip * V);
  }
};

int64_t forward_scratch(const AttentionArgs& args, int64_t keys) {
  Parts parts{nullptr};
  ForwardScratch(args, keys, parts);
  return parts.size;
}

// The largest score of every item so far, and the sum of e^(score - largest).
template <int NV>
struct Softmax {
  Vec highest[NV], total[NV];

  explicit Softmax(const Strip& strip) {
    float lanes[kStrip];
    const float* sinks = strip.args.sinks;
    for (int64_t i = 0; i < kStrip; ++i) lanes[i] = sinks == nullptr ? -INFINITY : sinks[strip.head[i]];
    for (int v = 0; v < NV; ++v) {
      highest[v] = Vec::load(lanes + v * kLanes);
      // a sink is a score whose value is zero; without one this is 0, too
      total[v] = exp_(highest[v] - base(highest[v]));
    }
  }

  // Nothing seen yet is -inf, which subtracted from itself would be nan.
  static Vec base(Vec highest) { return max(highest, Vec::set(-FLT_MAX)); }

  // Scores of more keys become e^(score - largest), and what was summed up before is to be multiplied by `factors`.
  void add(float* scores, int64_t count, Vec (&factors)[NV]) {
    Vec peak[NV], sum[NV];
    for (int v = 0; v < NV; ++v) peak[v] = highest[v];
    for (int64_t n = 0; n < count; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) peak[v] = max(Vec::load(scores + (n * NV + v) * kLanes), peak[v]);
    for (int v = 0; v < NV; ++v) {
      factors[v] = exp_(highest[v] - base(peak[v]));
      highest[v] = peak[v];
      peak[v] = base(peak[v]);
      sum[v] = Vec::zero();
    }
    for (int64_t n = 0; n < count; ++n) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        float* score = scores + (n * NV + v) * kLanes;
        const Vec weight = exp_(Vec::load(score) - peak[v]);
        weight.store(score);
        sum[v] = sum[v] + weight;
      }
    }
    for (int v = 0; v < NV; ++v) total[v] = fma(total[v], factors[v], sum[v]);
  }
};

// `offset` is the number of the first key in scratch memory.
template <int NV, class E>
void forward_strip(const Strip& strip, const Limits& limits, int64_t offset, const ForwardScratch& use) {
  constexpr int64_t width = NV * kLanes;
  const AttentionArgs& args = strip.args;
  const int64_t begin = strip.begin(), end = strip.end();
  load_queries<NV, E>(strip, use.rows, use.queries);
  Softmax<NV> softmax(strip);
  for (int64_t first = begin; first < end; first += kForwardBlock) {
    const int64_t last = smaller(end, first + kForwardBlock), count = last - first;
    compute_scores<NV>(strip, limits, use.keys + (first - offset) * use.D, first, last, use.queries, use.scores);
    Vec factors[NV];
    softmax.add(use.scores, count, factors);
    const float* values = use.values + (first - offset) * use.V;
    sum_rows<NV>(values, use.V, count, use.scores, first == begin ? nullptr : factors, args.value_dim, use.sums);
  }
  float highest[width], share[width];
  for (int v = 0; v < NV; ++v) {
    const Vec inverse = Vec::set(1.0f) / softmax.total[v];
    for (int64_t d = 0; d < args.value_dim; ++d) {
      float* sum = use.sums + (d * NV + v) * kLanes;
      (Vec::load(sum) * inverse).store(sum);
    }
    softmax.base(softmax.highest[v]).store(highest + v * kLanes);
    inverse.store(share + v * kLanes);
  }
  transpose(use.sums, use.V, width, use.rows);
  E* output = static_cast<E*>(args.output);
  for (int64_t i = 0; i < strip.count; ++i) {
    store_row(output + strip.contiguous(i, args.value_dim), use.rows + i * use.V, args.value_dim);
    args.scales[strip.scale(i)] = highest[i];
    args.scales[strip.scale(i) + 1] = share[i];
  }
}

template <class E>
void forward_task(const AttentionArgs& args, const ForwardTask& task, float* memory) {
  const Limits limits;
  const Strip whole(args, task.segment, task.key_head, task.first_item, task.last_item - task.first_item);
  const int64_t offset = whole.begin(), end = whole.end();
  Parts parts{memory};
  const ForwardScratch use(args, end - offset, parts);
  load_keys<E>(args, task.segment, task.key_head, offset, end, use.keys, use.values);
  for (int64_t item = task.first_item; item < task.last_item; item += kStrip) {
    const Strip strip(args, task.segment, task.key_head, item, smaller(kStrip, task.last_item - item));
    if (strip.count <= kLanes)
      forward_strip<1, E>(strip, limits, offset, use);
    else
      forward_strip<kTileVectors, E>(strip, limits, offset, use);
  }
}

void forward(const AttentionArgs& args, const ForwardTask& task, float* memory) {
  if (args.dtype == 0) forward_task<float>(args, task, memory);
  if (args.dtype == 1) forward_task<bf16>(args, task, memory);
  if (args.dtype == 2) forward_task<fp16>(args, task, memory);
}

struct BackwardScratch {
  int64_t D, V;
  float *keys, *values, *key_sums, *value_sums;
  float *query_rows, *queries, *grad_rows, *grads, *output_rows, *outputs, *scores, *slopes, *sums;

  BackwardScratch(const AttentionArgs& args, int64_t num_keys, Parts& parts)
      : D(padded(args.key_dim)), V(padded(args.value_dim)) {
    keys = parts.take(num_keys * D);
    values = parts.take(num_keys * V);
    key_sums = parts.take(num_keys * D);
    value_sums = parts.take(num_keys * V);
    query_rows = parts.take(kStrip * D);
    queries = parts.take(kStrip * D);
    grad_rows = parts.take(kStrip * V);
    grads = parts.take(kStrip * V);
    output_rows = parts.take(kStrip * V);
    outputs = parts.take(kStrip * V);
    scores = parts.take(kStrip * kBackwardBlock);
    slopes = parts.take(kStrip * kBackwardBlock);
    sums = parts.take(kStrip * D);
  }
};

int64_t backward_scratch(const AttentionArgs& args, int64_t keys) {
  Parts parts{nullptr};
  BackwardScratch(args, keys, parts);
  return parts.size;
}

// What the backward pass needs of every item: the softmax, and <gradient, output>.
struct Items {
  float highest[kStrip], share[kStrip], product[kStrip];
};

// Upstream gradients of a strip as [item][d] and [d][item].
template <int NV, class E>
void load_gradients(const Strip& strip, const BackwardScratch& use, Items& items) {
  const AttentionArgs& args = strip.args;
  const int64_t V = use.V;
  const Vec one = Vec::set(1.0f);
  const E* grad = static_cast<const E*>(args.grad_output);
  const E* output = static_cast<const E*>(args.output);
  for (int64_t i = 0; i < kStrip; ++i) items.highest[i] = items.share[i] = 0.0f;
  for (int64_t i = 0; i < strip.count; ++i) {
    load_row(use.grad_rows + i * V, grad + strip.strided(i, args.grad_token, args.grad_head), args.value_dim, one);
    load_row(use.output_rows + i * V, output + strip.contiguous(i, args.value_dim), args.value_dim, one);
    items.highest[i] = args.scales[strip.scale(i)];
    items.share[i] = args.scales[strip.scale(i) + 1];
  }
  const int64_t rest = (NV * kLanes - strip.count) * V;
  clear(use.grad_rows + strip.count * V, rest);
  clear(use.output_rows + strip.count * V, rest);
  transpose(use.grad_rows, NV * kLanes, V, use.grads);
  transpose(use.output_rows, NV * kLanes, V, use.outputs);
  // added in the order of dot_rows: an item that sees one key has no gradient, to the bit
  for (int v = 0; v < NV; ++v) {
    Vec product = Vec::zero();
    for (int64_t d = 0; d < args.value_dim; ++d) {
      const int64_t at = (d * NV + v) * kLanes;
      product = add_product(Vec::load(use.outputs + at), Vec::load(use.grads + at), product);
    }
    product.store(items.product + v * kLanes);
  }
}

// Scores become probabilities, and `slopes`, the gradients of probabilities, those of scores.
template <int NV>
void softmax_gradient(float softcap, const Items& items, int64_t count, float* scores, float* slopes) {
  const bool capped = softcap > 0;
  const Vec cap = Vec::set(capped ? softcap : 1.0f), one = Vec::set(1.0f), least = Vec::set(-1.0f);
  Vec highest[NV], share[NV], product[NV];
  for (int v = 0; v < NV; ++v) {
    highest[v] = Vec::load(items.highest + v * kLanes);
    share[v] = Vec::load(items.share + v * kLanes);
    product[v] = Vec::load(items.product + v * kLanes);
  }
  for (int64_t n = 0; n < count; ++n) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* score = scores + (n * NV + v) * kLanes;
      float* slope = slopes + (n * NV + v) * kLanes;
      const Vec s = Vec::load(score);
      const Vec p = exp_(s - highest[v]) * share[v];
      Vec gradient = p * (Vec::load(slope) - product[v]);
      if (capped) {
        // a masked score is -inf, and its gradient 0
        const Vec t = max(s / cap, least);
        gradient = gradient * fnma(t, t, one);
      }
      p.store(score);
      gradient.store(slope);
    }
  }
}

// Minus the probability of the sink times <gradient, output>, by member of the group.
void add_sink_gradients(const Strip& strip, const Items& items, double* grad_sinks) {
  float sinks[kStrip];
  for (int64_t i = 0; i < kStrip; ++i) sinks[i] = strip.args.sinks[strip.head[i]];
  for (int64_t i = 0; i < kStrip; i += kLanes)
    (exp_(Vec::load(sinks + i) - Vec::load(items.highest + i)) * Vec::load(items.share + i)).store(sinks + i);
  for (int64_t i = 0; i < strip.count; ++i)
    grad_sinks[strip.head[i] - strip.key_head * strip.group] -= double(sinks[i]) * double(items.product[i]);
}

template <int NV, class E>
void backward_strip(const Strip& strip, const Limits& limits, const BackwardScratch& use, double* grad_sinks) {
  constexpr int64_t width = NV * kLanes;
  const AttentionArgs& args = strip.args;
  const int64_t D = use.D, V = use.V, begin = strip.begin(), end = strip.end();
  Items items;
  load_queries<NV, E>(strip, use.query_rows, use.queries);
  load_gradients<NV, E>(strip, use, items);
  if (grad_sinks != nullptr) add_sink_gradients(strip, items, grad_sinks);
  Vec ones[NV];
  for (int v = 0; v < NV; ++v) ones[v] = Vec::set(1.0f);
  for (int64_t first = begin; first < end; first += kBackwardBlock) {
    const int64_t last = smaller(end, first + kBackwardBlock), count = last - first;
    const float *keys = use.keys + first * D, *values = use.values + first * V;
    compute_scores<NV>(strip, limits, keys, first, last, use.queries, use.scores);
    dot_rows<NV>(values, V, count, use.grads, args.value_dim, use.slopes);
    softmax_gradient<NV>(args.softcap, items, count, use.scores, use.slopes);
    spread_rows<NV>(use.scores, count, use.grad_rows, strip.count, V, use.value_sums + first * V);
    spread_rows<NV>(use.slopes, count, use.query_rows, strip.count, D, use.key_sums + first * D);
    sum_rows<NV>(keys, D, count, use.slopes, first == begin ? nullptr : ones, args.key_dim, use.sums);
  }
  for (int64_t i = 0; i < args.key_dim * width; i += kLanes)
    (Vec::load(use.sums + i) * Vec::set(args.scaling)).store(use.sums + i);
  transpose(use.sums, D, width, use.query_rows);
  E* grad = static_cast<E*>(args.grad_query);
  for (int64_t i = 0; i < strip.count; ++i)
    store_row(grad + strip.contiguous(i, args.key_dim), use.query_rows + i * D, args.key_dim);
}

template <class E>
void backward_task(const AttentionArgs& args, const BackwardTask& task, float* memory) {
  const int64_t group = args.query_heads / args.key_heads;
  const Limits limits;
  Parts parts{memory};
  const BackwardScratch use(args, task.max_keys, parts);
  if (task.grad_sinks != nullptr)
    for (int64_t g = 0; g < group; ++g) task.grad_sinks[g] = 0.0;
  // keys of the prefix that are there, with the gradients that they have so far
  int64_t held = 0;
  for (int64_t s = 0; s < task.num_segments; ++s) {
    const AttentionSegment& segment = task.segments[s];
    const int64_t keys = num_keys(segment), items = num_queries(segment) * group;
    load_keys<E>(args, segment, task.key_head, held, keys, use.keys + held * use.D, use.values + held * use.V);
    clear(use.key_sums + held * use.D, (keys - held) * use.D);
    clear(use.value_sums + held * use.V, (keys - held) * use.V);
    for (int64_t item = 0; item < items; item += kStrip) {
      const Strip strip(args, segment, task.key_head, item, smaller(kStrip, items - item));
      if (strip.count <= kLanes)
        backward_strip<1, E>(strip, limits, use, task.grad_sinks);
      else
        backward_strip<kTileVectors, E>(strip, limits, use, task.grad_sinks);
    }
    held = prefix_keys(segment);
    E *grad_key = static_cast<E*>(args.grad_key), *grad_value = static_cast<E*>(args.grad_value);
    for (int64_t n = held; n < keys; ++n) {
      const int64_t row = key_row(segment, n) * args.key_heads + task.key_head;
      store_row(grad_key + row * args.key_dim, use.key_sums + n * use.D, args.key_dim);
      store_row(grad_value + row * args.value_dim, use.value_sums + n * use.V, args.value_dim);
    }
  }
}

void backward(const AttentionArgs& args, const BackwardTask& task, float* memory) {
  if (args.dtype == 0) backward_task<float>(args, task, memory);
  if (args.dtype == 1) backward_task<bf16>(args, task, memory);
  if (args.dtype == 2) backward_task<fp16>(args, task, memory);
}

}  // namespace

extern const AttentionKernels attention_kernels = {kStrip, forward_scratch, backward_scratch, forward, backward};

}  // namespace DPO_ISA_NS
}  // namespace dpo
