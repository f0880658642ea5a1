// Sinusoid, linear, SiLU, linear. Traffic: both weights once for every 4 samples.
// Source: Vaswani et al. 2017, section 3.5 (the sinusoid); Ho et al. 2020 (its use for the timestep).
#include <math.h>

#include "exponential.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int kSamples = 4;               // samples that share one read of a weight
constexpr int64_t kSerial = 128 * 1024;   // products below which waking threads costs more than it gives

template <class T> LDMFAST_INLINE float rounded(float x) {
  T stored[kLanes];
  store(stored, splat(x));
  return load(stored)[0];
}

// row[dim] = the sinusoid of t, rounded to T as the layers' input
template <class T> void sinusoid(const TimestepMlpArgs& m, float t, float* row) {
  const int64_t half = m.dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float angle = t * m.freqs[i], s = sinf(angle), c = cosf(angle);
    row[i] = rounded<T>(m.flip_sin_to_cos ? c : s);
    row[half + i] = rounded<T>(m.flip_sin_to_cos ? s : c);
  }
  if (m.dim % 2) row[m.dim - 1] = 0.0f;
}

// out[k] = weight [depth] . x[k, depth] for kCount samples
template <class T, int kCount> void dots(const T* weight, const float* x, int64_t depth, float* out) {
  VecF sum[kCount] = {};
  int64_t i = 0;
  for (; i + kLanes <= depth; i += kLanes) {
    const VecF w = load(weight + i);
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) sum[k] += w * load(x + k * depth + i);
  }
  if (i < depth) {
    const VecF w = load_first(weight + i, depth - i);
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) sum[k] += w * load_first(x + k * depth + i, depth - i);
  }
  for (int k = 0; k < kCount; ++k) out[k] = reduce_add(sum[k]);
}

template <class T> void row_times(const T* weight, const float* x, int64_t N, int64_t depth, float* out) {
  int64_t n = 0;
  for (; n + kSamples <= N; n += kSamples) dots<T, kSamples>(weight, x + n * depth, depth, out + n);
  for (; n < N; ++n) dots<T, 1>(weight, x + n * depth, depth, out + n);
}

template <class T> void run(const TimestepMlpArgs& m) {
  float* embedded = m.workspace;              // [N, dim]
  float* hidden = embedded + m.N * m.dim;     // [N, F]
  float* columns = hidden + m.N * m.F;        // [max(F, E), N]: one row of a layer for all samples
  const T *w1 = (const T*)m.w1, *w2 = (const T*)m.w2;
  T* out = (T*)m.out;
#pragma omp parallel if (m.N * (m.dim + m.E) * m.F > kSerial)
  {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < m.N; ++n) sinusoid<T>(m, m.t[n], embedded + n * m.dim);
#pragma omp for schedule(static)
    for (int64_t f = 0; f < m.F; ++f) {
      const float bias = m.b1 ? load_scalar(m.b1, m.dtype, f) : 0.0f;
      row_times(w1 + f * m.dim, embedded, m.N, m.dim, columns + f * m.N);
      for (int64_t n = 0; n < m.N; ++n) {
        hidden[n * m.F + f] = silu<Accuracy::kFull>(splat(columns[f * m.N + n] + bias))[0];
      }
    }
#pragma omp for schedule(static)
    for (int64_t e = 0; e < m.E; ++e) {
      const float bias = m.b2 ? load_scalar(m.b2, m.dtype, e) : 0.0f;
      row_times(w2 + e * m.F, hidden, m.N, m.F, columns + e * m.N);
      for (int64_t n = 0; n < m.N; ++n) store_first(out + n * m.E + e, splat(columns[e * m.N + n] + bias), 1);
    }
  }
}

}  // namespace

size_t timestep_mlp_workspace(const TimestepMlpArgs& m) {
  return (size_t)(m.N * (m.dim + m.F + max64(m.F, m.E))) * sizeof(float);
}

void timestep_mlp(const TimestepMlpArgs& m) {
  if (m.N * m.E == 0) return;
  if (m.dtype == DType::kFloat32) return run<float>(m);
  if (m.dtype == DType::kBFloat16) return run<BFloat16>(m);
  return run<Half>(m);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
