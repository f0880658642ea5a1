// group_norm_silu_backward.cpp, channels_last: a task is a chunk of pixels, which are one piece of memory, and a slab
// of their channels. Which pixels a chunk has depends on P alone, and the chunks' sums are added in their order.
#pragma once
#include "group_norm_silu_backward_common.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kSlab = 512;  // channels, whose coefficients and sums stay in the first-level cache
constexpr int kAbreast = 4;     // pixels that are summed in registers before they join the others

template <class T> struct Block {
  const Sample& s;
  int64_t chunk, c, channels, pixels;  // channels from c on
  const T *x, *dy;                     // [pixels, channels]
  T* dx;
  float* kept;                         // [pixels, channels] of g, in the order of load_pair
  int64_t stride_x, stride;

  Block(const Sample& s, int64_t chunk, int64_t slab)
      : s(s), chunk(chunk), c(slab * kSlab), channels(min64(kSlab, s.a.C - c)),
        pixels(min64(kPixels, s.a.P - chunk * kPixels)), stride_x(s.a.stride_xp), stride(s.a.C) {
    const int64_t dense = (s.n * s.a.P + chunk * kPixels) * s.a.C + c;
    x = (const T*)s.a.x + s.n * s.a.stride_xn + chunk * kPixels * s.a.stride_xp + c;
    dy = (const T*)s.a.dy + dense;
    dx = (T*)s.a.dx + dense;
    kept = s.plan.g + s.n % s.plan.samples * s.plan.kept + chunk * kPixels * s.plan.width + c;
  }
};

// step(first pixel, how many, first channel, channels left, whole or not), a few pixels and a pair of vectors each
template <class T, class Step> LDMFAST_INLINE void each(const Block<T>& b, Step step) {
  const int64_t whole = b.channels / kPair * kPair;
  for (int64_t p = 0; p < b.pixels; p += kAbreast) {
    const int64_t count = min64(kAbreast, b.pixels - p);
    if (count == kAbreast) for (int64_t i = 0; i < whole; i += kPair) step(p, (int64_t)kAbreast, i, kPair, Whole{});
    else for (int64_t i = 0; i < whole; i += kPair) step(p, count, i, kPair, Whole{});
    if (whole < b.channels) step(p, count, whole, b.channels - whole, First{});
  }
}

LDMFAST_INLINE void add_to(float* sum, VecF u, VecF v) {
  store(sum, load(sum) + u);
  store(sum + kLanes, load(sum + kLanes) + v);
}

// sum += x - about over the pixels, or its square; both of the block's channels
template <bool kSquare, class T> LDMFAST_INLINE void add_pixels(const Block<T>& b, const float* about, float* sum) {
  each(b, [&](int64_t p, int64_t count, int64_t i, int64_t n, auto whole) __attribute__((always_inline)) {
    const VecF au = load(about + i), av = load(about + i + kLanes);
    VecF su{}, sv{}, u, v;
#pragma GCC unroll 4
    for (int64_t j = 0; j < count; ++j) {
      read_pair<decltype(whole)::value>(b.x + (p + j) * b.stride_x + i, n, u, v);
      u -= au, v -= av;
      su += kSquare ? u * u : u, sv += kSquare ? v * v : v;
    }
    add_to(sum + i, su, sv);
  });
}

// sums: of x - pivot, and of squares about the chunk's mean
template <class T> void chunk_moments(const Block<T>& b, const Pivot<T>& sample) {
  float mean[kSlab], sum[kSlab], square[kSlab];
  const Pivot<T> pivot = sample.at(b.c);
  for (int64_t i = 0; i < b.channels; i += kPair) {
    VecF u[3], v[3];
    const T* of[] = {pivot.first + i, pivot.first + pivot.middle + i, pivot.first + pivot.last + i};
    for (int j = 0; j < 3; ++j) {
      if (i + kPair <= b.channels) read_pair<true>(of[j], kPair, u[j], v[j]);
      else read_pair<false>(of[j], b.channels - i, u[j], v[j]);
    }
    store(mean + i, between(u[0], u[1], u[2])), store(mean + i + kLanes, between(v[0], v[1], v[2]));
    for (int64_t j = 0; j < kPair; j += kLanes) store(sum + i + j, VecF{}), store(square + i + j, VecF{});
  }
  add_pixels<false>(b, mean, sum);
  for (int64_t i = 0; i < b.channels; i += kLanes) store(mean + i, load(mean + i) + load(sum + i) / (float)b.pixels);
  add_pixels<true>(b, mean, square);
  float *sums = b.s.sums(b.chunk, 0) + b.c, *squares = b.s.sums(b.chunk, 1) + b.c;
  for (int64_t i = 0; i < b.channels; i += kLanes) store(sums + i, load(sum + i)), store(squares + i, load(square + i));
}

