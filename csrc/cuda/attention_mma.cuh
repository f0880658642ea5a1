// One warp's share of flash attention: scores, softmax and the product with the values, all in registers.
#pragma once
#include "attention.cuh"
#include "mma.cuh"

namespace ldmfast {
namespace attention_detail {

constexpr int kThreads = 128;
constexpr int kStep = 32;                 // keys between two updates of the running maximum
constexpr float kSlack = 8.0f;            // log2: the maximum may lag by 2^8 before the output is rescaled
constexpr float kLowest = -3.4028235e38f; // where the maximum starts: finite, so that no difference is inf - inf

template <typename T_, int D_, int MT_, int KEYS_> struct Config {
  using T = T_;
  static constexpr int D = D_, MT = MT_, KEYS = KEYS_;
  static constexpr int kQueries = 64 * MT;
  static constexpr int kColumns = D / 8;                  // output tiles of 8
  static constexpr int kStride = (kColumns | 1) * 8;      // an odd number of 16-byte units: no bank conflict
  static constexpr int kSteps16 = D / 16;
  static constexpr bool kTail = D % 16 != 0;
  static constexpr bool kKeepQ = D <= 64;                 // in registers; wider ones are read again each step
  static constexpr size_t kShared = (kQueries + 4 * KEYS) * kStride * sizeof(T);
  static constexpr int kBlocks = D <= 40 ? 4 : D <= 80 ? 3 : 2;   // a multiprocessor
};

// rows [from, from + ROWS) of a [rows, D] head to shared memory; zeros outside. A thread keeps its column, so that the
// addresses of its rows are one addition apart.
template <typename C, int ROWS>
__device__ __forceinline__ void load_tile(typename C::T* to, const typename C::T* head, int64_t stride, int from,
                                          int rows, int D, bool wide) {
  using T = typename C::T;
  if (wide) {
    constexpr int kPass = kThreads / C::kColumns;
    const int first = threadIdx.x / C::kColumns, c = threadIdx.x % C::kColumns * 8;
    const T* source = head + (from + first) * stride + c;
    if (first >= kPass) return;
#pragma unroll 1
    for (int r = first; r < ROWS; r += kPass, source += kPass * stride) {
      const bool valid = from + r < rows && c < D;
      cp_async<16>(to + r * C::kStride + c, valid ? source : head, valid);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * C::D; i += kThreads) {
      const int r = i / C::D, c = i % C::D;
      const bool valid = from + r < rows && c < D;
      to[r * C::kStride + c] = valid ? head[(from + r) * stride + c] : from_float<T>(0.0f);
    }
  }
}

template <typename C> struct Warp {        // what one warp keeps
  float o[C::MT][C::kColumns][4];
  float top[C::MT][2], sum[C::MT][2];   // rows g and g + 8: reference maximum, sum of exponentials
  uint32_t q[C::MT][C::kKeepQ ? C::kSteps16 + C::kTail : 1][4];
};

// A fragment of q's tile m: k-step s; the 8 columns left over fill two registers
template <typename C> __device__ __forceinline__ void load_q(uint32_t (&r)[4], const typename C::T* q, int m, int s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp * 16 * C::MT + m * 16 + lane % 16;
  const int column = s * 16 + (s < C::kSteps16 ? lane / 16 * 8 : 0);
  ldmatrix_x4(r, q + row * C::kStride + column);
}

// s [MT, 4 tiles of 8 keys] = q k^T
template <typename C>
__device__ __forceinline__ void scores(Warp<C>& w, float (&s)[C::MT][kStep / 8][4], const typename C::T* q,
                                       const typename C::T* k) {
  using T = typename C::T;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < C::MT; ++m)
#pragma unroll
    for (int t = 0; t < kStep / 8; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][t][i] = 0.0f;
#pragma unroll
  for (int step = 0; step < C::kSteps16 + C::kTail; ++step) {
    if constexpr (!C::kKeepQ) {
#pragma unroll
      for (int m = 0; m < C::MT; ++m) load_q<C>(w.q[m][0], q, m, step);
    }
    const int at = C::kKeepQ ? step : 0;
    uint32_t b[4];
    if (step < C::kSteps16) {
#pragma unroll
      for (int pair = 0; pair < kStep / 16; ++pair) {
        ldmatrix_x4(b, k + (pair * 16 + lane / 16 * 8 + lane % 8) * C::kStride + step * 16 + lane / 8 % 2 * 8);
#pragma unroll
        for (int m = 0; m < C::MT; ++m) {
          mma_k16<T>(s[m][2 * pair], w.q[m][at], b[0], b[1]);
          mma_k16<T>(s[m][2 * pair + 1], w.q[m][at], b[2], b[3]);
        }
      }
    } else {
      ldmatrix_x4(b, k + lane * C::kStride + step * 16);   // 32 keys, 8 columns
#pragma unroll
      for (int m = 0; m < C::MT; ++m)
#pragma unroll
        for (int t = 0; t < kStep / 8; ++t) mma_k8<T>(s[m][t], w.q[m][at], b[t]);
    }
  }
}

// s becomes exp2(factor * (s - top)), with the reference maximum moved where it lags by more than kSlack
template <typename C>
__device__ __forceinline__ void softmax(Warp<C>& w, float (&s)[C::MT][kStep / 8][4], float factor) {
  float top[C::MT][2];
  bool lags = false;
#pragma unroll
  for (int m = 0; m < C::MT; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float t = w.top[m][r];
#pragma unroll
      for (int i = 0; i < kStep / 8; ++i) t = fmaxf(t, fmaxf(s[m][i][2 * r], s[m][i][2 * r + 1]));
      t = fmaxf(t, shuffle_xor(t, 1));
      top[m][r] = fmaxf(t, shuffle_xor(t, 2));
      lags = lags || (top[m][r] - w.top[m][r]) * factor > kSlack;
    }
  if (warp_any(lags)) {
#pragma unroll
    for (int m = 0; m < C::MT; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float shrink = fast_exp2((w.top[m][r] - top[m][r]) * factor);
        w.top[m][r] = top[m][r];
        w.sum[m][r] *= shrink;
#pragma unroll
        for (int c = 0; c < C::kColumns; ++c) {
          w.o[m][c][2 * r] *= shrink;
          w.o[m][c][2 * r + 1] *= shrink;
        }
      }
  }
#pragma unroll
  for (int m = 0; m < C::MT; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float base = w.top[m][r] * factor;
#pragma unroll
      for (int t = 0; t < kStep / 8; ++t)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          s[m][t][i] = fast_exp2(s[m][t][i] * factor - base);
          w.sum[m][r] += s[m][t][i];
        }
    }
}

