// The gradient of SiLU(GroupNorm(x + add) * (1 + scale) + shift), in five launches, without atomics.
//
// 1 the moments of slices (the forward's kernel), 2 each group's mean and 1 / std, 3 each channel's sums of g, g * xhat
// and xhat over slices, 4 the sums of the slices and each group's means of d and d * xhat, 5 dx. The sum of dx follows
// from those of 3, so nothing is read for it. x is read three times and dy twice, where [2, 320, 64, 64] in 16 bits, 5
// MB each, stays in the L2 cache (50 MB) from the first read on: 16 MB from and to memory, 5.2 us at 3 TB/s. With five
// launches, and some 790 instructions of a thread's 8 channels in 3 and 5 before its first x, 14 to 20 are predicted.
#include "group_norm_silu_backward.cuh"
#include "group_norm_silu_plan.h"

namespace ldmfast {
namespace group_norm_backward {

// a warp a group
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  const int64_t group = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (group >= p.a.N * p.a.groups) return;
  group_norm::Moments m = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < p.moment_parts; i += 32) {
    const float* from = p.moments + (group * p.moment_parts + i) * 4;
    m = group_norm::merge(m, {from[0], from[1], from[2], from[3]});
  }
  m = group_norm::warp_merge(m);
  if (threadIdx.x % 32) return;
  float* to = p.stats + group * kStats;
  to[0] = m.mean, to[1] = m.rest, to[2] = rsqrtf(m.m2 * fast_reciprocal(m.count) + p.a.eps);
}

__device__ __forceinline__ float* part_of(const Params& p, int q, int64_t n, int slice) {
  return p.parts + ((q * p.a.N + n) * p.slices.value + slice) * p.a.C;
}

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  const Place<V, CL> w(p);
  float sum[3][V] = {};
  if (w.active) {
    Channel channel[CL ? V : 1];
    w.channels(p, channel);
    w.each(p, [&](int64_t x, int64_t y) {
      float xhat[V], g[V];
      terms<T, V, CL>(p, channel, x, y, xhat, g);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[0][j] += g[j], sum[1][j] += g[j] * xhat[j], sum[2][j] += xhat[j];
    });
  }
  if constexpr (CL) {
    float* rows = reinterpret_cast<float*>(shared_memory());   // [3, kThreads, V]
#pragma unroll
    for (int q = 0; q < 3; ++q)
#pragma unroll
      for (int j = 0; j < V; ++j) rows[(q * kThreads + threadIdx.x) * V + j] = sum[q][j];
    __syncthreads();
    const int width = p.columns.value * V;
    const int64_t channel = w.c - divided(threadIdx.x, p.columns).rest * V;   // the tile's first
    for (int i = threadIdx.x; i < 3 * width; i += kThreads) {
      const int q = i / width, c = i % width;
      float total = 0.0f;
      for (int r = 0; r < w.step; ++r) total += rows[q * kThreads * V + r * width + c];
      if (channel + c < p.a.C) part_of(p, q, w.n, w.slice)[channel + c] = total;
    }
  } else {
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < V; ++j) total += sum[q][j];
      total = warp_sum(total);
      if (w.active && threadIdx.x % 32 == 0) part_of(p, q, w.n, w.slice)[w.c] = total;
    }
  }
}

