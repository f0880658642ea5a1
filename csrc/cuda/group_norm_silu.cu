// y = SiLU(GroupNorm(x + add) * (1 + scale) + shift)
//
// Fused, one launch: a slice stays in shared memory from its only read to its only write; the blocks of a task form a
// cluster and exchange their moments through distributed shared memory. [2, 320, 64, 64] in 16 bits, channels_last: 16
// bundles of 80 bytes x 4096 pixels, clusters of 8, so 128 blocks of 40 KB, one wave on 132 multiprocessors; 10.5 MB in
// all, 3.5 us at 3 TB/s. Otherwise two launches: moments of each slice to the workspace, then normalise (reads twice).
#include "group_norm_silu.cuh"
#include "group_norm_silu_plan.h"

namespace ldmfast {
namespace group_norm {

template <typename T, int V, bool CL>
__device__ __forceinline__ void stage(const Params& p, const Place& w, const Slab<V, CL>& slab, Storage<T>& s) {
  const T* x = static_cast<const T*>(p.a.x);
  slab.each(w.n, [&](int i, int, int64_t from, int64_t) {
    if constexpr (V * sizeof(T) >= 4) cp_async<V * sizeof(T)>(s.slab + i, x + from);
    else s.slab[i] = x[from];
  });
  cp_async_commit();
}

// add, gain = weight * (1 + scale) and offset = bias * (1 + scale) + shift of the slab's channels
template <typename T, int V, bool CL>
__device__ __forceinline__ void load_coefficients(const Params& p, const Place& w, const Slab<V, CL>& slab,
                                                  Storage<T>& s) {
  const GroupNormSiluArgs& a = p.a;
  const int channels = slab.channels(w);
  for (int i = threadIdx.x; i < channels; i += kThreads) {
    const int64_t c = slab.channel + i;
    const float scale = a.scale ? 1.0f + load_as_float(a.scale, w.n * a.stride_scale + c, a.mod_dtype) : 1.0f;
    const float shift = a.shift ? load_as_float(a.shift, w.n * a.stride_shift + c, a.mod_dtype) : 0.0f;
    s.add[i] = a.add ? load_as_float(a.add, w.n * a.stride_add + c, a.mod_dtype) : 0.0f;
    s.gain[i] = (a.weight ? load_as_float(a.weight, c, a.param_dtype) : 1.0f) * scale;
    s.offset[i] = (a.bias ? load_as_float(a.bias, c, a.param_dtype) : 0.0f) * scale + shift;
  }
}

// merges the staged slab's moments into s.count, s.mean, s.m2: mean first, then the squares about it
template <typename T, int V, bool CL>
__device__ __forceinline__ void slab_moments(const Params& p, const Place& w, const Slab<V, CL>& slab, Storage<T>& s) {
  const int gc = p.group_channels, column = CL ? threadIdx.x % unsigned(slab.columns) * V : 0;
  const int low = CL ? column / gc : 0;                       // the lower of the two groups this thread can meet
  const int split = CL && gc - column % gc < V ? gc - column % gc : V;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int sum_gc = CL ? gc : V, sum_width = CL ? w.width : V;
  const float members = static_cast<float>(slab.count) * (CL ? (gc < w.width ? gc : w.width) : V);

  float sum[V] = {};
  slab.each(w.n, [&](int i, int c, int64_t, int64_t) {
    float v[V];
    load_vector(s.slab + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += v[j] + s.add[CL ? c + j : c];
  });
  float lower = 0.0f, upper = 0.0f;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    lower += j < split ? sum[j] : 0.0f;
    upper += j < split ? 0.0f : sum[j];
  }
  s.parts[threadIdx.x] = lower;
  s.parts[kThreads + threadIdx.x] = upper;
  __syncthreads();
  for (int g = warp; g < w.groups; g += kWarps) {
    const float total = group_sum<V>(s.parts, g, sum_width, slab.columns, slab.step, sum_gc);
    if (lane == 0) s.pivot[g] = members > 0 ? total * fast_reciprocal(members) : 0.0f;
  }
  __syncthreads();

  float pivot[V], rest[V] = {}, square[V] = {};               // rest: what rounding left in the first mean
#pragma unroll
  for (int j = 0; j < V; ++j) pivot[j] = s.pivot[j < split ? low : (low + 1 < w.groups ? low + 1 : low)];
  slab.each(w.n, [&](int i, int c, int64_t, int64_t) {
    float v[V];
    load_vector(s.slab + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float d = v[j] + (s.add[CL ? c + j : c] - pivot[j]);
      rest[j] += d;
      square[j] += d * d;
    }
  });
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    float r = 0.0f, q = 0.0f;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      r += (j < split) == (k == 0) ? rest[j] : 0.0f;
      q += (j < split) == (k == 0) ? square[j] : 0.0f;
    }
    s.parts[k * kThreads + threadIdx.x] = r;
    s.parts[(2 + k) * kThreads + threadIdx.x] = q;
  }
  __syncthreads();
  for (int g = warp; g < w.groups; g += kWarps) {
    const float d = group_sum<V>(s.parts, g, sum_width, slab.columns, slab.step, sum_gc);
    const float q = group_sum<V>(s.parts + 2 * kThreads, g, sum_width, slab.columns, slab.step, sum_gc);
    if (lane == 0 && members > 0) {
      const float correction = d * fast_reciprocal(members), m2 = q - d * correction;
      const Moments now = {members, s.pivot[g] + correction, m2 > 0.0f ? m2 : 0.0f};
      const Moments all = merge({s.count[g], s.mean[g], s.m2[g]}, now);
      s.count[g] = all.count, s.mean[g] = all.mean, s.m2[g] = all.m2;
    }
  }
  __syncthreads();
}

