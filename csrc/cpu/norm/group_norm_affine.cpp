// GroupNorm of [x1, x2] as a factor and a shift for each channel of each sample; the next convolution applies them.
// Traffic: x1 and x2 once.
//
//   for n, chunk of pixels, slab of channels of x1, then of x2:
//     sums[n][chunk][c] = sum, squares about the chunk's mean             # as group_norm_silu's, channels_last
//   for n, channel: merge its chunks; for n, group: merge its channels, which may lie in both; all in double
//     norm_scale[c], norm_shift[c] for its channels
//
// Chunks take one of their own pixels as pivot and are merged in double, so that a picture that comes in strips
// of whole chunks has the same moments, to the last bit of float32.
#include "group_norm_silu_channels_last.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// x1 or x2, as the sums take it.
GroupNormSiluArgs part_of(const GroupNormAffineArgs& a, bool second) {
  GroupNormSiluArgs g = {};
  g.x = second ? a.x2 : a.x1;
  g.stride_xn = second ? a.stride_x2n : a.stride_x1n, g.stride_xc = 1;
  g.stride_xp = second ? a.stride_x2p : a.stride_x1p;
  g.N = a.N, g.C = second ? a.C2 : a.C1, g.P = a.P, g.groups = 1, g.eps = a.eps;
  g.channels_last = true, g.dtype = a.dtype;
  return g;
}

struct Part {
  GroupNormSiluArgs g;
  Plan plan;
  int64_t sums() const { return g.C ? plan.chunks * plan.slabs : 0; }  // tasks of a sample
  size_t floats() const { return g.C ? plan.bytes / 4 : 0; }
};
Part part(const GroupNormAffineArgs& a, bool second, float* workspace) {
  Part p = {part_of(a, second), {}};
  p.g.workspace = workspace;
  if (p.g.C) p.plan = plan_of(p.g);
  return p;
}

// the moments of one channel over the pixels
template <class T> void merge_channel(const Part& p, int64_t n, int64_t c, Moments& all) {
  const GroupNormSiluArgs& g = p.g;
  const float* sums = p.plan.sums + n * p.plan.chunks * 2 * g.C + slot<T>(c, g.C);
  const T* x = (const T*)g.x + n * g.stride_xn + c;
  const auto pixels = [&](int64_t i) { return (double)min64(kPixels, g.P - i * kPixels); };
  const auto mean_of = [&](int64_t i) {
    const T* chunk = x + i * kPixels * g.stride_xp;
    const double pivot = kPivot<T> ? (double)value(pivot_of(chunk, (int64_t)pixels(i), g.stride_xp)) : 0.0;
    return pivot + sums[i * 2 * g.C] / pixels(i);
  };
  double total = 0, squares = 0;
  for (int64_t i = 0; i < p.plan.chunks; ++i) total += pixels(i) * mean_of(i);
  const double mean = total / (double)g.P;
  for (int64_t i = 0; i < p.plan.chunks; ++i) {
    const double delta = mean_of(i) - mean;
    squares += sums[(2 * i + 1) * g.C] + pixels(i) * delta * delta;
  }
  all.merge((double)g.P, mean, squares);
}

template <class T> void write_group(const GroupNormAffineArgs& a, const Part& x1, const Part& x2, int64_t i) {
  const int64_t C = a.C1 + a.C2, D = C / a.groups, n = i / a.groups, first = i % a.groups * D;
  Moments all{};
  for (int64_t c = first; c < first + D; ++c) {
    if (c < a.C1) merge_channel<T>(x1, n, c, all);
    else merge_channel<T>(x2, n, c - a.C1, all);
  }
  a.moments[2 * i] = all.mean, a.moments[2 * i + 1] = all.m2 / all.count;
  const double scale = rstd(all, a.eps);
  for (int64_t c = first; c < first + D; ++c) {
    const auto [factor, shift] = modulation(a, scale, n, c);
    a.norm_scale[n * C + c] = (float)factor;
    a.norm_shift[n * C + c] = (float)(shift - all.mean * factor);
  }
}

template <class T> void run(const GroupNormAffineArgs& a) {
  const Part x1 = part(a, false, a.workspace), x2 = part(a, true, a.workspace + x1.floats());
  const int64_t threads = a.N * (a.C1 + a.C2) * a.P > kSerial ? omp_get_max_threads() : 1;
  const int64_t sums = x1.sums() + x2.sums();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.N * sums; ++i) {
      const bool second = i % sums >= x1.sums();
      const Part& p = second ? x2 : x1;
      const int64_t task = i % sums - (second ? x1.sums() : 0);
      slab_sums<T>(p.g, p.plan, i / sums, task / p.plan.slabs, task % p.plan.slabs, true);
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < a.N * a.groups; ++i) write_group<T>(a, x1, x2, i);
  }
}

}  // namespace

size_t group_norm_affine_workspace(const GroupNormAffineArgs& a) {
  if (a.N * (a.C1 + a.C2) * a.P == 0) return 0;
  return 4 * (part(a, false, nullptr).floats() + part(a, true, nullptr).floats());
}

void group_norm_affine(const GroupNormAffineArgs& a) {
  if (a.N * (a.C1 + a.C2) * a.P == 0) return;
  if (a.dtype == DType::kFloat32) return run<float>(a);
  if (a.dtype == DType::kBFloat16) return run<BFloat16>(a);
  return run<Half>(a);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
