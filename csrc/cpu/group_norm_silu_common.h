// What both layouts of group_norm_silu.cpp share: moments, the affine map that a channel ends in, and the writing of y.
#pragma once
#include "exponential.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kSerial = 16 * 1024;  // elements below which waking threads costs more than it gives

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

template <bool kExponent>
Affine affine(const GroupNormSiluArgs& g, double group_mean, double group_rstd, int64_t n, int64_t c) {
  double a = group_rstd, b = 0.0;
  if (g.weight) a *= load_scalar(g.weight, g.param_dtype, c);
  if (g.bias) b = load_scalar(g.bias, g.param_dtype, c);
  if (g.scale) {
    double scale = 1.0 + load_scalar(g.scale, g.mod_dtype, n * g.stride_scale + c);
    a *= scale;
    b *= scale;
  }
  if (g.shift) b += load_scalar(g.shift, g.mod_dtype, n * g.stride_shift + c);
  const double mean = group_mean - added(g, n, c);
  if (kExponent) return {0.0f, plain_nan(-kLog2e * a), plain_nan(-kLog2e * (b - mean * a))};
  return {(float)mean, (float)a, (float)(b - (mean - (float)mean) * a)};
}

// The affine map of a run of elements: of one channel (contiguous), or one for each (channels_last).
struct Vectors { VecF mean, a, b; };

struct OneChannel {
  Vectors all;
  int64_t ahead;  // elements from here to where the next group's row lies

  explicit OneChannel(Affine k, int64_t ahead) : all{splat(k.mean), splat(k.a), splat(k.b)}, ahead(ahead) {}
  Vectors at(int64_t) const { return all; }
  Vectors first(int64_t, int64_t) const { return all; }
  template <class T> void prefetch(const T* x) const {
    __builtin_prefetch(x + ahead, 0, 2);  // 0.62 -> 0.56 ms of one thread
  }
};

struct EachChannel {
  const float *mean, *a, *b;  // [C]

  Vectors at(int64_t c) const { return {load(mean + c), load(a + c), load(b + c)}; }
  Vectors first(int64_t c, int64_t n) const {
    return {load_first(mean + c, n), load_first(a + c, n), load_first(b + c, n)};
  }
  template <class T> void prefetch(const T*) const {}  // x is read in the order of its addresses
};

template <class T, bool kSilu> LDMFAST_INLINE VecF apply(VecF x, const Vectors& k) {
  if (kFastSilu<T, kSilu>) return silu_of_exponent<AccuracyOf<T>::value>(x * k.a + k.b);
  VecF z = (x - k.mean) * k.a + k.b;
  return kSilu ? silu<AccuracyOf<T>::value>(z) : z;
}

template <class T, bool kSilu> LDMFAST_INLINE void write_pair(T* y, VecF u, VecF v) {
  if (kFastSilu<T, kSilu>) return store_pair_near(y, u, v);
  store_pair(y, u, v);
}

template <class T, bool kSilu, int kPairs, class Channels>
LDMFAST_INLINE void write_pairs(const T* x, T* y, int64_t i, const Channels& channels) {
  VecF v[2 * kPairs];
#pragma GCC unroll 3
  for (int j = 0; j < kPairs; ++j) {
    channels.prefetch(x + i + j * kPair);
    load_pair(x + i + j * kPair, v[2 * j], v[2 * j + 1]);
  }
#pragma GCC unroll 6
  for (int j = 0; j < 2 * kPairs; ++j) v[j] = apply<T, kSilu>(v[j], channels.at(i + j * kLanes));
#pragma GCC unroll 3
  for (int j = 0; j < kPairs; ++j) write_pair<T, kSilu>(y + i + j * kPair, v[2 * j], v[2 * j + 1]);
}

// y = act(z) of `count` elements in a row
template <class T, bool kSilu, class Channels>
LDMFAST_INLINE void write_row(const T* x, T* y, int64_t count, const Channels& channels) {
  int64_t i = 0;
  for (; i + kAbreast * kPair <= count; i += kAbreast * kPair) write_pairs<T, kSilu, kAbreast>(x, y, i, channels);
  for (; i + kPair <= count; i += kPair) write_pairs<T, kSilu, 1>(x, y, i, channels);
  for (; i < count; i += kLanes) {
    const int64_t n = min64(kLanes, count - i);
    store_first(y + i, apply<T, kSilu>(load_first(x + i, n), channels.first(i, n)), n);
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
