// Functions of Vec, to about one unit in the last place, in float32's whole range: denormal results, infinities, nan.
#pragma once

#include "simd.h"

namespace dpo {
namespace DPO_ISA_NS {
namespace {

// e^x = 2^n e^r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 P(r); P is a minimax fit, relative error 3e-9.
inline Vec exp_(Vec x) {
  // Beyond these the result is 0 or inf. In this order a nan passes.
  x = min(Vec::set(89.0f), max(Vec::set(-104.0f), x));
  const Vec n = round(x * Vec::set(1.44269504f));
  // ln 2 in two parts, of which the first has so few digits that n times it is exact, with or without fma.
  Vec r = fnma(n, Vec::set(0.693145751953125f), x);
  r = fnma(n, Vec::set(1.428606765330187e-06f), r);
  Vec p = fma(Vec::set(0.001381446490995586f), r, Vec::set(0.008368780836462975f));
  p = fma(p, r, Vec::set(0.04166839271783829f));
  p = fma(p, r, Vec::set(0.1666651964187622f));
  p = fma(p, r, Vec::set(0.4999999403953552f));
  p = fma(p * r, r, r) + Vec::set(1.0f);
  return scale(p, n);
}

// tanh x, and 1 - tanh^2 x without the cancellation of that formula, both from u = e^(-2 |x|).
inline Vec tanh_(Vec x, Vec* derivative) {
  const Vec one = Vec::set(1.0f), size = abs(x);
  const Vec u = exp_(size * Vec::set(-2.0f));
  const Vec sum = one + u;
  *derivative = Vec::set(4.0f) * u / (sum * sum);
  const Vec large = copysign((one - u) / sum, x);
  // Below, 1 - u cancels: x + x^3 P(x^2), a minimax fit on [0, 0.56], relative error 1e-9.
  const Vec square = x * x;
  Vec p = fma(Vec::set(-0.006207422818988562f), square, Vec::set(0.0210272129625082f));
  p = fma(p, square, Vec::set(-0.05384227633476257f));
  p = fma(p, square, Vec::set(0.13332499563694f));
  p = fma(p, square, Vec::set(-0.33333316445350647f));
  const Vec small = fma(p * square, x, x);
  return select_less(size, Vec::set(0.55f), small, large);
}

inline Vec tanh_(Vec x) {
  Vec derivative;
  return tanh_(x, &derivative);
}

// By the C library, lane by lane: for numbers of which there is one a row.
inline Vec log_(Vec x) {
  float lanes[Vec::N];
  x.store(lanes);
  for (float& value : lanes) value = static_cast<float>(::log(static_cast<double>(value)));
  return Vec::load(lanes);
}

}  // namespace
}  // namespace DPO_ISA_NS
}  // namespace dpo
