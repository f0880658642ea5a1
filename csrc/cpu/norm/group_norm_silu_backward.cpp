// The gradient of SiLU(GroupNorm(x + add) * (1 + scale) + shift), contiguous or channels_last.
// Traffic: x and dy once, dx once, where a task's share stays in cache. No sum depends on the number of threads.
// Source: Wu & He 2018, section 3, differentiated; Chan, Golub & LeVeque 1983 for merging moments.
//
//   for each sample, each task of whole groups, with m = x - mean and z = m * slope + offset as in the forward:
//     for its channels c:  mean and squares of x[c] over the pixels
//     for its groups:      mean, rstd; slope, offset of its channels from weight, bias, scale, shift   finish_moments()
//     for its channels c:  g = dy * act'(z);  sums[0][c] = sum of g,  sums[1][c] = sum of g * m
//     for its groups:      constant, linear from the sums; sums[1] becomes that of g * xhat            finish_sums()
//     for its channels c:  dx = g * slope - constant - m * linear;  sums[2][c] = sum of dx
//
//   contiguous: a channel is a row, the lanes are its pixels (below)
//   channels_last: each pass goes chunk of pixels by chunk, the lanes are channels (group_norm_silu_backward.h)
#include <omp.h>

#include "group_norm_silu_backward.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kRun = 2048;         // elements whose sums are made in registers before they join the others
constexpr int64_t kSlab = 256;         // channels of a channels_last task, where there are tasks enough
constexpr int64_t kSerial = 8 * 1024;  // elements below which waking threads costs more than it gives

// ---- contiguous: the lanes are pixels of one channel ----

template <class T> void row_moments(const T* x, int64_t count, float* mean, float* squares) {
  const float pivot = value(pivot_of(x, count, 1));
  double centre = 0, total = 0;
  for (int64_t i = 0; i < count; i += kRun) {
    const int64_t end = min64(count, i + kRun);
    VecF s{}, q{};
    int64_t j = i;
    while (j + kLanes <= end) {
      VecF part{};
      for (const int64_t to = min64(j + kPart * kLanes, end); j + kLanes <= to; j += kLanes) part += load(x + j) - pivot;
      s += part;
    }
    float sum = reduce_add(s);
    for (int64_t k = j; k < end; ++k) sum += to_float(x[k]) - pivot;
    const float here = sum / (float)(end - i), about = pivot + here;
    for (j = i; j + kLanes <= end;) {
      VecF part{};
      for (const int64_t to = min64(j + kPart * kLanes, end); j + kLanes <= to; j += kLanes) {
        part += (load(x + j) - about) * (load(x + j) - about);
      }
      q += part;
    }
    float square = reduce_add(q);
    for (; j < end; ++j) square += (to_float(x[j]) - about) * (to_float(x[j]) - about);
    const double share = (double)(end - i) / (double)end, delta = here - centre;
    centre += delta * share;
    total += square + delta * delta * (double)i * share;
  }
  *mean = (float)(pivot + centre);
  *squares = (float)total;
}

template <class T, bool kSilu> void row_sums(const Sample& s, int64_t c, const T* x, const T* dy, T* dx) {
  const VecF mean = splat(s.row(kMean)[c]), slope = splat(s.row(kSlope)[c]), offset = splat(s.row(kOffset)[c]);
  double total = 0, total_m = 0;
  for (int64_t i = 0; i < s.a.P; i += kRun) {
    VecF g_sum{}, gm_sum{};
    for (int64_t j = i, end = min64(s.a.P, i + kRun); j < end;) {
      VecF g_part{}, gm_part{};
      for (const int64_t to = min64(j + kPart * kLanes, end); j < to; j += kLanes) {
        const VecF m = read(x + j, end - j) - mean;  // past the end dy is zero, and so is g
        const VecF g = through_act<T, kSilu>(read(dy + j, end - j), m * slope + offset);
        if (kKeepsG<T, kSilu>) write(dx + j, g, end - j);
        g_part += g;
        gm_part += g * m;
      }
      g_sum += g_part;
      gm_sum += gm_part;
    }
    total += reduce_add(g_sum);
    total_m += reduce_add(gm_sum);
  }
  s.sum(0)[c] = (float)total;
  s.sum(1)[c] = (float)total_m;
}

