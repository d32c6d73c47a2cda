#include "logits.h"

#include <float.h>

#include "simd.h"
#include "vector_math.h"

namespace dpo {
namespace DPO_ISA_NS {
namespace {

// Columns whose exponentials are added in float32, before float64 takes their sum.
constexpr int64_t kBlock = 4096;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The first n lanes, and `fill` in the others.
inline Vec first_lanes(Vec v, int64_t n, float fill) {
  float lanes[Vec::N];
  v.store(lanes);
  return load_n(lanes, n, fill);
}

inline Vec without_lane(Vec v, int64_t i) {
  float lanes[Vec::N];
  v.store(lanes);
  lanes[i] = 0;
  return Vec::load(lanes);
}

template <bool kBias, int kForm>
struct Logits {
  const float* bias;
  Vec inner, outer;

  template <class Args>
  explicit Logits(const Args& args) : bias(args.bias), inner(Vec::set(args.inner)), outer(Vec::set(args.outer)) {}

  // z of n columns from the i-th on; lanes beyond are anything.
  Vec operator()(const float* row, int64_t i, int64_t n, Vec* factor) const {
    Vec s = load_n(row + i, n);
    if (kBias) s += load_n(bias + i, n);
    s *= inner;
    return kForm == kSoftcap ? tanh_(s, factor) * outer : s;
  }
};

// step(k, i, n) for the columns [begin, end), n from the i-th on, k < 4 in turn: chains of additions that overlap.
template <class Step>
inline void each_vector(int64_t begin, int64_t end, const Step& step) {
  int64_t i = begin;
  for (; i + 4 * Vec::N <= end; i += 4 * Vec::N)
    for (int k = 0; k < 4; ++k) step(k, i + k * Vec::N, Vec::N);
  for (; i < end; i += Vec::N) step(0, i, smaller(Vec::N, end - i));
}

inline Vec together(const Vec (&parts)[4]) { return (parts[0] + parts[1]) + (parts[2] + parts[3]); }

// Sums over a row that the second pass takes.
struct Sums {
  double exps = 0, entropy = 0, square = 0;
};

template <bool kBias, int kForm, bool kKeep, bool kStats>
struct Fold {
  using Form = Logits<kBias, kForm>;
  const FoldArgs& args;
  const Form logits;

  explicit Fold(const FoldArgs& a) : args(a), logits(a) {}

  float largest(const float* row, double* logit_sum) const {
    Vec most[4], sums[4];
    for (Vec& m : most) m = Vec::set(-INFINITY);
    for (int64_t begin = 0; begin < args.columns; begin += kBlock) {
      for (Vec& s : sums) s = Vec::zero();
      each_vector(begin, smaller(begin + kBlock, args.columns), [&](int k, int64_t i, int64_t n) {
        Vec factor, z = logits(row, i, n, &factor);
        if (n < Vec::N) z = first_lanes(z, n, -INFINITY);
        most[k] = max(z, most[k]);
        if (kStats) sums[k] += n < Vec::N ? first_lanes(z, n, 0) : z;
      });
      if (kStats) *logit_sum += sum_double(together(sums));
    }
    return max(max(max(most[0], most[1]), max(most[2], most[3])));
  }

  int64_t first_column_of(const float* row, float value) const {
    Vec factor;
    for (int64_t i = 0; i < args.columns; i += Vec::N) {
      const int64_t n = smaller(Vec::N, args.columns - i);
      const Vec z = logits(row, i, n, &factor);
      if (!any_equal(z, Vec::set(value))) continue;
      for (int64_t k = 0; k < n; ++k)
        if (lane(z, static_cast<int>(k)) == value) return i + k;
    }
    return 0;
  }

