// Guidance and one DDIM step in one pass. Traffic: every tensor once.
// Source: Song et al. 2021, equation 12; Ho & Salimans 2022 (guidance).
//
//   tasks: for each sample n, each block of kBlock elements     k = the coefficients, those of row n where a table is
//     for i in the block, two vectors at a time:
//       m = model_output[i], or with guidance u + guidance * (c - u) of its two halves
//       x0 = k.x0_sample * sample[i] + k.x0_model * m
//       x0 = min(max(x0, -clip), clip), if clipped
//       eps = k.eps_sample * sample[i] + k.eps_model * m
//       prev = k.prev_x0 * x0 + k.prev_eps * eps (+ k.sigma * noise[i])
//
// Whether there are guidance, clip and noise is known when it compiles: eight loops, of which run() takes one. A
// multistep method (its formulas: csrc/ops.h) has a ninth, which asks.
#include "simd.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kBlock = 4096;       // elements of one task
constexpr int64_t kSerial = 64 * 1024;  // elements below which waking threads costs more than it gives

constexpr float kNaN = __builtin_nanf("");

struct Step {
  DdimCoefficients k;
  float guidance, clip;
};

LDMFAST_INLINE VecF clamped(const Step& s, VecF x0) {  // written so that NaN stays
  x0 = x0 < -s.clip ? splat(-s.clip) : x0;
  return x0 > s.clip ? splat(s.clip) : x0;
}

template <bool kGuided, bool kClipped, bool kNoise>
LDMFAST_INLINE void step(const Step& s, VecF x, VecF mu, VecF mc, VecF noise, VecF& prev, VecF& x0) {
  const VecF m = kGuided ? mu + s.guidance * (mc - mu) : mu;
  x0 = s.k.x0_sample * x + s.k.x0_model * m;
  if (kClipped) x0 = clamped(s, x0);
  const VecF eps = s.k.eps_sample * x + s.k.eps_model * m;
  prev = s.k.prev_x0 * x0 + s.k.prev_eps * eps;
  if (kNoise) prev += s.k.sigma * noise;
}

template <class T, bool kGuided, bool kClipped, bool kNoise>
void block(const DdimStepArgs& d, const Step& s, int64_t begin, int64_t end) {
  const T *sample = (const T*)d.sample, *noise = (const T*)d.noise;
  const T *mu = (const T*)d.model_output, *mc = mu + d.N * d.M;
  T *out = (T*)d.prev, *out_x0 = (T*)d.x0;
  VecF prev, x0;
  int64_t i = begin;
  for (; i + kPair <= end; i += kPair) {
    VecF x[2], u[2], c[2] = {}, w[2] = {}, p[2], z[2];
    load_pair(sample + i, x[0], x[1]);
    load_pair(mu + i, u[0], u[1]);
    if (kGuided) load_pair(mc + i, c[0], c[1]);
    if (kNoise) load_pair(noise + i, w[0], w[1]);
    for (int j = 0; j < 2; ++j) step<kGuided, kClipped, kNoise>(s, x[j], u[j], c[j], w[j], p[j], z[j]);
    store_pair(out + i, p[0], p[1]);
    store_pair(out_x0 + i, z[0], z[1]);
  }
  for (; i < end; i += kLanes) {
    const int64_t n = min64(kLanes, end - i);
    step<kGuided, kClipped, kNoise>(s, load_first(sample + i, n), load_first(mu + i, n),
                                    kGuided ? load_first(mc + i, n) : VecF{},
                                    kNoise ? load_first(noise + i, n) : VecF{}, prev, x0);
    store_first(out + i, prev, n);
    store_first(out_x0 + i, x0, n);
  }
}

template <class T> void multistep_block(const DdimStepArgs& d, const Step& s, int64_t begin, int64_t end) {
  const T *sample = (const T*)d.sample, *output = (const T*)d.model_output, *noise = (const T*)d.noise;
  const T* history[] = {(const T*)d.history1, (const T*)d.history2, (const T*)d.history3};
  const float weights[] = {d.weight1, d.weight2, d.weight3};
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = min64(kLanes, end - i);
    const VecF x = load_first(sample + i, n);
    VecF m = load_first(output + i, n);
    if (d.guided) m += d.guidance * (load_first(output + d.N * d.M + i, n) - m);
    m = s.k.eps_sample * x + s.k.eps_model * m;
    store_first((T*)d.x0 + i, m, n);
    VecF e = d.weight0 * m;
    for (int j = 0; j < 3; ++j)
      if (history[j]) e += weights[j] * load_first(history[j] + i, n);
    VecF x0 = s.k.x0_sample * x + s.k.x0_model * e;
    if (d.clipped) x0 = clamped(s, x0);
    VecF prev = s.k.prev_x0 * x0 + s.k.prev_eps * e;
    if (noise) prev += s.k.sigma * load_first(noise + i, n);
    store_first((T*)d.prev + i, prev, n);
  }
}

template <class T> using Block = void (*)(const DdimStepArgs&, const Step&, int64_t, int64_t);

template <class T, bool kGuided> Block<T> choose(bool clipped, bool noise) {
  if (clipped) return noise ? block<T, kGuided, true, true> : block<T, kGuided, true, false>;
  return noise ? block<T, kGuided, false, true> : block<T, kGuided, false, false>;
}

Step step_of(const DdimStepArgs& d, int64_t n) {
  Step s{d.coefficients, d.guidance, d.clip};
  if (d.table) {
    const int64_t r = d.row ? d.row[n * d.stride_row] : n;
    constexpr float nan[7] = {kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN};
    const float* k = r >= 0 && r < d.rows ? d.table + r * 7 : nan;
    s.k = {k[0], k[1], k[2], k[3], k[4], k[5], k[6]};
  }
  return s;
}

template <class T> void run(const DdimStepArgs& d) {
  const Block<T> work = d.multistep ? multistep_block<T> : d.guided ? choose<T, true>(d.clipped, d.noise) : choose<T, false>(d.clipped, d.noise);
  const int64_t blocks = ceil_div(d.M, kBlock);
#pragma omp parallel for schedule(static) if (d.N * d.M > kSerial)
  for (int64_t i = 0; i < d.N * blocks; ++i) {
    const int64_t n = i / blocks, begin = i % blocks * kBlock;
    work(d, step_of(d, n), n * d.M + begin, n * d.M + min64(d.M, begin + kBlock));
  }
}

}  // namespace

void ddim_step(const DdimStepArgs& d) {
  if (d.N * d.M == 0) return;
  if (d.dtype == DType::kFloat32) return run<float>(d);
  if (d.dtype == DType::kBFloat16) return run<BFloat16>(d);
  return run<Half>(d);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
