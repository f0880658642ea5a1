// The inner loops of attention_backward.cpp: one product of matrices in registers, the softmax of a row, packing.
#pragma once
#include "attention_tiles.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kSum = 128;                // products in one running sum, so that float32 keeps its last bits
constexpr int kSums = kLanes == 16 ? 8 : 4;  // rows whose sums are in registers at one time; divides every count of rows

struct Left { const float* p; int64_t row, step; };     // element (r, i) is p[r * row + i * step]
struct Right { const float* p; int64_t row, panel; };   // row i of panel j, kTile wide, is at p + i * row + j * panel

// c[kSums, kVectors * kLanes] = a b, or += it, over depth terms
template <int kVectors> LDMFAST_INLINE void multiply_tile(Left a, const float* b, int64_t ldb, int64_t depth, bool add,
                                                          float* c, int64_t ldc) {
  VecF sum[kSums][kVectors] = {};
  for (int64_t i = 0; i < depth; ++i) {
    VecF x[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) x[j] = load(b + i * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kSums; ++r) {
      const VecF w = splat(a.p[r * a.row + i * a.step]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[r][j] += w * x[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kSums; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + r * ldc + j * kLanes;
      store(to, add ? load(to) + sum[r][j] : sum[r][j]);
    }
  }
}

// c[rows, columns] = a b where kFresh, else += it; rows is a multiple of kSums, columns of kLanes
template <bool kFresh>
void multiply(Left a, Right b, int64_t rows, int64_t columns, int64_t depth, float* c, int64_t ldc) {
  for (int64_t i = 0; i < depth; i += kSum) {
    const int64_t count = min64(kSum, depth - i);
    const bool add = !kFresh || i > 0;
    for (int64_t j = 0; j < columns; j += kTile) {
      const float* panel = b.p + i * b.row + j / kTile * b.panel;
      for (int64_t r = 0; r < rows; r += kSums) {
        const Left part{a.p + r * a.row + i * a.step, a.row, a.step};
        if (columns - j > kLanes) multiply_tile<2>(part, panel, b.row, count, add, c + r * ldc + j, ldc);
        else multiply_tile<1>(part, panel, b.row, count, add, c + r * ldc + j, ldc);
      }
    }
  }
}

// to[width] = row[D] and zeros; all zeros where row is null
template <class T> void unpack_row(const T* row, int64_t D, int64_t width, float* to) {
  for (int64_t d = 0; d < width; d += kLanes) {
    if (!row) store(to + d, VecF{});
    else store(to + d, D - d >= kLanes ? load(row + d) : load_first(row + d, D - d));
  }
}

// to[D, kTile] = the columns of kTile rows; rows from valid on are zero
template <class T> void transpose(const T* from, int64_t stride, int64_t valid, int64_t D, float* to) {
  float row[kLanes];
  for (int64_t i = 0; i < kTile; ++i) {
    for (int64_t d = 0; d < D; d += kLanes) {
      unpack_row(i < valid ? from + i * stride + d : nullptr, D - d, kLanes, row);
      for (int64_t j = 0; j < min64(kLanes, D - d); ++j) to[(d + j) * kTile + i] = row[j];
    }
  }
}

// row = row * factor + mask * log2(e), for one query and all keys
void mask_row_of(const AttentionBackwardArgs& b, int64_t head, int64_t l, float factor, float* row) {
  AttentionArgs a{};
  a.H = b.H, a.mask = b.mask, a.mask_dtype = b.mask_dtype;
  a.stride_mn = b.stride_mn, a.stride_mh = b.stride_mh, a.stride_ml = b.stride_ml, a.stride_ms = b.stride_ms;
  apply_mask(a, head, l, 0, b.S, factor, row);
}

// row = the softmax of row * factor (in powers of two) over `count` keys; zeros up to `padded`, and where all is -inf
template <Accuracy A> void soften(float* row, int64_t count, int64_t padded, float factor) {
  for (int64_t s = 0; s < padded; s += kLanes) store(row + s, load(row + s) * factor);
  for (int64_t s = count; s < padded; ++s) row[s] = -kInf;
  const float maximum = row_maximum(row, padded), shift = maximum == -kInf ? 0.0f : maximum;
  VecF sum{};
  for (int64_t s = 0; s < padded; s += kLanes) {
    const VecF x = exp2v<A>(load(row + s) - shift);
    sum += x;
    store(row + s, x);
  }
  const float total = reduce_add(sum), inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t s = 0; s < padded; s += kLanes) store(row + s, load(row + s) * inverse);
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
