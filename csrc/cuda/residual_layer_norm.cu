// sum = x + residual and y = LayerNorm(sum), one warp a row. No barrier: a row never leaves its warp.
//
//   each lane: its vectors of the row, V neighbours 32 * V apart
//     s = x + residual, rounded and written; kept in registers, or read again where a row has more than kKept a lane
//     mean = warp_sum(s) / K, then more by warp_sum(s - mean) / K: of a row of like elements nothing else would be left
//     rstd = rsqrt(warp_sum((s - mean)^2) / K + eps);  y = (s - mean) * rstd * weight + bias
//
// Traffic: 4 * x bytes: [8192, 320] in 16 bits is 21 MB, 7 us at 3 TB/s.   Source: Ba, Kiros & Hinton 2016.
#include "launch.cuh"

namespace ldmfast {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = kThreads / 32;   // of a block

template <typename T> __device__ __forceinline__ float rounded(float v) { return to_float(from_float<T>(v)); }

// KEPT: vectors of a lane in registers, which cover the row; 0: the sum is read again, by the lane that wrote it
template <typename T, int V, int KEPT>
// 1 block at least: left alone, ptxas stops at 64 registers for one form on sm_90 and spills 4 bytes
__global__ void __launch_bounds__(kThreads, 1)
residual_layer_norm_kernel(const __grid_constant__ ResidualLayerNormArgs a) {
  const int lane = threadIdx.x % 32;
  const int64_t m = int64_t(blockIdx.x) * kRows + threadIdx.x / 32;
  if (m >= a.M) return;                // the whole warp
  const T* x = static_cast<const T*>(a.x) + m * a.stride_x;
  const T* residual = static_cast<const T*>(a.residual) + m * a.stride_residual;
  T* sum = static_cast<T*>(a.sum) + m * a.K;
  wait_for_previous_kernel();
  float kept[KEPT ? KEPT : 1][V];
  // visits each vector of the lane: visit(k, s), s the sum from k on
  const auto each = [&](auto&& visit) {
    if constexpr (KEPT > 0) {
#pragma unroll
      for (int i = 0; i < KEPT; ++i) {
        const int64_t k = int64_t(i * 32 + lane) * V;
        if (k < a.K) visit(k, kept[i]);
      }
    } else {
      for (int64_t k = int64_t(lane) * V; k < a.K; k += 32 * V) {
        load_vector(sum + k, kept[0]);
        visit(k, kept[0]);
      }
    }
  };
  const auto add = [&](int64_t k, float (&s)[V]) {
    float r[V];
    load_vector(x + k, s);
    load_vector(residual + k, r);
#pragma unroll
    for (int j = 0; j < V; ++j) s[j] = rounded<T>(s[j] + r[j]);
    store_vector(sum + k, s);
  };
  if constexpr (KEPT > 0) {
    each(add);
  } else {
    for (int64_t k = int64_t(lane) * V; k < a.K; k += 32 * V) add(k, kept[0]);
  }
  float total = 0.0f;
  each([&](int64_t, const float (&s)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) total += s[j];
  });
  const float near = warp_sum(total) / static_cast<float>(a.K);
  float off = 0.0f, squares = 0.0f;
  each([&](int64_t, const float (&s)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) off += s[j] - near, squares += (s[j] - near) * (s[j] - near);
  });
  const float by = warp_sum(off) / static_cast<float>(a.K), mean = near + by;
  const float variance = warp_sum(squares) / static_cast<float>(a.K) - by * by;
  const float rstd = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + a.eps);  // NaN is not below 0
  T* y = static_cast<T*>(a.y) + m * a.K;
  each([&](int64_t k, const float (&s)[V]) {
    float v[V], p[V];
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = (s[j] - mean) * rstd;
    if (a.weight) {
      load_vector(static_cast<const T*>(a.weight) + k, p);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] *= p[j];
    }
    if (a.bias) {
      load_vector(static_cast<const T*>(a.bias) + k, p);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] += p[j];
    }
    store_vector(y + k, v);
  });
}

template <typename T, int V, int KEPT> void start(const ResidualLayerNormArgs& a, const Launch& where) {
  launch<residual_layer_norm_kernel<T, V, KEPT>>("residual_layer_norm", a, ceil_div(a.M, kRows), kThreads, 0, where);
}
}  // namespace

void residual_layer_norm(const ResidualLayerNormArgs& a, const Launch& where) {
  if (a.M * a.K == 0) return;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    bool wide = a.K % V == 0 && a.stride_x % V == 0 && a.stride_residual % V == 0;
    for (const void* p : {a.x, a.residual, a.weight, a.bias, static_cast<const void*>(a.sum),
                          static_cast<const void*>(a.y)})
      wide = wide && aligned(p, 16);
    const int64_t vectors = ceil_div(a.K, 32 * V);   // of a lane
    if (!wide) start<T, 1, 0>(a, where);
    else if (vectors <= 2) start<T, V, 2>(a, where);
    else if (vectors <= 5) start<T, V, 5>(a, where);     // 1280 in 16 bits
    else if (vectors <= 10) start<T, V, 10>(a, where);   // 1280 in float32
    else start<T, V, 0>(a, where);
  });
}
}  // namespace ldmfast
