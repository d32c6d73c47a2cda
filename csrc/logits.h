// Elementwise passes over rows of x W^T, float32, in place.
//
// A logit is z = f(a + bias) of an element a, by `form`: scaled f(s) = inner s; softcap f(s) = outer tanh(inner s).
// Arrays that a comment says to be "of rows" have one element a row.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace dpo {

enum Form : int32_t { kScaled, kSoftcap };

// What is left in the block: the input, e^(z - max), or the same less the sum of exponentials at the label's column,
// which is (softmax - onehot) times that sum. With a softcap each also times d tanh.
enum Keep : int32_t { kInput, kExps, kExpsLessLabel };

struct FoldArgs {
  float* block;
  const float* bias;         // of the block's columns, or null
  const int64_t* label;      // of rows; a column of the block where first_column <= label < first_column + columns
  float* max;                // of rows, as all below: what was found in earlier columns, to which this block is added
  float* sum;                // of exponentials relative to max
  float* label_logit;
  float* label_factor;       // 1 - tanh^2 at the label, or null
  float* weighted;           // rows of floats that are relative to max, like sum, and are rescaled with it; or null
  float* top;                // largest logit, or null
  int64_t* top_column;       // first column of it; not null where top is not
  float* logit_sum;          // or null
  float* entropy;            // -sum e^(z - max) (z - max), or null
  float* square;             // sum e^(2 (z - max)), or null
  float* tile_sum;           // tile_stride apart: sums of every tile_columns columns, without the label's; or null
  int64_t stride, rows, columns, first_column;
  int64_t weighted_stride, weighted_columns, tile_stride, tile_columns;
  float inner, outer;
  int32_t form, keep, threads;
};

// block = coefficient (onehot - softmax_factor e^(z - shift)), with a softcap times d tanh.
struct GradientArgs {
  float* block;
  const float* bias;
  const int64_t* label;
  const float* shift;           // of rows, as the next two
  const float* softmax_factor;
  const float* coefficient;
  int64_t stride, rows, columns, first_column;
  float inner, outer;
  int32_t form, threads;
};

enum Dtype : int32_t { kFloat32, kBfloat16, kFloat16 };

// out = in, each row times a factor if there are factors, computed in float32 and rounded once.
struct ConvertArgs {
  const void* in;
  void* out;
  const float* factor;          // of rows, or null
  int64_t in_stride, out_stride, rows, columns;
  int32_t in_dtype, out_dtype, threads;
};

// Each does the rows [begin, end).
struct LogitsKernels {
  void (*fold)(const FoldArgs&, int64_t begin, int64_t end);
  void (*gradient)(const GradientArgs&, int64_t begin, int64_t end);
  void (*convert)(const ConvertArgs&, int64_t begin, int64_t end);
};

DPO_DECLARE_TABLES(LogitsKernels, logits_kernels)

}  // namespace dpo
