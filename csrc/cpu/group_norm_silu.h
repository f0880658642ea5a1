// What both layouts of group_norm_silu.cpp share, and the channels_last one: moments of chunks of pixels, then their
// merge, then the writing.
#pragma once
#include <omp.h>

#include "exponential.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kChunkBytes = 64 * 1024;  // x whose two passes stay in the second-level cache
constexpr int64_t kPair = 2 * kLanes;       // channels or pixels that load_pair takes
constexpr int64_t kSerial = 16 * 1024;      // elements below which waking threads costs more than it gives

struct Moments {
  double count, mean, m2;

  void merge(double n, double other_mean, double other_m2) {
    if (n == 0) return;
    double total = count + n, delta = other_mean - mean;
    mean += delta * (n / total);
    m2 += other_m2 + delta * delta * (count * (n / total));
    count = total;
  }
};

double rstd(const Moments& m, float eps) { return 1.0 / __builtin_sqrt(m.m2 / m.count + (double)eps); }

// y = (x - mean) * a + b. What float32 loses of the mean is in b. In the fast form SiLU's exponent instead of y.
struct Affine { float mean, a, b; };
template <class T, bool kSilu> constexpr bool kFastSilu = kSilu && AccuracyOf<T>::value == Accuracy::kFast;

float added(const GroupNormSiluArgs& g, int64_t n, int64_t c) {
  return g.add ? load_scalar(g.add, g.mod_dtype, n * g.stride_add + c) : 0.0f;
}

template <bool kExponent>
Affine affine(const GroupNormSiluArgs& g, double group_mean, double group_rstd, int64_t n, int64_t c) {
  double a = group_rstd, b = 0.0;
  if (g.weight) a *= load_scalar(g.weight, g.param_dtype, c);
  if (g.bias) b = load_scalar(g.bias, g.param_dtype, c);
  if (g.scale) {
    double scale = 1.0 + load_scalar(g.scale, g.mod_dtype, n * g.stride_scale + c);
    a *= scale;
    b *= scale;
  }
  if (g.shift) b += load_scalar(g.shift, g.mod_dtype, n * g.stride_shift + c);
  const double mean = group_mean - added(g, n, c);
  if (kExponent) return {0.0f, (float)(-kLog2e * a), (float)(-kLog2e * (b - mean * a))};
  return {(float)mean, (float)a, (float)(b - (mean - (float)mean) * a)};
}

template <class T, bool kSilu> LDMFAST_INLINE VecF apply(VecF x, VecF mean, VecF a, VecF b) {
  if (kFastSilu<T, kSilu>) return silu_of_exponent<AccuracyOf<T>::value>(x * a + b);
  VecF y = (x - mean) * a + b;
  return kSilu ? silu<AccuracyOf<T>::value>(y) : y;
}

struct Plan {
  int64_t pixels, chunks;  // pixels of a chunk, chunks of a sample
  int64_t threads;
  double* moments;         // [N, chunks, G, 2]: mean and sum of squared deviations
  float* coefficients;     // [N, 3, C]: mean, a, b
  float* columns;          // [threads, 3, C]
  size_t bytes;
};

Plan plan_of(const GroupNormSiluArgs& g) {
  const int64_t size = g.dtype == DType::kFloat32 ? 4 : 2;
  Plan plan;
  plan.pixels = max64(1, min64(g.P, kChunkBytes / max64(1, g.C * size)));
  plan.chunks = ceil_div(g.P, plan.pixels);
  plan.threads = g.N * g.C * g.P > kSerial ? min64(omp_get_max_threads(), max64(1, g.N * plan.chunks)) : 1;
  const int64_t moments = g.N * plan.chunks * g.groups * 2, coefficients = g.N * 3 * g.C;
  plan.moments = (double*)g.workspace;
  plan.coefficients = g.workspace + 2 * moments;
  plan.columns = plan.coefficients + coefficients;
  plan.bytes = (size_t)moments * 8 + (size_t)(coefficients + plan.threads * 3 * g.C) * 4;
  return plan;
}

// Where the tables keep channel c: in the order in which load_pair hands out channels, and plainly after the last pair.
template <class T> LDMFAST_INLINE int64_t slot(int64_t c, int64_t) { return c; }
template <> inline __attribute__((always_inline)) int64_t slot<BFloat16>(int64_t c, int64_t C) {
  const int64_t at = c % kPair;
  return c - at + kPair > C ? c : c - at + (at % 2) * kLanes + at / 2;
}

// sum[c] = sum over the chunk's pixels of x - mean[c], and of its square where asked, for kPairs * kPair channels
template <class T, bool kSquares, int kPairs>
LDMFAST_INLINE void column_block(const T* x, int64_t pixels, int64_t stride, const float* mean, float* sum,
                                 float* square) {
  constexpr int kVectors = 2 * kPairs;
  VecF m[kVectors] = {}, s[kVectors] = {}, q[kVectors] = {}, v[kVectors];
  for (int j = 0; kSquares && j < kVectors; ++j) m[j] = load(mean + j * kLanes);
  for (int64_t p = 0; p < pixels; ++p) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j += 2) load_pair(x + p * stride + j * kLanes, v[j], v[j + 1]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const VecF d = kSquares ? v[j] - m[j] : v[j];
      s[j] += d;
      if (kSquares) q[j] += d * d;
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    store(sum + j * kLanes, s[j]);
    if (kSquares) store(square + j * kLanes, q[j]);
  }
}

