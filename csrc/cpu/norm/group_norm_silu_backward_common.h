// What both layouts of group_norm_silu_backward.cpp share: what belongs to a channel, and how it follows from sums.
#pragma once
#include <omp.h>

#include "../exponential.h"
#include "pivot.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

using Args = GroupNormSiluBackwardArgs;

constexpr int64_t kSerial = 8 * 1024;   // elements below which waking threads costs more than it gives
constexpr int64_t kPixels = 64;         // channels_last: pixels of a chunk, whose sums are made in float32
constexpr int64_t kGroup = 128 * 1024;  // contiguous: elements of a group whose g stays in cache from pass to pass
constexpr int64_t kSample = 256 * 1024;  // channels_last: elements of a sample, likewise
constexpr int64_t kBytes = 4 << 20;     // channels_last: of x, dy and dx that all threads go through at a time

// With m = x - mean and z = m * slope + offset:  dx = g * slope - constant - m * linear
enum Row { kMean, kSlope, kOffset, kConstant, kLinear, kRows };
// In double: the channel's mean (without add), later what it is more than its group's; squares about it, later the sum
// of g; the sum of g * m; what float32 loses of the mean; rstd.   xhat = (m - lost) * rstd
enum Exact { kCentre, kSquares, kG = kSquares, kGm, kLost, kRstd, kExacts };

typedef double VecD __attribute__((vector_size(8 * kLanes)));
LDMFAST_INLINE VecD exact(VecF x) { return __builtin_convertvector(x, VecD); }

// workspace: [N, kExacts, width] float64, [N, kRows, width] float32, then
//   channels_last: [N, chunks, 2, width] sums of chunks, [samples, kept] g;  contiguous: [threads, kept] g
struct Plan {
  int64_t width, chunks, threads;  // width: C, in whole pairs of vectors
  int64_t samples, kept;           // channels_last: that all threads go through together; elements
  double* exacts;
  float *rows, *sums, *g;
  size_t bytes;
};

template <class T> constexpr bool kNarrow = sizeof(T) == 2;

Plan plan_of(const Args& a) {
  Plan p;
  p.width = ceil_div(a.C, kPair) * kPair;
  p.chunks = a.channels_last ? ceil_div(a.P, kPixels) : 0;
  p.threads = a.N * a.C * a.P > kSerial ? max64(1, omp_get_max_threads()) : 1;
  const int64_t group = a.C / a.groups * a.P, size = a.dtype == DType::kFloat32 ? 4 : 2;
  p.samples = min64(a.N, max64(1, kBytes / (3 * a.C * a.P * size)));
  const bool fits = a.channels_last ? a.C * a.P <= kSample : group <= kGroup;
  p.kept = !(a.silu && size == 2 && fits) ? 0 : a.channels_last ? a.P * p.width : ceil_div(group, kPair) * kPair;
  p.exacts = (double*)a.workspace;
  p.rows = (float*)(p.exacts + a.N * kExacts * p.width);
  p.sums = p.rows + a.N * kRows * p.width;
  p.g = p.sums + a.N * p.chunks * 2 * p.width;
  p.bytes = (size_t)(a.N * p.width) * (kExacts * sizeof(double) + (kRows + 2 * p.chunks) * sizeof(float)) +
            (size_t)((a.channels_last ? p.samples : p.threads) * p.kept) * sizeof(float);
  return p;
}

struct Sample {
  const Args& a;
  const Plan& plan;
  int64_t n;
  double* exact(Exact e) const { return plan.exacts + (n * kExacts + e) * plan.width; }
  float* row(Row r) const { return plan.rows + (n * kRows + r) * plan.width; }
  float* sums(int64_t chunk, int i) const { return plan.sums + ((n * plan.chunks + chunk) * 2 + i) * plan.width; }
};

float modulation(const Args& a, const void* p, int64_t stride, int64_t n, int64_t c) {
  return p ? load_scalar(p, a.mod_dtype, n * stride + c) : 0.0f;
}

// channels_last keeps what belongs to a channel in the order of load_pair
template <class T> LDMFAST_INLINE int64_t place(const Args& a, int64_t c) {
  return a.channels_last ? slot<T>(c, a.C) : c;
}

