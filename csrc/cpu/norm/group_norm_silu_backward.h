// What both layouts of group_norm_silu_backward.cpp share, and the channels_last one.
#pragma once
#include "../exponential.h"
#include "pivot.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

using Args = GroupNormSiluBackwardArgs;

constexpr int64_t kPixels = 64;               // pixels whose sums are made in registers before they join the others
constexpr int64_t kPart = 16;                 // terms of a sum added up first: beside much, like terms round alike
constexpr int kStrip = kLanes == 16 ? 2 : 1;  // vectors of channels whose coefficients are in registers

// What belongs to a channel of a sample; workspace is [N, kRows, C].
// With m = x - mean and z = m * slope + offset:  dx = g * slope - constant - m * linear,  xhat = (m - lost) * rstd
enum Row { kMean, kLost, kRstd, kSlope, kOffset, kConstant, kLinear, kRows };
// Of sums over chunks, what the last addition rounded away (Kahan 1965), in rows that are not in use then.
constexpr Row kLostSquares = kOffset, kLostG = kConstant, kLostGm = kLinear, kLostDx = kLost;

struct Sample {
  const Args& a;
  int64_t n;
  float* row(Row r) const { return a.workspace + (n * kRows + r) * a.C; }
  float* sum(int i) const { return a.sums + (i * a.N + n) * a.C; }
};

float modulation(const Args& a, const void* p, int64_t stride, int64_t n, int64_t c) {
  return p ? load_scalar(p, a.mod_dtype, n * stride + c) : 0.0f;
}

// Rows kMean and kSlope hold each channel's mean without add, and its squares about that; now all but the last two.
void finish_moments(const Sample& s, int64_t group) {
  const Args& a = s.a;
  const int64_t D = a.C / a.groups, first = group * D;
  float *mean = s.row(kMean), *slope = s.row(kSlope);
  double sum = 0, squares = 0;
  for (int64_t c = first; c < first + D; ++c) sum += (double)mean[c] + modulation(a, a.add, a.stride_add, s.n, c);
  const double centre = sum / (double)D;
  for (int64_t c = first; c < first + D; ++c) {
    const double delta = (double)mean[c] + modulation(a, a.add, a.stride_add, s.n, c) - centre;
    squares += (double)slope[c] + (double)a.P * delta * delta;
  }
  const double rstd = 1.0 / __builtin_sqrt(squares / (double)(D * a.P) + (double)a.eps);
  for (int64_t c = first; c < first + D; ++c) {
    const double scale = 1.0 + modulation(a, a.scale, a.stride_scale, s.n, c);
    const double weight = a.weight ? load_scalar(a.weight, a.param_dtype, c) : 1.0f;
    const double bias = a.bias ? load_scalar(a.bias, a.param_dtype, c) : 0.0f;
    const double exact = centre - modulation(a, a.add, a.stride_add, s.n, c), lost = exact - (float)exact;
    mean[c] = (float)exact;
    s.row(kLost)[c] = (float)lost;
    s.row(kRstd)[c] = (float)rstd;
    slope[c] = (float)(rstd * weight * scale);
    s.row(kOffset)[c] =
        (float)(bias * scale + modulation(a, a.shift, a.stride_shift, s.n, c) - lost * rstd * weight * scale);
    for (int i = 0; i < 3; ++i) s.sum(i)[c] = 0.0f;
    s.row(kLostG)[c] = s.row(kLostGm)[c] = 0.0f;
  }
}

// sums[1] holds that of g * m; now of g * xhat. Then the last two rows.
void finish_sums(const Sample& s, int64_t group) {
  const int64_t D = s.a.C / s.a.groups, first = group * D;
  const float *lost = s.row(kLost), *slope = s.row(kSlope);
  const double rstd = s.row(kRstd)[first];
  float *g = s.sum(0), *g_xhat = s.sum(1);
  double mean_d = 0, mean_d_xhat = 0;  // times rstd
  for (int64_t c = first; c < first + D; ++c) {
    const double exact = rstd * ((double)g_xhat[c] - (double)lost[c] * g[c]);
    g_xhat[c] = (float)exact;
    mean_d += (double)slope[c] * g[c];
    mean_d_xhat += (double)slope[c] * exact;
  }
  mean_d /= (double)(D * s.a.P);
  const double linear = rstd * mean_d_xhat / (double)(D * s.a.P);
  for (int64_t c = first; c < first + D; ++c) {
    s.row(kLinear)[c] = (float)linear;
    s.row(kConstant)[c] = (float)(mean_d - lost[c] * linear);
    s.row(kLostDx)[c] = 0.0f;
  }
}

// dy * act'(z)
template <class T, bool kSilu> LDMFAST_INLINE VecF through_act(VecF dy, VecF z) {
  if (!kSilu) return dy;
  const VecF s = sigmoid<AccuracyOf<T>::value>(z);
  return dy * (s + s * z * (1.0f - s));
}

