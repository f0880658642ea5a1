// What common.cuh and mma.cuh give a kernel, on the host (host.h): the same names.
#pragma once
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "host.h"

namespace ldmfast {

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

inline float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7FFF) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  const float scaled = bits_to_float(magnitude) * 5.192296858534828e33f;  // 2^112: the exponents' biases differ so
  return bits_to_float((magnitude >= 0x0F800000 ? magnitude | 0x7F800000 : float_to_bits(scaled)) | sign);
}
template <typename T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
  const uint32_t u = float_to_bits(x);
  if (x != x) return {0x7FFF};
  return {uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16)};
}
template <> inline f16 from_float<f16>(float x) {
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return {0x7FFF};
  if (magnitude >= 0x477FF000) return {uint16_t(sign | 0x7C00)};   // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                                    // below 2^-14: units of 2^-24, nearest even
    const float units = std::nearbyintf(bits_to_float(magnitude) * 16777216.0f);
    return {uint16_t(sign | uint32_t(units))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13))};
}
template <typename T> uint32_t pack2(float lo, float hi) {
  return from_float<T>(lo).bits | uint32_t(from_float<T>(hi).bits) << 16;
}
template <typename T> float2 unpack2(uint32_t u) {
  return {to_float(T{uint16_t(u)}), to_float(T{uint16_t(u >> 16)})};
}

#define threadIdx (::ldmfast::host::self().index)
#define blockIdx (::ldmfast::host::self().block->index)
#define blockDim (::ldmfast::host::self().block->dim)
#define gridDim (::ldmfast::host::self().block->grid)

inline unsigned fresh_thread_index() { return threadIdx.x; }
inline unsigned char* shared_memory() { return host::self().block->shared; }
template <int BYTES> void check_aligned(const void* p) { host::check_alignment(p, BYTES); }

// the place in the source from which a primitive is called
#define LDMFAST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void wait_for_previous_kernel(LDMFAST_SITE) { host::wait_for_previous_kernel({file, line}); }
inline void __syncthreads(LDMFAST_SITE) { host::synchronise_block({file, line}); }
inline void __syncwarp(LDMFAST_SITE) { host::synchronise_warp({file, line}); }
inline float shuffle_xor(float v, int mask, LDMFAST_SITE) { return host::shuffle_xor(v, mask, {file, line}); }
inline bool warp_any(bool v, LDMFAST_SITE) { return host::warp_any(v, {file, line}); }

inline unsigned cluster_rank() { return host::self().block->rank; }
inline void cluster_arrive(LDMFAST_SITE) { host::cluster_arrive({file, line}, false); }
inline void cluster_arrive_relaxed(LDMFAST_SITE) { host::cluster_arrive({file, line}, true); }
inline void cluster_wait(LDMFAST_SITE) { host::cluster_wait({file, line}); }
inline float cluster_load(const float* own, unsigned rank) { return host::cluster_load(own, rank); }

inline float fast_exp2(float x) { return host::exp2(x); }
inline float fast_reciprocal(float x) { return host::reciprocal(x); }
inline float rsqrtf(float x) { return host::reciprocal_root(x); }
inline float max_or_nan(float a, float b) { return a < b ? b : b != b ? b : a; }
inline void sincosf(float x, float* s, float* c) { *s = std::sin(x); *c = std::cos(x); }

template <int BYTES> void cp_async(void* to, const void* from, bool valid = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async size");
  host::copy(to, from, BYTES, valid);
}
inline void cp_async_commit(LDMFAST_SITE) { host::commit_copies({file, line}); }
template <int PENDING> void cp_async_wait(LDMFAST_SITE) { host::wait_for_copies(PENDING, {file, line}); }

using SharedAddress = const unsigned char*;
inline SharedAddress plain_address(const void* p) { return static_cast<SharedAddress>(p); }
inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row, LDMFAST_SITE) {
  host::ldmatrix(r, row, 4, false, {file, line});
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row, LDMFAST_SITE) {
  host::ldmatrix(r, row, 4, true, {file, line});
}
inline void ldmatrix_x2(uint32_t (&r)[2], SharedAddress row, LDMFAST_SITE) {
  host::ldmatrix(r, row, 2, false, {file, line});
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], SharedAddress row, LDMFAST_SITE) {
  host::ldmatrix(r, row, 2, true, {file, line});
}
template <typename T> constexpr bool kBrain = false;
template <> constexpr bool kBrain<bf16> = true;
template <typename T>
void mma_k16(float (&c)[4], const uint32_t* a, uint32_t b0, uint32_t b1, LDMFAST_SITE) {
  const uint32_t b[2] = {b0, b1};
  host::mma(c, a, b, 16, kBrain<T>, {file, line});
}
template <typename T> void mma_k8(float (&c)[4], const uint32_t* a, uint32_t b0, LDMFAST_SITE) {
  host::mma(c, a, &b0, 8, kBrain<T>, {file, line});
}
}  // namespace ldmfast
