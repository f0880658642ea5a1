// SiLU(GroupNorm(x + add) * (1 + scale) + shift), contiguous or channels_last. Traffic: x once from memory where a
// group (contiguous) or the tensor (channels_last) stays in cache, y once.
// Source: Wu & He 2018, section 3; Chan, Golub & LeVeque 1983 for merging moments.
#include <omp.h>

#include "simd.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kChunk = 4096;            // elements whose two passes stay in the first-level cache
constexpr int64_t kChunkBytes = 64 * 1024;  // the same for channels_last and the second-level cache
constexpr int64_t kSerial = 16 * 1024;      // elements below which waking threads costs more than it gives

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(double n, double other_mean, double other_m2) {
    if (n == 0) return;
    double total = count + n, delta = other_mean - mean;
    mean += delta * (n / total);
    m2 += other_m2 + delta * delta * (count * (n / total));
    count = total;
  }
};

double rstd(const Moments& m, float eps) { return 1.0 / __builtin_sqrt(m.m2 / m.count + (double)eps); }

// y = (x - mean) * a + b. What float32 loses of the mean is in b.
struct Affine { float mean, a, b; };

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
  double mean = g.add ? group_mean - load_scalar(g.add, g.mod_dtype, n * g.stride_add + c) : group_mean;
  return {(float)mean, (float)a, (float)(b - (mean - (float)mean) * a)};
}

// Two passes over at most kChunk elements; the second corrects the mean of the first.
template <class T> void add_chunk(Moments& moments, const T* x, int64_t count, double offset) {
  VecF s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    VecF a, b;
    load_pair(x + i, a, b);
    s0 += a;
    s1 += b;
  }
  float sum = reduce_add(s0 + s1);
  for (int64_t j = i; j < count; ++j) sum += load_first(x + j, 1)[0];
  const float mean = sum / (float)count;

  VecF d0{}, d1{}, q0{}, q1{};
  for (i = 0; i + 2 * kLanes <= count; i += 2 * kLanes) {
    VecF a, b;
    load_pair(x + i, a, b);
    a -= mean;
    b -= mean;
    d0 += a;
    d1 += b;
    q0 += a * a;
    q1 += b * b;
  }
  float deviation = reduce_add(d0 + d1), square = reduce_add(q0 + q1);
  for (; i < count; ++i) {
    float d = load_first(x + i, 1)[0] - mean;
    deviation += d;
    square += d * d;
  }
  double correction = (double)deviation / (double)count;
  moments.merge((double)count, mean + correction + offset, square - correction * deviation);
}

template <class T> void add_row(Moments& moments, const T* x, int64_t count, double offset) {
  for (int64_t i = 0; i < count; i += kChunk) add_chunk(moments, x + i, min64(kChunk, count - i), offset);
}

template <class T, bool kSilu> LDMFAST_INLINE VecF apply(VecF x, VecF mean, VecF a, VecF b) {
  VecF y = (x - mean) * a + b;
  return kSilu ? silu<AccuracyOf<T>::value>(y) : y;
}

template <class T, bool kSilu> void write_row(const T* x, T* y, int64_t count, Affine k) {
  const VecF mean = splat(k.mean), a = splat(k.a), b = splat(k.b);
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    VecF u, v;
    load_pair(x + i, u, v);
    store_pair(y + i, apply<T, kSilu>(u, mean, a, b), apply<T, kSilu>(v, mean, a, b));
  }
  for (; i < count; i += kLanes) {
    int64_t n = min64(kLanes, count - i);
    store_first(y + i, apply<T, kSilu>(load_first(x + i, n), mean, a, b), n);
  }
}

// ---- contiguous: a group at a time, all in one thread ----

template <class T, bool kSilu> void contiguous_group(const GroupNormSiluArgs& g, int64_t n, int64_t group) {
  const int64_t D = g.C / g.groups, first = group * D;
  const T* x = (const T*)g.x + n * g.stride_xn + first * g.stride_xc;  // [D, P]
  T* y = (T*)g.y + (n * g.C + first) * g.P;                            // [D, P]
  Moments moments;
  if (!g.add && g.stride_xc == g.P) {
    add_row(moments, x, D * g.P, 0.0);
  } else {
    for (int64_t d = 0; d < D; ++d) {
      double offset = g.add ? load_scalar(g.add, g.mod_dtype, n * g.stride_add + first + d) : 0.0;
      add_row(moments, x + d * g.stride_xc, g.P, offset);
    }
  }
  const double scale = rstd(moments, g.eps);
  for (int64_t d = 0; d < D; ++d) {
    Affine k = affine(g, moments.mean, scale, n, first + d);
    write_row<T, kSilu>(x + d * g.stride_xc, y + d * g.P, g.P, k);
  }
}

template <class T, bool kSilu> void contiguous(const GroupNormSiluArgs& g) {
  const int64_t total = g.N * g.groups;
#pragma omp parallel for schedule(static) if (g.N * g.C * g.P > kSerial)
  for (int64_t i = 0; i < total; ++i) contiguous_group<T, kSilu>(g, i / g.groups, i % g.groups);
}

// ---- channels_last: moments of chunks of pixels, then their merge, then the writing ----

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