// sums: of g, and of g * m
template <class T, bool kSilu, bool kKept> void chunk_sums(const Block<T>& b) {
  float g_sum[kSlab], gm_sum[kSlab];
  const float *mean = b.s.row(kMean) + b.c, *slope = b.s.row(kSlope) + b.c, *offset = b.s.row(kOffset) + b.c;
  for (int64_t i = 0; i < kSlab; i += kLanes) store(g_sum + i, VecF{}), store(gm_sum + i, VecF{});
  each(b, [&](int64_t p, int64_t count, int64_t i, int64_t n, auto whole) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    const VecF mu = load(mean + i), mv = load(mean + i + kLanes), au = load(slope + i), av = load(slope + i + kLanes);
    const VecF bu = load(offset + i), bv = load(offset + i + kLanes);
    VecF gu{}, gv{}, gmu{}, gmv{}, u, v, du, dv;
#pragma GCC unroll 4
    for (int64_t j = 0; j < count; ++j) {
      read_pair<kWhole>(b.x + (p + j) * b.stride_x + i, n, u, v);
      read_pair<kWhole>(b.dy + (p + j) * b.stride + i, n, du, dv);
      u -= mu, v -= mv;
      du = through_act<T, kSilu>(du, u * au + bu), dv = through_act<T, kSilu>(dv, v * av + bv);
      if (kKeepsG<T, kSilu>) write_pair<kWhole>(b.dx + (p + j) * b.stride + i, n, du, dv);
      if (kKept) write_pair<true>(b.kept + (p + j) * b.s.plan.width + i, kPair, du, dv);
      gu += du, gv += dv;
      gmu += du * u, gmv += dv * v;
    }
    add_to(g_sum + i, gu, gv);
    add_to(gm_sum + i, gmu, gmv);
  });
  float *g = b.s.sums(b.chunk, 0) + b.c, *gm = b.s.sums(b.chunk, 1) + b.c;
  for (int64_t i = 0; i < b.channels; i += kLanes) store(g + i, load(g_sum + i)), store(gm + i, load(gm_sum + i));
}

template <class T, bool kSilu, bool kKept> void chunk_gradient(const Block<T>& b) {
  const float *mean = b.s.row(kMean) + b.c, *slope = b.s.row(kSlope) + b.c, *offset = b.s.row(kOffset) + b.c;
  const float *constant = b.s.row(kConstant) + b.c, *linear = b.s.row(kLinear) + b.c;
  each(b, [&](int64_t p, int64_t count, int64_t i, int64_t n, auto whole) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    const VecF mu = load(mean + i), mv = load(mean + i + kLanes), au = load(slope + i), av = load(slope + i + kLanes);
    const VecF bu = load(offset + i), bv = load(offset + i + kLanes);
    const VecF cu = load(constant + i), cv = load(constant + i + kLanes);
    const VecF lu = load(linear + i), lv = load(linear + i + kLanes);
    VecF u, v, du, dv;
#pragma GCC unroll 4
    for (int64_t j = 0; j < count; ++j) {
      T* dx = b.dx + (p + j) * b.stride + i;
      read_pair<kWhole>(b.x + (p + j) * b.stride_x + i, n, u, v);
      u -= mu, v -= mv;
      if (kKept) read_pair<true>(b.kept + (p + j) * b.s.plan.width + i, kPair, du, dv);
      else read_pair<kWhole>(kKeepsG<T, kSilu> ? dx : b.dy + (p + j) * b.stride + i, n, du, dv);
      if (!kKeepsG<T, kSilu> && !kKept) {
        du = through_act<T, kSilu>(du, u * au + bu), dv = through_act<T, kSilu>(dv, v * av + bv);
      }
      write_pair<kWhole>(dx, n, du * au - cu - u * lu, dv * av - cv - v * lv);
    }
  });
}

