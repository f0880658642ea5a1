// The inner loops of attention.cpp, on operands packed as 32-bit words, the packing, and the mask.
#pragma once
#include <cmath>
#include "exponential.h"
#include "transpose.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// queries whose sums are in registers at one time: 32 registers, or 16; at most kLanes
constexpr int kRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 4;
constexpr int kTile = 2 * kLanes;            // keys whose sums are in registers at one time
constexpr int kStrip = kRows == 6 ? 2 : 3;   // vectors of a row of V likewise
constexpr int64_t kKeys = 256;               // most keys between two updates of the maximum; a multiple of kTile
constexpr int64_t kPart = 128;               // words of a query that lie together, and products in one running sum
constexpr int kHalf = kLanes == 16 ? 8 : 0;  // where half a vector costs half, head widths such as 40 end in one

typedef float VecHalf __attribute__((vector_size(32)));

template <class V> LDMFAST_INLINE V load_as(const float* p) {
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}
LDMFAST_INLINE VecF broadcast(const float* p) {
  uint32_t bits;
  memcpy(&bits, p, 4);
  return (VecF)splat_u(bits);
}
#if defined(__AVX512F__)
// A second broadcast of the same word would go through a general register, and both then through the port of shuffles.
LDMFAST_INLINE VecHalf lower_half(VecF x) { return (VecHalf)_mm512_castps512_ps256((__m512)x); }
#else
VecHalf lower_half(VecF);
#endif

// Of `floats` from `from` on, the share that is to come while rows [row, row + kRows) of `rows` are multiplied: what the
// next rows need is then in the first-level cache. Keys and values that one task takes once come from the third.
LDMFAST_INLINE void fetch(const float* from, int64_t floats, int64_t row, int64_t rows) {
  const int64_t end = (row + kRows) * floats / rows;
  for (int64_t i = row * floats / rows / 16 * 16; i < end; i += 16) __builtin_prefetch(from + i);
}

// Packed operands are 32-bit words, held in float: one float32, or two neighbours in bfloat16.
struct Single {
  static constexpr int kPack = 1;
  static constexpr uint32_t kSign = 0x80000000u;
  template <class V> LDMFAST_INLINE V dot(V sum, V a, V b) { return sum + a * b; }
  template <class T> LDMFAST_INLINE VecF words(const T* row, int64_t n) {  // n elements remain in the row
    return n >= kLanes ? load(row) : load_first(row, n);
  }
  template <class T> LDMFAST_INLINE VecF value_words(const T* row, const T*, int64_t n) { return words(row, n); }
  LDMFAST_INLINE void store_weights(float* p, VecF a, VecF b) {
    store(p, a);
    store(p + kLanes, b);
  }
};

#if defined(__AVX512BF16__)
struct Paired {
  static constexpr int kPack = 2;
  static constexpr uint32_t kSign = 0x80008000u;
  LDMFAST_INLINE VecF dot(VecF sum, VecF a, VecF b) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  LDMFAST_INLINE VecHalf dot(VecHalf sum, VecHalf a, VecHalf b) {
    return (VecHalf)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
  }
  LDMFAST_INLINE VecF words(const BFloat16* row, int64_t n) {
    const __mmask32 mask = n >= 32 ? ~0u : (1u << n) - 1;
    return (VecF)_mm512_maskz_loadu_epi16(mask, row);
  }
  LDMFAST_INLINE VecF value_words(const BFloat16* even, const BFloat16* odd, int64_t n) {
    VecU a = (VecU)Single::words(even, n), b = odd ? (VecU)Single::words(odd, n) : VecU{};
    return (VecF)(a >> 16 | b);
  }
  LDMFAST_INLINE void store_weights(float* p, VecF a, VecF b) {
    __m512bh h = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    memcpy(p, &h, sizeof h);
  }
};
#endif

template <class T> struct MathOf { using type = Single; };
#if defined(__AVX512BF16__)
template <> struct MathOf<BFloat16> { using type = Paired; };
#endif

// to[depth, kLanes] = the words of kLanes rows of D elements, and zeros; rows from valid on are zero
template <class M, class T>
void interleave(const T* from, int64_t stride, int64_t valid, int64_t D, int64_t depth, float* to) {
  for (int64_t d = 0; d < D; d += kLanes * M::kPack, to += kLanes * kLanes) {
    VecF words[kLanes];
#pragma GCC unroll 16
    for (int row = 0; row < kLanes; ++row) words[row] = row < valid ? M::words(from + row * stride + d, D - d) : VecF{};
    transpose(words);
    const int64_t count = min64(kLanes, depth - d / M::kPack);
    for (int64_t i = 0; i < count; ++i) store(to + i * kLanes, words[i]);
  }
}

