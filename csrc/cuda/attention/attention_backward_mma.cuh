// One warp's share of the gradient: 16 rows (queries, or keys) against STEP rows of the other side, in registers; the
// copies of tiles to shared memory, and the walk over them.
#pragma once
#include "attention_backward.cuh"
#include "../mma.cuh"

namespace ldmfast {
namespace attention_detail {

constexpr int kBackwardThreads = 128;

template <typename T_, int D_> struct BackwardConfig {
  using T = T_;
  static constexpr int D = D_;
  static constexpr int kOwn = 64;                         // rows of a block, 16 a warp
  static constexpr int kStep = D <= 80 ? 32 : 16;         // rows of the other side between two products
  static constexpr int kTile = D <= 80 ? 64 : 32;         // and in shared memory, in each of two stages
  static constexpr int kColumns = D / 8;
  static constexpr int kStride = (kColumns | 1) * 8;      // an odd number of 16-byte units: no bank conflict
  static constexpr int kSteps16 = D / 16;
  static constexpr bool kTail = D % 16 != 0;
  static constexpr bool kKeep = D <= 40;                  // the warp's rows stay in registers, or are read again
  static constexpr int kBlocks = D <= 40 ? 3 : 2;         // a multiprocessor
  static constexpr size_t kShared = (2 * kOwn + 4 * kTile) * kStride * sizeof(T) + 2 * 3 * kTile * sizeof(float);
};

// rows [from, from + ROWS) of a [rows, D] head to shared memory; zeros outside
template <typename C, int ROWS>
__device__ __forceinline__ void fetch(typename C::T* to, const typename C::T* head, int64_t stride, int from, int rows,
                                      int D, bool wide) {
  using T = typename C::T;
  if (wide) {
    constexpr int kPass = kBackwardThreads / C::kColumns;
    const unsigned thread = fresh_thread_index();
    const int first = thread / C::kColumns, c = thread % C::kColumns * 8;
    if (first >= kPass) return;
#pragma unroll 1
    for (int r = first; r < ROWS; r += kPass) {
      const bool valid = from + r < rows && c < D;
      cp_async<16>(to + r * C::kStride + c, valid ? head + (from + r) * stride + c : head, valid);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * C::D; i += kBackwardThreads) {
      const int r = i / C::D, c = i % C::D;
      const bool valid = from + r < rows && c < D;
      to[r * C::kStride + c] = valid ? head[(from + r) * stride + c] : from_float<T>(0.0f);
    }
  }
}

// Walks over [from, to) of the other side in steps: fetch(stage, row) starts the copies of the tile from `row` on, and
// step(stage, row in the tile, row) uses a step of it.
template <typename C, typename Fetch, typename Step>
__device__ __forceinline__ void walk(int from, int to, Fetch&& fetch_tile, Step&& step) {
  fetch_tile(0, from);
  cp_async_commit();
  int stage = 0;
  for (int row = from; row < to; row += C::kTile, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();                        // this tile is there, and the other stage is no longer read
    if (row + C::kTile < to) fetch_tile(stage ^ 1, row + C::kTile);
    cp_async_commit();
    for (int at = 0; at < C::kTile && row + at < to; at += C::kStep) step(stage, at, row + at);
  }
}

// The warp's 16 rows as A fragments; the 8 columns that 16 do not divide fill two registers
template <typename C> struct Own {
  static constexpr int kSteps = C::kSteps16 + C::kTail;
  uint32_t kept[C::kKeep ? kSteps : 1][4];
  SharedAddress at;
  __device__ __forceinline__ void keep(const typename C::T* tile) {
    const int lane = threadIdx.x % 32;
    at = plain_address(tile + (threadIdx.x / 32 * 16 + lane % 16) * C::kStride + lane / 16 * 8);
    if constexpr (C::kKeep) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) ldmatrix_x4(kept[s], at + s * 32);
    }
  }
  __device__ __forceinline__ const uint32_t* step(int s) {
    if constexpr (C::kKeep) return kept[s];
    ldmatrix_x4(kept[0], at + s * 32);
    return kept[0];
  }
};