  // Exponentials of [begin, end) less max; those of the label's column count for no sum.
  template <bool kHasLabel>
  void exponentials(float* row, int64_t begin, int64_t end, int64_t label, Vec max_, Sums* sums) const {
    Vec exps[4], entropy[4], square[4];
    for (int k = 0; k < 4; ++k) exps[k] = entropy[k] = square[k] = Vec::zero();
    each_vector(begin, end, [&](int k, int64_t i, int64_t n) {
      Vec factor = Vec::set(1.0f);
      const Vec t = logits(row, i, n, &factor) - max_;
      Vec e = exp_(t);
      if (kKeep) store_n(kForm == kSoftcap ? e * factor : e, row + i, n);
      if (n < Vec::N) e = first_lanes(e, n, 0);
      if (kHasLabel && label >= i && label < i + n) e = without_lane(e, label - i);
      exps[k] += e;
      if (kStats) {
        // Below, e is 0, and 0 times an infinite t would be nan; lanes beyond the end may hold one.
        const Vec bounded = max(Vec::set(-200.0f), n < Vec::N ? first_lanes(t, n, 0) : t);
        entropy[k] = fnma(e, bounded, entropy[k]);
        square[k] = fma(e, e, square[k]);
      }
    });
    sums->exps += sum_double(together(exps));
    if (kStats) {
      sums->entropy += sum_double(together(entropy));
      sums->square += sum_double(together(square));
    }
  }

  void row(int64_t r) const {
    float* row = args.block + r * args.stride;
    double logit_sum = 0;
    const float block_max = largest(row, &logit_sum);
    if (kStats && args.logit_sum) args.logit_sum[r] += static_cast<float>(logit_sum);
    if (kStats && args.top && block_max > args.top[r]) {
      args.top[r] = block_max;
      args.top_column[r] = args.first_column + first_column_of(row, block_max);
    }
    // Kept finite: columns that are all -inf, by a bias that masks tokens, must add 0 and not nan.
    float new_max = block_max > -FLT_MAX ? block_max : -FLT_MAX;
    if (args.max[r] > new_max) new_max = args.max[r];
    const int64_t label = args.label[r] - args.first_column;
    const bool has_label = label >= 0 && label < args.columns;
    float label_factor = 1, label_gap = 0, label_exp = 0;
    if (has_label) {
      Vec factor = Vec::set(1.0f);
      const Vec z = logits(row, label, 1, &factor);
      args.label_logit[r] = lane(z, 0);
      label_factor = lane(factor, 0);
      label_gap = lane(z - Vec::set(new_max), 0);
      label_exp = lane(exp_(z - Vec::set(new_max)), 0);
      if (args.label_factor) args.label_factor[r] = label_factor;
    }
    const Sums sums = sum_up(row, r, label, has_label, Vec::set(new_max));
    // The difference sum - e^(label) is the sum of the others: nothing cancels where the softmax is peaked.
    if (kKeep && args.keep == kExpsLessLabel && has_label) row[label] = -static_cast<float>(sums.exps) * label_factor;
    update(r, new_max, sums, label_exp, label_gap);
  }

  Sums sum_up(float* row, int64_t r, int64_t label, bool has_label, Vec max_) const {
    Sums sums;
    const bool tiles = kStats && args.tile_sum;
    const int64_t width = tiles ? args.tile_columns : kBlock;
    for (int64_t begin = 0; begin < args.columns; begin += width) {
      const int64_t end = smaller(begin + width, args.columns);
      const double before = sums.exps;
      if (tiles) sums.exps = 0;
      if (has_label && label >= begin && label < end)
        exponentials<true>(row, begin, end, label, max_, &sums);
      else
        exponentials<false>(row, begin, end, label, max_, &sums);
      if (tiles) {
        args.tile_sum[r * args.tile_stride + begin / width] = static_cast<float>(sums.exps);
        sums.exps += before;
      }
    }
    return sums;
  }