template <class T, bool kSquares>
void column_sums(const T* x, int64_t pixels, int64_t stride, int64_t C, const float* mean, float* sum, float* square) {
  int64_t c = 0;
  for (; c + 2 * kPair <= C; c += 2 * kPair) {
    column_block<T, kSquares, 2>(x + c, pixels, stride, mean + c, sum + c, square + c);
  }
  for (; c + kPair <= C; c += kPair) {
    column_block<T, kSquares, 1>(x + c, pixels, stride, mean + c, sum + c, square + c);
  }
  for (; c < C; ++c) {
    float s = 0, q = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      const float d = to_float(x[p * stride + c]) - (kSquares ? mean[c] : 0.0f);
      s += d;
      q += d * d;
    }
    sum[c] = s;
    if (kSquares) square[c] = q;
  }
}

template <class T>
void chunk_moments(const GroupNormSiluArgs& g, const Plan& plan, int64_t n, int64_t chunk, float* mean) {
  const int64_t first = chunk * plan.pixels, pixels = min64(plan.pixels, g.P - first), D = g.C / g.groups;
  const T* x = (const T*)g.x + n * g.stride_xn + first * g.stride_xp;  // [pixels, C]
  double* out = plan.moments + (n * plan.chunks + chunk) * g.groups * 2;
  float *sum = mean + g.C, *square = sum + g.C;
  const double count = (double)(D * pixels);
  column_sums<T, false>(x, pixels, g.stride_xp, g.C, mean, sum, square);
  for (int64_t group = 0; group < g.groups; ++group) {
    double total = 0;
    for (int64_t c = group * D; c < (group + 1) * D; ++c) {
      total += sum[slot<T>(c, g.C)] + (double)pixels * added(g, n, c);
    }
    out[2 * group] = total / count;
    for (int64_t c = group * D; c < (group + 1) * D; ++c) {
      mean[slot<T>(c, g.C)] = (float)(out[2 * group] - added(g, n, c));
    }
  }
  column_sums<T, true>(x, pixels, g.stride_xp, g.C, mean, sum, square);
  for (int64_t group = 0; group < g.groups; ++group) {
    double deviation = 0, squares = 0;
    for (int64_t c = group * D; c < (group + 1) * D; ++c) {
      deviation += sum[slot<T>(c, g.C)];
      squares += square[slot<T>(c, g.C)];
    }
    out[2 * group] += deviation / count;
    out[2 * group + 1] = squares - deviation * (deviation / count);
  }
}

template <class T, bool kSilu>
void merge_chunks(const GroupNormSiluArgs& g, const Plan& plan, int64_t n, int64_t group) {
  const int64_t D = g.C / g.groups, step = 2 * g.groups;
  const double* part = plan.moments + n * plan.chunks * step + 2 * group;
  Moments all{(double)(D * g.P), 0.0, 0.0};
  for (int64_t i = 0; i < plan.chunks; ++i) {
    all.mean += part[i * step] * (double)min64(plan.pixels, g.P - i * plan.pixels);
  }
  all.mean /= (double)g.P;
  for (int64_t i = 0; i < plan.chunks; ++i) {
    const double delta = part[i * step] - all.mean;
    all.m2 += part[i * step + 1] + delta * delta * (double)(D * min64(plan.pixels, g.P - i * plan.pixels));
  }
  const double scale = rstd(all, g.eps);
  float* mean = plan.coefficients + n * 3 * g.C;
  for (int64_t c = group * D; c < (group + 1) * D; ++c) {
    const Affine k = affine<kFastSilu<T, kSilu>>(g, all.mean, scale, n, c);
    const int64_t at = slot<T>(c, g.C);
    mean[at] = k.mean;
    mean[g.C + at] = k.a;
    mean[2 * g.C + at] = k.b;
  }
}

template <class T, bool kSilu>
void write_chunk(const GroupNormSiluArgs& g, const Plan& plan, int64_t n, int64_t chunk) {
  const int64_t end = min64(g.P, (chunk + 1) * plan.pixels);
  const float *mean = plan.coefficients + n * 3 * g.C, *a = mean + g.C, *b = a + g.C;
  for (int64_t p = chunk * plan.pixels; p < end; ++p) {
    const T* x = (const T*)g.x + n * g.stride_xn + p * g.stride_xp;  // [C]
    T* y = (T*)g.y + (n * g.P + p) * g.C;                            // [C]
    int64_t c = 0;
    for (; c + kPair <= g.C; c += kPair) {
      VecF u, v;
      load_pair(x + c, u, v);
      u = apply<T, kSilu>(u, load(mean + c), load(a + c), load(b + c));
      v = apply<T, kSilu>(v, load(mean + c + kLanes), load(a + c + kLanes), load(b + c + kLanes));
      store_pair(y + c, u, v);
    }
    for (; c < g.C; c += kLanes) {
      const int64_t w = min64(kLanes, g.C - c);
      VecF v = apply<T, kSilu>(load_first(x + c, w), load_first(mean + c, w), load_first(a + c, w),
                               load_first(b + c, w));
      store_first(y + c, v, w);
    }
  }
}

template <class T, bool kSilu> void channels_last(const GroupNormSiluArgs& g) {
  const Plan plan = plan_of(g);
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  {
    float* columns = plan.columns + omp_get_thread_num() * 3 * g.C;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.N * plan.chunks; ++i) {
      chunk_moments<T>(g, plan, i / plan.chunks, i % plan.chunks, columns);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.N * g.groups; ++i) merge_chunks<T, kSilu>(g, plan, i / g.groups, i % g.groups);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.N * plan.chunks; ++i) write_chunk<T, kSilu>(g, plan, i / plan.chunks, i % plan.chunks);
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