template <class T, bool kSilu> void row_gradient(const Sample& s, int64_t c, const T* x, const T* dy, T* dx) {
  const VecF mean = splat(s.row(kMean)[c]), slope = splat(s.row(kSlope)[c]), offset = splat(s.row(kOffset)[c]);
  const VecF constant = splat(s.row(kConstant)[c]), linear = splat(s.row(kLinear)[c]);
  double total = 0;
  for (int64_t i = 0; i < s.a.P; i += kRun) {
    VecF sum{};
    for (int64_t j = i, end = min64(s.a.P, i + kRun); j < end;) {
      VecF part{};
      for (const int64_t to = min64(j + kPart * kLanes, end); j < to; j += kLanes) {
        const VecF m = read(x + j, end - j) - mean;
        const VecF g = kKeepsG<T, kSilu> ? read(dx + j, end - j)
                                         : through_act<T, kSilu>(read(dy + j, end - j), m * slope + offset);
        const VecF found = g * slope - constant - m * linear;
        write(dx + j, found, end - j);
        if (end - j >= kLanes) part += found;
        else for (int64_t k = 0; k < end - j; ++k) total += found[k];
      }
      sum += part;
    }
    total += reduce_add(sum);
  }
  s.sum(2)[c] = (float)total;
}

template <class T, bool kSilu> void contiguous_task(const Sample& s, int64_t first, int64_t end) {
  const Args& a = s.a;
  const int64_t D = a.C / a.groups, from = first * D, to = end * D;
  const T* x = (const T*)a.x + s.n * a.stride_xn;
  const T* dy = (const T*)a.dy + s.n * a.C * a.P;
  T* dx = (T*)a.dx + s.n * a.C * a.P;
  for (int64_t c = from; c < to; ++c) row_moments(x + c * a.stride_xc, a.P, s.row(kMean) + c, s.row(kSlope) + c);
  for (int64_t group = first; group < end; ++group) finish_moments(s, group);
  for (int64_t c = from; c < to; ++c) row_sums<T, kSilu>(s, c, x + c * a.stride_xc, dy + c * a.P, dx + c * a.P);
  for (int64_t group = first; group < end; ++group) finish_sums(s, group);
  for (int64_t c = from; c < to; ++c) {
    row_gradient<T, kSilu>(s, c, x + c * a.stride_xc, dy + c * a.P, dx + c * a.P);
  }
}

// groups of a task: one where rows are contiguous; as many as make a slab where four tasks a thread remain
int64_t groups_of_task(const Args& a, int64_t threads) {
  if (!a.channels_last) return 1;
  const int64_t D = a.C / a.groups;
  int64_t groups = max64(1, kSlab / D);
  while (groups > 1 && groups * D > 2 * kLanes && a.N * ceil_div(a.groups, groups) < 4 * threads) groups /= 2;
  return groups;
}

template <class T, bool kSilu> void run(const Args& a) {
  const int64_t threads = a.N * a.C * a.P > kSerial ? omp_get_max_threads() : 1;
  const int64_t step = groups_of_task(a, threads), tasks = ceil_div(a.groups, step);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < a.N * tasks; ++i) {
    const int64_t first = i % tasks * step, end = min64(a.groups, first + step);
    const Sample s{a, i / tasks};
    if (a.channels_last) channels_last_task<T, kSilu>(s, first, end);
    else contiguous_task<T, kSilu>(s, first, end);
  }
}

template <class T> void run(const Args& a) { return a.silu ? run<T, true>(a) : run<T, false>(a); }

}  // namespace

size_t group_norm_silu_backward_workspace(const GroupNormSiluBackwardArgs& a) {
  return (size_t)(a.N * kRows * a.C) * sizeof(float);
}

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& a) {
  if (a.N * a.C * a.P == 0) return;
  if (a.dtype == DType::kFloat32) return run<float>(a);
  if (a.dtype == DType::kBFloat16) return run<BFloat16>(a);
  return run<Half>(a);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
