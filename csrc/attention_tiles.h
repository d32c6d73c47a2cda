// What attention is made of: three products of small matrices and the transposition of rows.
//
// Matrices are float and row-major; one with kStrip or kLanes columns has items along its lanes.
#pragma once

#include "tiles.h"

namespace dpo {
namespace DPO_ISA_NS {
namespace {

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t clamped(int64_t x) { return larger(0, smaller(x, kStrip)); }

// out[n][item] = sum over d of rows[n][d] * columns[d][item]
template <int NV>
void dot_rows(const float* rows, int64_t row_step, int64_t count, const float* columns, int64_t depth, float* out) {
  constexpr int64_t width = NV * kLanes;
  over_rows(count, [&](auto size, int64_t n) __attribute__((always_inline)) {
    Vec tile[decltype(size)::value][NV];
    clear_tile(tile);
    multiply(tile, rows + n * row_step, row_step, 1, columns, width, depth);
    store_tile(tile, out + n * width, width);
  });
}

// out[d][item] = factors[item] * out[d][item] + sum over n of rows[n][d] * weights[n][item]; no first term without
// factors
template <int NV>
void sum_rows(const float* rows, int64_t row_step, int64_t count, const float* weights, const Vec* factors,
              int64_t depth, float* out) {
  constexpr int64_t width = NV * kLanes;
  over_rows(depth, [&](auto size, int64_t d) __attribute__((always_inline)) {
    constexpr int M = decltype(size)::value;
    Vec tile[M][NV];
    clear_tile(tile);
    multiply(tile, rows + d, 1, row_step, weights, width, count);
    if (factors != nullptr) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
          tile[m][v] = fma(Vec::load(out + (d + m) * width + v * kLanes), factors[v], tile[m][v]);
    }
    store_tile(tile, out + d * width, width);
  });
}

// out[n][d] += sum over items of weights[n][item] * rows[item][d]
template <int NV>
void spread_rows(const float* weights, int64_t count, const float* rows, int64_t items, int64_t depth, float* out) {
  constexpr int64_t width = NV * kLanes;
  over_rows(count, [&](auto size, int64_t n) __attribute__((always_inline)) {
    constexpr int M = decltype(size)::value;
    int64_t d = 0;
    for (; d + kStrip <= depth; d += kStrip) {
      Vec tile[M][kTileVectors];
      clear_tile(tile);
      multiply(tile, weights + n * width, width, 1, rows + d, depth, items);
      add_tile(tile, out + n * depth + d, depth);
    }
    for (; d < depth; d += kLanes) {
      Vec tile[M][1];
      clear_tile(tile);
      multiply(tile, weights + n * width, width, 1, rows + d, depth, items);
      add_tile(tile, out + n * depth + d, depth);
    }
  });
}

// to[padded(width)] = from[width] * factor, then zeros.
template <class E>
DPO_INLINE void load_row(float* to, const E* from, int64_t width, Vec factor) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) (Vec::load(from + d) * factor).store(to + d);
  if (d < width) (load_n(from + d, width - d) * factor).store(to + d);
}

template <class E>
DPO_INLINE void store_row(E* to, const float* from, int64_t width) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) Vec::load(from + d).store(to + d);
  if (d < width) store_n(Vec::load(from + d), to + d, width - d);
}

void clear(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) Vec::zero().store(to + i);
}

// to[j][i] = from[i][j]; both sizes are multiples of kLanes.
void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes)
      transpose_block(from + i * columns + j, columns, to + j * rows + i, rows);
}

}  // namespace
}  // namespace DPO_ISA_NS
}  // namespace dpo