// float32's dx holds g from the second pass to the third, which spares an exponential and a division an element
template <class T, bool kSilu> constexpr bool kKeepsG = kSilu && sizeof(T) == 4;

template <class T> LDMFAST_INLINE VecF read(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, n);
}
template <class T> LDMFAST_INLINE void write(T* p, VecF x, int64_t n) {
  if (n >= kLanes) store(p, x);
  else store_first(p, x, n);
}
LDMFAST_INLINE void add_to(float* sum, float* lost, VecF term, int64_t n) {
  term -= read(lost, n);
  const VecF old = read(sum, n), next = old + term;
  write(lost, (next - old) - term, n);
  write(sum, next, n);
}

// ---- channels_last: the lanes are channels; n of them are left where kCount is 1 ----

// Pixels between what is read and what is prefetched: the stride is too long for the processor's own prefetchers.
// Near a chunk's end that is the next chunk's beginning.
// (float32's rows of a strip are two lines and got slower by it.)
constexpr int64_t kAhead = 16;
template <class T> LDMFAST_INLINE void prefetch_row(const T* p, int64_t stride) {
  if (sizeof(T) == 2) __builtin_prefetch(p + kAhead * stride);
}

template <class T> struct Pixels {
  const T *x, *dy;  // [pixels, C] from one channel on
  T* dx;
  int64_t stride_x, stride, pixels;
};

// The chunk's moments join those of `before` pixels: mean, relative to the pivot, and squares about it.
template <class T, int kCount>
void moments(const Pixels<T>& at, const Pivot<T>& pivot, int64_t before, int64_t n, float* mean, float* squares,
             float* lost) {
  VecF p[kCount], s[kCount] = {}, q[kCount] = {};
#pragma GCC unroll 2
  for (int j = 0; j < kCount; ++j) {
    const T* first = pivot.first + j * kLanes;
    p[j] = between(read(first, n), read(first + pivot.middle, n), read(first + pivot.last, n));
  }
  for (int64_t i = 0; i < at.pixels;) {
    VecF part[kCount] = {};
    for (const int64_t end = min64(i + kPart, at.pixels); i < end; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kCount; ++j) {
        prefetch_row(at.x + i * at.stride_x + j * kLanes, at.stride_x);
        part[j] += read(at.x + i * at.stride_x + j * kLanes, n) - p[j];
      }
    }
    for (int j = 0; j < kCount; ++j) s[j] += part[j];
  }
#pragma GCC unroll 2
  for (int j = 0; j < kCount; ++j) {
    s[j] /= (float)at.pixels;
    p[j] += s[j];
  }
  for (int64_t i = 0; i < at.pixels;) {
    VecF part[kCount] = {};
    for (const int64_t end = min64(i + kPart, at.pixels); i < end; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kCount; ++j) {
        const VecF d = read(at.x + i * at.stride_x + j * kLanes, n) - p[j];
        part[j] += d * d;
      }
    }
    for (int j = 0; j < kCount; ++j) q[j] += part[j];
  }
  const float share = (float)at.pixels / (float)(before + at.pixels);
  for (int j = 0; j < kCount; ++j) {
    const VecF old = before ? read(mean + j * kLanes, n) : VecF{}, delta = s[j] - old;
    write(mean + j * kLanes, old + delta * share, n);
    if (!before) write(squares + j * kLanes, VecF{}, n), write(lost + j * kLanes, VecF{}, n);
    add_to(squares + j * kLanes, lost + j * kLanes, q[j] + delta * delta * ((float)before * share), n);
  }
}

template <class T, bool kSilu, int kCount> void sums(const Pixels<T>& at, const Sample& s, int64_t c, int64_t n) {
  VecF mean[kCount], slope[kCount], offset[kCount], g_sum[kCount] = {}, gm_sum[kCount] = {};
#pragma GCC unroll 2
  for (int j = 0; j < kCount; ++j) {
    mean[j] = read(s.row(kMean) + c + j * kLanes, n);
    slope[j] = read(s.row(kSlope) + c + j * kLanes, n);
    offset[j] = read(s.row(kOffset) + c + j * kLanes, n);
  }
  for (int64_t i = 0; i < at.pixels;) {
    VecF g_part[kCount] = {}, gm_part[kCount] = {};
    for (const int64_t end = min64(i + kPart, at.pixels); i < end; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kCount; ++j) {
        prefetch_row(at.x + i * at.stride_x + j * kLanes, at.stride_x);
        prefetch_row(at.dy + i * at.stride + j * kLanes, at.stride);
        const VecF m = read(at.x + i * at.stride_x + j * kLanes, n) - mean[j];
        const VecF g = through_act<T, kSilu>(read(at.dy + i * at.stride + j * kLanes, n), m * slope[j] + offset[j]);
        if (kKeepsG<T, kSilu>) write(at.dx + i * at.stride + j * kLanes, g, n);
        g_part[j] += g;
        gm_part[j] += g * m;
      }
    }
    for (int j = 0; j < kCount; ++j) g_sum[j] += g_part[j], gm_sum[j] += gm_part[j];
  }
  for (int64_t j = 0, k = c; j < kCount; ++j, k += kLanes) {
    add_to(s.sum(0) + k, s.row(kLostG) + k, g_sum[j], n);
    add_to(s.sum(1) + k, s.row(kLostGm) + k, gm_sum[j], n);
  }
}

