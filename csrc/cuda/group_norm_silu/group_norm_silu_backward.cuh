// The gradient of group_norm_silu: how the work is cut, and what one element becomes. group_norm_silu_backward.cu has
// the kernels.
//
// Channels_last: a block takes whole pixels, or a tile of their channels, and a thread keeps its channels, so that its
// sums stay in registers. Contiguous: a warp takes a stretch of one channel.
#pragma once
#include "group_norm_silu_block.cuh"

namespace ldmfast {
namespace group_norm_backward {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStretch = 1024;   // contiguous: elements of a channel a warp takes
constexpr int kStats = 5;

struct Params {
  GroupNormSiluBackwardArgs a;
  const float* moments;   // [N, groups, moment_parts, 4], from group_norm::statistics_kernel
  float* stats;           // [N, groups, kStats]: mean and what is left of it, 1 / std; the means of d and of d * xhat
  float* parts;           // [3, N, slices, C]: a slice's sums of g, of g * xhat and of xhat
  int moment_parts;
  Divisor group_channels;  // C / groups
  Divisor channels;       // C
  bool few;               // contiguous: fewer than 2^31 stretches, so that their numbers are divided by Divisors
  Divisor slices;         // of the P pixels
  int slice;              // pixels a slice
  Divisor columns, tiles;  // channels_last: vectors a tile of channels, tiles
  bool wide;              // and the parameters of a vector's channels lie so that they are loaded together
};

// What a channel of one sample needs: xhat = (x + center) * rstd + rest, z = xhat * gain + offset (see Normal)
struct Channel { float center, rstd, rest, gain, offset; };
__device__ __forceinline__ float* stats_of(const Params& p, int64_t n, int64_t group) {
  return p.stats + (n * p.a.groups + group) * kStats;
}
__device__ __forceinline__ Channel channel_of(const Params& p, int64_t n, int64_t group, const group_norm::Affine& f) {
  const float* stats = stats_of(p, n, group);
  const float mean = stats[0], rest = stats[1], rstd = stats[2];
  const float2 center = group_norm::exact_sum(f.add, -mean);
  return {center.x, rstd, (center.y - rest) * rstd, f.gain, f.offset};
}

// xhat and g = dy * act'(z) of V neighbours: of V channels, or of one
template <typename T, int V, bool CL>
__device__ __forceinline__ void terms(const Params& p, const Channel (&channel)[CL ? V : 1], int64_t x, int64_t y,
                                      float (&xhat)[V], float (&g)[V]) {
  load_vector(static_cast<const T*>(p.a.x) + x, xhat);
  load_vector(static_cast<const T*>(p.a.dy) + y, g);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const Channel& c = channel[CL ? j : 0];
    xhat[j] = (xhat[j] + c.center) * c.rstd + c.rest;
    if (p.a.silu) g[j] *= silu_and_slope(xhat[j] * c.gain + c.offset).slope;
  }
}

// This thread's place: its sample, first channel, slice, and which of the slice's pixels or vectors are its own
template <int V, bool CL> struct Place {
  int64_t n, c;
  int slice, first, end, step;   // pixels
  bool active;
  __device__ __forceinline__ explicit Place(const Params& p) {
    if constexpr (CL) {
      const Quotient at = divided(blockIdx.x, p.slices), tile = divided(at.of, p.tiles);
      const Quotient mine = divided(threadIdx.x, p.columns);
      const int rows = kThreads / p.columns, row = mine.of;
      slice = at.rest;
      n = tile.of;
      c = (int64_t(tile.rest) * p.columns.value + mine.rest) * V;
      active = row < rows && c < p.a.C;
      first = slice * p.slice + row;
      step = rows;
    } else {
      const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
      const int64_t row = p.few ? unsigned(unit) / p.slices : unit / p.slices.value;
      slice = static_cast<int>(unit - row * p.slices.value);
      n = p.few ? unsigned(row) / p.channels : row / p.a.C;
      c = row - n * p.a.C;
      active = n < p.a.N;
      first = slice * p.slice + threadIdx.x % 32 * V;
      step = 32 * V;
    }
    const int64_t stop = int64_t(slice + 1) * p.slice;
    end = static_cast<int>(stop < p.a.P ? stop : p.a.P);
  }
  __device__ __forceinline__ void channels(const Params& p, Channel (&channel)[CL ? V : 1]) const {
    group_norm::Affine f[CL ? V : 1];
    if (CL && V > 1 && p.wide) {
      if constexpr (CL && V > 1) group_norm::affine_of(p.a, n, c, f);
    } else {
#pragma unroll
      for (int j = 0; j < (CL ? V : 1); ++j) f[j] = group_norm::affine_of(p.a, n, c + j);
    }
#pragma unroll
    for (int j = 0; j < (CL ? V : 1); ++j) channel[j] = channel_of(p, n, group(p, j), f[j]);
  }
  // of channel c + j: the first one's is divided out once a thread
  __device__ __forceinline__ int group(const Params& p, int j) const {
    const int first = unsigned(c) / p.group_channels;
    if (j == 0) return first;
    const int past = static_cast<int>(c) + j - first * p.group_channels.value;
    return first + unsigned(past) / p.group_channels;
  }
  // f(offset into x, offset into dy and dx)
  template <typename F> __device__ __forceinline__ void each(const Params& p, F&& f) const {
    const GroupNormSiluBackwardArgs& a = p.a;
    for (int i = first; i < end; i += step) {
      if constexpr (CL) f(n * a.stride_xn + i * a.stride_xp + c, (n * a.P + i) * a.C + c);
      else f(n * a.stride_xn + c * a.stride_xc + i, (n * a.C + c) * a.P + i);
    }
  }
};
}  // namespace group_norm_backward
}  // namespace ldmfast
