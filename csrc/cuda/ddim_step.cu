// One DDIM step: guidance, predicted x0, previous sample, in a single pass.
//
// Traffic: (2 or 3 inputs, + noise, + 2 outputs) * bytes; [2, 4, 64, 64] is 64 KB a tensor, so the time is that of a
// launch. 256 threads, one 16-byte access per tensor and thread: every load is issued before the first use.
#include "launch.cuh"

namespace ldmfast {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ DdimCoefficients row_of_table(const DdimStepArgs& a, int64_t n) {
  const int64_t r = a.row ? a.row[n * a.stride_row] : n;
  if (r < 0 || r >= a.rows) {
    const float nan = bits_to_float(0x7FC00000u);
    return {nan, nan, nan, nan, nan, nan, nan};
  }
  const float* k = a.table + r * 7;
  return {k[0], k[1], k[2], k[3], k[4], k[5], k[6]};
}

template <typename T, int V>
__device__ __forceinline__ void add_history(const void* history, float weight, int64_t i, float (&e)[V]) {
  if (!history) return;
  float h[V];
  load_vector(static_cast<const T*>(history) + i, h);
#pragma unroll
  for (int j = 0; j < V; ++j) e[j] += weight * h[j];
}

// the formulas of DdimStepArgs where multistep is true; model is guided by now
template <typename T, int V>
__device__ __forceinline__ void multistep(const DdimStepArgs& a, const DdimCoefficients& c, int64_t i,
                                          const float (&sample)[V], float (&model)[V], const float (&noise)[V]) {
  float e[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    model[j] = c.eps_sample * sample[j] + c.eps_model * model[j];
    e[j] = a.weight0 * model[j];
  }
  add_history<T, V>(a.history1, a.weight1, i, e);
  add_history<T, V>(a.history2, a.weight2, i, e);
  add_history<T, V>(a.history3, a.weight3, i, e);
  store_vector(static_cast<T*>(a.x0) + i, model);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    float x = c.x0_sample * sample[j] + c.x0_model * e[j];
    if (a.clipped) x = x < -a.clip ? -a.clip : x > a.clip ? a.clip : x;
    e[j] = c.prev_x0 * x + c.prev_eps * e[j] + c.sigma * noise[j];
  }
  store_vector(static_cast<T*>(a.prev) + i, e);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) ddim_step_kernel(const __grid_constant__ DdimStepArgs a) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  const int64_t total = a.N * a.M;
  if (i >= total) return;
  wait_for_previous_kernel();
  float sample[V], model[V], noise[V], prev[V], x0[V];
  load_vector(static_cast<const T*>(a.sample) + i, sample);
  load_vector(static_cast<const T*>(a.model_output) + i, model);
  if (a.noise) {
    load_vector(static_cast<const T*>(a.noise) + i, noise);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) noise[j] = 0.0f;
  }
  if (a.guided) {
    float conditional[V];
    load_vector(static_cast<const T*>(a.model_output) + total + i, conditional);
#pragma unroll
    for (int j = 0; j < V; ++j) model[j] += a.guidance * (conditional[j] - model[j]);
  }
  DdimCoefficients c = a.coefficients;
  if (a.table) c = row_of_table(a, i / a.M);   // V divides M, so a vector lies within one sample
  if (a.multistep) return multistep<T, V>(a, c, i, sample, model, noise);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    float x = c.x0_sample * sample[j] + c.x0_model * model[j];
    if (a.clipped) x = x < -a.clip ? -a.clip : x > a.clip ? a.clip : x;   // a NaN stays one, which fmaxf would drop
    const float eps = c.eps_sample * sample[j] + c.eps_model * model[j];
    x0[j] = x;
    prev[j] = c.prev_x0 * x + c.prev_eps * eps + c.sigma * noise[j];
  }
  store_vector(static_cast<T*>(a.x0) + i, x0);
  store_vector(static_cast<T*>(a.prev) + i, prev);
}

template <typename T, int V> void start(const DdimStepArgs& a, const Launch& where) {
  const int64_t blocks = ceil_div(a.N * a.M, int64_t(kThreads) * V);
  launch<ddim_step_kernel<T, V>>("ddim_step", a, blocks, kThreads, 0, where);
}
}  // namespace

void ddim_step(const DdimStepArgs& a, const Launch& where) {
  if (a.N * a.M == 0) return;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    bool wide = a.M % V == 0;
    for (const void* p : {a.sample, a.model_output, a.noise, static_cast<const void*>(a.prev),
                          static_cast<const void*>(a.x0), a.history1, a.history2, a.history3})
      wide = wide && aligned(p, 16);
    if (wide) start<T, V>(a, where);
    else start<T, 1>(a, where);
  });
}
}  // namespace ldmfast
