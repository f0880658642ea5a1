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
LDMFAST_INLINE VecF gelu(VecF x) { return 0.5f * x * (1.0f + erf(x * 0.70710678118654752f)); }

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
