// What every kernel here stands on: 16-bit types, vector accesses, warp and cluster primitives, the launch.
// With LDMFAST_CUDA_HOST the same names come from emulator/host_primitives.h and the sources build with g++ alone.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../ops.h"

#ifdef LDMFAST_CUDA_HOST
#include "emulator/host_primitives.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace ldmfast {

using f16 = __half;
using bf16 = __nv_bfloat16;

__device__ __forceinline__ float bits_to_float(uint32_t u) { return __uint_as_float(u); }
__device__ __forceinline__ uint32_t float_to_bits(float f) { return __float_as_uint(f); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

template <typename T> __device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <> __device__ __forceinline__ uint32_t pack2<f16>(float lo, float hi) {
  uint32_t u;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(hi), "f"(lo));
  return u;
}
template <> __device__ __forceinline__ uint32_t pack2<bf16>(float lo, float hi) {
  uint32_t u;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(u) : "f"(hi), "f"(lo));
  return u;
}
template <typename T> __device__ __forceinline__ float2 unpack2(uint32_t u);
template <> __device__ __forceinline__ float2 unpack2<f16>(uint32_t u) {
  return __half22float2(*reinterpret_cast<__half2*>(&u));
}
template <> __device__ __forceinline__ float2 unpack2<bf16>(uint32_t u) {
  return {__uint_as_float(u << 16), __uint_as_float(u & 0xFFFF0000u)};
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char storage[];
  return storage;
}
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Until the kernels before have ended and what they wrote is seen: launch.cuh may let this one begin sooner. Each thread
// calls it before it reads or writes global memory; the parameters are there from the start.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// threadIdx.x, read again: what is derived from it is not kept in registers across a loop
__device__ __forceinline__ unsigned fresh_thread_index() {
  unsigned i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
  return i;
}
template <int BYTES> __device__ __forceinline__ void check_aligned(const void*) {}   // the emulator's does
__device__ __forceinline__ float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, v, mask); }
__device__ __forceinline__ bool warp_any(bool v) { return __any_sync(0xFFFFFFFFu, v); }

