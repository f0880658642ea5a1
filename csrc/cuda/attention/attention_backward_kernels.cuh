// The kernels of attention's gradient on tensor cores: the queries' statistics, dk and dv by tiles of keys, dq by tiles
// of queries. attention_backward.cu starts them.
#pragma once
#include "attention_backward_mma.cuh"

namespace ldmfast {
namespace attention_detail {

template <typename C> struct Tiles {        // of the two stages
  using T = typename C::T;
  T* first;                                 // [kOwn] rows each
  T* second;
  T* third;                                 // [2, kTile] rows each
  T* fourth;
  float* rows;                              // [2, 3, kTile]
  __device__ __forceinline__ Tiles() {
    first = reinterpret_cast<T*>(shared_memory());
    second = first + C::kOwn * C::kStride;
    third = second + C::kOwn * C::kStride;
    fourth = third + 2 * C::kTile * C::kStride;
    rows = reinterpret_cast<float*>(fourth + 2 * C::kTile * C::kStride);
  }
};

template <typename C> struct Head {         // of this block
  using T = typename C::T;
  int64_t n, h;
  const T *q, *k, *v, *dout;
  int64_t stride_dense;
  __device__ __forceinline__ explicit Head(const BackwardParams& p) : n(blockIdx.z), h(blockIdx.y) {
    const AttentionArgs& a = p.a;
    q = static_cast<const T*>(a.q) + n * a.stride_qn + h * a.stride_qh;
    k = static_cast<const T*>(a.k) + n * a.stride_kn + h * a.stride_kh;
    v = static_cast<const T*>(a.v) + n * a.stride_vn + h * a.stride_vh;
    dout = static_cast<const T*>(p.dout) + queries(p);
    stride_dense = a.H * a.D;
  }
  __device__ __forceinline__ int64_t queries(const BackwardParams& p) const { return (n * p.a.L * p.a.H + h) * p.a.D; }
  __device__ __forceinline__ int64_t keys(const BackwardParams& p) const { return (n * p.a.S * p.a.H + h) * p.a.D; }
  __device__ __forceinline__ int64_t mask(const BackwardParams& p) const {
    return n * p.a.stride_mn + h * p.a.stride_mh;
  }
};

template <typename C, bool MASKED>
__global__ void __launch_bounds__(kBackwardThreads, C::kBlocks) rows_kernel(const __grid_constant__ BackwardParams p) {
  using T = typename C::T;
  const AttentionArgs& a = p.a;
  const Tiles<C> tiles;
  const Head<C> head(p);
  const int L = static_cast<int>(a.L), S = static_cast<int>(a.S), D = static_cast<int>(a.D);
  const int first = blockIdx.x * C::kOwn, lane = threadIdx.x % 32, row = first + threadIdx.x / 32 * 16;
  wait_for_previous_kernel();
  fetch<C, C::kOwn>(tiles.first, head.q, a.stride_ql, first, L, D, p.wide_q);
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};   // of this lane's columns
  Own<C> q;
  walk<C>(0, S, [&](int stage, int key) {
    fetch<C, C::kTile>(tiles.third + stage * C::kTile * C::kStride, head.k, a.stride_ks, key, S, D, p.wide_k);
  }, [&](int stage, int at, int key) {
    if (key == 0) q.keep(tiles.first);
    float s[C::kStep / 8][4];
    product<C>(s, q, plain_address(tiles.third + (stage * C::kTile + at) * C::kStride));
    if constexpr (MASKED) mask_product<C, true>(a, s, head.mask(p), row, key);
    if (key + C::kStep > S) cut_product<C>(s, S - key);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float t = top[r];
#pragma unroll
      for (int i = 0; i < C::kStep / 8; ++i) {
        s[i][2 * r] *= p.factor, s[i][2 * r + 1] *= p.factor;
        t = fmaxf(t, fmaxf(s[i][2 * r], s[i][2 * r + 1]));
      }
      const float base = t == -INFINITY ? 0.0f : t;
      sum[r] *= fast_exp2(top[r] - base);
      top[r] = t;
#pragma unroll
      for (int i = 0; i < C::kStep / 8; ++i)
        sum[r] += fast_exp2(s[i][2 * r] - base) + fast_exp2(s[i][2 * r + 1] - base);
    }
  });
  float* rows = rows_of(p, head.n, head.h);
#pragma unroll
  for (int r = 0; r < 2; ++r) {             // over the 4 lanes of a row
    float t = fmaxf(top[r], shuffle_xor(top[r], 1));
    t = fmaxf(t, shuffle_xor(t, 2));
    const float base = t == -INFINITY ? 0.0f : t;
    float total = sum[r] * fast_exp2(top[r] - base);
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    const int l = row + r * 8 + lane / 4;
    if (lane % 4 == 0 && l < L) rows[l] = base, rows[L + l] = total == 0.0f ? 0.0f : 1.0f / total;
  }
  const T* out = static_cast<const T*>(a.out) + head.queries(p);
  for (int l = row; l < row + 16 && l < L; ++l) {
    float delta = 0.0f;
    for (int d = lane; d < D; d += 32)
      delta += to_float(head.dout[l * head.stride_dense + d]) * to_float(out[l * head.stride_dense + d]);
    delta = warp_sum(delta);
    if (lane == 0) rows[2 * L + l] = delta;
  }
}

