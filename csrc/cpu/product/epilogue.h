// What a product's sums go through before they are written: bias, activation, residual, scale.
#pragma once
#include "../exponential.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// x Phi(x) as max(x, 0) - |x| Phi(-|x|), of which 1 + erf would leave nothing below -3: Phi(-u) by minimax polynomials
// (Lawson's weights, u in [0, 5.8]). kFull: 2^p(u), relative to 1 + u^2 / 4, which the rounding of u costs anyway, 1e-7;
// kFast: p(u)^-16, 1e-4 relative. Both are 0 far out, and the whole is NaN for -inf, as torch has it.
template <Accuracy A> LDMFAST_INLINE VecF gelu(VecF x) {
  const VecF u = vmax(-x, vmin(x, splat(1000.0f)));  // |x|; inf - 0 of inf
  VecF tail;
  if (A == Accuracy::kFull) {
    VecF p = u * -1.8664144e-08f + 5.91338562e-07f;
    p = p * u - 8.01929946e-06f;
    p = p * u + 5.87731156e-05f;
    p = p * u - 2.16855886e-04f;
    p = p * u - 1.34724876e-04f;
    p = p * u + 7.11784931e-03f;
    p = p * u - 5.25619686e-02f;
    p = p * u - 4.59178954e-01f;
    p = p * u - 1.15110970e+00f;
    p = p * u - 9.99999881e-01f;
    tail = exp2v<A, false>(p);
  } else {
    VecF p = u * 2.78335415e-06f - 3.04649693e-05f;
    p = p * u + 2.43459552e-04f;
    p = p * u - 4.89876838e-04f;
    p = p * u + 4.19366034e-03f;
    p = p * u + 2.15329174e-02f;
    p = p * u + 5.22200912e-02f;
    p = p * u + 1.04426754e+00f;
    for (int i = 0; i < 4; ++i) p *= p;
#if defined(__AVX512F__)
    tail = (VecF)_mm512_rcp14_ps((__m512)p);
#else
    tail = 1.0f / p;
#endif
  }
  return vmax(VecF{}, x) - u * tail;  // vmax gives its second where one is NaN
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
