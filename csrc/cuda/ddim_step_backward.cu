// The gradient of one DDIM step, in a single pass; see DdimStepBackwardArgs for the formulas.
//
// Traffic: 2 inputs (sample and model output only where x0 was clamped) and 2 to 4 outputs; as the forward, small.
#include "launch.cuh"

namespace ldmfast {
namespace {

constexpr int kThreads = 256;

// d0 becomes zero where the clamp held x0
template <typename T, int V>
__device__ __forceinline__ void clamp_gradient(const DdimStepBackwardArgs& a, const DdimCoefficients& c, int64_t i,
                                               float (&d0)[V]) {
  float sample[V], model[V];
  load_vector(static_cast<const T*>(a.sample) + i, sample);
  load_vector(static_cast<const T*>(a.model_output) + i, model);
  if (a.guided) {
    float conditional[V];
    load_vector(static_cast<const T*>(a.model_output) + a.N * a.M + i, conditional);
#pragma unroll
    for (int j = 0; j < V; ++j) model[j] += a.guidance * (conditional[j] - model[j]);
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float x0 = c.x0_sample * sample[j] + c.x0_model * model[j];
    d0[j] = x0 >= -a.clip && x0 <= a.clip ? d0[j] : 0.0f;
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) ddim_step_backward_kernel(const __grid_constant__ DdimStepBackwardArgs a) {
  wait_for_previous_kernel();
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  const int64_t total = a.N * a.M;
  if (i >= total) return;
  float dprev[V], d0[V], out[V];
  load_vector(static_cast<const T*>(a.dprev) + i, dprev);
  load_vector(static_cast<const T*>(a.dx0) + i, d0);
  DdimCoefficients c = a.coefficients;
  if (a.table) {                     // V divides M, so a vector lies within one sample
    const float* row = a.table + i / a.M * 7;
    c = {row[0], row[1], row[2], row[3], row[4], row[5], row[6]};
  }
#pragma unroll
  for (int j = 0; j < V; ++j) d0[j] += c.prev_x0 * dprev[j];
  if (a.clipped) clamp_gradient<T, V>(a, c, i, d0);
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] = c.x0_sample * d0[j] + c.eps_sample * c.prev_eps * dprev[j];
  store_vector(static_cast<T*>(a.dsample) + i, out);
  float dm[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    dm[j] = c.x0_model * d0[j] + c.eps_model * c.prev_eps * dprev[j];
    out[j] = a.guided ? (1.0f - a.guidance) * dm[j] : dm[j];
    dm[j] *= a.guidance;
  }
  store_vector(static_cast<T*>(a.dmodel_output) + i, out);
  if (a.guided) store_vector(static_cast<T*>(a.dmodel_output) + total + i, dm);
  if (!a.dnoise) return;
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] = c.sigma * dprev[j];
  store_vector(static_cast<T*>(a.dnoise) + i, out);
}

template <typename T, int V> void start(const DdimStepBackwardArgs& a, const Launch& where) {
  const int64_t blocks = ceil_div(a.N * a.M, int64_t(kThreads) * V);
  launch<ddim_step_backward_kernel<T, V>>("ddim_step_backward", a, blocks, kThreads, 0, where);
}
}  // namespace

void ddim_step_backward(const DdimStepBackwardArgs& a, const Launch& where) {
  if (a.N * a.M == 0) return;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    bool wide = a.M % V == 0;
    for (const void* p : {a.dprev, a.dx0, a.sample, a.model_output, static_cast<const void*>(a.dsample),
                          static_cast<const void*>(a.dmodel_output), static_cast<const void*>(a.dnoise)})
      wide = wide && aligned(p, 16);
    if (wide) start<T, V>(a, where);
    else start<T, 1>(a, where);
  });
}
}  // namespace ldmfast
