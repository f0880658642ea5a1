// group_norm_silu: what one block does with its slab: stage, statistics, normalise.
#pragma once
#include "group_norm_silu.cuh"

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
#pragma unroll 1
  for (int i = threadIdx.x; i < channels; i += kThreads) {
    const int64_t c = slab.channel + i;
    const Affine f = affine_of(a, w.n, c);
    s.add[i] = f.add, s.gain[i] = f.gain, s.offset[i] = f.offset;
  }
}

// this thread's sums for its two groups, to parts [2, kThreads]
template <int V> __device__ __forceinline__ void put(float* parts, const Columns<V>& mine, const float (&v)[V]) {
  float lower = 0.0f, upper = 0.0f;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    lower += j < mine.split ? v[j] : 0.0f;
    upper += j < mine.split ? 0.0f : v[j];
  }
  parts[threadIdx.x] = lower;
  parts[kThreads + threadIdx.x] = upper;
}

// this thread's sum of x + add
template <typename T, int V, bool CL>
__device__ __forceinline__ void sum_slab(const Place& w, const Slab<V, CL>& slab, const Storage<T>& s,
                                         const Columns<V>& mine, float (&sum)[V]) {
  float vectors = 0.0f;
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = 0.0f;
  slab.each(w.n, [&](int i, int c, int64_t, int64_t) {
    float v[V];
    load_vector(s.slab + i, v);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += CL ? v[j] : v[j] + s.add[c];
    vectors += 1.0f;
  });
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] += CL && slab.count > 0 ? vectors * s.add[mine.first + j] : 0.0f;
}

// this thread's sums of d and d^2, d = x + add - pivot. What add - pivot loses to rounding is another number in each
// channel, so it is no part of the mean: 190 deviations off, it would be 1e-5 of one.
template <typename T, int V, bool CL>
__device__ __forceinline__ void square_slab(const Place& w, const Slab<V, CL>& slab, const Storage<T>& s,
                                            const Columns<V>& mine, float (&rest)[V], float (&square)[V]) {
  float shift[V], vectors = 0.0f;
  const auto shifted = [&](int j) {
    return CL && slab.count > 0 ? exact_sum(s.add[mine.first + j], -s.pivot[mine.group(j)]) : float2{0.0f, 0.0f};
  };
#pragma unroll
  for (int j = 0; j < V; ++j) shift[j] = shifted(j).x, rest[j] = square[j] = 0.0f;
  slab.each(w.n, [&](int i, int c, int64_t, int64_t) {
    float v[V];
    load_vector(s.slab + i, v);
    const float2 one = CL ? float2{0.0f, 0.0f} : exact_sum(s.add[c], -s.pivot[0]);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float d = CL ? v[j] + shift[j] : (v[j] + one.x) + one.y;
      rest[j] += d;
      square[j] += d * d;
    }
    vectors += 1.0f;
  });
  if constexpr (CL) {
#pragma unroll
    for (int j = 0; j < V; ++j) {   // one number a channel here: taken in afterwards, so that no register holds it
      const float left = shifted(j).y, all = left * vectors;
      square[j] += left * (2.0f * rest[j] + all);
      rest[j] += all;
    }
  }
}

// Merges the staged slab's moments into s.moments: the mean first, then the squares about it. The caller synchronises.
template <typename T, int V, bool CL>
__device__ __forceinline__ void slab_moments(const Params& p, const Place& w, const Slab<V, CL>& slab, Storage<T>& s) {
  const int gc = CL ? p.group_channels.value : V, width = CL ? w.width : V;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Columns<V> mine = slab.mine(w);
  const float members = static_cast<float>(slab.count) * (gc < width ? gc : width);
  float sum[V], square[V];
  sum_slab(w, slab, s, mine, sum);
  put(s.parts, mine, sum);
  __syncthreads();
#pragma unroll 1
  for (int g = warp; g < w.groups; g += kWarps) {
    const float all = group_sum<V>(s.parts, g, width, slab.columns, slab.step, gc);
    if (lane == 0) s.pivot[g] = members > 0.0f ? all * fast_reciprocal(members) : 0.0f;
  }
  __syncthreads();
  square_slab(w, slab, s, mine, sum, square);   // sum: what rounding left in the first mean
  put(s.parts, mine, sum);
  put(s.parts + 2 * kThreads, mine, square);
  __syncthreads();
#pragma unroll 1
  for (int g = warp; g < w.groups; g += kWarps) {
    const float d = group_sum<V>(s.parts, g, width, slab.columns, slab.step, gc);
    const float q = group_sum<V>(s.parts + 2 * kThreads, g, width, slab.columns, slab.step, gc);
    if (lane == 0 && members > 0.0f) {
      const float correction = d * fast_reciprocal(members), m2 = q - d * correction;
      const float2 mean = exact_sum(s.pivot[g], correction);
      store(s.moments + 4 * g, merge(s.load(g), {members, mean.x, mean.y, m2 > 0.0f ? m2 : 0.0f}));
    }
  }
}

