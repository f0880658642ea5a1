// Sinusoid, linear, SiLU, linear. Traffic: both weights once for every 4 samples.
// Source: Vaswani et al. 2017, section 3.5 (the sinusoid); Ho et al. 2020 (its use for the timestep).
//
//   three rounds of tasks, one parallel region:
//     for each sample n:          embedded[n] = sinusoid(t[n])
//     for each row f of w1:       for n: hidden[n][f] = silu(w1[f] . embedded[n] + b1[f])
//     for each row e of w2:       for n: out[n][e] = w2[e] . hidden[n] + b2[e]
//
//   a row against all samples, w . x[n], 4 samples at a time (then 2, 1), so that w is read once for the four:
//     for i in w, two vectors at a time: sum[n] += w[i] * x[n][i]
//
// Two vectors of bfloat16 weights come from one load with even and odd elements apart; slot() puts what they are
// multiplied with, embedded and hidden, in the same order.
#include "exponential.h"
#include "sinusoid.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kSerial = 128 * 1024;  // products below which waking threads costs more than it gives

// out[k] = weight [depth] . x[k, depth] for kCount samples
template <class T, int kCount> void dots(const T* weight, const float* x, int64_t depth, float* out) {
  VecF a[kCount] = {}, b[kCount] = {};
  int64_t i = 0;
  for (; i + kPair <= depth; i += kPair) {
    VecF u, v;
    load_pair(weight + i, u, v);
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      a[k] += u * load(x + k * depth + i);
      b[k] += v * load(x + k * depth + i + kLanes);
    }
  }
  for (; i < depth; i += kLanes) {
    const int64_t n = min64(kLanes, depth - i);
    const VecF w = load_first(weight + i, n);
    for (int k = 0; k < kCount; ++k) a[k] += w * load_first(x + k * depth + i, n);
  }
  for (int k = 0; k < kCount; ++k) out[k] = reduce_add(a[k] + b[k]);
}

template <class T> void row_times(const T* weight, const float* x, int64_t N, int64_t depth, float* out) {
  int64_t n = 0;
  for (; n + 4 <= N; n += 4) dots<T, 4>(weight, x + n * depth, depth, out + n);
  for (; n + 2 <= N; n += 2) dots<T, 2>(weight, x + n * depth, depth, out + n);
  if (n < N) dots<T, 1>(weight, x + n * depth, depth, out + n);
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
    for (int64_t n = 0; n < m.N; ++n) {  // in the order of load_pair
      sinusoid<T>(m.t[n], m.freqs, m.dim, m.flip_sin_to_cos, embedded + n * m.dim,
                  [&](int64_t i) { return slot<T>(i, m.dim); });
    }
#pragma omp for schedule(static)
    for (int64_t f = 0; f < m.F; ++f) {
      const float bias = m.b1 ? load_scalar(m.b1, m.dtype, f) : 0.0f;
      row_times(w1 + f * m.dim, embedded, m.N, m.dim, columns + f * m.N);
      for (int64_t n = 0; n < m.N; ++n) {
        hidden[n * m.F + slot<T>(f, m.F)] = silu<Accuracy::kFull>(splat(columns[f * m.N + n] + bias))[0];
      }
    }
#pragma omp for schedule(static) nowait
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
