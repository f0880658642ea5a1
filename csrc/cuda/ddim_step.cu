// One DDIM step: guidance, predicted x0, previous sample, in a single pass.
//
// Traffic: (2 or 3 inputs, + noise, + 2 outputs) * bytes; [2, 4, 64, 64] is 64 KB a tensor, so the time is that of a
// launch. 256 threads, one 16-byte access per tensor and thread: every load is issued before the first use.
#include "launch.cuh"

namespace ldmfast {
namespace {

constexpr int kThreads = 256;

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) ddim_step_kernel(const __grid_constant__ DdimStepArgs a) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  const int64_t total = a.N * a.M;
  if (i >= total) return;
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
  if (a.table) {                     // V divides M, so a vector lies within one sample
    const float* row = a.table + i / a.M * 7;
    c = {row[0], row[1], row[2], row[3], row[4], row[5], row[6]};
  }
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
    const bool wide = a.M % V == 0 && aligned(a.sample, 16) && aligned(a.model_output, 16) && aligned(a.prev, 16) &&
                      aligned(a.x0, 16) && (!a.noise || aligned(a.noise, 16));
    if (wide) start<T, V>(a, where);
    else start<T, 1>(a, where);
  });
}
}  // namespace ldmfast
