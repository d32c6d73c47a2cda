// Tiles of a product, which stay in registers: a few scalars of some rows times a few vectors. And transposition.
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

}  // namespace
}  // namespace DPO_ISA_NS
}  // namespace dpo
