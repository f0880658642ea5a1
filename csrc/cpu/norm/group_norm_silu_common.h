// What both layouts of group_norm_silu.cpp share: moments, and the affine map that a channel ends in.
#pragma once
#include "../exponential.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kSerial = 16 * 1024;  // elements below which waking threads costs more than it gives

// Numbers whose float32 sum is made first, before it joins the whole sum: beside an outlier, whose square is most of it,
// each addition rounds the same way. 127 like pixels and one far away: 2.7e-6 of the variance lost, now 5e-7.
constexpr int64_t kRun = 16;

// Pairs of vectors whose steps the compiler alternates (CMakeLists.txt), for each step of SiLU waits for its last one.
// 0.39 -> 0.34 ms of writing [2, 320, 64, 64] bfloat16, one thread of a Zen 4; 16 registers hold one pair.
#if defined(__AVX512F__)
constexpr int kAbreast = 3;
#else
constexpr int kAbreast = 1;
#endif

struct Moments {
  double count, mean, m2;

  void merge(double n, double other_mean, double other_m2) {
    if (n == 0) return;
    double total = count + n, delta = other_mean - mean;
    mean += delta * (n / total);
    m2 += other_m2 + delta * delta * (count * (n / total));
    count = total;
  }
};

double rstd(const Moments& m, float eps) { return 1.0 / __builtin_sqrt(m.m2 / m.count + (double)eps); }

// z = (x - mean) * a + b. What float32 loses of the mean is in b. In the fast form SiLU's exponent instead of z.
struct Affine { float mean, a, b; };
template <class T, bool kSilu> constexpr bool kFastSilu = kSilu && AccuracyOf<T>::value == Accuracy::kFast;

float added(const GroupNormSiluArgs& g, int64_t n, int64_t c) {
  return g.add ? load_scalar(g.add, g.mod_dtype, n * g.stride_add + c) : 0.0f;
}

float plain_nan(double x) { return x == x ? (float)x : __builtin_nanf(""); }  // as store_pair_near wants it

// What a channel ends in after the mean was taken from it: z = (x + add - mean) * a + b.
struct Modulation { double a, b; };
template <class Args> Modulation modulation(const Args& g, double group_rstd, int64_t n, int64_t c) {
  double a = group_rstd, b = 0.0;
  if (g.weight) a *= load_scalar(g.weight, g.param_dtype, c);
  if (g.bias) b = load_scalar(g.bias, g.param_dtype, c);
  if (g.scale) {
    double scale = 1.0 + load_scalar(g.scale, g.mod_dtype, n * g.stride_scale + c);
    a *= scale;
    b *= scale;
  }
  if (g.shift) b += load_scalar(g.shift, g.mod_dtype, n * g.stride_shift + c);
  return {a, b};
}

template <bool kExponent>
Affine affine(const GroupNormSiluArgs& g, double group_mean, double group_rstd, int64_t n, int64_t c) {
  const auto [a, b] = modulation(g, group_rstd, n, c);
  const double mean = group_mean - added(g, n, c);
  if (kExponent) return {0.0f, plain_nan(-kLog2e * a), plain_nan(-kLog2e * (b - mean * a))};
  return {(float)mean, (float)a, (float)(b - (mean - (float)mean) * a)};
}

template <class T, bool kSilu> LDMFAST_INLINE VecF apply(VecF x, VecF mean, VecF a, VecF b) {
  if (kFastSilu<T, kSilu>) return silu_of_exponent<AccuracyOf<T>::value>(x * a + b);
  VecF z = (x - mean) * a + b;
  return kSilu ? silu<AccuracyOf<T>::value>(z) : z;
}

template <class T, bool kSilu> LDMFAST_INLINE void write_pair(T* y, VecF u, VecF v) {
  if (kFastSilu<T, kSilu>) return store_pair_near(y, u, v);
  store_pair(y, u, v);
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