// Thread block clusters exist from sm_90 on; a kernel compiled for less is never launched with one.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive;" ::: "memory"); }
// for a block that only has read: what it wrote need not be visible to the others
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }
__device__ __forceinline__ float cluster_load(const float* own, unsigned rank) {
  uint32_t address;
  float v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
#else
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_arrive_relaxed() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ float cluster_load(const float* own, unsigned) { return *own; }
#endif

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// copies BYTES to shared memory without passing through registers; zeros where !valid
template <int BYTES> __device__ __forceinline__ void cp_async(void* to, const void* from, bool valid = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async size");
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES),
                 "r"(valid ? BYTES : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
}  // namespace ldmfast
#endif

namespace ldmfast {

template <typename T> __host__ __device__ constexpr DType dtype_of();
template <> __host__ __device__ constexpr DType dtype_of<float>() { return DType::kFloat32; }
template <> __host__ __device__ constexpr DType dtype_of<f16>() { return DType::kFloat16; }
template <> __host__ __device__ constexpr DType dtype_of<bf16>() { return DType::kBFloat16; }
inline size_t size_of(DType d) { return d == DType::kFloat32 ? 4 : d == DType::kBool ? 1 : 2; }

template <int64_t B> constexpr int64_t round_up(int64_t a) { return (a + B - 1) / B * B; }
inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a number below 2^31 is divided by: two instructions after another where a division by a parameter takes twenty.
// With l = ceil(log2 d) and m = floor(2^(31 + l) / d) + 1 it is n * m / 2^(31 + l): m * d passes 2^(31 + l) by d <= 2^l
// at most, which n < 2^31 times is less than one in the quotient's last place (Granlund & Montgomery 1994).
struct Divisor {
  int32_t value = 1;
  uint32_t multiplier = 0x80000001u, shift = 0;
  Divisor() = default;
  explicit Divisor(int64_t d) : value(static_cast<int32_t>(d)) {
    while ((int64_t(1) << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t(1) << (31 + shift)) / d + 1);
  }
};
struct Quotient { unsigned of, rest; };
__device__ __forceinline__ unsigned operator/(unsigned n, const Divisor& d) {
  return static_cast<unsigned>(uint64_t(n + n) * d.multiplier >> 32) >> d.shift;
}
__device__ __forceinline__ Quotient divided(unsigned n, const Divisor& d) {
  const unsigned quotient = n / d;
  return {quotient, n - quotient * d.value};
}

inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// an element as it lies in memory, and what it is: several loads are on their way before the first is converted
__device__ __forceinline__ uint32_t load_bits(const void* p, int64_t i, DType d) {
  return d == DType::kFloat32 ? static_cast<const uint32_t*>(p)[i] : static_cast<const uint16_t*>(p)[i];
}
__device__ __forceinline__ float bits_as_float(uint32_t u, DType d) {
  return d == DType::kFloat32 ? bits_to_float(u) : d == DType::kFloat16 ? unpack2<f16>(u).x : unpack2<bf16>(u).x;
}
__device__ __forceinline__ float load_as_float(const void* p, int64_t i, DType d) {
  return bits_as_float(load_bits(p, i, d), d);
}

// 1, 2 or 4 words in one access
template <int W> __device__ __forceinline__ void load_words(const void* p, uint32_t (&w)[W]) {
  check_aligned<4 * W>(p);
  if constexpr (W == 4) {
    const uint4 u = *static_cast<const uint4*>(p);
    w[0] = u.x, w[1] = u.y, w[2] = u.z, w[3] = u.w;
  } else if constexpr (W == 2) {
    const uint2 u = *static_cast<const uint2*>(p);
    w[0] = u.x, w[1] = u.y;
  } else {
    w[0] = *static_cast<const uint32_t*>(p);
  }
}
template <int W> __device__ __forceinline__ void store_words(void* p, const uint32_t (&w)[W]) {
  check_aligned<4 * W>(p);
  if constexpr (W == 4) *static_cast<uint4*>(p) = uint4{w[0], w[1], w[2], w[3]};
  else if constexpr (W == 2) *static_cast<uint2*>(p) = uint2{w[0], w[1]};
  else *static_cast<uint32_t*>(p) = w[0];
}

// V neighbouring elements in one access of V * sizeof(T) bytes, as they lie in memory and as floats
template <typename T, int V> constexpr int kWords = V * sizeof(T) < 4 ? 1 : V * sizeof(T) / 4;
template <typename T, int V> __device__ __forceinline__ void load_raw(const T* p, uint32_t (&w)[kWords<T, V>]) {
  if constexpr (V * sizeof(T) < 4) w[0] = *reinterpret_cast<const uint16_t*>(p);
  else load_words(p, w);
}
template <typename T, int V> __device__ __forceinline__ void unpack(const uint32_t (&w)[kWords<T, V>], float (&v)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if constexpr (sizeof(T) == 4) v[i] = bits_to_float(w[i]);
    else v[i] = i % 2 ? unpack2<T>(w[i / 2]).y : unpack2<T>(w[i / 2]).x;
  }
}
template <typename T, int V> __device__ __forceinline__ void load_vector(const T* p, float (&v)[V]) {
  uint32_t w[kWords<T, V>];
  load_raw<T, V>(p, w);
  unpack<T, V>(w, v);
}
template <typename T, int V> __device__ __forceinline__ void store_vector(T* p, const float (&v)[V]) {
  if constexpr (V == 1) {
    *p = from_float<T>(v[0]);
  } else {
    uint32_t w[V * sizeof(T) / 4];
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < V; ++i) w[i] = float_to_bits(v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < V / 2; ++i) w[i] = pack2<T>(v[2 * i], v[2 * i + 1]);
    }
    store_words(p, w);
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v += shuffle_xor(v, mask);
  return v;
}
__device__ __forceinline__ float one_plus_exp(float y) { return 1.0f + fast_exp2(1.4426950408889634f * y); }
__device__ __forceinline__ float silu(float y) { return y * fast_reciprocal(one_plus_exp(-y)); }

// SiLU and its derivative, sigmoid * (1 + y * (1 - sigmoid)). What sigmoid lacks to 1 is the exponential's share: as a
// difference it would be the reciprocal's rounding where y is large, times y. The bound keeps the share finite.
struct SiluAndSlope { float value, slope; };
__device__ __forceinline__ SiluAndSlope silu_and_slope(float y) {
  y = max_or_nan(y, -86.0f);
  const float e = fast_exp2(-1.4426950408889634f * y), sigmoid = fast_reciprocal(1.0f + e);
  return {y * sigmoid, sigmoid * (1.0f + y * (e * sigmoid))};
}

// Two reciprocals from one: the special function unit (16 results a clock and multiprocessor) is what SiLU waits for.
// Below -43 SiLU is less than 1e-17; the bound keeps the product finite. A NaN stays one.
template <int V> __device__ __forceinline__ void silu_vector(float (&y)[V]) {
  if constexpr (V == 1) {
    y[0] = silu(y[0]);
  } else {
#pragma unroll
    for (int j = 0; j < V; j += 2) {
      const float a = max_or_nan(y[j], -43.0f), b = max_or_nan(y[j + 1], -43.0f);
      const float s = one_plus_exp(-a), t = one_plus_exp(-b), inverse = fast_reciprocal(s * t);
      y[j] = a * (inverse * t);
      y[j + 1] = b * (inverse * s);
    }
  }
}
}  // namespace ldmfast