// kTile rows likewise: to[2, depth, kLanes]
template <class M, class T>
void interleave_tile(const T* from, int64_t stride, int64_t valid, int64_t D, int64_t depth, float* to) {
  for (int i = 0; i < kTile; i += kLanes) interleave<M>(from + i * stride, stride, valid - i, D, depth, to + i * depth);
}

// s[kRows, kVectors * kLanes] = q k^T, or += it, of q [kRows, kPart] and k [kVectors, depth, kLanes], of which count
// words are taken. Long sums are made in parts, so that float32 keeps its last bits.
template <class M, int kVectors>
void multiply_keys(const float* q, const float* k, int64_t depth, int64_t count, bool add, float* s) {
  VecF sum[kRows][kVectors] = {};
#pragma GCC unroll kUnroll
  for (int64_t d = 0; d < count; ++d) {
    VecF x[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) x[j] = load(k + (j * depth + d) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const VecF w = broadcast(q + r * kPart + d);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[r][j] = M::dot(sum[r][j], w, x[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = s + r * kKeys + j * kLanes;
      store(to, add ? load(to) + sum[r][j] : sum[r][j]);
    }
  }
}

// o[kR, ...] = o * decay + p v for kVectors vectors of the head width and, if asked, half a one; of p [kR, words] and
// v [words, kVectors * kLanes + tail]. Without decay, o = p v.
template <class M, int kR, int kVectors, bool kTail>
void multiply_values(const float* p, const float* v, int64_t words, int64_t width, const float* decay, float* o) {
  VecF sum[kR][kVectors] = {};
  VecHalf tail[kR] = {};
  if (decay) {
#pragma GCC unroll 12
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sum[r][j] = load(o + r * width + j * kLanes) * decay[r];
      if (kTail) tail[r] = load_as<VecHalf>(o + r * width + kVectors * kLanes) * decay[r];
    }
  }
#pragma GCC unroll kUnroll
  for (int64_t w = 0; w < words; ++w, v += kVectors * kLanes + (kTail ? kHalf : 0), ++p) {
    VecF x[kVectors];
    VecHalf last = VecHalf{};
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) x[j] = load(v + j * kLanes);
    if (kTail) last = load_as<VecHalf>(v + kVectors * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kR; ++r) {
      const float* weight = p + r * kKeys / M::kPack;
      const VecF y = broadcast(weight);
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sum[r][j] = M::dot(sum[r][j], y, x[j]);
      if constexpr (kTail) tail[r] = M::dot(tail[r], lower_half(y), last);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) store(o + r * width + j * kLanes, sum[r][j]);
    if (kTail) memcpy(o + r * width + kVectors * kLanes, &tail[r], sizeof tail[r]);
  }
}

// V is packed in strips of the head width, as wide as multiply_values takes them: kStrip vectors, or two and a half
LDMFAST_INLINE int64_t strip_width(int64_t left) {
  if (kStrip == 2) return min64(left, 2 * kLanes);
  const int64_t vectors = left / kLanes, half = left % kLanes;
  if (vectors <= 2 || (vectors == 3 && !half)) return left;
  return (vectors == 4 || vectors == 3 ? 2 : 3) * kLanes;
}

// Rows that take a strip together: of a single vector twice as many, for the sums of kRows would wait for each other.
LDMFAST_INLINE int strip_rows(int64_t strip, int64_t left) {
  return kStrip == 2 && strip <= kLanes && left >= 2 * kRows ? 2 * kRows : kRows;
}

template <class M>
void multiply_strip(int rows, int64_t strip, const float* p, const float* v, int64_t words, int64_t width,
                    const float* decay, float* o) {
  const int64_t vectors = strip / kLanes;
  if (kHalf && strip % kLanes) {
    if (vectors == 2) multiply_values<M, kRows, 2, kHalf != 0>(p, v, words, width, decay, o);
    if (vectors == 1) multiply_values<M, kRows, 1, kHalf != 0>(p, v, words, width, decay, o);
    return;
  }
  if (kStrip == 3 && vectors == 3) multiply_values<M, kRows, kStrip, false>(p, v, words, width, decay, o);
  if (vectors == 2) multiply_values<M, kRows, 2, false>(p, v, words, width, decay, o);
  if (vectors == 1 && rows == kRows) multiply_values<M, kRows, 1, false>(p, v, words, width, decay, o);
  if (vectors == 1 && rows > kRows) multiply_values<M, 2 * kRows, 1, false>(p, v, words, width, decay, o);
}