// s [16, kStep] = own other^T
template <typename C>
__device__ __forceinline__ void product(float (&s)[C::kStep / 8][4], Own<C>& own, SharedAddress other) {
  using T = typename C::T;
#pragma unroll
  for (int t = 0; t < C::kStep / 8; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[t][i] = 0.0f;
  const int lane = fresh_thread_index() % 32;
  const SharedAddress square = other + ((lane / 16 * 8 + lane % 8) * C::kStride + lane / 8 % 2 * 8) * 2;
#pragma unroll
  for (int step = 0; step < C::kSteps16; ++step) {
    const uint32_t* a = own.step(step);
#pragma unroll
    for (int pair = 0; pair < C::kStep / 16; ++pair) {
      uint32_t b[4];
      ldmatrix_x4(b, square + (pair * 16 * C::kStride + step * 16) * 2);
      mma_k16<T>(s[2 * pair], a, b[0], b[1]);
      mma_k16<T>(s[2 * pair + 1], a, b[2], b[3]);
    }
  }
  if constexpr (C::kTail) {
    const uint32_t* a = own.step(C::kSteps16);
    const SharedAddress narrow = other + (lane % 16 * C::kStride + C::kSteps16 * 16) * 2;
#pragma unroll
    for (int pair = 0; pair < C::kStep / 16; ++pair) {
      uint32_t b[2];
      ldmatrix_x2(b, narrow + pair * 16 * C::kStride * 2);
      mma_k8<T>(s[2 * pair], a, b[0]);
      mma_k8<T>(s[2 * pair + 1], a, b[1]);
    }
  }
}

// sum [16, D] += s other
template <typename C>
__device__ __forceinline__ void accumulate(float (&sum)[C::kColumns][4], const float (&s)[C::kStep / 8][4],
                                           SharedAddress other) {
  using T = typename C::T;
  const int lane = fresh_thread_index() % 32;
  const SharedAddress square = other + (lane % 16 * C::kStride + lane / 16 * 8) * 2;
#pragma unroll
  for (int k = 0; k < C::kStep / 16; ++k) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pack2<T>(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int pair = 0; pair < C::kColumns / 2; ++pair) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, square + (k * 16 * C::kStride + pair * 16) * 2);
      mma_k16<T>(sum[2 * pair], a, b[0], b[1]);
      mma_k16<T>(sum[2 * pair + 1], a, b[2], b[3]);
    }
    if constexpr (C::kColumns % 2 != 0) {
      uint32_t b[2];
      ldmatrix_x2_trans(b, square + (k * 16 * C::kStride + (C::kColumns - 1) * 8) * 2);
      mma_k16<T>(sum[C::kColumns - 1], a, b[0], b[1]);
    }
  }
}

// The scores in units of log2 for rows `own` and columns `other` on; QUERIES: the warp's rows are queries
template <typename C, bool QUERIES>
__device__ __forceinline__ void mask_product(const AttentionArgs& a, float (&s)[C::kStep / 8][4], int64_t mask_head,
                                             int own, int other) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < C::kStep / 8; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = own + lane / 4 + i / 2 * 8, column = other + t * 8 + lane % 4 * 2 + i % 2;
      const int l = QUERIES ? row : column, k = QUERIES ? column : row;
      if (l < a.L && k < a.S) s[t][i] = masked_score(a, s[t][i], mask_head + l * a.stride_ml, k);
    }
}

// -inf for the keys behind the last, in the columns
template <typename C> __device__ __forceinline__ void cut_product(float (&s)[C::kStep / 8][4], int left) {
#pragma unroll
  for (int t = 0; t < C::kStep / 8; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      s[t][i] = int(t * 8 + threadIdx.x % 4 * 2 + i % 2) >= left ? -INFINITY : s[t][i];
}

// sum * factor to rows [first, ...) of a dense [rows, H, D] tensor, through the warp's own rows of shared memory, which
// nobody reads any more
template <typename C>
__device__ __forceinline__ void write_rows(const float (&sum)[C::kColumns][4], float factor, typename C::T* tile,
                                           typename C::T* out, int64_t stride, int first, int rows, int D, bool wide) {
  using T = typename C::T;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 * 16;
  tile += warp * C::kStride;
  first += warp;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int c = 0; c < C::kColumns; ++c)
      *reinterpret_cast<uint32_t*>(tile + (r * 8 + lane / 4) * C::kStride + c * 8 + lane % 4 * 2) =
          pack2<T>(sum[c][2 * r] * factor, sum[c][2 * r + 1] * factor);
  __syncwarp();
  for (int i = lane; i < 16 * C::kColumns; i += 32) {
    const int r = i / C::kColumns, c = i % C::kColumns * 8;
    if (first + r >= rows) continue;
    const T* from = tile + r * C::kStride + c;
    T* to = out + (first + r) * stride + c;
    if (wide) {
      uint32_t words[4];
      load_words(from, words);
      if (c < D) store_words(to, words);
    } else {
      for (int j = 0; j < 8 && c + j < D; ++j) to[j] = from[j];
    }
  }
}
}  // namespace attention_detail
}  // namespace ldmfast
