namespace dpo {
namespace plain {
namespace {

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {
    // Denormal: fraction 2^-24, an exact product.
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
}

inline uint16_t narrow(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  // From halfway between 65504 and 65536 on.
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Adding 0.5 puts the denormal's last bit where the sum is rounded.
    const float sum = float_of(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(sum) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// Vectors of the compiler's own: four lanes in whatever registers there are.
struct Vec {
  static constexpr int N = 4;
  typedef float Lanes __attribute__((vector_size(16)));
  typedef int32_t Whole __attribute__((vector_size(16)));
  Lanes v;

  static Vec set(float x) { return {Lanes{x, x, x, x}}; }
  static Vec zero() { return set(0); }
  static Vec load(const float* p) {
    Vec x;
    memcpy(&x.v, p, sizeof x.v);
    return x;
  }
  static Vec load(const bf16* p) {
    Vec x;
    for (int i = 0; i < N; ++i) x.v[i] = float_of(static_cast<uint32_t>(p[i].bits) << 16);
    return x;
  }
  static Vec load(const fp16* p) {
    Vec x;
    for (int i = 0; i < N; ++i) x.v[i] = widen(p[i].bits);
    return x;
  }
  void store(float* p) const { memcpy(p, &v, sizeof v); }
  void store(bf16* p) const {
    for (int i = 0; i < N; ++i) {
      const uint32_t bits = bits_of(v[i]);
      const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
      const uint32_t kept = nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1);
      p[i].bits = static_cast<uint16_t>(kept >> 16);
    }
  }
  void store(fp16* p) const {
    for (int i = 0; i < N; ++i) p[i].bits = narrow(v[i]);
  }
};

// Lanes of `yes` where the mask has ones, else of `no`.
inline Vec blend(Vec::Whole mask, Vec yes, Vec no) {
  return {(Vec::Lanes)((mask & (Vec::Whole)yes.v) | (~mask & (Vec::Whole)no.v))};
}

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// Rounded twice: a call of fmaf would be slow where the processor has no such instruction.
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
inline Vec max(Vec a, Vec b) { return blend(a.v > b.v, a, b); }
inline Vec min(Vec a, Vec b) { return blend(a.v < b.v, a, b); }
inline Vec abs(Vec a) { return {(Vec::Lanes)((Vec::Whole)a.v & 0x7fffffff)}; }
inline Vec copysign(Vec magnitude, Vec sign) {
  return {(Vec::Lanes)((Vec::Whole)magnitude.v | ((Vec::Whole)sign.v & INT32_MIN))};
}
// For |a| < 2^22: the sum has no bits left for a fraction.
inline Vec round(Vec a) { return {(a.v + 0x1.8p23f) - 0x1.8p23f}; }
// a 2^n for whole n in [-252, 254], by two powers that are normal numbers; only the second product can round.
inline Vec scale(Vec a, Vec n) {
  // A nan has no whole part to convert.
  const Vec::Whole whole = __builtin_convertvector(blend(n.v == n.v, n, Vec::zero()).v, Vec::Whole);
  const Vec::Whole half = whole >> 1;
  return {a.v * (Vec::Lanes)((half + 127) << 23) * (Vec::Lanes)((whole - half + 127) << 23)};
}
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return blend(a.v < b.v, yes, no); }
inline bool any_equal(Vec a, Vec b) {
  const Vec::Whole equal = a.v == b.v;
  return equal[0] | equal[1] | equal[2] | equal[3];
}
inline double sum_double(Vec v) {
  return (static_cast<double>(v.v[0]) + v.v[1]) + (static_cast<double>(v.v[2]) + v.v[3]);
}

}  // namespace
}  // namespace plain
}  // namespace dpo
