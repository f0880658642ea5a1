// What a product's sums go through before they are written: bias, activation, residual, scale.
#pragma once
#include "../exponential.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// erf as x p(x^2) / q(x^2) on [-4, 4], beyond which float32 has 1: 4e-7 absolute. Coefficients: XLA's ErfImpl32.
LDMFAST_INLINE VecF erf(VecF x) {
  x = vmin(vmax(x, splat(-4.0f)), splat(4.0f));
  const VecF s = x * x;
  VecF p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  VecF q = s * -1.45660718464996e-05f - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}
// x / 2 (1 + erf(x / sqrt(2))). kFast: erf as x p(x^2) / q(x^2) on [-3.4, 3.4], 3.7e-6 absolute (least squares with
// Lawson's weights), and 0 below; NaN for -inf, as torch has it.
template <Accuracy A> LDMFAST_INLINE VecF gelu(VecF x) {
  const VecF z = x * 0.70710678118654752f;
  if (A == Accuracy::kFull) return 0.5f * x * (1.0f + erf(z));
  const VecF y = vmin(vmax(z, splat(-3.4f)), splat(3.4f)), s = y * y;
  const VecF p = ((s * 7.26492668e-4f + 4.28559668e-2f) * s + 1.56669781e-1f) * s + 1.12836111f;
  const VecF q = ((s * 9.11269430e-3f + 9.53857601e-2f) * s + 4.72112089e-1f) * s + 1.0f;
#if defined(__AVX512F__)
  VecF inverse = (VecF)_mm512_rcp14_ps((__m512)q);
  inverse *= 2.0f - q * inverse;  // a step of Newton's, in a third of a division's time
  const VecF both = 1.0f + y * p * inverse;
#else
  const VecF both = 1.0f + y * p / q;
#endif
  return 0.5f * x * (z < -3.4f ? VecF{} : both);
}

// kLanes elements, or the n that remain; kFull: they do remain
template <bool kFull = false, class T> LDMFAST_INLINE VecF load_upto(const T* p, int64_t n) {
  return kFull || __builtin_expect(n >= kLanes, 1) ? load(p) : load_first(p, n);
}
template <bool kFull = false, class T> LDMFAST_INLINE void store_upto(T* p, VecF x, int64_t n) {
  if (kFull || __builtin_expect(n >= kLanes, 1)) store(p, x);
  else store_first(p, x, n);
}

// (sums + bias + residual) * scale of a tile of a product, straight from the registers: by 3 % faster than by way of a
// tile of sums (4096 x 320 -> 320 in bfloat16, Zen 4), where a store waits for a load by 12 %.
template <class T> struct Straight {
  T* out;             // of the tile's first row and column
  const T* residual;  // likewise, or null
  int64_t stride_out, stride_residual;
  VecF bias[2];
  float scale;
  __attribute__((always_inline)) void operator()(float*, int r, int j, VecF y) const {
    y += bias[j];
    if (residual) y += load(residual + r * stride_residual + j * kLanes);
    store(out + r * stride_out + j * kLanes, y * scale);
  }
};

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