// For each channel the sum over the chunk's pixels of x - mean[c], and of its square where asked.
template <class T, bool kSquares>
void column_sums(const T* x, int64_t pixels, int64_t stride, int64_t C, const float* mean, float* sum, float* square) {
  for (int64_t c = 0; c < C; c += kLanes) {
    const int64_t width = min64(kLanes, C - c);
    const VecF m = kSquares ? load_first(mean + c, width) : VecF{};
    VecF s{}, q{};
    for (int64_t p = 0; p < pixels; ++p) {
      const T* row = x + p * stride + c;
      VecF d = (width == kLanes ? load(row) : load_first(row, width)) - m;
      s += d;
      q += d * d;
    }
    store_first(sum + c, s, width);
    if (kSquares) store_first(square + c, q, width);
  }
}

template <class T> void chunk_moments(const GroupNormSiluArgs& g, const Plan& plan, int64_t n, int64_t chunk, float* mean) {
  const int64_t first = chunk * plan.pixels, pixels = min64(plan.pixels, g.P - first), D = g.C / g.groups;
  const T* x = (const T*)g.x + n * g.stride_xn + first * g.stride_xp;  // [pixels, C]
  double* out = plan.moments + (n * plan.chunks + chunk) * g.groups * 2;
  float *sum = mean + g.C, *square = sum + g.C;
  const double count = (double)(D * pixels);
  column_sums<T, false>(x, pixels, g.stride_xp, g.C, nullptr, sum, nullptr);
  for (int64_t group = 0; group < g.groups; ++group) {
    double total = 0;
    for (int64_t c = group * D; c < (group + 1) * D; ++c) {
      mean[c] = g.add ? load_scalar(g.add, g.mod_dtype, n * g.stride_add + c) : 0.0f;
      total += sum[c] + (double)pixels * mean[c];
    }
    out[2 * group] = total / count;
    for (int64_t c = group * D; c < (group + 1) * D; ++c) mean[c] = (float)(out[2 * group] - mean[c]);
  }
  column_sums<T, true>(x, pixels, g.stride_xp, g.C, mean, sum, square);
  for (int64_t group = 0; group < g.groups; ++group) {
    double deviation = 0, squares = 0;
    for (int64_t c = group * D; c < (group + 1) * D; ++c) {
      deviation += sum[c];
      squares += square[c];
    }
    out[2 * group] += deviation / count;
    out[2 * group + 1] = squares - deviation * (deviation / count);
  }
}

void merge_chunks(const GroupNormSiluArgs& g, const Plan& plan, int64_t n, int64_t group) {
  const int64_t D = g.C / g.groups;
  Moments moments;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const double* part = plan.moments + ((n * plan.chunks + chunk) * g.groups + group) * 2;
    moments.merge((double)(D * min64(plan.pixels, g.P - chunk * plan.pixels)), part[0], part[1]);
  }
  const double scale = rstd(moments, g.eps);
  float* mean = plan.coefficients + n * 3 * g.C;
  for (int64_t c = group * D; c < (group + 1) * D; ++c) {
    Affine k = affine(g, moments.mean, scale, n, c);
    mean[c] = k.mean;
    mean[g.C + c] = k.a;
    mean[2 * g.C + c] = k.b;
  }
}

template <class T, bool kSilu> void write_chunk(const GroupNormSiluArgs& g, const Plan& plan, int64_t n, int64_t chunk) {
  const int64_t end = min64(g.P, (chunk + 1) * plan.pixels);
  const float *mean = plan.coefficients + n * 3 * g.C, *a = mean + g.C, *b = a + g.C;
  for (int64_t p = chunk * plan.pixels; p < end; ++p) {
    const T* x = (const T*)g.x + n * g.stride_xn + p * g.stride_xp;  // [C]
    T* y = (T*)g.y + (n * g.P + p) * g.C;                            // [C]
    int64_t c = 0;
    for (; c + kLanes <= g.C; c += kLanes) {
      store(y + c, apply<T, kSilu>(load(x + c), load(mean + c), load(a + c), load(b + c)));
    }
    if (int64_t w = g.C - c) {
      VecF v = apply<T, kSilu>(load_first(x + c, w), load_first(mean + c, w), load_first(a + c, w), load_first(b + c, w));
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
    for (int64_t i = 0; i < g.N * plan.chunks; ++i) chunk_moments<T>(g, plan, i / plan.chunks, i % plan.chunks, columns);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.N * g.groups; ++i) merge_chunks(g, plan, i / g.groups, i % g.groups);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.N * plan.chunks; ++i) write_chunk<T, kSilu>(g, plan, i / plan.chunks, i % plan.chunks);
  }
}

template <class T> void run(const GroupNormSiluArgs& g) {
  if (g.channels_last) return g.silu ? channels_last<T, true>(g) : channels_last<T, false>(g);
  return g.silu ? contiguous<T, true>(g) : contiguous<T, false>(g);
}

}  // namespace

size_t group_norm_silu_workspace(const GroupNormSiluArgs& g) {
  return g.channels_last && g.N * g.C * g.P > 0 ? plan_of(g).bytes : 0;
}

void group_norm_silu(const GroupNormSiluArgs& g) {
  if (g.N * g.C * g.P == 0) return;
  if (g.dtype == DType::kFloat32) return run<float>(g);
  if (g.dtype == DType::kBFloat16) return run<BFloat16>(g);
  return run<Half>(g);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