// a block a group: the channels' sums; in the end that of dx = rstd * (gain * g - mean_d - xhat * mean_dx)
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  const GroupNormSiluBackwardArgs& a = p.a;
  float* warp_sums = reinterpret_cast<float*>(shared_memory());   // [2, kWarps]
  const int64_t width = p.group_channels.value;
  const int64_t n = blockIdx.x / unsigned(a.groups), group = blockIdx.x % unsigned(a.groups);
  const int64_t first = group * width;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* sums = a.sums + n * a.C;
  float d = 0.0f, dx = 0.0f;
  for (int64_t c = first + warp; c < first + width; c += kWarps) {
    float sum[3] = {};
    for (int i = lane; i < p.slices.value; i += 32)
#pragma unroll
      for (int q = 0; q < 3; ++q) sum[q] += part_of(p, q, n, i)[c];
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      sum[q] = warp_sum(sum[q]);
      if (lane == 0) sums[q * a.N * a.C + c] = sum[q];
    }
    const float gain = group_norm::affine_of(a, n, c).gain;
    d += gain * sum[0], dx += gain * sum[1];
  }
  if (lane == 0) warp_sums[warp] = d, warp_sums[kWarps + warp] = dx;
  __syncthreads();
  d = dx = 0.0f;
  for (int i = 0; i < kWarps; ++i) d += warp_sums[i], dx += warp_sums[kWarps + i];
  const float members = static_cast<float>(width * a.P);
  d /= members, dx /= members;
  float* stats = p.stats + int64_t(blockIdx.x) * kStats;
  if (threadIdx.x == 0) stats[3] = d, stats[4] = dx;
  for (int64_t c = first + threadIdx.x; c < first + width; c += kThreads) {
    const Channel channel = channel_of(p, n, group, group_norm::affine_of(a, n, c));
    float* all = sums + 2 * a.N * a.C + c;                        // what lies there is the sum of xhat
    *all = channel.rstd * (channel.gain * sums[c] - static_cast<float>(a.P) * d - *all * dx);
  }
}

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, 2) apply_kernel(const __grid_constant__ Params p) {
  const Place<V, CL> w(p);
  if (!w.active) return;
  wait_for_previous_kernel();
  Channel channel[CL ? V : 1];
  w.channels(p, channel);
  float mean_d[CL ? V : 1], mean_dx[CL ? V : 1];
#pragma unroll
  for (int j = 0; j < (CL ? V : 1); ++j) {
    const float* stats = stats_of(p, w.n, w.group(p, j));
    mean_d[j] = stats[3] * channel[j].rstd, mean_dx[j] = stats[4] * channel[j].rstd;
  }
  w.each(p, [&](int64_t x, int64_t y) {
    float xhat[V], g[V];
    terms<T, V, CL>(p, channel, x, y, xhat, g);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int k = CL ? j : 0;
      g[j] = channel[k].rstd * channel[k].gain * g[j] - mean_d[k] - xhat[j] * mean_dx[k];
    }
    store_vector(static_cast<T*>(p.a.dx) + y, g);
  });
}

