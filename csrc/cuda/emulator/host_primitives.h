// What common.cuh and mma.cuh give a kernel, on the host (host.h): the same names, the exact fragment layouts.
#pragma once
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

inline int fresh_thread_index() { return threadIdx.x; }
inline unsigned char* shared_memory() { return host::self().block->shared; }

inline void __syncthreads(int line = __builtin_LINE()) {
  host::Gate& gate = host::self().block->barrier;
  const uint64_t generation = gate.generation;
  if (host::arrive(gate, "__syncthreads", line)) host::open(gate);
  else host::wait_for(gate, generation);
}
inline void __syncwarp(int line = __builtin_LINE()) {
  host::collective<int>("__syncwarp", line, 0, [](auto, auto) {});
}
inline float shuffle_xor(float v, int mask, int line = __builtin_LINE()) {
  return host::collective<float>("shuffle_xor", line, v, [mask](auto in, auto out) {
    for (int l = 0; l < 32; ++l) out(l) = in(l ^ mask);
  });
}
inline bool warp_any(bool v, int line = __builtin_LINE()) {
  return host::collective<bool>("warp_any", line, v, [](auto in, auto out) {
    bool any = false;
    for (int l = 0; l < 32; ++l) any = any || in(l);
    for (int l = 0; l < 32; ++l) out(l) = any;
  });
}

inline unsigned cluster_rank() { return host::self().block->rank; }
inline void cluster_arrive() {
  host::Thread& t = host::self();
  host::Gate& gate = host::machine()->cluster;
  t.cluster_ticket = gate.generation;
  if (host::arrive(gate, "cluster barrier", 0)) host::open(gate);
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() { host::wait_for(host::machine()->cluster, host::self().cluster_ticket); }
inline float cluster_load(const float* own, unsigned rank) {
  host::check_shared(own, 4, 4, "cluster_load");
  const host::Block& mine = *host::self().block;
  const host::Block& other = host::machine()->blocks.at(rank);
  return *reinterpret_cast<const float*>(other.shared + (reinterpret_cast<const unsigned char*>(own) - mine.shared));
}

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float max_or_nan(float a, float b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void sincosf(float x, float* s, float* c) { *s = std::sin(x); *c = std::cos(x); }

template <int BYTES> void cp_async(void* to, const void* from, bool valid = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async size");
  host::check_shared(to, BYTES, BYTES, "cp.async");
  if (valid && reinterpret_cast<uintptr_t>(from) % BYTES) host::fail("cp.async source not aligned");
  std::memset(to, 0xFF, BYTES);
  host::self().copies.push_back({to, from, BYTES, valid});
}
inline void cp_async_commit() {
  host::Thread& t = host::self();
  size_t grouped = 0;
  for (size_t g : t.groups) grouped += g;
  t.groups.push_back(t.copies.size() - grouped);
}
template <int PENDING> void cp_async_wait() {
  host::Thread& t = host::self();
  while (t.groups.size() > PENDING) {
    for (size_t i = 0; i < t.groups.front(); ++i) {
      const host::Copy& c = t.copies[i];
      if (c.valid) std::memcpy(c.to, c.from, c.bytes);
      else std::memset(c.to, 0, c.bytes);
    }
    t.copies.erase(t.copies.begin(), t.copies.begin() + t.groups.front());
    t.groups.erase(t.groups.begin());
  }
}

namespace host {
struct Fragment { uint32_t r[4]; };
// lane l passes the address of row l % 8 of matrix l / 8; each lane receives two neighbouring elements of each matrix
template <int MATRICES, bool TRANSPOSE>
void ldmatrix(uint32_t* r, const void* row, int line) {
  if (self().index.x % kWarp < 8 * MATRICES) check_shared(row, 16, 16, "ldmatrix");
  const Fragment f = collective<Fragment>("ldmatrix", line, row, [](auto in, auto out) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < MATRICES; ++m) {
        const int major = l / 4, minor = l % 4 * 2;
        uint16_t e[2];
        for (int i = 0; i < 2; ++i) {
          const int rr = TRANSPOSE ? minor + i : major, cc = TRANSPOSE ? major : minor + i;
          e[i] = static_cast<const uint16_t*>(in(m * 8 + rr))[cc];
        }
        out(l).r[m] = e[0] | uint32_t(e[1]) << 16;
      }
  });
  for (int m = 0; m < MATRICES; ++m) r[m] = f.r[m];
}
template <int K> struct MmaIn { uint32_t a[K / 4], b[K / 8]; float c[4]; };
struct MmaOut { float c[4]; };
template <int K>
__attribute__((optimize("O3"), noinline))
void multiply(const float (&a)[16][K], const float (&b)[K][8], float (&c)[16][8]) {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
}
// row g, columns t, t + 1 of lane 4 g + t / 2; register i of a is 8 rows on with bit 0, 8 columns on with bit 1
template <typename T, int K> void mma(float* c, const uint32_t* a, const uint32_t* b, int line) {
  MmaIn<K> mine;
  std::copy(a, a + K / 4, mine.a);
  std::copy(b, b + K / 8, mine.b);
  std::copy(c, c + 4, mine.c);
  const MmaOut got = collective<MmaOut>("mma", line, mine, [](auto in, auto out) {
    float A[16][K], B[K][8], C[16][8];
    for (int l = 0; l < 32; ++l) {
      const MmaIn<K>& v = in(l);
      const int g = l / 4, t = l % 4 * 2;
      for (int i = 0; i < K / 4; ++i) {
        const float2 e = unpack2<T>(v.a[i]);
        A[g + 8 * (i & 1)][t + 8 * (i >> 1)] = e.x;
        A[g + 8 * (i & 1)][t + 8 * (i >> 1) + 1] = e.y;
      }
      for (int i = 0; i < K / 8; ++i) {
        const float2 e = unpack2<T>(v.b[i]);
        B[t + 8 * i][g] = e.x;
        B[t + 8 * i + 1][g] = e.y;
      }
      for (int i = 0; i < 4; ++i) C[g + 8 * (i >> 1)][t + (i & 1)] = v.c[i];
    }
    multiply<K>(A, B, C);
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) out(l).c[i] = C[l / 4 + 8 * (i >> 1)][l % 4 * 2 + (i & 1)];
  });
  std::copy(got.c, got.c + 4, c);
}
}  // namespace host

using SharedAddress = const unsigned char*;
inline SharedAddress plain_address(const void* p) { return static_cast<SharedAddress>(p); }
inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row, int line = __builtin_LINE()) {
  host::ldmatrix<4, false>(r, row, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row, int line = __builtin_LINE()) {
  host::ldmatrix<4, true>(r, row, line);
}
inline void ldmatrix_x2(uint32_t (&r)[2], SharedAddress row, int line = __builtin_LINE()) {
  host::ldmatrix<2, false>(r, row, line);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], SharedAddress row, int line = __builtin_LINE()) {
  host::ldmatrix<2, true>(r, row, line);
}
template <typename T>
void mma_k16(float (&c)[4], const uint32_t* a, uint32_t b0, uint32_t b1, int line = __builtin_LINE()) {
  const uint32_t b[2] = {b0, b1};
  host::mma<T, 16>(c, a, b, line);
}
template <typename T> void mma_k8(float (&c)[4], const uint32_t* a, uint32_t b0, int line = __builtin_LINE()) {
  host::mma<T, 8>(c, a, &b0, line);
}
}  // namespace ldmfast