// The scores of the keys from count on become -inf: a vector at a time, for a load that follows waits for parts.
LDMFAST_INLINE void hide_from(int64_t count, int64_t padded, float* s) {
  for (int64_t i = count / kLanes * kLanes; i < padded; i += kLanes) {
    VecI lane;
    for (int j = 0; j < kLanes; ++j) lane[j] = (int)i + j;
    store(s + i, lane < (int)count ? load(s + i) : splat(-kInf));
  }
}

// s * factor - maximum, not above 0. The maximum is a rounded product; from kRounded on the scores' products are to be
// rounded likewise, for a multiply-add would leave what rounding took of the maximum: from 2^31 on more than 2^x holds.
// Below that it is in each weight of the row, and cancels.
constexpr float kRounded = 0x1p20f;
template <bool kRound> LDMFAST_INLINE VecF exponent_of(VecF s, float factor, float maximum) {
  VecF product = s * factor;
#if defined(__x86_64__)
  if (kRound) asm("" : "+x"(product));  // keeps the compiler from a multiply-add
#elif defined(__aarch64__)
  if (kRound) asm("" : "+w"(product));
#endif
  return product - maximum;
}

// p = 2^(s * factor - maximum), the weights of count keys (padded to kTile) for one query; returns their lane sums.
template <class M, Accuracy A, bool kRound>
LDMFAST_INLINE VecF weights_of(const float* s, int64_t count, float factor, float maximum, float* p) {
  VecF total0{}, total1{};
  for (int64_t i = 0; i < count; i += kTile) {
    const VecF a = exp2v<A, false>(exponent_of<kRound>(load(s + i), factor, maximum));
    const VecF b = exp2v<A, false>(exponent_of<kRound>(load(s + i + kLanes), factor, maximum));
    total0 += a;
    total1 += b;
    M::store_weights(p + i / M::kPack, a, b);
  }
  return total0 + total1;
}
template <class M, Accuracy A>
LDMFAST_INLINE VecF weights(const float* s, int64_t count, float factor, float maximum, float* p) {
  if (std::fabs(maximum) < kRounded) return weights_of<M, A, false>(s, count, factor, maximum, p);
  return weights_of<M, A, true>(s, count, factor, maximum, p);
}

LDMFAST_INLINE float row_maximum(const float* s, int64_t count) {
  VecF m0 = splat(-kInf), m1 = m0;
  for (int64_t i = 0; i < count; i += kTile) {
    m0 = vmax(load(s + i), m0);  // the second operand survives where the score is NaN
    m1 = vmax(load(s + i + kLanes), m1);
  }
  return reduce_max(vmax(m0, m1));
}

template <class U> LDMFAST_INLINE void mask_row(const U* mask, float factor, int64_t count, float* s) {
  for (int64_t i = 0; i < count; i += kLanes) {
    VecF m = count - i >= kLanes ? load(mask + i) : load_first(mask + i, count - i);
    store(s + i, load(s + i) * factor + m * kLog2e);
  }
}

// s = s * factor + mask * log2(e), for the block's keys from s0 on and one query
void apply_mask(const AttentionArgs& a, int64_t head, int64_t l, int64_t s0, int64_t count, float factor, float* s) {
  const int64_t at = head / a.H * a.stride_mn + head % a.H * a.stride_mh + l * a.stride_ml + s0 * a.stride_ms;
  if (a.mask_dtype == DType::kBool) {
    const uint8_t* mask = (const uint8_t*)a.mask + at;
    for (int64_t i = 0; i < count; ++i) s[i] = mask[i * a.stride_ms] ? s[i] * factor : -kInf;
  } else if (a.stride_ms != 1) {
    for (int64_t i = 0; i < count; ++i) {
      s[i] = s[i] * factor + load_scalar(a.mask, a.mask_dtype, at + i * a.stride_ms) * kLog2e;
    }
  } else if (a.mask_dtype == DType::kFloat32) {
    mask_row((const float*)a.mask + at, factor, count, s);
  } else if (a.mask_dtype == DType::kBFloat16) {
    mask_row((const BFloat16*)a.mask + at, factor, count, s);
  } else {
    mask_row((const Half*)a.mask + at, factor, count, s);
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
