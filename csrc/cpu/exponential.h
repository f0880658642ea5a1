// 2^t and SiLU on vectors.
#pragma once
#include "simd.h"

namespace ldmfast {
namespace LDMFAST_ISA {

// kFast is for results that end in 8 bits of mantissa: 7.5e-5 relative (with the processor's estimate of a reciprocal
// 4.5e-4) against bfloat16's half step of 3.9e-3.
enum class Accuracy { kFast, kFull };
template <class T> struct AccuracyOf { static constexpr Accuracy value = Accuracy::kFull; };
template <> struct AccuracyOf<BFloat16> { static constexpr Accuracy value = Accuracy::kFast; };

// factor * 2^t; infinite above 128, 0 below about -126, NaN for NaN. Minimax polynomials of 2^f, f in [-0.5, 0.5], by
// Lawson's iteration on the relative error: 7.5e-5 (degree 3) and 7.9e-8 with its float32 rounding (degree 6).
// kCapped false is for t of at most 1.
template <Accuracy A, bool kCapped = true> LDMFAST_INLINE VecF exp2v(VecF t, float factor = 1.0f) {
#if defined(__AVX512F__)
  VecF n = (VecF)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  VecF f = t - n;
#else
  constexpr float kShift = 0x1.8p23f + (A == Accuracy::kFast ? 127.0f : 0.0f);
  t = vmax(splat(A == Accuracy::kFast ? -127.0f : -126.0f), t);
  if (kCapped) t = vmin(splat(A == Accuracy::kFast ? 128.0f : 128.5f), t);
  VecF shifted = t + kShift;  // rounds to an integer, held in the low bits
  VecF f = t - (shifted - kShift);
#endif
  VecF p;
  if (A == Accuracy::kFast) {
    p = f * (factor * 0.0551716685f) + factor * 0.242611125f;
    p = p * f + factor * 0.693260968f;
    p = p * f + factor * 0.999928057f;
  } else {
    p = f * (factor * 0.000153458124f) + factor * 0.00133999309f;
    p = p * f + factor * 0.00961848907f;
    p = p * f + factor * 0.0555032864f;
    p = p * f + factor * 0.240226462f;
    p = p * f + factor * 0.693147182f;
    p = p * f + factor * 1.0f;
  }
#if defined(__AVX512F__)
  // infinities are right although f is NaN there: scalef(NaN, inf) is inf, scalef(NaN, -inf) is 0
  return (VecF)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  if (A == Accuracy::kFast) return p * (VecF)((VecI)shifted << 23);  // infinite from 127.5 on
  VecI exponent = (VecI)shifted - 0x4b400000 + 126;
  return p * (VecF)(exponent << 23) * 2.0f;  // in two steps: 2^128 has no float32
#endif
}

// y * sigmoid(y) for t = -log2(e) * y: t / (-log2(e) * (1 + 2^t)). NaN for y = -inf, as torch has it.
template <Accuracy A> LDMFAST_INLINE VecF silu_of_exponent(VecF t) {
  const VecF denominator = exp2v<A>(t, -kLog2e) - kLog2e;
#if defined(__AVX512F__)
  if (A == Accuracy::kFast) return t * (VecF)_mm512_rcp14_ps((__m512)denominator);  // 6e-5 relative
#elif defined(__AVX2__)
  if (A == Accuracy::kFast) return t * (VecF)_mm256_rcp_ps((__m256)denominator);  // 3.7e-4 relative
#endif
  return t / denominator;
}
// 1 / (1 + 2^(-log2(e) * y))
template <Accuracy A> LDMFAST_INLINE VecF sigmoid(VecF y) {
  const VecF denominator = exp2v<A>(y * -kLog2e) + 1.0f;
#if defined(__AVX512F__)
  if (A == Accuracy::kFast) return (VecF)_mm512_rcp14_ps((__m512)denominator);
#endif
  return 1.0f / denominator;
}
template <Accuracy A> LDMFAST_INLINE VecF silu(VecF y) { return y / (exp2v<A>(y * -kLog2e) + 1.0f); }

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
