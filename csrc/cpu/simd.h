// Vectors of float32 for one instruction set, and what the kernels need of them.
//
// Every kernel file is compiled once per instruction set, each time with another LDMFAST_ISA, which names the
// inner namespace. Nothing here, and nothing in the kernels, may leave a symbol outside that namespace: the linker
// keeps one copy of a shared inline function, perhaps the AVX-512 one, and an older machine would run it. Hence no
// std:: templates below.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../ops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LDMFAST_INLINE static inline __attribute__((always_inline))

namespace ldmfast {
namespace LDMFAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));  // kLanes 16-bit numbers

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

// Words of a product between two branches. Where products are 8 wide, a loop's own instructions take 3 to 6 % where
// another thread has a share of the core, and loops of 40 end in a wrong guess, which costs 3 %.
constexpr int kUnroll = kLanes == 8 ? 8 : 1;

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kInf = __builtin_inff();

LDMFAST_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
LDMFAST_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
LDMFAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

LDMFAST_INLINE VecF splat(float x) { return x - VecF{}; }
LDMFAST_INLINE VecU splat_u(uint32_t x) { return x - VecU{}; }
#if defined(__AVX2__) && !defined(__AVX512F__)  // which the compiler does not make of a comparison and a choice
LDMFAST_INLINE VecF vmax(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }  // b if either is NaN
LDMFAST_INLINE VecF vmin(VecF a, VecF b) { return (VecF)_mm256_min_ps((__m256)a, (__m256)b); }  // likewise
#else
LDMFAST_INLINE VecF vmax(VecF a, VecF b) { return a > b ? a : b; }
LDMFAST_INLINE VecF vmin(VecF a, VecF b) { return a < b ? a : b; }
#endif

LDMFAST_INLINE bool any_nan(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) != 0;
#else
  for (int i = 0; i < kLanes; ++i) if (a[i] != a[i] || b[i] != b[i]) return true;
  return false;
#endif
}

// ---- conversions; to 16 bits with round-to-nearest-even ----

LDMFAST_INLINE VecF from_bits(VecH h, BFloat16) { return (VecF)(__builtin_convertvector(h, VecU) << 16); }

// the upper 16 bits are the bfloat16
LDMFAST_INLINE VecU rounded_number(VecF x) { return (VecU)x + 0x7fffu + (((VecU)x >> 16) & 1u); }  // not for NaN
LDMFAST_INLINE VecU rounded_bits(VecF x) {
  return (VecU)(x == x ? (VecI)rounded_number(x) : (VecI)((VecU)x | 0x00400000u));
}

LDMFAST_INLINE VecH to_bits(VecF x, BFloat16) {
#if defined(__AVX512BF16__)
  return (VecH)_mm512_cvtneps_pbh((__m512)x);
#else
  return __builtin_convertvector(rounded_bits(x) >> 16, VecH);
#endif
}

LDMFAST_INLINE VecF from_bits(VecH h, Half) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
  VecU u = __builtin_convertvector(h, VecU);
  VecU magnitude = (u & 0x7fffu) << 13;
  VecF scaled = (VecF)magnitude * 0x1p112f;  // also makes subnormals exact
  VecI special = (VecI)((u & 0x7c00u) == 0x7c00u);
  VecU bits = (VecU)(special ? (VecI)(magnitude | 0x7f800000u) : (VecI)scaled);
  return (VecF)(bits | ((u & 0x8000u) << 16));
#endif
}

LDMFAST_INLINE VecH to_bits(VecF x, Half) {
#if defined(__AVX512F__)
  return (VecH)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (VecH)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  VecU u = (VecU)x & 0x7fffffffu, sign = ((VecU)x >> 16) & 0x8000u;
  VecF magnitude = (VecF)u;
  VecU normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  VecU subnormal = (VecU)(magnitude + 0.5f) - 0x3f000000u;  // the addition rounds at half's last place, 2^-24
  VecI r = magnitude < 0x1p-14f ? (VecI)subnormal : (VecI)normal;
  r = magnitude >= 65520.0f ? VecI{} + 0x7c00 : r;
  r = x == x ? r : VecI{} + 0x7e00;
  return __builtin_convertvector((VecU)r | sign, VecH);
#endif
}

// ---- memory: kLanes elements, or the first n of them (the rest reads as zero and is not written) ----

