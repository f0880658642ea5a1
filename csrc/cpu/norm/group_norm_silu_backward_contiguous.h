// group_norm_silu_backward.cpp, contiguous: a group is one task; a channel is a row, and the lanes are its pixels.
#pragma once
#include "group_norm_silu_backward_common.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kRun = 2048;  // elements whose sums are made in float32 before they join the others
constexpr int64_t kPart = 16;   // terms of a sum added up first: beside much, like terms round alike

LDMFAST_INLINE float sum_of(VecF x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return reduce_add(x);
#endif
}

// step(element, n, whole or not) over the pairs of vectors from `from` to `to`
template <class Step> LDMFAST_INLINE void pairs(int64_t from, int64_t to, Step step) {
  for (; from + kPair <= to; from += kPair) step(from, kPair, Whole{});
  if (from < to) step(from, to - from, First{});
}

template <class T> void row_moments(const T* x, int64_t count, double* mean, double* squares) {
  const float pivot = value(pivot_of(x, count, 1));
  double centre = 0, total = 0;
  for (int64_t i = 0; i < count; i += kRun) {
    const int64_t end = min64(count, i + kRun), whole = i + (end - i) / kPair * kPair;
    VecF s{}, q{};
    for (int64_t j = i; j < whole;) {
      VecF u, v, su{}, sv{};
      for (const int64_t to = min64(j + kPart * kPair, whole); j < to; j += kPair) {
        load_pair(x + j, u, v);
        su += u - pivot, sv += v - pivot;
      }
      s += su + sv;
    }
    float sum = sum_of(s);
    for (int64_t j = whole; j < end; ++j) sum += to_float(x[j]) - pivot;
    const float here = sum / (float)(end - i), about = pivot + here;
    for (int64_t j = i; j < whole;) {
      VecF u, v, su{}, sv{};
      for (const int64_t to = min64(j + kPart * kPair, whole); j < to; j += kPair) {
        load_pair(x + j, u, v);
        u -= about, v -= about;
        su += u * u, sv += v * v;
      }
      q += su + sv;
    }
    float square = sum_of(q);
    for (int64_t j = whole; j < end; ++j) square += (to_float(x[j]) - about) * (to_float(x[j]) - about);
    const double share = i ? (double)(end - i) / (double)end : 1.0, delta = here - centre;
    centre += delta * share;
    total += square + delta * delta * (double)i * share;
  }
  *mean = pivot + centre;
  *squares = total;
}

// kept: where g is held for the last pass, or null
template <class T, bool kSilu, bool kKept>
void row_sums(const Sample& s, int64_t c, const T* x, const T* dy, T* dx, float* kept) {
  const VecF mean = splat(s.row(kMean)[c]), slope = splat(s.row(kSlope)[c]), offset = splat(s.row(kOffset)[c]);
  double total = 0, total_m = 0;
  for (int64_t i = 0; i < s.a.P; i += kRun) {
    VecF g_sum{}, gm_sum{};
    for (int64_t j = i, end = min64(s.a.P, i + kRun); j < end; j += kPart * kPair) {
      VecF gu{}, gv{}, gmu{}, gmv{};
      pairs(j, min64(j + kPart * kPair, end), [&](int64_t k, int64_t n, auto whole) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        VecF u, v, du, dv;  // past the end dy is zero, and so is g
        read_pair<kWhole>(x + k, n, u, v);
        read_pair<kWhole>(dy + k, n, du, dv);
        u -= mean, v -= mean;
        du = through_act<T, kSilu>(du, u * slope + offset), dv = through_act<T, kSilu>(dv, v * slope + offset);
        if (kKeepsG<T, kSilu>) write_pair<kWhole>(dx + k, n, du, dv);
        else if (kKept) write_pair<kWhole>(kept + k, n, du, dv);
        gu += du, gv += dv;
        gmu += du * u, gmv += dv * v;
      });
      g_sum += gu + gv;
      gm_sum += gmu + gmv;
    }
    total += sum_of(g_sum);
    total_m += sum_of(gm_sum);
  }
  s.exact(kG)[c] = total;
  s.exact(kGm)[c] = total_m;
}

template <class T, bool kSilu, bool kKept>
void row_gradient(const Sample& s, int64_t c, const T* x, const T* dy, T* dx, const float* kept) {
  const VecF mean = splat(s.row(kMean)[c]), slope = splat(s.row(kSlope)[c]), offset = splat(s.row(kOffset)[c]);
  const VecF constant = splat(s.row(kConstant)[c]), linear = splat(s.row(kLinear)[c]);
  pairs(0, s.a.P, [&](int64_t k, int64_t n, auto whole) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    VecF u, v, du, dv;
    read_pair<kWhole>(x + k, n, u, v);
    u -= mean, v -= mean;
    if (kKept) {
      read_pair<kWhole>(kept + k, n, du, dv);
    } else if (kKeepsG<T, kSilu>) {
      read_pair<kWhole>(dx + k, n, du, dv);
    } else {
      read_pair<kWhole>(dy + k, n, du, dv);
      du = through_act<T, kSilu>(du, u * slope + offset), dv = through_act<T, kSilu>(dv, v * slope + offset);
    }
    write_pair<kWhole>(dx + k, n, du * slope - constant - u * linear, dv * slope - constant - v * linear);
  });
}

template <class T, bool kSilu, bool kKept> void contiguous_group(const Sample& s, int64_t group, float* kept) {
  const Args& a = s.a;
  const int64_t D = a.C / a.groups, first = group * D;
  const T* x = (const T*)a.x + s.n * a.stride_xn + first * a.stride_xc;
  const int64_t dense = (s.n * a.C + first) * a.P;
  const T* dy = (const T*)a.dy + dense;
  T* dx = (T*)a.dx + dense;
  for (int64_t d = 0; d < D; ++d) {
    row_moments(x + d * a.stride_xc, a.P, s.exact(kCentre) + first + d, s.exact(kSquares) + first + d);
  }
  finish_moments<T>(s, group);
  for (int64_t d = 0, i = 0; d < D; ++d, i += a.P) {
    row_sums<T, kSilu, kKept>(s, first + d, x + d * a.stride_xc, dy + i, dx + i, kKept ? kept + i : nullptr);
  }
  finish_sums<T>(s, group);
  for (int64_t d = 0, i = 0; d < D; ++d, i += a.P) {
    row_gradient<T, kSilu, kKept>(s, first + d, x + d * a.stride_xc, dy + i, dx + i, kKept ? kept + i : nullptr);
  }
}

template <class T, bool kSilu> void contiguous(const Args& a, const Plan& plan) {
#pragma omp parallel for schedule(static) num_threads(plan.threads) if (plan.threads > 1)
  for (int64_t i = 0; i < a.N * a.groups; ++i) {
    const Sample s{a, plan, i / a.groups};
    if (kNarrow<T> && kSilu && plan.kept) {
      contiguous_group<T, kSilu, kNarrow<T> && kSilu>(s, i % a.groups, plan.g + omp_get_thread_num() * plan.kept);
    } else {
      contiguous_group<T, kSilu, false>(s, i % a.groups, nullptr);
    }
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
