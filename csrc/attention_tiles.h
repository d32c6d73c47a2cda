// What attention is made of: three products of small matrices and the transposition of rows.
//
// All products are one micro-kernel: a few scalars of a row times a few vectors. Matrices are float and row-major; one
// with kStrip or kLanes columns has items along its lanes.
#pragma once

#include "simd.h"

namespace dpo {
namespace DPO_ISA_NS {
namespace {

constexpr int64_t kLanes = Vec::N;
#if defined(DPO_ISA_AVX512)
constexpr int kTileRows = 8, kTileVectors = 2;
#elif defined(DPO_ISA_AVX2)
constexpr int kTileRows = 6, kTileVectors = 2;
#elif defined(DPO_ISA_NEON)
constexpr int kTileRows = 5, kTileVectors = 4;
#else
constexpr int kTileRows = 2, kTileVectors = 4;
#endif
constexpr int64_t kStrip = kTileVectors * kLanes;

#define DPO_INLINE inline __attribute__((always_inline))

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t clamped(int64_t x) { return larger(0, smaller(x, kStrip)); }
int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

template <int M>
struct Rows {
  static constexpr int value = M;
};

// step(Rows<M>, first) for all rows, most of them kTileRows at a time.
template <class Step>
DPO_INLINE void over_rows(int64_t rows, const Step& step) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) step(Rows<kTileRows>{}, i);
  if constexpr (kTileRows > 4)
    if (i + 4 <= rows) step(Rows<4>{}, i), i += 4;
  if constexpr (kTileRows > 2)
    if (i + 2 <= rows) step(Rows<2>{}, i), i += 2;
  if (i < rows) step(Rows<1>{}, i);
}

DPO_INLINE Vec add_product(Vec a, Vec b, Vec c) {
#ifdef DPO_ISA_PLAIN
  // in float32: its fma rounds once, by way of float64
  return a * b + c;
#else
  return fma(a, b, c);
#endif
}

// tile[m][v] += sum over k of a[m * row_step + k * k_step] * b[k][v]
template <int M, int NV>
DPO_INLINE void multiply(Vec (&tile)[M][NV], const float* a, int64_t row_step, int64_t k_step, const float* b,
                         int64_t b_step, int64_t count) {
  for (int64_t k = 0; k < count; ++k, a += k_step, b += b_step) {
    Vec y[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) y[v] = Vec::load(b + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = Vec::set(a[m * row_step]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) tile[m][v] = add_product(x, y[v], tile[m][v]);
    }
  }
}

// A sum of few terms first, then added to the others: errors grow with the square root of both.
template <int M, int NV>
DPO_INLINE void add_tile(const Vec (&tile)[M][NV], float* to, int64_t step) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* at = to + m * step + v * kLanes;
      (Vec::load(at) + tile[m][v]).store(at);
    }
}

template <int M, int NV>
DPO_INLINE void store_tile(const Vec (&tile)[M][NV], float* to, int64_t step) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) tile[m][v].store(to + m * step + v * kLanes);
}

template <int M, int NV>
DPO_INLINE void clear_tile(Vec (&tile)[M][NV]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) tile[m][v] = Vec::zero();
}

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

template <int... I>
struct Indices {};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DPO_SHUFFLE 1
#endif
#endif

#ifdef DPO_SHUFFLE
typedef float Raw __attribute__((vector_size(kLanes * 4)));

template <int Count, int... I>
struct Counted : Counted<Count - 1, Count - 1, I...> {};
template <int... I>
struct Counted<0, I...> {
  using type = Indices<I...>;
};

template <int Offset, int... I>
DPO_INLINE Raw interleave(Raw a, Raw b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (Offset + I / 2 + (I % 2) * int(kLanes))...);
}

// Transpose kLanes x kLanes numbers: as often as halving goes, lane-wise shuffles of the first half with the second.
DPO_INLINE void transpose_block(const float* from, int64_t from_step, float* to, int64_t to_step) {
  using all = typename Counted<int(kLanes)>::type;
  Raw x[kLanes], y[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) __builtin_memcpy(&x[i], from + i * from_step, sizeof(Raw));
#pragma GCC unroll 4
  for (int done = 1; done < kLanes; done *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = interleave<0>(x[i], x[i + kLanes / 2], all{});
      y[2 * i + 1] = interleave<int(kLanes) / 2>(x[i], x[i + kLanes / 2], all{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) __builtin_memcpy(to + i * to_step, &x[i], sizeof(Raw));
}
#else
DPO_INLINE void transpose_block(const float* from, int64_t from_step, float* to, int64_t to_step) {
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < kLanes; ++j) to[j * to_step + i] = from[i * from_step + j];
}
#endif

// to[j][i] = from[i][j]; both sizes are multiples of kLanes.
void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes)
      transpose_block(from + i * columns + j, columns, to + j * rows + i, rows);
}

}  // namespace
}  // namespace DPO_ISA_NS
}  // namespace dpo