template <class T> LDMFAST_INLINE VecF load(const T* p) {
  VecH h;
  memcpy(&h, p, sizeof h);
  return from_bits(h, T{});
}
template <> inline __attribute__((always_inline)) VecF load(const float* p) {
  VecF x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class T> LDMFAST_INLINE void store(T* p, VecF x) {
  VecH h = to_bits(x, T{});
  memcpy(p, &h, sizeof h);
}
template <> inline __attribute__((always_inline)) void store(float* p, VecF x) { memcpy(p, &x, sizeof x); }

#if defined(__AVX512F__)
LDMFAST_INLINE __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }
template <class T> LDMFAST_INLINE VecF load_first(const T* p, int64_t n) {
  return from_bits((VecH)_mm256_maskz_loadu_epi16(first_lanes(n), p), T{});
}
template <> inline __attribute__((always_inline)) VecF load_first(const float* p, int64_t n) {
  return (VecF)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
template <class T> LDMFAST_INLINE void store_first(T* p, VecF x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)to_bits(x, T{}));
}
template <> inline __attribute__((always_inline)) void store_first(float* p, VecF x, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x);
}
#else
template <class T> LDMFAST_INLINE VecF load_first(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  memcpy(buffer, p, (size_t)n * sizeof(T));
  return load(buffer);
}
template <class T> LDMFAST_INLINE void store_first(T* p, VecF x, int64_t n) {
  T buffer[kLanes];
  store(buffer, x);
  memcpy(p, buffer, (size_t)n * sizeof(T));
}
#endif

// 2 * kLanes elements in an order of the type's own: bfloat16 splits into even and odd with one operation each.
constexpr int64_t kPair = 2 * kLanes;
template <class T> LDMFAST_INLINE void load_pair(const T* p, VecF& a, VecF& b) {
  a = load(p);
  b = load(p + kLanes);
}
template <> inline __attribute__((always_inline)) void load_pair(const BFloat16* p, VecF& even, VecF& odd) {
  VecU u;
  memcpy(&u, p, sizeof u);
  even = (VecF)(u << 16);
  odd = (VecF)(u & 0xffff0000u);
}
// Where a table keeps what belongs to element c of C: in the order of load_pair, and plainly after the last whole pair.
template <class T> LDMFAST_INLINE int64_t slot(int64_t c, int64_t) { return c; }
template <> inline __attribute__((always_inline)) int64_t slot<BFloat16>(int64_t c, int64_t C) {
  const int64_t at = c % kPair;
  return c - at + kPair > C ? c : c - at + (at % 2) * kLanes + at / 2;
}

// a + b += the sum of 2 * kLanes elements
template <class T> LDMFAST_INLINE void add_pair(const T* p, VecF& a, VecF& b) {
  VecF x, y;
  load_pair(p, x, y);
  a += x;
  b += y;
}
#if defined(__AVX512BF16__)
template <> inline __attribute__((always_inline)) void add_pair(const BFloat16* p, VecF& a, VecF&) {
  __m512bh x;
  memcpy(&x, p, sizeof x);
  a = (VecF)_mm512_dpbf16_ps((__m512)a, x, (__m512bh)_mm512_set1_epi16(0x3f80));  // times one, and exact
}
#endif
LDMFAST_INLINE VecU join_halves(VecU even, VecU odd) {  // the upper 16 bits of both
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (VecU)_mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa);
#else
  return (even >> 16) | (odd & 0xffff0000u);
#endif
}
template <class T> LDMFAST_INLINE void store_pair(T* p, VecF a, VecF b) {
  store(p, a);
  store(p + kLanes, b);
}
template <> inline __attribute__((always_inline)) void store_pair(BFloat16* p, VecF even, VecF odd) {
#if defined(__AVX512BF16__)
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const Halves order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  VecU u = (VecU)_mm512_permutexvar_epi16((__m512i)order, halves);
#else
  VecU e = rounded_number(even), o = rounded_number(odd);
  if (__builtin_expect(any_nan(even, odd), 0)) e = rounded_bits(even), o = rounded_bits(odd);
  VecU u = join_halves(e, o);
#endif
  memcpy(p, &u, sizeof u);
}

// store_pair for results that are approximate anyway: a tie goes away from zero, and a NaN's lower half must be zero
// (what the processor makes itself, or reads from bfloat16). 4 operations instead of 14.
template <class T> LDMFAST_INLINE void store_pair_near(T* p, VecF a, VecF b) { store_pair(p, a, b); }
#if !defined(__AVX512BF16__)
template <> inline __attribute__((always_inline)) void store_pair_near(BFloat16* p, VecF even, VecF odd) {
  VecU u = join_halves((VecU)even + 0x8000u, (VecU)odd + 0x8000u);
  memcpy(p, &u, sizeof u);
}
#endif

LDMFAST_INLINE float to_float(float x) { return x; }
LDMFAST_INLINE float to_float(BFloat16 x) { return ((VecF)splat_u((uint32_t)x.bits << 16))[0]; }
LDMFAST_INLINE float to_float(Half x) { return from_bits(x.bits - VecH{}, x)[0]; }

// One number of a dtype known only at run time; for coefficients, not for inner loops.
LDMFAST_INLINE float load_scalar(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return ((const float*)p)[i];
  return dtype == DType::kBFloat16 ? to_float(((const BFloat16*)p)[i]) : to_float(((const Half*)p)[i]);
}

// ---- across lanes ----

LDMFAST_INLINE float reduce_add(VecF x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
#endif
}
LDMFAST_INLINE float reduce_max(VecF x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#elif defined(__AVX2__)
  __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
#else
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
