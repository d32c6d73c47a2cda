// Products of float32 matrices: for processors on which torch's own leave half of the vectors unused.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace dpo {

// out[row][column] = sum over depth of a[row][depth] * b[depth][column], or += it.
struct ProductArgs {
  const float* a;
  const float* b;
  float* out;
  float* scratch;  // as much as dpo_product_scratch says
  int64_t rows, columns, depth;
  int64_t a_row, a_depth, b_depth, b_column;  // steps, of which one of each matrix is 1
  int64_t out_row;
  int32_t accumulate, threads;
};

// A part of a product, and where its sums go.
struct ProductTask {
  int64_t row, row_end, column, column_end, depth, depth_end;
  float* out;  // of row 0 and column 0
  int64_t out_row;
  bool accumulate;
};

struct ProductKernels {
  int64_t scratch;  // floats that a task takes
  void (*product)(const ProductArgs&, const ProductTask&, float* scratch);
  void (*add)(const float* from, float* to, int64_t count);
};

DPO_DECLARE_TABLES(ProductKernels, product_kernels)

}  // namespace dpo
