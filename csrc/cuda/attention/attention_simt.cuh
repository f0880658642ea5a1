// What the plain kernels of attention and of its gradient share: tiles of 64 x 64 scores by multiply-adds, 256 threads,
// 4 x 4 scores each.
#pragma once
#include "attention.cuh"

namespace ldmfast {
namespace attention_detail {
namespace simt {

constexpr int kThreads = 256;
constexpr int kRows = 64, kKeys = 64, kColumns = 64, kDepth = 32;
constexpr int kPad = 4;   // floats: rows stay 16-byte aligned, and 4 rows apart fall into other banks

// [64, WIDTH] of a head as floats, zeros outside; element-wise, since strides and widths are any
template <typename T, int WIDTH, int STRIDE>
__device__ __forceinline__ void load_tile(float* to, const T* source, int64_t stride, int64_t from, int64_t rows,
                                          int64_t column, int64_t columns) {
  for (int i = threadIdx.x; i < 64 * WIDTH; i += kThreads) {
    const int r = i / WIDTH, c = i % WIDTH;
    const bool inside = from + r < rows && column + c < columns;
    to[r * STRIDE + c] = inside ? to_float(source[(from + r) * stride + column + c]) : 0.0f;
  }
}

// One side of a head: [rows, D], unit stride in D
template <typename T> struct Side {
  const T* head;
  int64_t stride, rows;
};

// s[i][j]: row ty * 4 + i of q, row tx + 16 * j of k, so that a warp's reads of k spread over the banks
template <typename T>
__device__ __forceinline__ void scores(float (&s)[4][4], float* q, float* k, const Side<T>& q_side,
                                       const Side<T>& k_side, int64_t row, int64_t key, int64_t D) {
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < 16; ++i) s[i / 4][i % 4] = 0.0f;
  for (int64_t d = 0; d < D; d += kDepth) {
    __syncthreads();
    load_tile<T, kDepth, kDepth + kPad>(q, q_side.head, q_side.stride, row, q_side.rows, d, D);
    load_tile<T, kDepth, kDepth + kPad>(k, k_side.head, k_side.stride, key, k_side.rows, d, D);
    __syncthreads();
#pragma unroll 2
    for (int e = 0; e < kDepth; e += 4) {
      float x[4][4], y[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_vector(q + (ty * 4 + i) * (kDepth + kPad) + e, x[i]);
        load_vector(k + (tx + 16 * i) * (kDepth + kPad) + e, y[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int f = 0; f < 4; ++f) s[i][j] += x[i][f] * y[j][f];
    }
  }
}

__device__ __forceinline__ float row_max(float v) {     // over the 16 lanes of a row
#pragma unroll
  for (int mask = 8; mask > 0; mask >>= 1) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
}
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
  for (int mask = 8; mask > 0; mask >>= 1) v += shuffle_xor(v, mask);
  return v;
}
}  // namespace simt
}  // namespace attention_detail
}  // namespace ldmfast
