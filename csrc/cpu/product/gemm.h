// The matrix product beneath linear and conv2d, on operands packed as 32-bit words.
//
//   for each task, a rectangle of rows x columns:                             # tasks go to the threads
//     for each block of the depth:
//       pack the columns of the weight   [tiles, words, kTile]                # stays in the second-level cache
//       for each panel of kRows rows:
//         pack the panel                 [parts, kRows, kPart]                # stays in the first-level cache
//         for each tile of kTile columns:
//           sums[kRows, kTile] += panel * columns                             # in registers
//           after the last block: finish(sums)                                # bias, activation, residual
//
// What packs and what finishes are the caller's; see Product.
// Source: Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication".
#pragma once
#include <omp.h>

#include "../tiles.h"
#include "../transpose.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int kVectorRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4;  // rows whose sums are in registers: 32, or 16
constexpr int kTile = 2 * kLanes;                                     // columns likewise
constexpr int64_t kPart = 32;                                         // words of a row that lie together in a panel

// A word is one float32, or two neighbours in the depth as bfloat16. kRows: of a panel. kTiles: multiplied by tiles.
struct Single {
  static constexpr int kPack = 1, kRows = kVectorRows;
  static constexpr bool kTiles = false;
  LDMFAST_INLINE VecF dot(VecF sum, VecF a, VecF b) { return sum + a * b; }
  template <class T> LDMFAST_INLINE VecF words(const T* p, int64_t n) {  // n elements remain
    return n >= kLanes ? load(p) : load_first(p, n);
  }
  LDMFAST_INLINE VecF join(VecF a, VecF) { return a; }        // elements of a, then of b, two a word
  LDMFAST_INLINE VecF interleave(VecF a, VecF) { return a; }  // word i: element i of a and of b
};

