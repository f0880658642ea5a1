// The gradient of the time embedding with regard to its weights and biases; TimestepMlpBackwardArgs has the formulas.
//
// Five launches, bound by reading the weights and writing their gradients: 320 -> 1280 -> 1280 in 16 bits is 8.2 MB,
// 2.7 us at 3 TB/s, so most of the time is that of the launches. Everything between is float32 in the workspace.
#include "launch.cuh"

namespace ldmfast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSamples = 4;        // that share one reading of the weights
constexpr int kAcross = 16;        // features of a block in the product with w2: 32 bytes of a row in 16 bits

struct Params {
  TimestepMlpBackwardArgs a;
  float* input;                    // [N, dim]: the sinusoid, rounded to dtype
  float* hidden;                   // [N, F]: first w1 input + b1, in the end its silu
  float* gradient;                 // [N, F]: of w1 input + b1
};

template <typename T>
__global__ void __launch_bounds__(kThreads) sinusoid_kernel(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.a.N * p.a.dim) return;
  const int64_t n = at / p.a.dim, i = at % p.a.dim, half = p.a.dim / 2;
  float s = 0.0f, c = 0.0f;        // an odd width ends in a zero
  if (i < 2 * half) sincosf(p.a.t[n] * p.a.freqs[i < half ? i : i - half], &s, &c);
  p.input[at] = to_float(from_float<T>((i < half) == p.a.flip_sin_to_cos ? c : s));
}

// a warp a feature
template <typename T>
__global__ void __launch_bounds__(kThreads) hidden_kernel(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  const int64_t f = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, n0 = int64_t(blockIdx.y) * kSamples;
  if (f >= p.a.F) return;
  const int lane = threadIdx.x % 32, samples = static_cast<int>(p.a.N - n0 < kSamples ? p.a.N - n0 : kSamples);
  const T* weight = static_cast<const T*>(p.a.w1) + f * p.a.dim;
  float sum[kSamples] = {};
  for (int64_t k = lane; k < p.a.dim; k += 32) {
    const float w = to_float(weight[k]);
#pragma unroll
    for (int s = 0; s < kSamples; ++s) sum[s] += s < samples ? w * p.input[(n0 + s) * p.a.dim + k] : 0.0f;
  }
  const float bias = p.a.b1 ? to_float(static_cast<const T*>(p.a.b1)[f]) : 0.0f;
#pragma unroll
  for (int s = 0; s < kSamples; ++s) {
    sum[s] = warp_sum(sum[s]);
    if (lane == 0 && s < samples) p.hidden[(n0 + s) * p.a.F + f] = sum[s] + bias;
  }
}

// gradient = (dout w2) silu'(hidden); hidden = silu(hidden). A block: kAcross features, E over the rest of the threads
template <typename T>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  constexpr int kDown = kThreads / kAcross;
  float* parts = reinterpret_cast<float*>(shared_memory());   // [kSamples, kDown, kAcross]
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  const int64_t f = int64_t(blockIdx.x) * kAcross + across, n0 = int64_t(blockIdx.y) * kSamples;
  const int samples = static_cast<int>(p.a.N - n0 < kSamples ? p.a.N - n0 : kSamples);
  const T* dout = static_cast<const T*>(p.a.dout) + n0 * p.a.E;
  float sum[kSamples] = {};
  for (int64_t e = down; e < p.a.E && f < p.a.F; e += kDown) {
    const float w = to_float(static_cast<const T*>(p.a.w2)[e * p.a.F + f]);
#pragma unroll
    for (int s = 0; s < kSamples; ++s) sum[s] += s < samples ? w * to_float(dout[s * p.a.E + e]) : 0.0f;
  }
#pragma unroll
  for (int s = 0; s < kSamples; ++s) parts[s * kThreads + threadIdx.x] = sum[s];
  __syncthreads();
  if (f >= p.a.F || down >= samples) return;   // row `down` of threads finishes sample `down`
  float total = 0.0f;
  for (int i = 0; i < kDown; ++i) total += parts[down * kThreads + i * kAcross + across];
  const int64_t at = (n0 + down) * p.a.F + f;
  const SiluAndSlope activation = silu_and_slope(p.hidden[at]);
  p.gradient[at] = total * activation.slope;
  p.hidden[at] = activation.value;
}

// dweight [R, C] = left^T right, dbias [R] = sum of left; SECOND: of w2 and b2, whose left side is dout
template <typename T, bool SECOND>
__global__ void __launch_bounds__(kThreads) outer_kernel(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  const TimestepMlpBackwardArgs& a = p.a;
  const int64_t R = SECOND ? a.E : a.F, C = SECOND ? a.F : a.dim;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= R * C) return;
  const int64_t r = at / C, c = at % C;
  const float* right = SECOND ? p.hidden : p.input;
  float sum = 0.0f, bias = 0.0f;
  for (int64_t n = 0; n < a.N; ++n) {
    const float left = SECOND ? to_float(static_cast<const T*>(a.dout)[n * R + r]) : p.gradient[n * R + r];
    sum += left * right[n * C + c];
    bias += left;
  }
  static_cast<T*>(SECOND ? a.dw2 : a.dw1)[at] = from_float<T>(sum);
  if (c == 0) static_cast<T*>(SECOND ? a.db2 : a.db1)[r] = from_float<T>(bias);
}
}  // namespace

size_t timestep_mlp_backward_workspace(const TimestepMlpBackwardArgs& a) {
  return size_t(a.N) * (a.dim + 2 * a.F) * sizeof(float);
}

void timestep_mlp_backward(const TimestepMlpBackwardArgs& a, const Launch& where) {
  if (a.N * a.dim * a.F * a.E == 0) return;
  const char* op = "timestep_mlp_backward";
  const int64_t chunks = ceil_div(a.N, kSamples);
  if (chunks > kMaxBlocksYZ) throw std::runtime_error(std::string(op) + ": more than 262140 timesteps");
  const Params p = {a, a.workspace, a.workspace + a.N * a.dim, a.workspace + a.N * (a.dim + a.F)};
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch<sinusoid_kernel<T>>(op, p, ceil_div(a.N * a.dim, kThreads), kThreads, 0, where);
    launch<hidden_kernel<T>>(op, p, Blocks(ceil_div(a.F, kWarps), chunks), kThreads, 0, where);
    launch<gradient_kernel<T>>(op, p, Blocks(ceil_div(a.F, kAcross), chunks), kThreads,
                               kSamples * kThreads * sizeof(float), where);
    launch<outer_kernel<T, true>>(op, p, ceil_div(a.E * a.F, kThreads), kThreads, 0, where);
    launch<outer_kernel<T, false>>(op, p, ceil_div(a.F * a.dim, kThreads), kThreads, 0, where);
  });
}
}  // namespace ldmfast
