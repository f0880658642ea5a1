// Scores of bfloat16 queries and keys from integers of 16 bits, where a processor multiplies them faster than float32.
//
// A bfloat16 has 8 bits of mantissa. Times a power of two, one for each query and one for all keys of a head, elements
// of 128 or more are whole numbers, and only those below, of a vector as long as 16000 or more, may be rounded. vpmaddwd
// makes two products where a multiply-add of float32 makes one:
//
//   for each head:   scale_k = the largest power of two with every |k| scale_k <= kKeyNorm, every element <= kElement
//                    K = round(k scale_k);  error_k = the largest |K - k scale_k|                   scan(), pack_keys()
//   for each query:  scale_q = the largest power of two with |q| scale_q <= kQueryNorm
//                    Q = round(q scale_q);  scores = Q K^T / (scale_q scale_k)                      pack_queries()
//
// No sum overflows, in whatever order: |Q| |K| < 2^31 (Cauchy-Schwarz). No score is wrong by more than
// (|Q - q scale_q| |K| + |q| scale_q error_k) / (scale_q scale_k), by the same inequality. If that times the scale of
// the softmax is above kLogitError, or anything is not finite, or far from 1, the query is multiplied in float32.
// A query is multiplied together with kRows - 1 neighbours: what becomes of them depends on their head alone.
#pragma once
#include <float.h>

#include "attention_tiles.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// What a task must know of a head's keys, in units of 1 / scale. A scale of 0: they are not to be had as integers.
struct KeyNorms { float scale, norm, error; };

template <class T> struct Fixed {
  static constexpr bool kUsed = false;
  static constexpr int kPack = 1;
  static constexpr int64_t kWidest = 0;
};