// s: the scores, becomes the weights; dp becomes dS. Row r of the warp has (base, inverse, delta) of query r or column
template <typename C, typename F>
__device__ __forceinline__ void weigh(float (&s)[C::kStep / 8][4], float (&dp)[C::kStep / 8][4], float factor, F&& of) {
#pragma unroll
  for (int t = 0; t < C::kStep / 8; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float base, inverse, delta;
      of(t, i, base, inverse, delta);
      s[t][i] = fast_exp2(s[t][i] * factor - base) * inverse;
      dp[t][i] = s[t][i] * (dp[t][i] - delta);
    }
}

template <typename C, bool MASKED>
__global__ void __launch_bounds__(kBackwardThreads, C::kBlocks) keys_kernel(const __grid_constant__ BackwardParams p) {
  using T = typename C::T;
  const AttentionArgs& a = p.a;
  const Tiles<C> tiles;
  const Head<C> head(p);
  const int L = static_cast<int>(a.L), S = static_cast<int>(a.S), D = static_cast<int>(a.D);
  const int split = blockIdx.x % unsigned(p.splits), lane = threadIdx.x % 32;
  const int first = blockIdx.x / unsigned(p.splits) * C::kOwn, row = first + threadIdx.x / 32 * 16;
  // a share of the queries: whole tiles
  const int share = (L + p.splits * C::kTile - 1) / (p.splits * C::kTile) * C::kTile;
  const int from = split * share < L ? split * share : L, to = L - from < share ? L : from + share;
  wait_for_previous_kernel();
  fetch<C, C::kOwn>(tiles.first, head.k, a.stride_ks, first, S, D, p.wide_k);
  fetch<C, C::kOwn>(tiles.second, head.v, a.stride_vs, first, S, D, p.wide_v);
  const float* rows = rows_of(p, head.n, head.h);
  float dk[C::kColumns][4] = {}, dv[C::kColumns][4] = {};
  Own<C> k, v;
  if (from < to) walk<C>(from, to, [&](int stage, int query) {
    const int offset = stage * C::kTile * C::kStride;
    fetch<C, C::kTile>(tiles.third + offset, head.q, a.stride_ql, query, L, D, p.wide_q);
    fetch<C, C::kTile>(tiles.fourth + offset, head.dout, head.stride_dense, query, L, D, p.wide_out);
    for (int i = threadIdx.x; i < 3 * C::kTile; i += kBackwardThreads) {
      const int q = i / C::kTile, l = query + i % C::kTile;
      cp_async<4>(tiles.rows + stage * 3 * C::kTile + i, rows + q * a.L + (l < L ? l : 0), l < L);   // zeros: weight 0
    }
  }, [&](int stage, int at, int query) {
    if (query == from) k.keep(tiles.first), v.keep(tiles.second);
    const SharedAddress q = plain_address(tiles.third + (stage * C::kTile + at) * C::kStride);
    const SharedAddress dout = plain_address(tiles.fourth + (stage * C::kTile + at) * C::kStride);
    float s[C::kStep / 8][4], dp[C::kStep / 8][4];
    product<C>(s, k, q);
    if constexpr (MASKED) mask_product<C, false>(a, s, head.mask(p), row, query);
    product<C>(dp, v, dout);
    const float* mine = tiles.rows + stage * 3 * C::kTile + at + lane % 4 * 2;
    weigh<C>(s, dp, p.factor, [&](int t, int i, float& base, float& inverse, float& delta) {
      const float* of = mine + t * 8 + i % 2;
      base = of[0], inverse = of[C::kTile], delta = of[2 * C::kTile];
    });
    accumulate<C>(dv, s, dout);
    accumulate<C>(dk, dp, q);
  });
  if (p.splits == 1) {
    __syncthreads();
    write_rows<C>(dv, 1.0f, tiles.second, static_cast<T*>(p.dv) + head.keys(p), head.stride_dense, first, S, D,
                  p.wide_out);
    write_rows<C>(dk, a.scale, tiles.first, static_cast<T*>(p.dk) + head.keys(p), head.stride_dense, first, S, D,
                  p.wide_out);
    return;
  }
#pragma unroll
  for (int c = 0; c < C::kColumns; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int s = row + lane / 4 + i / 2 * 8, d = c * 8 + lane % 4 * 2 + i % 2;
      if (s >= S || d >= D) continue;
      const int64_t size = a.N * a.H * a.S * a.D, at = ((head.n * a.H + head.h) * a.S + s) * a.D + d;
      p.parts[split * 2 * size + at] = dk[c][i];
      p.parts[(split * 2 + 1) * size + at] = dv[c][i];
    }
}

