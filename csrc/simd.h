// Vec: some float32 lanes of the instruction set that this file is compiled for (DPO_ISA_..., a macro of the build).
//
// Files that include this one are compiled once per instruction set. All they define lies in an unnamed namespace, and
// they use no inline function of the standard library: of two copies of such a function the linker keeps one, which
// might be the one that this processor cannot run.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace dpo {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace dpo

#if defined(DPO_ISA_AVX512)
#define DPO_ISA_NS avx512
#include "simd_avx512.h"
#elif defined(DPO_ISA_AVX2)
#define DPO_ISA_NS avx2
#include "simd_avx2.h"
#elif defined(DPO_ISA_NEON)
#define DPO_ISA_NS neon
#include "simd_neon.h"
#elif defined(DPO_ISA_PLAIN)
#define DPO_ISA_NS plain
#include "simd_plain.h"
#else
#error "no instruction set: csrc/build_native.py names one for every *_kernels.cpp"
#endif

namespace dpo {
namespace DPO_ISA_NS {
namespace {

// Fewer than N elements: loads fill up the other lanes, stores leave the rest of memory alone.
template <class Element>
inline Vec load_n(const Element* p, int64_t n, float fill = 0) {
  if (n >= Vec::N) return Vec::load(p);
  Element part[Vec::N];
  memset(part, 0, sizeof part);
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  float lanes[Vec::N];
  Vec::load(part).store(lanes);
  for (int64_t i = n; i < Vec::N; ++i) lanes[i] = fill;
  return Vec::load(lanes);
}

template <class Element>
inline void store_n(const Vec& v, Element* p, int64_t n) {
  if (n >= Vec::N) return v.store(p);
  Element part[Vec::N];
  v.store(part);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

inline Vec operator+=(Vec& a, Vec b) { return a = a + b; }
inline Vec operator*=(Vec& a, Vec b) { return a = a * b; }

inline float lane(Vec v, int i) {
  float lanes[Vec::N];
  v.store(lanes);
  return lanes[i];
}

inline float sum(Vec v) { return static_cast<float>(sum_double(v)); }

// Largest lane that is not nan; -inf when there is none.
inline float max(Vec v) {
  float lanes[Vec::N];
  v.store(lanes);
  float largest = -INFINITY;
  for (int i = 0; i < Vec::N; ++i)
    if (lanes[i] > largest) largest = lanes[i];
  return largest;
}

}  // namespace
}  // namespace DPO_ISA_NS
}  // namespace dpo
