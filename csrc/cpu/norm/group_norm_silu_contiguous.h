// group_norm_silu.cpp, contiguous: a group is one task, which sums it chunk by chunk and writes it row by row.
#pragma once
#include "group_norm_silu_common.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kChunk = 4096;  // elements whose two passes stay in the first-level cache

// Two passes over at most kChunk elements; the second corrects the mean of the first. Four sums each, since an
// addition takes three or four cycles.
template <class T> void add_chunk(Moments& moments, const T* x, int64_t count, double offset) {
  constexpr bool kCorrect = sizeof(T) == 4;  // float32's rounding of the mean is nothing to a 16-bit result
  VecF s[4] = {}, d[4] = {}, q[4] = {}, v[4];
  const int64_t whole = count / (4 * kPair) * (4 * kPair);
  for (int64_t i = 0; i < whole; i += 4 * kPair) {
    for (int j = 0; j < 4; ++j) add_pair(x + i + j * kPair, s[j], s[(j + 2) % 4]);
  }
  for (int64_t i = whole; i < count; i += kLanes) s[0] += load_first(x + i, min64(kLanes, count - i));
  const float mean = reduce_add((s[0] + s[1]) + (s[2] + s[3])) / (float)count;

  for (int64_t i = 0; i < whole;) {
    VecF deviations[4] = {}, squares[4] = {};
    for (const int64_t end = min64(i + kRun * 2 * kPair, whole); i < end; i += 2 * kPair) {
      __builtin_prefetch(x + i + kChunk);  // the next chunk, while this pass has its own at hand
      __builtin_prefetch(x + i + kChunk + kPair);
      load_pair(x + i, v[0], v[1]);
      load_pair(x + i + kPair, v[2], v[3]);
      for (int j = 0; j < 4; ++j) {
        v[j] -= mean;
        if (kCorrect) deviations[j] += v[j];
        squares[j] += v[j] * v[j];
      }
    }
    for (int j = 0; j < 4; ++j) d[j] += deviations[j], q[j] += squares[j];
  }
  const int64_t whole_vectors = count / kLanes * kLanes;
  for (int64_t i = whole; i < whole_vectors; i += kLanes) {
    v[0] = load(x + i) - mean;
    if (kCorrect) d[0] += v[0];
    q[0] += v[0] * v[0];
  }
  float deviation = reduce_add((d[0] + d[1]) + (d[2] + d[3])), square = reduce_add((q[0] + q[1]) + (q[2] + q[3]));
  for (int64_t i = whole_vectors; i < count; ++i) {
    const float last = to_float(x[i]) - mean;
    if (kCorrect) deviation += last;
    square += last * last;
  }
  double correction = (double)deviation / (double)count;
  moments.merge((double)count, mean + correction + offset, square - correction * deviation);
}

template <class T> void add_row(Moments& moments, const T* x, int64_t count, double offset) {
  for (int64_t i = 0; i < count; i += kChunk) add_chunk(moments, x + i, min64(kChunk, count - i), offset);
}

// kPairs pairs of vectors of one channel: y = act(z).   ahead  elements from here to where the next group's row lies
template <class T, bool kSilu, int kPairs>
LDMFAST_INLINE void write_row_pairs(const T* x, T* y, VecF mean, VecF a, VecF b, int64_t ahead) {
  VecF v[2 * kPairs];
#pragma GCC unroll 3
  for (int j = 0; j < kPairs; ++j) {
    __builtin_prefetch(x + ahead + j * kPair, 0, 2);  // 0.62 -> 0.56 ms of one thread
    load_pair(x + j * kPair, v[2 * j], v[2 * j + 1]);
  }
#pragma GCC unroll 6
  for (int j = 0; j < 2 * kPairs; ++j) v[j] = apply<T, kSilu>(v[j], mean, a, b);
#pragma GCC unroll 3
  for (int j = 0; j < kPairs; ++j) write_pair<T, kSilu>(y + j * kPair, v[2 * j], v[2 * j + 1]);
}

template <class T, bool kSilu>
LDMFAST_INLINE void write_row(const T* x, T* y, int64_t count, Affine k, int64_t ahead) {
  const VecF mean = splat(k.mean), a = splat(k.a), b = splat(k.b);
  int64_t i = 0;
  for (; i + kAbreast * kPair <= count; i += kAbreast * kPair) {
    write_row_pairs<T, kSilu, kAbreast>(x + i, y + i, mean, a, b, ahead);
  }
  for (; i + kPair <= count; i += kPair) write_row_pairs<T, kSilu, 1>(x + i, y + i, mean, a, b, ahead);
  for (; i < count; i += kLanes) {
    const int64_t n = min64(kLanes, count - i);
    store_first(y + i, apply<T, kSilu>(load_first(x + i, n), mean, a, b), n);
  }
}

// one group, in one thread
template <class T, bool kSilu> void contiguous_group(const GroupNormSiluArgs& g, int64_t n, int64_t group) {
  const int64_t D = g.C / g.groups, first = group * D;
  const T* x = (const T*)g.x + n * g.stride_xn + first * g.stride_xc;  // [D, P]
  T* y = (T*)g.y + (n * g.C + first) * g.P;                            // [D, P]
  Moments moments{};
  if (!g.add && g.stride_xc == g.P) {
    add_row(moments, x, D * g.P, 0.0);
  } else {
    for (int64_t d = 0; d < D; ++d) add_row(moments, x + d * g.stride_xc, g.P, added(g, n, first + d));
  }
  const double scale = rstd(moments, g.eps);
  for (int64_t d = 0; d < D; ++d) {
    Affine k = affine<kFastSilu<T, kSilu>>(g, moments.mean, scale, n, first + d);
    write_row<T, kSilu>(x + d * g.stride_xc, y + d * g.P, g.P, k, D * g.stride_xc);
  }
}

template <class T, bool kSilu> void contiguous(const GroupNormSiluArgs& g) {
  const int64_t total = g.N * g.groups;
#pragma omp parallel for schedule(static) if (g.N * g.C * g.P > kSerial)
  for (int64_t i = 0; i < total; ++i) contiguous_group<T, kSilu>(g, i / g.groups, i % g.groups);
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
