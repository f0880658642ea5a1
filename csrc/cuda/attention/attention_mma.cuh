// One warp's share of flash attention: scores, softmax and the product with the values, all in registers.
#pragma once
#include "attention.cuh"
#include "../mma.cuh"

namespace ldmfast {
namespace attention_detail {

constexpr int kThreads = 128;
constexpr int kStep = 32;                 // keys between two updates of the running maximum
constexpr float kSlack = 8.0f;            // log2: how far scores may pass the maximum before it moves
constexpr float kLowest = -3.4028235e38f; // where the maximum starts: finite, so that no difference is inf - inf

template <typename T_, int D_, int MT_, int KEYS_> struct Config {
  using T = T_;
  static constexpr int D = D_, MT = MT_, KEYS = KEYS_;
  static_assert(MT == 1 || MT == 2);
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
    constexpr int kPass = kThreads / C::kColumns, kPasses = (ROWS + kPass - 1) / kPass;
    const unsigned thread = fresh_thread_index();
    const int first = thread / C::kColumns, c = thread % C::kColumns * 8;
    const T* source = head + (from + first) * stride + c;
    if (first >= kPass) return;
    if (from + ROWS <= rows && D == C::D) {   // a whole tile: unrolled, and no row is asked about but the last pass's
      to += first * C::kStride + c;
#pragma unroll
      for (int i = 0; i < kPasses; ++i, to += kPass * C::kStride, source += kPass * stride)
        if (i + 1 < kPasses || first < ROWS - i * kPass) cp_async<16>(to, source);
      return;
    }
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
  float ceiling[C::MT][2];                // rows g and g + 8: the reference maximum + kSlack, in units of the scores
  float sum[4];                           // of the probabilities: row g of tile m at m, row g + 8 at m + 2
  uint32_t q[C::MT][C::kKeepQ ? C::kSteps16 + C::kTail : 1][4];
};

// Where this lane's rows lie for ldmatrix. The two registers of a B fragment must come side by side, so k's 8 x 8
// matrices are taken along its columns first and v's along its keys first. Computed at each use: five instructions,
// where a register more would be spilled.
template <typename C> __device__ __forceinline__ int k_offset() {   // bytes; 16 keys x 16 columns
  const int lane = fresh_thread_index() % 32;
  return ((lane / 16 * 8 + lane % 8) * C::kStride + lane / 8 % 2 * 8) * 2;
}
template <typename C> __device__ __forceinline__ int v_offset() {   // the lower 16 lanes: 16 keys x 8 columns, too
  const int lane = fresh_thread_index() % 32;
  return (lane % 16 * C::kStride + lane / 16 * 8) * 2;
}

// A fragment: 16 queries, k-step s; the 8 columns left over fill two registers
template <typename C> __device__ __forceinline__ void load_q(uint32_t (&r)[4], SharedAddress q, int m, int s) {
  ldmatrix_x4(r, q + (m * 16 * C::kStride + s * 16) * 2);
}

// s [MT, 4 tiles of 8 keys] = q k^T
template <typename C>
__device__ __forceinline__ void scores(Warp<C>& w, float (&s)[C::MT][kStep / 8][4], SharedAddress q,
                                       SharedAddress k) {
  using T = typename C::T;
#pragma unroll
  for (int m = 0; m < C::MT; ++m)
#pragma unroll
    for (int t = 0; t < kStep / 8; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][t][i] = 0.0f;
  const SharedAddress square = k + k_offset<C>(), narrow = k + v_offset<C>();
#pragma unroll
  for (int step = 0; step < C::kSteps16 + C::kTail; ++step) {
    const int kept = C::kKeepQ ? step : 0;
    if constexpr (!C::kKeepQ) {
#pragma unroll
      for (int m = 0; m < C::MT; ++m) load_q<C>(w.q[m][0], q, m, step);
    }
#pragma unroll
    for (int pair = 0; pair < kStep / 16; ++pair) {
      const int at = (pair * 16 * C::kStride + step * 16) * 2;
      if (step < C::kSteps16) {
        uint32_t b[4];
        ldmatrix_x4(b, square + at);
#pragma unroll
        for (int m = 0; m < C::MT; ++m) {
          mma_k16<T>(s[m][2 * pair], w.q[m][kept], b[0], b[1]);
          mma_k16<T>(s[m][2 * pair + 1], w.q[m][kept], b[2], b[3]);
        }
      } else {
        uint32_t b[2];
        ldmatrix_x2(b, narrow + at);
#pragma unroll
        for (int m = 0; m < C::MT; ++m) {
          mma_k8<T>(s[m][2 * pair], w.q[m][kept], b[0]);
          mma_k8<T>(s[m][2 * pair + 1], w.q[m][kept], b[1]);
        }
      }
    }
  }
}

// Moves the reference maximum of every row to its largest score yet, and the sums and outputs with it
template <typename C>
__device__ __forceinline__ void raise(Warp<C>& w, const float (&local)[C::MT][2], const Params& p) {
#pragma unroll
  for (int m = 0; m < C::MT; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(local[m][r], shuffle_xor(local[m][r], 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      const float ceiling = fmaxf(top + p.slack, w.ceiling[m][r]);
      const float shrink = fast_exp2((w.ceiling[m][r] - ceiling) * p.factor);
      w.ceiling[m][r] = ceiling;
      w.sum[2 * r + m] *= shrink;
#pragma unroll
      for (int c = 0; c < C::kColumns; ++c) {
        w.o[m][c][2 * r] *= shrink;
        w.o[m][c][2 * r + 1] *= shrink;
      }
    }
}

// s becomes exp2(factor * (s - maximum)). The maximum moves only when a score passes it by kSlack, so that the usual
// step costs one vote: no shuffles, no rescaled output.
template <typename C>
__device__ __forceinline__ void softmax(Warp<C>& w, float (&s)[C::MT][kStep / 8][4], const Params& p) {
  float local[C::MT][2];
  bool passed = false;
#pragma unroll
  for (int m = 0; m < C::MT; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float t = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
      for (int i = 1; i < kStep / 8; ++i) t = fmaxf(t, fmaxf(s[m][i][2 * r], s[m][i][2 * r + 1]));
      local[m][r] = t;
      passed = passed || t > w.ceiling[m][r];
    }
  if (warp_any(passed)) raise<C>(w, local, p);
#pragma unroll
  for (int m = 0; m < C::MT; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float base = w.ceiling[m][r] * p.factor - kSlack;
#pragma unroll
      for (int t = 0; t < kStep / 8; ++t)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) s[m][t][i] = fast_exp2(s[m][t][i] * p.factor - base);
    }
}

// o += p v, and sum += p 1: as one more column of v, of ones, which the tensor cores add where it would be 16
// additions a tile, of probabilities as they are rounded for the product. One product's 8 columns of sums have room
// for two tiles: the even columns are of the first, the odd ones of the second.
template <typename C>
__device__ __forceinline__ void values(Warp<C>& w, const float (&s)[C::MT][kStep / 8][4],
                                       SharedAddress v) {
  using T = typename C::T;
  uint32_t p[C::MT][kStep / 16][4];
#pragma unroll
  for (int m = 0; m < C::MT; ++m)
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &s[m][2 * k + i / 2][i % 2 * 2];
        p[m][k][i] = pack2<T>(pair[0], pair[1]);
      }
  const uint32_t even = threadIdx.x / 4 % 2 == 0 ? pack2<T>(1.0f, 1.0f) : 0;   // this lane's column of the ones
#pragma unroll
  for (int m = 0; m < C::MT; ++m)
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      const uint32_t ones = m == 0 ? even : even ^ pack2<T>(1.0f, 1.0f);
      mma_k16<T>(w.sum, p[m][k], ones, ones);
    }
  const SharedAddress square = v + v_offset<C>();
  uint32_t b[4];
#pragma unroll
  for (int pair = 0; pair < C::kColumns / 2; ++pair)
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      ldmatrix_x4_trans(b, square + (k * 16 * C::kStride + pair * 16) * 2);
#pragma unroll
      for (int m = 0; m < C::MT; ++m) {
        mma_k16<T>(w.o[m][2 * pair], p[m][k], b[0], b[1]);
        mma_k16<T>(w.o[m][2 * pair + 1], p[m][k], b[2], b[3]);
      }
    }
  if constexpr (C::kColumns % 2 != 0) {
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      uint32_t tail[2];
      ldmatrix_x2_trans(tail, square + (k * 16 * C::kStride + (C::kColumns - 1) * 8) * 2);
#pragma unroll
      for (int m = 0; m < C::MT; ++m) mma_k16<T>(w.o[m][C::kColumns - 1], p[m][k], tail[0], tail[1]);
    }
  }
}
}  // namespace attention_detail
}  // namespace ldmfast