// s.pivot, s.rstd = mean, 1 / sqrt(var + eps) of each group of the bundle, from `parts` moments read by part(g, i)
template <typename T, typename F>
__device__ __forceinline__ void finish(const Params& p, const Place& w, Storage<T>& s, int parts, F&& part) {
  for (int g = threadIdx.x / 32; g < w.groups; g += kWarps) {
    Moments m = {0.0f, 0.0f, 0.0f};
    for (int i = threadIdx.x % 32; i < parts; i += 32) m = merge(m, part(g, i));
    m = warp_merge(m);
    if (threadIdx.x % 32 == 0) {
      s.pivot[g] = m.mean;
      s.rstd[g] = rsqrtf(m.m2 * fast_reciprocal(m.count) + p.a.eps);
    }
  }
}

// y = act((x + add - mean) * rstd * gain + offset): the difference first, which a mean of 300 does not blunt
template <typename T, int V, bool CL, bool STAGED>
__device__ __forceinline__ void apply(const Params& p, const Place& w, const Slab<V, CL>& slab, Storage<T>& s) {
  const T* x = static_cast<const T*>(p.a.x);
  T* y = static_cast<T*>(p.a.y);
  float center[V], gain[V], offset[V];
  const int gc = p.group_channels;
  if constexpr (CL) {
    const int column = threadIdx.x % unsigned(slab.columns) * V;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int c = column + j, g = c / gc;
      center[j] = s.add[c] - s.pivot[g];
      gain[j] = s.gain[c] * s.rstd[g];
      offset[j] = s.offset[c];
    }
  }
  const bool act = p.a.silu;
  slab.each(w.n, [&](int i, int c, int64_t from, int64_t to) {
    float v[V];
    load_vector(STAGED ? s.slab + i : x + from, v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if constexpr (CL) v[j] = (v[j] + center[j]) * gain[j] + offset[j];
      else v[j] = (v[j] + (s.add[c] - s.pivot[0])) * (s.gain[c] * s.rstd[0]) + s.offset[c];
      if (act) v[j] = silu(v[j]);
    }
    store_vector(y + to, v);
  });
}

template <typename T> __device__ __forceinline__ void reset(const Place& w, Storage<T>& s) {
  for (int g = threadIdx.x; g < w.groups; g += kThreads) s.count[g] = s.mean[g] = s.m2[g] = 0.0f;
}

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, 1) fused_kernel(const __grid_constant__ Params p) {
  Storage<T> s(p);
  const Place w = locate(p);
  const Slab<V, CL> slab(p, w, w.begin);
  stage(p, w, slab, s);
  load_coefficients(p, w, slab, s);
  reset(w, s);
  cp_async_wait<0>();
  __syncthreads();
  slab_moments(p, w, slab, s);
  if (p.clustered) {
    cluster_arrive();
    cluster_wait();
    finish(p, w, s, p.slices, [&](int g, int r) {
      return Moments{cluster_load(s.count + g, r), cluster_load(s.mean + g, r), cluster_load(s.m2 + g, r)};
    });
    cluster_arrive();
  } else {
    finish(p, w, s, 1, [&](int g, int) { return Moments{s.count[g], s.mean[g], s.m2[g]}; });
  }
  __syncthreads();
  apply<T, V, CL, true>(p, w, slab, s);
  if (p.clustered) cluster_wait();   // the others may still read this block's moments
}