// o += p v
template <typename C>
__device__ __forceinline__ void values(Warp<C>& w, const float (&s)[C::MT][kStep / 8][4], const typename C::T* v) {
  using T = typename C::T;
  const int lane = threadIdx.x % 32;
  uint32_t p[C::MT][kStep / 16][4];
#pragma unroll
  for (int m = 0; m < C::MT; ++m)
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) p[m][k][i] = pack2<T>(s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]);
  uint32_t b[4];
#pragma unroll
  for (int pair = 0; pair < C::kColumns / 2; ++pair)
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      ldmatrix_x4_trans(b, v + (k * 16 + lane % 16) * C::kStride + pair * 16 + lane / 16 * 8);
#pragma unroll
      for (int m = 0; m < C::MT; ++m) {
        mma_k16<T>(w.o[m][2 * pair], p[m][k], b[0], b[1]);
        mma_k16<T>(w.o[m][2 * pair + 1], p[m][k], b[2], b[3]);
      }
    }
  if constexpr (C::kColumns % 2 != 0) {
    ldmatrix_x4_trans(b, v + lane * C::kStride + (C::kColumns - 1) * 8);   // 32 keys, 8 columns
#pragma unroll
    for (int m = 0; m < C::MT; ++m)
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) mma_k16<T>(w.o[m][C::kColumns - 1], p[m][k], b[2 * k], b[2 * k + 1]);
  }
}
}  // namespace attention_detail
}  // namespace ldmfast