  // Adds the block to what was found in earlier columns, on the scale of the new maximum.
  void update(int64_t r, float new_max, Sums sums, float label_exp, float label_gap) const {
    const double gap = static_cast<double>(new_max) - args.max[r], old_sum = args.sum[r], shrink = ::exp(-gap);
    if (kStats && args.entropy) {
      // A sum of 0 has nothing to move, and its gap may be infinite.
      const double moved = old_sum > 0 ? gap * old_sum : 0;
      const double of_label = label_exp == 0 ? 0 : static_cast<double>(label_exp) * label_gap;
      args.entropy[r] = static_cast<float>((args.entropy[r] + moved) * shrink + sums.entropy - of_label);
    }
    if (kStats && args.square) {
      const double of_label = static_cast<double>(label_exp) * label_exp;
      args.square[r] = static_cast<float>(args.square[r] * shrink * shrink + sums.square + of_label);
    }
    args.sum[r] = static_cast<float>(old_sum * shrink + sums.exps + label_exp);
    args.max[r] = new_max;
    if (!args.weighted || shrink == 1) return;
    float* weighted = args.weighted + r * args.weighted_stride;
    const Vec factor = Vec::set(static_cast<float>(shrink));
    for (int64_t i = 0; i < args.weighted_columns; i += Vec::N) {
      const int64_t n = smaller(Vec::N, args.weighted_columns - i);
      store_n(load_n(weighted + i, n) * factor, weighted + i, n);
    }
  }
};

template <bool kBias, int kForm, bool kKeep, bool kStats>
void fold_rows(const FoldArgs& args, int64_t begin, int64_t end) {
  const Fold<kBias, kForm, kKeep, kStats> fold(args);
  for (int64_t r = begin; r < end; ++r) fold.row(r);
}

// Turns what a call asks for into constants of the loops.
template <bool kBias, int kForm>
struct FoldForm {
  static void run(const FoldArgs& args, int64_t begin, int64_t end) {
    const bool stats = args.top || args.logit_sum || args.entropy || args.square || args.tile_sum;
    if (args.keep == kInput)
      (stats ? fold_rows<kBias, kForm, false, true> : fold_rows<kBias, kForm, false, false>)(args, begin, end);
    else
      (stats ? fold_rows<kBias, kForm, true, true> : fold_rows<kBias, kForm, true, false>)(args, begin, end);
  }
};

template <bool kBias, int kForm>
struct GradientForm {
  static void run(const GradientArgs& args, int64_t begin, int64_t end) {
    const Logits<kBias, kForm> logits(args);
    for (int64_t r = begin; r < end; ++r) {
      float* row = args.block + r * args.stride;
      const Vec shift = Vec::set(args.shift[r]);
      const Vec slope = Vec::set(-args.coefficient[r] * args.softmax_factor[r]);
      const int64_t label = args.label[r] - args.first_column;
      const bool has_label = label >= 0 && label < args.columns;
      Vec factor = Vec::set(1.0f), label_value = Vec::zero();
      if (has_label) {
        const Vec softmax = exp_(logits(row, label, 1, &factor) - shift) * slope;
        label_value = (softmax + Vec::set(args.coefficient[r])) * factor;
      }
      each_vector(0, args.columns, [&](int, int64_t i, int64_t n) {
        Vec tangent;
        const Vec softmax = exp_(logits(row, i, n, &tangent) - shift) * slope;
        store_n(kForm == kSoftcap ? softmax * tangent : softmax, row + i, n);
      });
      if (has_label) row[label] = lane(label_value, 0);
    }
  }
};

template <template <bool, int> class Pass, class Args>
void by_form(const Args& args, int64_t begin, int64_t end) {
  if (args.form == kSoftcap)
    (args.bias ? Pass<true, kSoftcap>::run : Pass<false, kSoftcap>::run)(args, begin, end);
  else
    (args.bias ? Pass<true, kScaled>::run : Pass<false, kScaled>::run)(args, begin, end);
}

template <class In, class Out>
void convert_rows(const ConvertArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const In* in = static_cast<const In*>(args.in) + r * args.in_stride;
    Out* out = static_cast<Out*>(args.out) + r * args.out_stride;
    const Vec factor = Vec::set(args.factor ? args.factor[r] : 1.0f);
    each_vector(0, args.columns, [&](int, int64_t i, int64_t n) { store_n(load_n(in + i, n) * factor, out + i, n); });
  }
}

template <class In>
void convert_from(const ConvertArgs& args, int64_t begin, int64_t end) {
  switch (args.out_dtype) {
    case kBfloat16:
      return convert_rows<In, bf16>(args, begin, end);
    case kFloat16:
      return convert_rows<In, fp16>(args, begin, end);
    default:
      return convert_rows<In, float>(args, begin, end);
  }
}

void convert(const ConvertArgs& args, int64_t begin, int64_t end) {
  switch (args.in_dtype) {
    case kBfloat16:
      return convert_from<bf16>(args, begin, end);
    case kFloat16:
      return convert_from<fp16>(args, begin, end);
    default:
      return convert_from<float>(args, begin, end);
  }
}

}  // namespace

extern const LogitsKernels logits_kernels = {by_form<FoldForm, FoldArgs>, by_form<GradientForm, GradientArgs>, convert};

}  // namespace DPO_ISA_NS
}  // namespace dpo