#if defined(__AVX512BF16__)
struct Paired {
  static constexpr int kPack = 2, kRows = kVectorRows;
  static constexpr bool kTiles = false;
  LDMFAST_INLINE VecF dot(VecF sum, VecF a, VecF b) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  LDMFAST_INLINE VecF words(const BFloat16* p, int64_t n) {
    if (n >= 2 * kLanes) return (VecF)_mm512_loadu_si512(p);
    return (VecF)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
  }
  LDMFAST_INLINE VecF join(VecF a, VecF b) { return (VecF)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
  LDMFAST_INLINE VecF interleave(VecF a, VecF b) {
    typedef uint16_t Halves __attribute__((vector_size(64)));
    const Halves order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (VecF)_mm512_permutexvar_epi16((__m512i)order, (__m512i)join(a, b));
  }
};
#endif

#if defined(__AMX_BF16__)
struct Tiled : Paired {
  static constexpr int kRows = 2 * kTileRows;
  static constexpr bool kTiles = true;
};
#endif

// VectorMathOf: without tiles
template <class T> struct VectorMathOf { using type = Single; };
#if defined(__AVX512BF16__)
template <> struct VectorMathOf<BFloat16> { using type = Paired; };
#endif
template <class T> struct MathOf { using type = typename VectorMathOf<T>::type; };
#if defined(__AMX_BF16__)
template <> struct MathOf<BFloat16> { using type = Tiled; };
#endif

template <class M> constexpr int64_t kPanelPart = M::kRows * kPart;

// What a thread holds while it multiplies by M.
template <bool kTiles> struct TilesIf {};
#if defined(__AMX_BF16__)
template <> struct TilesIf<true> : Tiles {};
#endif
template <class M> using TilesOf = TilesIf<M::kTiles>;

LDMFAST_INLINE VecF broadcast(const float* p) {
  uint32_t bits;
  memcpy(&bits, p, 4);
  return (VecF)splat_u(bits);
}

// Where a vector of sums goes from its register: to c, unless something else is wanted.
struct Keep {
  __attribute__((always_inline)) void operator()(float* to, int, int, VecF y) const { store(to, y); }
};

// a b, of a [parts, kRows, kPart] and b [words, kV * kLanes], and c [kR, kV * kLanes] added to it; see Keep.
template <class M, int kR, int kV, class Finish = Keep>
void multiply(const float* a, const float* b, int64_t words, bool add, float* c, int64_t stride_c,
              const Finish& finish = {}) {
  VecF sum[kR][kV] = {};
  if (add) {
    for (int r = 0; r < kR; ++r) for (int j = 0; j < kV; ++j) __builtin_prefetch(c + r * stride_c + j * kLanes);
  }
  const auto step = [&](int64_t d) __attribute__((always_inline)) {
    VecF x[kV];
#pragma GCC unroll 2
    for (int j = 0; j < kV; ++j) x[j] = load(b + j * kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < kR; ++r) {
      const VecF w = broadcast(a + r * kPart + d);
#pragma GCC unroll 2
      for (int j = 0; j < kV; ++j) sum[r][j] = M::dot(sum[r][j], w, x[j]);
    }
    b += kV * kLanes;
  };
  for (; words > 0; words -= kPart, a += kPanelPart<M>) {
    const float* next = a + kPanelPart<M>;  // part, which may come from memory; fetched word by word or at once
#pragma GCC unroll 32
    for (int64_t i = 0; kUnroll > 1 && i < kPanelPart<M>; i += 16) __builtin_prefetch(next + i);
    if (words < kPart) {
      for (int64_t d = 0; d < words; ++d) step(d);
      break;
    }
#pragma GCC unroll kUnroll
    for (int64_t d = 0; d < kPart; ++d) {
      if (kUnroll == 1) __builtin_prefetch(next + d * M::kRows);
      step(d);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kV; ++j) {
      float* to = c + r * stride_c + j * kLanes;
      finish(to, r, j, add ? load(to) + sum[r][j] : sum[r][j]);
    }
  }
}

template <class M, int kR = M::kRows>
LDMFAST_INLINE void multiply_rows(int rows, const float* a, const float* b, int64_t words, bool add, float* c,
                                  int64_t stride_c) {
  if (rows == kR) return multiply<M, kR, 2>(a, b, words, add, c, stride_c);
  if constexpr (kR > 1) multiply_rows<M, kR - 1>(rows, a, b, words, add, c, stride_c);
}

// ---- packing ----

LDMFAST_INLINE float* aligned(float* p) { return (float*)(((uintptr_t)p + 63) / 64 * 64); }

// A store, and the line of one that follows soon: a store that misses the first-level cache holds up those behind it.
LDMFAST_INLINE void store_ahead(float* p, int64_t ahead, VecF x) {
  __builtin_prefetch(p + ahead, 1);
  store(p, x);
}

// to[words, stride_to] = the words of kLanes rows of n elements each; rows from valid on are zero. The kLanes
// rows after them are likely to be next.
template <class M, class T>
void pack_transposed(const T* from, int64_t stride, int64_t valid, int64_t n, float* to, int64_t stride_to) {
  for (int64_t k = 0; k < n; k += kLanes * M::kPack, to += kLanes * stride_to) {
    VecF x[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) __builtin_prefetch(from + (r + kLanes) * stride + k, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) x[r] = r < valid ? M::words(from + r * stride + k, n - k) : VecF{};
    transpose(x);
    const int64_t count = ceil_div(n - k, M::kPack);
    if (count >= kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + i * stride_to, x[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) memcpy(to + i * stride_to, &x[i], sizeof(VecF));
    }
  }
}

// Where word w of a panel's row is, from the row's first word.
LDMFAST_INLINE int64_t panel_word(int64_t w, int64_t part) { return w / kPart * part + w % kPart; }

// The same as float32, one element a word; bfloat16 goes through the transposition two a word.
template <class T> void pack_elements(const T* from, int64_t stride, int64_t valid, int64_t n, float* to) {
  pack_transposed<Single>(from, stride, valid, n, to, kLanes);
}
template <> inline void pack_elements(const BFloat16* from, int64_t stride, int64_t valid, int64_t n, float* to) {
  if (n % 2) return pack_transposed<Single>(from, stride, valid, n, to, kLanes);
  for (int64_t k = 0; k < n; k += kPair, to += kPair * kLanes) {
    VecF x[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      const float* words = (const float*)(from + r * stride + k);
      __builtin_prefetch(from + (r + kLanes) * stride + k, 0, 2);
      x[r] = r < valid ? Single::words(words, (n - k) / 2) : VecF{};
    }
    transpose(x);
    const int64_t count = min64(kLanes, (n - k) / 2);
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; ++i) {
      store(to + 2 * i * kLanes, (VecF)((VecU)x[i] << 16));
      store(to + (2 * i + 1) * kLanes, (VecF)((VecU)x[i] & 0xffff0000u));
    }
  }
}

// A row of n elements into a panel whose parts stand `part` floats apart; next: the row that will take its place
template <class M, class T>
LDMFAST_INLINE void pack_row(const T* from, int64_t n, const T* next, float* to,
                             int64_t part = kPanelPart<M>) {
  constexpr int64_t kStep = kLanes * M::kPack, kSteps = kPart / kLanes;
  for (; n >= kSteps * kStep; n -= kSteps * kStep, to += part) {
#pragma GCC unroll 2
    for (int i = 0; i < kSteps; ++i, from += kStep, next += kStep) {
      __builtin_prefetch(next, 0, 2);
      store(to + i * kLanes, M::words(from, kStep));
    }
  }
  for (; n > 0; n -= kStep, from += kStep, to += kLanes) store(to, M::words(from, n));
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
