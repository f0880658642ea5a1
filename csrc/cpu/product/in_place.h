// gemm.h's kernel on rows that are read where they lie, without a panel.
#pragma once
#include "gemm.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// multiply of gemm.h with the rows of a stride_a words apart
template <class M, int kR, int kV, class Finish = Keep>
void multiply_in_place(const float* a, int64_t stride_a, const float* b, int64_t words, bool add, float* c,
                       int64_t stride_c, const Finish& finish = {}) {
  constexpr int kAbreast = 3;  // rows beside a pointer, reached by the stride and twice the stride
  constexpr int kPointers = (kR + kAbreast - 1) / kAbreast;
  VecF sum[kR][kV] = {};
  if (add) {
    for (int r = 0; r < kR; ++r) for (int j = 0; j < kV; ++j) __builtin_prefetch(c + r * stride_c + j * kLanes);
  }
  const float* row[kPointers];
  for (int i = 0; i < kPointers; ++i) row[i] = a + i * kAbreast * stride_a;
  for (int64_t d = 0; d < words; ++d, b += kV * kLanes) {
    VecF x[kV];
#pragma GCC unroll 2
    for (int j = 0; j < kV; ++j) x[j] = load(b + j * kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < kR; ++r) {
      const VecF w = broadcast(row[r / kAbreast] + r % kAbreast * stride_a);
#pragma GCC unroll 2
      for (int j = 0; j < kV; ++j) sum[r][j] = M::dot(sum[r][j], w, x[j]);
    }
#pragma GCC unroll 5
    for (int i = 0; i < kPointers; ++i) ++row[i];
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
LDMFAST_INLINE void multiply_rows_in_place(int rows, const float* a, int64_t stride_a, const float* b, int64_t words,
                                           bool add, float* c, int64_t stride_c) {
  if (rows == kR) return multiply_in_place<M, kR, 2>(a, stride_a, b, words, add, c, stride_c);
  if constexpr (kR > 1) multiply_rows_in_place<M, kR - 1>(rows, a, stride_a, b, words, add, c, stride_c);
}

// Fetches the next panel's rows, where they are read in place, into the second-level cache: some with every tile.
template <class M> struct Ahead {
  const float* rows;
  int64_t stride, words, count, share;  // words and rows of the panel, and words of a row for each tile

  Ahead(const float* a, int64_t stride, int64_t words, int64_t remaining, int64_t tiles)
      : rows(a ? a + M::kRows * stride : nullptr), stride(stride), words(words), count(min64(M::kRows, remaining)),
        share(ceil_div(ceil_div(words, 16), tiles) * 16) {}
  void fetch(int64_t tile) const {
    const int64_t end = min64(words, (tile + 1) * share);
    for (int64_t w = tile * share; w < end; w += 16) {  // a line
      for (int64_t r = 0; r < count; ++r) __builtin_prefetch(rows + r * stride + w, 0, 2);
    }
  }
};

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
