// The gradient of softmax(scale * q k^T + mask) v with float16 and bfloat16 inputs, on tensor cores (mma.sync).
//
// A block of 4 warps takes 64 rows of one side, 16 a warp, and walks over the other side's in tiles of two stages. The
// kernel over keys has everything transposed, so that the weights, as they come out of one product, are the left operand
// of the next without leaving the registers. As in the forward, D = 40 is not padded. 12 products of L * S * D
// multiply-adds a head where one kernel with atomics would take 10, and the same bits each time.
//
// A prompt's 77 keys are 2 blocks a head: there the queries are split over blocks, whose sums a last launch adds.
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

template <typename C, bool MASKED>
__global__ void __launch_bounds__(kBackwardThreads, C::kBlocks) rows_kernel(const __grid_constant__ BackwardParams p) {
  using T = typename C::T;
  const AttentionArgs& a = p.a;
  const Tiles<C> tiles;
  const Head<C> head(p);
  const int L = static_cast<int>(a.L), S = static_cast<int>(a.S), D = static_cast<int>(a.D);
  const int first = blockIdx.x * C::kOwn, lane = threadIdx.x % 32, row = first + threadIdx.x / 32 * 16;
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
      for (int i = 0; i < C::kStep / 8; ++i) sum[r] += fast_exp2(s[i][2 * r] - base) + fast_exp2(s[i][2 * r + 1] - base);
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
    if (lane % 4 == 0 && l < L) rows[l] = base, rows[L + l] = total > 0.0f ? 1.0f / total : 0.0f;
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
    write_rows<C>(dv, 1.0f, tiles.second, static_cast<T*>(p.dv) + head.keys(p), head.stride_dense, first, S, D, p.wide_out);
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
__global__ void __launch_bounds__(kBackwardThreads, C::kBlocks) queries_kernel(const __grid_constant__ BackwardParams p) {
  using T = typename C::T;
  const AttentionArgs& a = p.a;
  const Tiles<C> tiles;
  const Head<C> head(p);
  const int L = static_cast<int>(a.L), S = static_cast<int>(a.S), D = static_cast<int>(a.D);
  const int first = blockIdx.x * C::kOwn, lane = threadIdx.x % 32, row = first + threadIdx.x / 32 * 16;
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

namespace {
constexpr int kWidest = 160;
constexpr int64_t kFewBlocks = 264;        // two on each of 132 multiprocessors
constexpr int64_t kShare = 512;            // queries a block takes at least

bool on_tensor_cores(DType dtype, int64_t D) { return dtype != DType::kFloat32 && D <= kWidest; }

// how many blocks share a tile of keys' queries, from the shape alone
int splits_of(int64_t N, int64_t L, int64_t S, int64_t H, int64_t D, DType dtype) {
  if (!on_tensor_cores(dtype, D)) return 1;
  const int64_t blocks = ceil_div(S, 64) * H * N, wanted = ceil_div(kFewBlocks, blocks), most = ceil_div(L, kShare);
  return static_cast<int>(wanted < most ? wanted : most);
}

template <typename C, bool MASKED> void start_kernels(BackwardParams p, const Launch& where) {
  const char* op = "attention_backward";
  const AttentionArgs& a = p.a;
  p.factor = MASKED ? 1.0f : a.scale * kLog2e;
  const int64_t queries = ceil_div(a.L, C::kOwn), keys = ceil_div(a.S, C::kOwn);
  launch<rows_kernel<C, MASKED>>(op, p, Blocks(queries, a.H, a.N), kBackwardThreads, C::kShared, where);
  launch<keys_kernel<C, MASKED>>(op, p, Blocks(keys * p.splits, a.H, a.N), kBackwardThreads, C::kShared, where);
  if (p.splits > 1)
    launch<combine_kernel<typename C::T>>(op, p, ceil_div(a.N * a.H * a.S * a.D, kBackwardThreads), kBackwardThreads, 0,
                                          where);
  launch<queries_kernel<C, MASKED>>(op, p, Blocks(queries, a.H, a.N), kBackwardThreads, C::kShared, where);
}
template <typename T, int D> void start(const BackwardParams& p, const Launch& where) {
  if (p.a.mask) start_kernels<BackwardConfig<T, D>, true>(p, where);
  else start_kernels<BackwardConfig<T, D>, false>(p, where);
}

bool wide(const void* p, int64_t D, int64_t a, int64_t b, int64_t c) {
  return aligned(p, 16) && D % 8 == 0 && a % 8 == 0 && b % 8 == 0 && c % 8 == 0;
}

template <typename T> void start_mma(BackwardParams p, const Launch& where) {
  const AttentionArgs& a = p.a;
  p.wide_q = wide(a.q, a.D, a.stride_qn, a.stride_ql, a.stride_qh);
  p.wide_k = wide(a.k, a.D, a.stride_kn, a.stride_ks, a.stride_kh);
  p.wide_v = wide(a.v, a.D, a.stride_vn, a.stride_vs, a.stride_vh);
  p.wide_out = wide(p.dout, a.D, 0, 0, 0) && aligned(p.dq, 16) && aligned(p.dk, 16) && aligned(p.dv, 16);
  if (a.D <= 40) start<T, 40>(p, where);
  else if (a.D <= 64) start<T, 64>(p, where);
  else if (a.D <= 80) start<T, 80>(p, where);
  else if (a.D <= 128) start<T, 128>(p, where);
  else start<T, 160>(p, where);
}

BackwardParams params_of(const AttentionBackwardArgs& b) {
  BackwardParams p{};
  AttentionArgs& a = p.a;
  a.q = b.q, a.k = b.k, a.v = b.v, a.out = const_cast<void*>(b.out), a.mask = b.mask, a.mask_dtype = b.mask_dtype;
  a.stride_qn = b.stride_qn, a.stride_ql = b.stride_ql, a.stride_qh = b.stride_qh;
  a.stride_kn = b.stride_kn, a.stride_ks = b.stride_ks, a.stride_kh = b.stride_kh;
  a.stride_vn = b.stride_vn, a.stride_vs = b.stride_vs, a.stride_vh = b.stride_vh;
  a.stride_mn = b.stride_mn, a.stride_mh = b.stride_mh, a.stride_ml = b.stride_ml, a.stride_ms = b.stride_ms;
  a.N = b.N, a.L = b.L, a.S = b.S, a.H = b.H, a.D = b.D, a.scale = b.scale, a.dtype = b.dtype;
  p.dout = b.dout, p.dq = b.dq, p.dk = b.dk, p.dv = b.dv;
  p.rows = static_cast<float*>(b.workspace);
  p.parts = p.rows + 3 * b.N * b.H * b.L;
  p.splits = splits_of(b.N, b.L, b.S, b.H, b.D, b.dtype);
  p.blocks_d = 1;
  return p;
}
}  // namespace
}  // namespace attention_detail

size_t attention_backward_workspace(const AttentionBackwardArgs& a) {
  const int64_t splits = attention_detail::splits_of(a.N, a.L, a.S, a.H, a.D, a.dtype);
  return size_t(3 * a.N * a.H * a.L + (splits > 1 ? splits * 2 * a.N * a.H * a.S * a.D : 0)) * sizeof(float);
}

void attention_backward(const AttentionBackwardArgs& a, const Launch& where) {
  using namespace attention_detail;
  if (a.N * a.L * a.S * a.H * a.D == 0) return;
  if (a.L > INT32_MAX - 256 || a.S > INT32_MAX - 256 || a.H > kMaxBlocksYZ || a.N > kMaxBlocksYZ)
    throw std::runtime_error("attention_backward: more than 2^31 rows, or 65535 heads or samples");
  const BackwardParams p = params_of(a);
  if (!on_tensor_cores(a.dtype, a.D)) start_backward_simt(p, where);
  else if (a.dtype == DType::kFloat16) start_mma<f16>(p, where);
  else start_mma<bf16>(p, where);
}
}  // namespace ldmfast