// dk and dv from the shares of the queries
template <typename T>
__global__ void __launch_bounds__(kBackwardThreads) combine_kernel(const __grid_constant__ BackwardParams p) {
  wait_for_previous_kernel();
  const AttentionArgs& a = p.a;
  const int64_t size = a.N * a.H * a.S * a.D, i = int64_t(blockIdx.x) * kBackwardThreads + threadIdx.x;
  if (i >= size) return;
  float dk = 0.0f, dv = 0.0f;
  for (int split = 0; split < p.splits; ++split) {
    dk += p.parts[split * 2 * size + i];
    dv += p.parts[(split * 2 + 1) * size + i];
  }
  const int64_t d = i % a.D, s = i / a.D % a.S, h = i / a.D / a.S % a.H, n = i / a.D / a.S / a.H;
  const int64_t to = ((n * a.S + s) * a.H + h) * a.D + d;
  static_cast<T*>(p.dk)[to] = from_float<T>(dk * a.scale);
  static_cast<T*>(p.dv)[to] = from_float<T>(dv);
}

template <typename C, bool MASKED>
__global__ void __launch_bounds__(kBackwardThreads, C::kBlocks)
    queries_kernel(const __grid_constant__ BackwardParams p) {
  using T = typename C::T;
  const AttentionArgs& a = p.a;
  const Tiles<C> tiles;
  const Head<C> head(p);
  const int L = static_cast<int>(a.L), S = static_cast<int>(a.S), D = static_cast<int>(a.D);
  const int first = blockIdx.x * C::kOwn, lane = threadIdx.x % 32, row = first + threadIdx.x / 32 * 16;
  wait_for_previous_kernel();
  fetch<C, C::kOwn>(tiles.first, head.q, a.stride_ql, first, L, D, p.wide_q);
  fetch<C, C::kOwn>(tiles.second, head.dout, head.stride_dense, first, L, D, p.wide_out);
  float of_row[2][3];
  const float* rows = rows_of(p, head.n, head.h);
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int l = row + r * 8 + lane / 4;
      of_row[r][i] = l < L ? rows[i * a.L + l] : 0.0f;
    }
  float dq[C::kColumns][4] = {};
  Own<C> q, dout;
  walk<C>(0, S, [&](int stage, int key) {
    const int offset = stage * C::kTile * C::kStride;
    fetch<C, C::kTile>(tiles.third + offset, head.k, a.stride_ks, key, S, D, p.wide_k);
    fetch<C, C::kTile>(tiles.fourth + offset, head.v, a.stride_vs, key, S, D, p.wide_v);
  }, [&](int stage, int at, int key) {
    if (key == 0) q.keep(tiles.first), dout.keep(tiles.second);
    const SharedAddress k = plain_address(tiles.third + (stage * C::kTile + at) * C::kStride);
    float s[C::kStep / 8][4], dp[C::kStep / 8][4];
    product<C>(s, q, k);
    if constexpr (MASKED) mask_product<C, true>(a, s, head.mask(p), row, key);
    if (key + C::kStep > S) cut_product<C>(s, S - key);
    product<C>(dp, dout, plain_address(tiles.fourth + (stage * C::kTile + at) * C::kStride));
    weigh<C>(s, dp, p.factor, [&](int, int i, float& base, float& inverse, float& delta) {
      base = of_row[i / 2][0], inverse = of_row[i / 2][1], delta = of_row[i / 2][2];
    });
    accumulate<C>(dq, dp, k);
  });
  __syncthreads();
  write_rows<C>(dq, a.scale, tiles.first, static_cast<T*>(p.dq) + head.queries(p), head.stride_dense, first, L, D,
                p.wide_out);
}
}  // namespace attention_detail
}  // namespace ldmfast