template <typename T> __device__ __forceinline__ void reset(const Place& w, Storage<T>& s) {
  for (int g = threadIdx.x; g < w.groups; g += kThreads) store(s.moments + 4 * g, {0.0f, 0.0f, 0.0f, 0.0f});
}

// workspace: [N, groups, tiles * slices, 4]
__device__ __forceinline__ float* moments_of(const Params& p, const Place& w, int g) {
  return p.a.workspace + (w.n * p.a.groups + w.group + g) * (p.tiles.value * p.slices.value) * 4;
}

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, 2) statistics_kernel(const __grid_constant__ Params p) {
  Storage<T> s(p);
  const Place w = locate(p);
  wait_for_previous_kernel();
  reset(w, s);
  for (int at = w.begin; at < w.end; at += p.slab_extent) {
    const Slab<V, CL> slab(p, w, at);
    stage(p, w, slab, s);
    load_coefficients(p, w, slab, s);
    cp_async_wait<0>();
    __syncthreads();
    slab_moments(p, w, slab, s);   // its last sums are of s.parts alone, which the next slab writes behind a barrier
  }
  __syncthreads();
  for (int g = threadIdx.x; g < w.groups; g += kThreads)
    store(moments_of(p, w, g) + (w.tile * p.slices.value + w.slice) * 4, s.load(g));
}

// s.pivot, s.rest, s.rstd of each group of the bundle, from `parts` moments read by part(g, i)
template <typename T, typename F>
__device__ __forceinline__ void finish(const Params& p, const Place& w, Storage<T>& s, int parts, F&& part) {
#pragma unroll 1
  for (int g = threadIdx.x / 32; g < w.groups; g += kWarps) {
    Moments m = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < parts; i += 32) m = merge(m, part(g, i));
    m = warp_merge(m);
    if (threadIdx.x % 32 == 0) {
      s.pivot[g] = m.mean;
      s.rest[g] = m.rest;
      s.rstd[g] = rsqrtf(m.m2 * fast_reciprocal(m.count) + p.a.eps);
    }
  }
}

// y = act((x + add - mean) * rstd * gain + offset). The difference comes first, which a mean of 300 does not blunt;
// what the mean and add - mean lost to rounding is in the offset.
struct Normal { float center, gain, offset; };
template <typename T> __device__ __forceinline__ Normal normal(const Storage<T>& s, int c, int g) {
  const float2 center = exact_sum(s.add[c], -s.pivot[g]);
  const float gain = s.gain[c] * s.rstd[g];
  return {center.x, gain, s.offset[c] + (center.y - s.rest[g]) * gain};
}
template <typename T, int V, bool CL, bool STAGED>
__device__ __forceinline__ void apply(const Params& p, const Place& w, const Slab<V, CL>& slab, Storage<T>& s) {
  const T* x = static_cast<const T*>(p.a.x);
  T* y = static_cast<T*>(p.a.y);
  float center[V], gain[V], offset[V];
  if constexpr (CL) {
    const Columns<V> mine = slab.mine(w);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Normal f = normal(s, mine.first + j, mine.group(j));
      center[j] = f.center, gain[j] = f.gain, offset[j] = f.offset;
    }
  }
  const bool act = p.a.silu;
  slab.each(w.n, [&](int i, int c, int64_t from, int64_t to) {
    float v[V];
    load_vector(STAGED ? s.slab + i : x + from, v);
    const Normal one = CL ? Normal{} : normal(s, c, 0);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if constexpr (CL) v[j] = (v[j] + center[j]) * gain[j] + offset[j];
      else v[j] = (v[j] + one.center) * one.gain + one.offset;
    }
    if (act) silu_vector(v);
    store_vector(y + to, v);
  });
}

}  // namespace group_norm
}  // namespace ldmfast
