// Sinusoid, linear, SiLU, linear: the time embedding, in two launches.
//
// Bound by reading the weights: 320 -> 1280 -> 1280 in 16 bits is 4.1 MB, 1.4 us at 3 TB/s. One warp computes one
// output feature for up to kSamples samples at a time, so that 1280 warps read the rows with 16-byte accesses and every
// weight leaves memory once for kSamples samples. The hidden activations stay float32 in the workspace.
#include "launch.cuh"

namespace ldmfast {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kSamples = 4;
constexpr int kAhead = 4;       // 16-byte loads in flight a thread

struct Layer {
  TimestepMlpArgs a;
  const void* weight;   // [outputs, inputs]
  const void* bias;     // [outputs] or null
  int64_t inputs, outputs;
  int64_t chunks;       // blocks in y, folded into x: groups of kSamples samples
  int chunk;            // inputs in shared memory at a time, a multiple of 256
};

// where input k of a chunk lies: lane l reads its V neighbours 32 floats apart, without a bank conflict
template <int V> __device__ __forceinline__ int slot(int k) {
  return k / (32 * V) * (32 * V) + k % V * 32 + k / V % 32;
}

// element i of the sinusoid of t, rounded to the weights' dtype
template <typename T> __device__ __forceinline__ float sinusoid(const TimestepMlpArgs& a, float t, int64_t i) {
  const int64_t half = a.dim / 2;
  if (i >= 2 * half) return 0.0f;
  float s, c;
  sincosf(t * a.freqs[i < half ? i : i - half], &s, &c);
  return to_float(from_float<T>((i < half) == a.flip_sin_to_cos ? c : s));
}

// inputs [k0, k0 + width) of this block's samples to shared memory
template <typename T, int V, bool FIRST>
__device__ __forceinline__ void stage(const Layer& p, float* input, int64_t n0, int64_t k0, int samples, int width) {
  for (int s = 0; s < samples; ++s)
    for (int k = threadIdx.x; k < width; k += kThreads) {
      float v;
      if constexpr (FIRST) v = sinusoid<T>(p.a, p.a.t[n0 + s], k0 + k);
      else v = p.a.workspace[(n0 + s) * p.inputs + k0 + k];
      input[s * p.chunk + slot<V>(k)] = v;
    }
}

// FIRST: reads t, writes silu(.) to the workspace; else reads the workspace, writes out
template <typename T, int V, bool FIRST>
__global__ void __launch_bounds__(kThreads, 1) timestep_mlp_kernel(const __grid_constant__ Layer p) {
  const int64_t n0 = blockIdx.x % unsigned(p.chunks) * kSamples;
  const int64_t row = blockIdx.x / unsigned(p.chunks) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int samples = static_cast<int>(p.a.N - n0 < kSamples ? p.a.N - n0 : kSamples);
  float* input = reinterpret_cast<float*>(shared_memory());   // [kSamples, chunk]
  float sum[kSamples] = {};
  wait_for_previous_kernel();
  for (int64_t k0 = 0; k0 < p.inputs; k0 += p.chunk) {
    const int width = static_cast<int>(p.inputs - k0 < p.chunk ? p.inputs - k0 : p.chunk);
    const T* weight = static_cast<const T*>(p.weight) + (row < p.outputs ? row : 0) * p.inputs + k0;
    uint32_t ahead[kAhead][kWords<T, V>];
    const auto load = [&](int k) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (k + i * 32 * V < width) load_raw<T, V>(weight + k + i * 32 * V, ahead[i]);
    };
    load(lane * V);              // on their way while the inputs are staged
    __syncthreads();
    stage<T, V, FIRST>(p, input, n0, k0, samples, width);
    __syncthreads();
    for (int k = lane * V; k < width; k += kAhead * 32 * V) {
      if (k != lane * V) load(k);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (k + i * 32 * V >= width) break;
        float w[V];
        unpack<T, V>(ahead[i], w);
#pragma unroll
        for (int s = 0; s < kSamples; ++s) {
          if (s >= samples) break;
          const float* mine = input + s * p.chunk + k - lane * V + i * 32 * V + lane;
#pragma unroll
          for (int j = 0; j < V; ++j) sum[s] += w[j] * mine[j * 32];
        }
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kSamples; ++s) sum[s] = warp_sum(sum[s]);
  if (row >= p.outputs || lane >= samples) return;
  float y = sum[0];
#pragma unroll
  for (int s = 1; s < kSamples; ++s) y = lane == s ? sum[s] : y;
  if (p.bias) y += to_float(static_cast<const T*>(p.bias)[row]);
  const int64_t at = (n0 + lane) * p.outputs + row;
  if constexpr (FIRST) p.a.workspace[at] = silu(y);
  else static_cast<T*>(p.a.out)[at] = from_float<T>(y);
}

template <typename T, bool FIRST> void start(Layer p, const Launch& where) {
  constexpr int V = 16 / sizeof(T);
  p.chunks = ceil_div(p.a.N, kSamples);
  p.chunk = static_cast<int>(p.inputs < 2048 ? round_up<256>(p.inputs) : 2048);
  const int64_t blocks = ceil_div(p.outputs, kWarps) * p.chunks;
  const size_t shared = size_t(p.chunk) * kSamples * sizeof(float);
  if (p.inputs % V == 0 && aligned(p.weight, 16))
    launch<timestep_mlp_kernel<T, V, FIRST>>("timestep_mlp", p, blocks, kThreads, shared, where);
  else
    launch<timestep_mlp_kernel<T, 1, FIRST>>("timestep_mlp", p, blocks, kThreads, shared, where);
}
}  // namespace

size_t timestep_mlp_workspace(const TimestepMlpArgs& a) { return size_t(a.N) * a.F * sizeof(float); }

void timestep_mlp(const TimestepMlpArgs& a, const Launch& where) {
  if (a.N == 0) return;
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.F > 0) start<T, true>({a, a.w1, a.b1, a.dim, a.F, 0, 0}, where);
    if (a.E > 0) start<T, false>({a, a.w2, a.b2, a.F, a.E, 0, 0}, where);
  });
}
}  // namespace ldmfast