namespace {
constexpr int64_t kBlocks = 528;           // four on each of 132 multiprocessors

GroupNormSiluArgs forward_of(const GroupNormSiluBackwardArgs& a) {   // what the moments are taken of
  GroupNormSiluArgs f{};
  f.x = a.x, f.stride_xn = a.stride_xn, f.stride_xc = a.stride_xc, f.stride_xp = a.stride_xp;
  f.y = a.dx, f.add = a.add, f.stride_add = a.stride_add;
  f.N = a.N, f.C = a.C, f.P = a.P, f.groups = a.groups, f.eps = a.eps, f.channels_last = a.channels_last;
  f.dtype = a.dtype, f.param_dtype = a.param_dtype, f.mod_dtype = a.mod_dtype;
  return f;
}

// parts of a group's moments, known from the shape alone: the workspace is sized before addresses are known
int64_t most_parts(const GroupNormSiluBackwardArgs& a) {
  GroupNormSiluArgs f = forward_of(a);
  f.x = nullptr, f.y = nullptr, f.stride_xn = f.stride_xc = f.stride_xp = 0;
  const group_norm::Plan plan = group_norm::make_split_plan(f);
  const int64_t parts = int64_t(plan.params.tiles.value) * plan.params.slices.value;
  const int64_t narrow = ceil_div(a.C / a.groups, group_norm::kThreads);   // tiles where an access is one element
  return parts > narrow ? parts : narrow;
}

// pixels a slice, from the shape alone: [2, 320, 64, 64] channels_last has 2 x 256 slices of 16 for 6 rows of threads
int64_t slice_of(const GroupNormSiluBackwardArgs& a) {
  if (!a.channels_last) return kStretch;
  const int64_t slice = ceil_div(a.P * a.N, kBlocks);
  return slice < 16 ? 16 : slice;
}

struct Sizes { int64_t moments, stats, parts; };   // floats
Sizes sizes_of(const GroupNormSiluBackwardArgs& a) {
  return {a.N * a.groups * most_parts(a) * 4, a.N * a.groups * kStats, 3 * a.N * ceil_div(a.P, slice_of(a)) * a.C};
}

template <typename T, int V, bool CL> void start(Params p, const Launch& where) {
  const char* op = "group_norm_silu_backward";
  const GroupNormSiluBackwardArgs& a = p.a;
  if (CL) {
    p.columns = Divisor(a.C / V < kThreads ? a.C / V : kThreads);
    p.tiles = Divisor(ceil_div(a.C / V, p.columns.value));
    p.wide = group_norm::can_access_rows(a, V);
  }
  const int64_t blocks = CL ? a.N * p.tiles.value * p.slices.value : ceil_div(a.N * a.C * p.slices.value, kWarps);
  launch<finish_kernel>(op, p, ceil_div(a.N * a.groups, kWarps), kThreads, 0, where);
  launch<sums_kernel<T, V, CL>>(op, p, blocks, kThreads, CL ? 3 * kThreads * V * sizeof(float) : 0, where);
  launch<combine_kernel>(op, p, a.N * a.groups, kThreads, 2 * kWarps * sizeof(float), where);
  launch<apply_kernel<T, V, CL>>(op, p, blocks, kThreads, 0, where);
}

template <typename T, int V, bool CL> void moments(const group_norm::Plan& plan, const Launch& where) {
  launch<group_norm::statistics_kernel<T, V, CL>>("group_norm_silu_backward", plan.params, plan.blocks,
                                                  group_norm::kThreads, storage_bytes(plan.params), where);
}

template <typename T, bool CL> void start(const Params& p, const group_norm::Plan& plan, const Launch& where) {
  constexpr int kWide = 16 / sizeof(T);
  if (plan.vector == kWide) moments<T, kWide, CL>(plan, where);
  else if (CL && plan.vector == 4) moments<T, CL ? 4 : 1, CL>(plan, where);
  else moments<T, 1, CL>(plan, where);
  const GroupNormSiluArgs f = forward_of(p.a);
  if (group_norm::can_access(f, kWide) && aligned(p.a.dy, 16)) start<T, kWide, CL>(p, where);
  else start<T, 1, CL>(p, where);
}
}  // namespace
}  // namespace group_norm_backward

size_t group_norm_silu_backward_workspace(const GroupNormSiluBackwardArgs& a) {
  if (a.N * a.C * a.P == 0) return 0;
  const group_norm_backward::Sizes s = group_norm_backward::sizes_of(a);
  return size_t(s.moments + s.stats + s.parts) * sizeof(float);
}

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& a, const Launch& where) {
  using namespace group_norm_backward;
  if (a.N * a.C * a.P == 0) return;
  if (a.P > INT32_MAX - kStretch || a.C > INT32_MAX)
    throw std::runtime_error("group_norm_silu_backward: more than 2^31 pixels or channels");
  const Sizes sizes = sizes_of(a);
  const int64_t most = most_parts(a);
  GroupNormSiluArgs f = forward_of(a);
  f.workspace = a.workspace;
  const group_norm::Plan plan = group_norm::make_split_plan(f, most);
  Params p{};
  p.a = a;
  p.moments = a.workspace;
  p.stats = a.workspace + sizes.moments;
  p.parts = p.stats + sizes.stats;
  p.moment_parts = plan.params.tiles.value * plan.params.slices.value;
  p.slice = static_cast<int>(slice_of(a));
  p.slices = Divisor(ceil_div(a.P, p.slice));
  p.group_channels = Divisor(a.C / a.groups);
  p.channels = Divisor(a.C);
  p.few = a.N * a.C * p.slices.value <= INT32_MAX - kWarps;   // with room for the last block's warps
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.channels_last) start<T, true>(p, plan, where);
    else start<T, false>(p, plan, where);
  });
}
}  // namespace ldmfast