// From each channel's mean and squares what the pass over g needs.
template <class T> void finish_moments(const Sample& s, int64_t group) {
  const Args& a = s.a;
  const int64_t D = a.C / a.groups, first = group * D;
  double *centre = s.exact(kCentre), *squares = s.exact(kSquares), *lost = s.exact(kLost);
  double sum = 0, total = 0;
  for (int64_t c = first; c < first + D; ++c) {
    sum += centre[place<T>(a, c)] += modulation(a, a.add, a.stride_add, s.n, c);
  }
  const double mean = sum / (double)D;
  for (int64_t c = first; c < first + D; ++c) {
    const int64_t at = place<T>(a, c);
    centre[at] -= mean;
    total += squares[at] + (double)a.P * centre[at] * centre[at];
  }
  const double rstd = 1.0 / __builtin_sqrt(total / (double)(D * a.P) + (double)a.eps);
  for (int64_t c = first; c < first + D; ++c) {
    const int64_t at = place<T>(a, c);
    const double scale = 1.0 + modulation(a, a.scale, a.stride_scale, s.n, c);
    const double weight = a.weight ? load_scalar(a.weight, a.param_dtype, c) : 1.0f;
    const double bias = a.bias ? load_scalar(a.bias, a.param_dtype, c) : 0.0f;
    const double own = mean - modulation(a, a.add, a.stride_add, s.n, c), slope = rstd * weight * scale;
    lost[at] = own - (float)own;
    s.exact(kRstd)[at] = rstd;
    s.row(kMean)[at] = (float)own;
    s.row(kSlope)[at] = (float)slope;
    s.row(kOffset)[at] = (float)(bias * scale + modulation(a, a.shift, a.stride_shift, s.n, c) - lost[at] * slope);
  }
}

// From each channel's sums of g and g * m the results' sums and what dx needs. The sum of dx needs no pass of its own:
// of slope * (g - E[d] / slope - xhat * E[d * xhat]) each term's sum is known.
template <class T> void finish_sums(const Sample& s, int64_t group) {
  const Args& a = s.a;
  const int64_t D = a.C / a.groups, first = group * D;
  const double *centre = s.exact(kCentre), *g = s.exact(kG), *lost = s.exact(kLost);
  double* gm = s.exact(kGm);
  const float* slope = s.row(kSlope);
  float* sums = a.sums + s.n * a.C;
  const double rstd = s.exact(kRstd)[place<T>(a, first)];
  double mean_d = 0, mean_d_xhat = 0;  // times rstd
  for (int64_t c = first; c < first + D; ++c) {
    const int64_t at = place<T>(a, c);
    gm[at] = rstd * (gm[at] - lost[at] * g[at]);
    mean_d += slope[at] * g[at];
    mean_d_xhat += slope[at] * gm[at];
  }
  mean_d /= (double)(D * a.P);
  const double linear = rstd * mean_d_xhat / (double)(D * a.P);
  for (int64_t c = first; c < first + D; ++c) {
    const int64_t at = place<T>(a, c);
    s.row(kLinear)[at] = (float)linear;
    s.row(kConstant)[at] = (float)(mean_d - lost[at] * linear);
    sums[c] = (float)g[at];
    sums[a.N * a.C + c] = (float)gm[at];
    sums[2 * a.N * a.C + c] = (float)(slope[at] * g[at] - (double)a.P * (mean_d + centre[at] * linear));
  }
}

// dy * act'(z)
template <class T, bool kSilu> LDMFAST_INLINE VecF through_act(VecF dy, VecF z) {
  if (!kSilu) return dy;
  const VecF s = sigmoid<AccuracyOf<T>::value>(z);
  return dy * (s + s * z * (1.0f - s));
}

// float32's dx holds g from the second pass to the third, which spares an exponential and a division an element
template <class T, bool kSilu> constexpr bool kKeepsG = kSilu && !kNarrow<T>;

struct Whole { static constexpr bool value = true; };
struct First { static constexpr bool value = false; };

// 2 * kLanes elements, or the first n of them where kWhole is false: the rest reads as zero and is not written
template <bool kWhole, class T> LDMFAST_INLINE void read_pair(const T* p, int64_t n, VecF& u, VecF& v) {
  if (kWhole) return load_pair(p, u, v);
  u = load_first(p, min64(n, kLanes));
  v = load_first(p + min64(n, kLanes), max64(0, n - kLanes));
}
template <bool kWhole, class T> LDMFAST_INLINE void write_pair(T* p, int64_t n, VecF u, VecF v) {
  if (kWhole) return store_pair(p, u, v);
  store_first(p, u, min64(n, kLanes));
  store_first(p + min64(n, kLanes), v, max64(0, n - kLanes));
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
