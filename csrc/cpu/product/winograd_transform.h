// The transforms of Winograd's F(2x2, 3x3) and F(4x4, 3x3), and of F(2x2, 2x2) for two neighbours of them, on vectors of
// channels.
//
//   Y = A^T [ (G g G^T) * (B^T d B) ] A      d: a tile of the input, g: a kernel, Y: a tile of the output
//
// Each side is a transform of columns, then of rows. F(4, 3) takes the points 0, +-a, +-b and infinity.
// An enlarged picture (nearest) has two kinds of outputs in a direction, each of two taps: g0, g1 + g2 and g0 + g1, g2.
// With stride 2 the outer taps see every other pixel, which are F(2, 2) of g0, g2; the middle one sees those between.
// Source: Lavin & Gray 2016, "Fast algorithms for convolutional neural networks"; the points: Barabasz et al. 2020,
// "Error analysis and improving the accuracy of Winograd convolution".
#pragma once
#include "../simd.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// In one direction: kOut outputs of a tile, kSide products, kIn pixels of its input, and kStep from those of one tile to
// those of the next; kEnlarged times as large is the picture that the kernel sees.
struct F2 {
  static constexpr int kOut = 2, kSide = 4, kIn = 4, kStep = 2, kEnlarged = 1;
  LDMFAST_INLINE void input(const VecF* x, VecF* y) {
    y[0] = x[0] - x[2];
    y[1] = x[1] + x[2];
    y[2] = x[2] - x[1];
    y[3] = x[3] - x[1];
  }
  LDMFAST_INLINE void weight(const VecF* g, VecF* y) {
    const VecF even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
    y[0] = g[0];
    y[1] = even + odd;
    y[2] = even - odd;
    y[3] = g[2];
  }
  LDMFAST_INLINE void output(const VecF* m, VecF* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
};

struct F4 {
  static constexpr int kOut = 4, kSide = 6, kIn = 6, kStep = 4, kEnlarged = 1;
  static constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f, a2 = a * a, b2 = b * b;
  LDMFAST_INLINE void input(const VecF* x, VecF* y) {
    const VecF even_a = x[4] - b2 * x[2], odd_a = a * x[3] - (a * b2) * x[1];
    const VecF even_b = x[4] - a2 * x[2], odd_b = b * x[3] - (b * a2) * x[1];
    y[0] = (a2 * b2) * x[0] - (a2 + b2) * x[2] + x[4];
    y[1] = even_a + odd_a;
    y[2] = even_a - odd_a;
    y[3] = even_b + odd_b;
    y[4] = even_b - odd_b;
    y[5] = (a2 * b2) * x[1] - (a2 + b2) * x[3] + x[5];
  }
  LDMFAST_INLINE void weight(const VecF* g, VecF* y) {
    constexpr float na = 1 / (2 * a2 * (a2 - b2)), nb = 1 / (2 * b2 * (b2 - a2));
    const VecF even_a = na * g[0] + (na * a2) * g[2], odd_a = (na * a) * g[1];
    const VecF even_b = nb * g[0] + (nb * b2) * g[2], odd_b = (nb * b) * g[1];
    y[0] = (1 / (a2 * b2)) * g[0];
    y[1] = even_a + odd_a;
    y[2] = even_a - odd_a;
    y[3] = even_b + odd_b;
    y[4] = even_b - odd_b;
    y[5] = g[2];
  }
  LDMFAST_INLINE void output(const VecF* m, VecF* y) {
    const VecF sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    const VecF sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = a * difference_a + b * difference_b;
    y[2] = a2 * sum_a + b2 * sum_b;
    y[3] = (a * a2) * difference_a + (b * b2) * difference_b + m[5];
  }
};

struct F4Enlarged {  // by 2, with a padding of 1: two pixels of the picture as it was, and one on either side
  static constexpr int kOut = 4, kSide = 6, kIn = 4, kStep = 2, kEnlarged = 2;
  LDMFAST_INLINE void input(const VecF* x, VecF* y) {
    y[0] = x[0] - x[1];
    y[1] = x[1];
    y[2] = x[2] - x[1];
    y[3] = x[1] - x[2];
    y[4] = x[2];
    y[5] = x[3] - x[2];
  }
  LDMFAST_INLINE void weight(const VecF* g, VecF* y) {
    y[0] = g[0];
    y[2] = g[1] + g[2];
    y[3] = g[0] + g[1];
    y[1] = y[4] = y[3] + g[2];
    y[5] = g[2];
  }
  LDMFAST_INLINE void output(const VecF* m, VecF* y) {
    y[0] = m[0] + m[1];
    y[1] = m[3] + m[4];
    y[2] = m[1] + m[2];
    y[3] = m[4] + m[5];
  }
};

struct F2Strided {  // stride 2
  static constexpr int kOut = 2, kSide = 5, kIn = 5, kStep = 4, kEnlarged = 1;
  LDMFAST_INLINE void input(const VecF* x, VecF* y) {
    y[0] = x[0] - x[2];
    y[1] = x[2];
    y[2] = x[4] - x[2];
    y[3] = x[1];
    y[4] = x[3];
  }
  LDMFAST_INLINE void weight(const VecF* g, VecF* y) {
    y[0] = g[0];
    y[1] = g[0] + g[2];
    y[2] = g[2];
    y[3] = y[4] = g[1];
  }
  LDMFAST_INLINE void output(const VecF* m, VecF* y) {
    y[0] = m[0] + m[1] + m[3];
    y[1] = m[1] + m[2] + m[4];
  }
};

// What the three have in common: y(i, k) = sum over j of P(x)(i, j) P'(k, j), by columns, then by rows. load(row,
// column) gives a vector, store(i, k, vector) takes one.
template <int kFrom, int kTo, class Load, class Step, class Store>
LDMFAST_INLINE void transform(const Load& load, const Step& step, const Store& store) {
  VecF half[kTo][kFrom];
#pragma GCC unroll 6
  for (int j = 0; j < kFrom; ++j) {
    VecF x[kFrom], y[kTo];
#pragma GCC unroll 6
    for (int i = 0; i < kFrom; ++i) x[i] = load(i, j);
    step(x, y);
#pragma GCC unroll 6
    for (int i = 0; i < kTo; ++i) half[i][j] = y[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTo; ++i) {
    VecF y[kTo];
    step(half[i], y);
#pragma GCC unroll 6
    for (int k = 0; k < kTo; ++k) store(i, k, y[k]);
  }
}
template <class F, class Load, class Store> LDMFAST_INLINE void transform_input(const Load& d, const Store& store) {
  transform<F::kIn, F::kSide>(d, [](const VecF* x, VecF* y) { F::input(x, y); }, store);  // B^T d B
}
template <class F, class Load, class Store> LDMFAST_INLINE void transform_weight(const Load& g, const Store& store) {
  transform<3, F::kSide>(g, [](const VecF* x, VecF* y) { F::weight(x, y); }, store);  // G g G^T
}
template <class F, class Load, class Store> LDMFAST_INLINE void transform_output(const Load& m, const Store& store) {
  transform<F::kSide, F::kOut>(m, [](const VecF* x, VecF* y) { F::output(x, y); }, store);  // A^T m A
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