template <class T, bool kSilu, int kCount> void gradient(const Pixels<T>& at, const Sample& s, int64_t c, int64_t n) {
  VecF mean[kCount], slope[kCount], offset[kCount], constant[kCount], linear[kCount], sum[kCount] = {};
#pragma GCC unroll 2
  for (int j = 0; j < kCount; ++j) {
    mean[j] = read(s.row(kMean) + c + j * kLanes, n);
    slope[j] = read(s.row(kSlope) + c + j * kLanes, n);
    offset[j] = read(s.row(kOffset) + c + j * kLanes, n);
    constant[j] = read(s.row(kConstant) + c + j * kLanes, n);
    linear[j] = read(s.row(kLinear) + c + j * kLanes, n);
  }
  for (int64_t i = 0; i < at.pixels;) {
    VecF part[kCount] = {};
    for (const int64_t end = min64(i + kPart, at.pixels); i < end; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kCount; ++j) {
        const int64_t here = i * at.stride + j * kLanes;
        prefetch_row(at.x + i * at.stride_x + j * kLanes, at.stride_x);
        prefetch_row(at.dy + here, at.stride);
        const VecF m = read(at.x + i * at.stride_x + j * kLanes, n) - mean[j];
        const VecF g = kKeepsG<T, kSilu> ? read(at.dx + here, n)
                                         : through_act<T, kSilu>(read(at.dy + here, n), m * slope[j] + offset[j]);
        const VecF dx = g * slope[j] - constant[j] - m * linear[j];
        part[j] += dx;
        write(at.dx + here, dx, n);
      }
    }
    for (int j = 0; j < kCount; ++j) sum[j] += part[j];
  }
  for (int64_t j = 0, k = c; j < kCount; ++j, k += kLanes) add_to(s.sum(2) + k, s.row(kLostDx) + k, sum[j], n);
}

// step(pixels, first pixel, c, channels left, strip or not) over the task's chunks of pixels and strips of channels
template <class T, class Step> LDMFAST_INLINE void over_chunks(const Sample& s, int64_t from, int64_t to, Step step) {
  const Args& a = s.a;
  for (int64_t p = 0; p < a.P; p += kPixels) {
    const T* x = (const T*)a.x + s.n * a.stride_xn + p * a.stride_xp;
    const int64_t dense = (s.n * a.P + p) * a.C, pixels = min64(kPixels, a.P - p);
    for (int64_t c = from; c < to;) {
      const bool strip = to - c >= kStrip * kLanes;
      step(Pixels<T>{x + c, (const T*)a.dy + dense + c, (T*)a.dx + dense + c, a.stride_xp, a.C, pixels}, p, c, to - c,
           strip);
      c += strip ? kStrip * kLanes : kLanes;
    }
  }
}

template <class T, bool kSilu> void channels_last_task(const Sample& s, int64_t first, int64_t end) {
  const int64_t D = s.a.C / s.a.groups, from = first * D, to = end * D;
  const Pivot<T> pivot = pivot_of((const T*)s.a.x + s.n * s.a.stride_xn, s.a.P, s.a.stride_xp);
  float *mean = s.row(kMean), *squares = s.row(kSlope), *lost = s.row(kLostSquares);
  over_chunks<T>(s, from, to, [&](const Pixels<T>& at, int64_t p, int64_t c, int64_t n, bool strip) {
    if (strip) moments<T, kStrip>(at, pivot.at(c), p, kStrip * kLanes, mean + c, squares + c, lost + c);
    else moments<T, 1>(at, pivot.at(c), p, n, mean + c, squares + c, lost + c);
  });
  for (int64_t c = from; c < to; ++c) mean[c] += value(pivot.at(c));
  for (int64_t group = first; group < end; ++group) finish_moments(s, group);
  over_chunks<T>(s, from, to, [&](const Pixels<T>& at, int64_t, int64_t c, int64_t n, bool strip) {
    if (strip) sums<T, kSilu, kStrip>(at, s, c, kStrip * kLanes);
    else sums<T, kSilu, 1>(at, s, c, n);
  });
  for (int64_t group = first; group < end; ++group) finish_sums(s, group);
  over_chunks<T>(s, from, to, [&](const Pixels<T>& at, int64_t, int64_t c, int64_t n, bool strip) {
    if (strip) gradient<T, kSilu, kStrip>(at, s, c, kStrip * kLanes);
    else gradient<T, kSilu, 1>(at, s, c, n);
  });
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