#if defined(__AVX2__) && !defined(__AVX512F__)
template <> struct Fixed<BFloat16> {
  static constexpr bool kUsed = true;
  static constexpr int kPack = 2;
  static constexpr int64_t kWidest = 192;  // head width; of 256, normal numbers are beyond kLogitError
  static constexpr float kKeyNorm = 65000.0f, kQueryNorm = 32500.0f;  // their product, and roundings, below 2^31
  static constexpr float kElement = 32700.0f;
  // A weight is then as near as one rounded to bfloat16, which is what PyTorch multiplies with V; ours are float32.
  static constexpr float kLogitError = 0x1p-9f;
  // Norms and elements outside are left to float32: their squares might not have float32's precision, or overflow.
  static constexpr float kLeast = 0x1p-40f, kMost = 0x1p40f;

  LDMFAST_INLINE float sum_of(VecF x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  LDMFAST_INLINE VecF sums_of(const VecF* x) {  // lane i: of the lanes of x[i]
    const __m256 a = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]), b = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]);
    const __m256 c = _mm256_hadd_ps((__m256)x[4], (__m256)x[5]), d = _mm256_hadd_ps((__m256)x[6], (__m256)x[7]);
    const __m256 e = _mm256_hadd_ps(a, b), f = _mm256_hadd_ps(c, d);
    return (VecF)_mm256_permute2f128_ps(e, f, 0x20) + (VecF)_mm256_permute2f128_ps(e, f, 0x31);
  }
  LDMFAST_INLINE bool any_above(VecF x, float limit) {  // or NaN
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(limit), _CMP_NLE_UQ)) != 0;
  }
  LDMFAST_INLINE float below(float limit, float norm) {  // the largest power of two with power * norm <= limit
    const float ratio = limit / norm;
    uint32_t bits;
    memcpy(&bits, &ratio, 4);
    bits &= 0x7f800000u;
    float power;
    memcpy(&power, &bits, 4);
    return power;
  }
  // 2 * kLanes elements of a row of which n remain: the rest is zero
  LDMFAST_INLINE VecU elements(const BFloat16* row, int64_t n) {
    VecU u;
    if (__builtin_expect(n >= kPair, 1)) {
      memcpy(&u, row, sizeof u);
      return u;
    }
    if (n == kLanes) {
      __m128i half;
      memcpy(&half, row, sizeof half);
      return (VecU)_mm256_zextsi128_si256(half);
    }
    static const int32_t kMask[2 * kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1};
    __m256i mask;
    memcpy(&mask, kMask + kLanes - n / 2, sizeof mask);
    u = (VecU)_mm256_maskload_epi32((const int*)row, mask);
    if (n % 2) u[n / 2] = row[n - 1].bits;
    return u;
  }
  LDMFAST_INLINE void split(VecU u, VecF& even, VecF& odd) {
    even = (VecF)(u << 16);
    odd = (VecF)(u & 0xffff0000u);
  }
  // two neighbours as a word; error += the squares of what rounding changes
  LDMFAST_INLINE VecF word(VecF even, VecF odd, VecF& error) {
    const __m256i a = _mm256_cvtps_epi32((__m256)even), b = _mm256_cvtps_epi32((__m256)odd);
    const VecF x = even - (VecF)_mm256_cvtepi32_ps(a), y = odd - (VecF)_mm256_cvtepi32_ps(b);
    error += x * x;
    error += y * y;
    return (VecF)_mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
  }

  // sum[j] += the products of a query's word, at q, and kLanes keys' in x[j]. From C++ the compiler adds the products
  // of several words first, or moves all loads ahead, and has no registers left.
  template <int kVectors> LDMFAST_INLINE void dot(VecI* sum, const float* q, const VecI* x) {
    VecI first = sum[0], last = sum[kVectors - 1], w, products;
    if (kVectors == 2) {
      asm("vpbroadcastd %6, %2\n\tvpmaddwd %4, %2, %3\n\tvpmaddwd %5, %2, %2\n\t"
          "vpaddd %3, %0, %0\n\tvpaddd %2, %1, %1"
          : "+x"(first), "+x"(last), "=&x"(w), "=&x"(products)
          : "x"(x[0]), "x"(x[kVectors - 1]), "m"(*q));
    } else {
      asm("vpbroadcastd %3, %1\n\tvpmaddwd %2, %1, %1\n\tvpaddd %1, %0, %0"
          : "+x"(first), "=&x"(w)
          : "x"(x[0]), "m"(*q));
    }
    if (kVectors == 2) sum[1] = last;
    sum[0] = first;
  }

  // the largest square of a norm, infinite if not finite, and the largest element, of up to kTile keys
  static void scan(const BFloat16* k, int64_t stride, int64_t valid, int64_t D, float* square, float* element) {
    float most = 0.0f;
    VecF largest{};
    for (int64_t i = 0; i < min64(kTile, valid); ++i, k += stride) {
      VecF sum{}, even, odd;
      for (int64_t d = 0; d < D; d += kPair) {
        const VecU u = elements(k + d, D - d);
        split(u, even, odd);
        sum += even * even;
        sum += odd * odd;
        split(u & 0x7fff7fffu, even, odd);
        largest = vmax(vmax(even, odd), largest);
      }
      const float total = sum_of(sum);
      if (total > most) most = total;
      if (!(total <= FLT_MAX)) most = kInf;
    }
    *square = most;
    *element = reduce_max(largest);
  }

  static KeyNorms norms_of(float square, float element, float square_error) {
    if (square == 0.0f && element == 0.0f) return {1.0f, 0.0f, 0.0f};
    if (!(element >= kLeast && element <= kMost && square <= FLT_MAX)) return {0.0f, 0.0f, 0.0f};
    const float norm = __builtin_sqrtf(square), of_norm = below(kKeyNorm, norm), of_element = below(kElement, element);
    const float scale = of_norm < of_element ? of_norm : of_element;
    return {scale, norm * scale, __builtin_sqrtf(square_error)};
  }

  // to[depth, kLanes] = the words of kLanes keys of D elements times scale, zeros from valid on; returns the largest
  // square of a rounding error
  static float pack_keys(const BFloat16* from, int64_t stride, int64_t valid, int64_t D, float scale, float* to) {
    float columns[(kWidest + 1) * kLanes];
    interleave<Single>(from, stride, valid, D, D, columns);
    if (D % 2) store(columns + D * kLanes, VecF{});
    VecF error{};
    for (int64_t d = 0; d < D; d += kPack, to += kLanes) {
      store(to, word(load(columns + d * kLanes) * scale, load(columns + (d + 1) * kLanes) * scale, error));
    }
    return reduce_max(error);
  }

  // The words of kRows queries, of which `valid` are some, kPart of them at each `parts` apart, and in unit[kLanes]
  // what their scores are to be multiplied by; or false: those of one would not be near enough. factor: the scale of
  // the softmax, whose sign goes to the queries.
  static bool pack_queries(const BFloat16* from, int64_t stride, int64_t valid, int64_t D, float factor,
                           const KeyNorms& keys, int64_t parts, float* to, float* unit) {
    static_assert(kRows < kLanes, "the numbers of all rows are one vector");
    VecF sums[kLanes] = {}, even, odd;
    for (int64_t i = 0; i < min64(kRows, valid); ++i) {
      VecF sum{};
      for (int64_t d = 0; d < D; d += kPair) {
        split(elements(from + i * stride + d, D - d), even, odd);
        sum += even * even;
        sum += odd * odd;
      }
      sums[i] = sum;
    }
    const VecF square = sums_of(sums), norm = (VecF)_mm256_sqrt_ps((__m256)square);
    VecF scale = (VecF)((VecU)(kQueryNorm / norm) & 0x7f800000u);  // the power of two below
    const VecI near = (square >= kLeast * kLeast) & (square <= kMost * kMost);
    if (__builtin_expect(_mm256_movemask_ps((__m256)near) != (1 << min64(kRows, valid)) - 1, 0)) {
      for (int64_t i = 0; i < min64(kRows, valid); ++i) {  // a query of zeros is one of integers, too
        for (int64_t d = 0; !near[i] && d < D; ++d) if (from[i * stride + d].bits & 0x7fff) return false;
      }
    }
    scale = (VecF)(near ? (VecI)scale : (VecI)splat(1.0f));
    float times[kLanes];
    store(times, factor < 0 ? -scale : scale);
    for (int64_t i = 0; i < kRows; ++i) {
      VecF error{};
      for (int64_t d = 0, w = 0; d < D; d += kPair, w += kLanes) {
        split(i < valid ? elements(from + i * stride + d, D - d) : VecU{}, even, odd);
        store(to + i * kPart + w / kPart * parts + w % kPart, word(even * times[i], odd * times[i], error));
      }
      sums[i] = error;
    }
    const VecF error = (VecF)_mm256_sqrt_ps((__m256)sums_of(sums)), units = 1.0f / (scale * keys.scale);
    const VecF wrong = error * (keys.norm + keys.error) + norm * scale * keys.error;
    store(unit, units);
    return !any_above(wrong * units * (factor < 0 ? -factor : factor), kLogitError);
  }

  // multiply_keys of attention_tiles.h
  template <int kVectors>
  __attribute__((noinline)) static void multiply_keys(const float* q, const float* k, int64_t depth, int64_t count,
                                                      bool add, float* s) {
    VecI sum[kRows][kVectors] = {};
#pragma GCC unroll 4
    for (int64_t d = 0; d < count; ++d, ++q, k += kLanes) {
      VecI x[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) x[j] = (VecI)load(k + j * depth * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) dot<kVectors>(sum[r], q + r * kPart, x);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        float* to = s + r * kKeys + j * kLanes;
        const VecF here = (VecF)_mm256_cvtepi32_ps((__m256i)sum[r][j]);
        store(to, add ? load(to) + here : here);
      }
    }
  }

  // a row of the result: D sums times inverse
  static void finish(const float* sum, float inverse, int64_t D, BFloat16* out) {
    int64_t d = 0;
    for (; D - d >= kPair; d += kPair) {
      const VecF a = load(sum + d) * inverse, b = load(sum + d + kLanes) * inverse;
      VecU x = rounded_number(a), y = rounded_number(b);
      if (__builtin_expect(any_nan(a, b), 0)) x = rounded_bits(a), y = rounded_bits(b);
      const __m256i both = _mm256_packus_epi32((__m256i)(x >> 16), (__m256i)(y >> 16));
      const VecU u = (VecU)_mm256_permute4x64_epi64(both, 0xd8);
      memcpy(out + d, &u, sizeof u);
    }
    for (; d < D; d += kLanes) {
      const VecF x = load(sum + d) * inverse;
      if (D - d >= kLanes) store(out + d, x);
      else store_first(out + d, x, D - d);
    }
  }
};
#endif

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