// A vector of channels: their means and squares from the chunks'.
void merge_moments(const Sample& s, int64_t i) {
  VecD total{}, squares{};
  for (int64_t chunk = 0; chunk < s.plan.chunks; ++chunk) total += exact(load(s.sums(chunk, 0) + i));
  const VecD mean = total / (double)s.a.P;
  for (int64_t chunk = 0; chunk < s.plan.chunks; ++chunk) {
    const double pixels = (double)min64(kPixels, s.a.P - chunk * kPixels);
    const VecD delta = exact(load(s.sums(chunk, 0) + i)) * (1.0 / pixels) - mean;
    squares += exact(load(s.sums(chunk, 1) + i)) + delta * delta * pixels;
  }
  memcpy(s.exact(kCentre) + i, &mean, sizeof mean);
  memcpy(s.exact(kSquares) + i, &squares, sizeof squares);
}
void merge_sums(const Sample& s, int64_t i) {
  VecD g{}, gm{};
  for (int64_t chunk = 0; chunk < s.plan.chunks; ++chunk) {
    g += exact(load(s.sums(chunk, 0) + i));
    gm += exact(load(s.sums(chunk, 1) + i));
  }
  memcpy(s.exact(kG) + i, &g, sizeof g);
  memcpy(s.exact(kGm) + i, &gm, sizeof gm);
}

// groups that fill whole pairs of vectors
int64_t bundle_of(const Args& a) {
  int64_t common = a.C / a.groups;
  for (int64_t rest = kPair; rest;) {  // Euclid
    const int64_t next = common % rest;
    common = rest;
    rest = next;
  }
  return kPair / common;
}

// The passes over samples `from` to `to`, by all threads together.
template <class T, bool kSilu, bool kKept> void passes(const Args& a, const Plan& plan, int64_t from, int64_t to) {
  const int64_t D = a.C / a.groups, bundle = bundle_of(a), bundles = ceil_div(a.groups, bundle);
  const int64_t slabs = ceil_div(a.C, kSlab), blocks = plan.chunks * slabs;
#pragma omp for schedule(static)
  for (int64_t i = from * blocks; i < to * blocks; ++i) {
    const Sample s{a, plan, i / blocks};
    const T* x = (const T*)a.x + s.n * a.stride_xn;
    chunk_moments<T>(Block<T>(s, i % blocks / slabs, i % slabs), pivot_of(x, a.P, a.stride_xp));
  }
#pragma omp for schedule(static)
  for (int64_t i = from * bundles; i < to * bundles; ++i) {
    const Sample s{a, plan, i / bundles};
    const int64_t first = i % bundles * bundle, end = min64(a.groups, first + bundle);
    const Pivot<T> pivot = pivot_of((const T*)a.x + s.n * a.stride_xn, a.P, a.stride_xp);
    for (int64_t c = first * D; c < end * D; c += kLanes) merge_moments(s, c);
    for (int64_t c = first * D; c < end * D; ++c) s.exact(kCentre)[place<T>(a, c)] += (double)value(pivot.at(c));
    for (int64_t group = first; group < end; ++group) finish_moments<T>(s, group);
  }
#pragma omp for schedule(static)
  for (int64_t i = from * blocks; i < to * blocks; ++i) {
    const Sample s{a, plan, i / blocks};
    chunk_sums<T, kSilu, kKept>(Block<T>(s, i % blocks / slabs, i % slabs));
  }
#pragma omp for schedule(static)
  for (int64_t i = from * bundles; i < to * bundles; ++i) {
    const Sample s{a, plan, i / bundles};
    const int64_t first = i % bundles * bundle, end = min64(a.groups, first + bundle);
    for (int64_t c = first * D; c < end * D; c += kLanes) merge_sums(s, c);
    for (int64_t group = first; group < end; ++group) finish_sums<T>(s, group);
  }
#pragma omp for schedule(static) nowait
  for (int64_t i = from * blocks; i < to * blocks; ++i) {
    const Sample s{a, plan, i / blocks};
    chunk_gradient<T, kSilu, kKept>(Block<T>(s, i % blocks / slabs, i % slabs));
  }
}

template <class T, bool kSilu> void channels_last(const Args& a, const Plan& plan) {
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  for (int64_t n = 0; n < a.N; n += plan.samples) {
    const int64_t to = min64(a.N, n + plan.samples);
    if (kNarrow<T> && kSilu && plan.kept) passes<T, kSilu, kNarrow<T> && kSilu>(a, plan, n, to);
    else passes<T, kSilu, false>(a, plan, n, to);
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