// workspace: [N, groups, tiles * slices, 3]
__device__ __forceinline__ float* moments_of(const Params& p, const Place& w, int g) {
  return p.a.workspace + (w.n * p.a.groups + w.group + g) * (p.tiles * p.slices) * 3;
}

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, 1) statistics_kernel(const __grid_constant__ Params p) {
  Storage<T> s(p);
  const Place w = locate(p);
  reset(w, s);
  for (int at = w.begin; at < w.end; at += p.slab_extent) {
    const Slab<V, CL> slab(p, w, at);
    stage(p, w, slab, s);
    load_coefficients(p, w, slab, s);
    cp_async_wait<0>();
    __syncthreads();
    slab_moments(p, w, slab, s);
  }
  __syncthreads();
  for (int g = threadIdx.x; g < w.groups; g += kThreads) {
    float* to = moments_of(p, w, g) + (w.tile * p.slices + w.slice) * 3;
    to[0] = s.count[g], to[1] = s.mean[g], to[2] = s.m2[g];
  }
}

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, 1) apply_kernel(const __grid_constant__ Params p) {
  Storage<T> s(p);
  const Place w = locate(p);
  finish(p, w, s, p.tiles * p.slices, [&](int g, int i) {
    const float* from = moments_of(p, w, g) + i * 3;
    return Moments{from[0], from[1], from[2]};
  });
  for (int at = w.begin; at < w.end; at += p.slab_extent) {
    const Slab<V, CL> slab(p, w, at);
    __syncthreads();
    load_coefficients(p, w, slab, s);
    __syncthreads();
    apply<T, V, CL, false>(p, w, slab, s);
  }
}
}  // namespace group_norm

namespace {
using group_norm::Params;
using group_norm::Plan;

template <typename T, int V, bool CL> void start(const Plan& plan, const Launch& where) {
  const char* op = "group_norm_silu";
  const Params& p = plan.params;
  const size_t shared = storage_bytes(p);
  if (plan.fused) {
    launch<group_norm::fused_kernel<T, V, CL>>(op, p, plan.blocks, group_norm::kThreads, shared, where,
                                               static_cast<int>(p.clustered ? p.slices : 1));
    return;
  }
  launch<group_norm::statistics_kernel<T, V, CL>>(op, p, plan.blocks, group_norm::kThreads, shared, where);
  launch<group_norm::apply_kernel<T, V, CL>>(op, p, plan.blocks, group_norm::kThreads, shared, where);
}
template <typename T, bool CL> void start(const Plan& plan, const Launch& where) {
  constexpr int kWide = 16 / sizeof(T);
  if (plan.vector == kWide) start<T, kWide, CL>(plan, where);
  else if constexpr (CL && kWide != 4) plan.vector == 4 ? start<T, 4, CL>(plan, where) : start<T, 1, CL>(plan, where);
  else start<T, 1, CL>(plan, where);
}
}  // namespace

size_t group_norm_silu_workspace(const GroupNormSiluArgs& a) {
  if (a.N * a.C * a.P == 0) return 0;
  const Plan plan = group_norm::make_plan(a, nullptr);
  return plan.fused ? 0 : a.N * a.groups * int64_t(plan.params.tiles) * plan.params.slices * 3 * sizeof(float);
}

void group_norm_silu(const GroupNormSiluArgs& a, const Launch& where) {
  if (a.N * a.C * a.P == 0) return;
  const Device device = device_of("group_norm_silu", where);
  const Plan plan = group_norm::make_plan(a, &device);
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.channels_last) start<T, true>(plan, where);
    else start<T, false>(plan, where);
  });
}
}  // namespace ldmfast
