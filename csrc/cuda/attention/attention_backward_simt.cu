// The gradient of attention for float32 inputs and for heads wider than 160, with plain multiply-adds.
//
// As attention_simt.cu: a block takes 64 rows of one side and 64 columns of the width, and walks over tiles of 64 rows
// of the other side; wider heads get one block per 64 columns, each of which computes the weights again.
#include "attention_backward.cuh"
#include "attention_simt.cuh"

namespace ldmfast {
namespace attention_detail {
namespace {
using namespace simt;

constexpr int kWeights = kKeys + kPad;     // a row of weights in shared memory

// The sides of this block's head, and its tiles in shared memory
template <typename T> struct Work {
  int64_t n, h, column, row;               // first column and first row
  Side<T> q, k, v, dout;
  const float* rows;
  float *x, *y;                            // [64, kDepth + kPad], for the scores
  float* other;                            // [64, kColumns]: rows of the other side
  float* weights;                          // [64, kWeights]
  __device__ __forceinline__ explicit Work(const BackwardParams& p) {
    const AttentionArgs& a = p.a;
    n = blockIdx.z, h = blockIdx.y;
    column = int64_t(blockIdx.x % unsigned(p.blocks_d)) * kColumns;
    row = int64_t(blockIdx.x / unsigned(p.blocks_d)) * kRows;
    q = {static_cast<const T*>(a.q) + n * a.stride_qn + h * a.stride_qh, a.stride_ql, a.L};
    k = {static_cast<const T*>(a.k) + n * a.stride_kn + h * a.stride_kh, a.stride_ks, a.S};
    v = {static_cast<const T*>(a.v) + n * a.stride_vn + h * a.stride_vh, a.stride_vs, a.S};
    dout = {static_cast<const T*>(p.dout) + (n * a.L * a.H + h) * a.D, a.H * a.D, a.L};
    rows = rows_of(p, n, h);
    x = reinterpret_cast<float*>(shared_memory());
    y = x + kRows * (kDepth + kPad);
    other = y + kKeys * (kDepth + kPad);
    weights = other + kKeys * kColumns;
  }
  __device__ __forceinline__ float score(const AttentionArgs& a, float s, int64_t l, int64_t key) const {
    return l < a.L && key < a.S ? masked_score(a, s, n * a.stride_mn + h * a.stride_mh + l * a.stride_ml, key)
                                : -INFINITY;
  }
  __device__ __forceinline__ float weight(const AttentionArgs& a, float s, int64_t l, int64_t key) const {
    const float masked = score(a, s, l, key);
    return masked == -INFINITY ? 0.0f : fast_exp2(masked - rows[l]) * rows[a.L + l];
  }
};
constexpr size_t kShared = sizeof(float) * ((kRows + kKeys) * (kDepth + kPad) + kKeys * kColumns + kRows * kWeights);

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) rows_simt_kernel(const __grid_constant__ BackwardParams p) {
  wait_for_previous_kernel();
  const AttentionArgs& a = p.a;
  const Work<T> w(p);
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float top[4], sum[4] = {};
  for (int i = 0; i < 4; ++i) top[i] = -INFINITY;
  for (int64_t key = 0; key < a.S; key += kKeys) {
    float s[4][4];
    scores<T>(s, w.x, w.y, w.q, w.k, w.row, key, a.D);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float t = top[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[i][j] = w.score(a, s[i][j], w.row + ty * 4 + i, key + tx + 16 * j);
        t = fmaxf(t, s[i][j]);
      }
      t = row_max(t);
      const float base = t == -INFINITY ? 0.0f : t;
      sum[i] *= fast_exp2(top[i] - base);
      top[i] = t;
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i] += fast_exp2(s[i][j] - base);
    }
  }
  float* rows = rows_of(p, w.n, w.h);
  const T* out = static_cast<const T*>(a.out) + (w.n * a.L * a.H + w.h) * a.D;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t l = w.row + ty * 4 + i;
    const float total = row_sum(sum[i]);
    float delta = 0.0f;
    for (int64_t d = tx; d < a.D && l < a.L; d += 16)
      delta += to_float(w.dout.head[l * w.dout.stride + d]) * to_float(out[l * w.dout.stride + d]);
    delta = row_sum(delta);
    if (tx == 0 && l < a.L) {
      rows[l] = top[i] == -INFINITY ? 0.0f : top[i];
      rows[a.L + l] = total == 0.0f ? 0.0f : 1.0f / total;
      rows[2 * a.L + l] = delta;
    }
  }
}

// sum[i][j] of row ty * 4 + i and column tx * 4 + j  +=  weights other
template <typename T>
__device__ __forceinline__ void add_product(const Work<T>& w, float (&sum)[4][4], const float (&weights)[4][4],
                                            const Side<T>& side, int64_t from, int64_t D) {
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  __syncthreads();                         // the last product is done with both tiles
  load_tile<T, kColumns, kColumns>(w.other, side.head, side.stride, from, side.rows, w.column, D);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) w.weights[(ty * 4 + i) * kWeights + tx + 16 * j] = weights[i][j];
  __syncthreads();
  float tile[4][4] = {};                   // summed by itself, as in the forward
  for (int e = 0; e < kKeys; e += 4) {
    float x[4][4], y[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_vector(w.weights + (ty * 4 + i) * kWeights + e, x[i]);
      load_vector(w.other + (e + i) * kColumns + tx * 4, y[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int f = 0; f < 4; ++f)
#pragma unroll
        for (int j = 0; j < 4; ++j) tile[i][j] += x[i][f] * y[f][j];
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] += tile[i / 4][i % 4];
}

// sum * factor to this block's rows and columns of a dense [N, rows, H, D]
template <typename T>
__device__ __forceinline__ void write(const Work<T>& w, const AttentionArgs& a, const float (&sum)[4][4], float factor,
                                      void* to, int64_t rows) {
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t r = w.row + ty * 4 + i, c = w.column + tx * 4 + j;
      if (r < rows && c < a.D)
        static_cast<T*>(to)[((w.n * rows + r) * a.H + w.h) * a.D + c] = from_float<T>(sum[i][j] * factor);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) keys_simt_kernel(const __grid_constant__ BackwardParams p) {
  wait_for_previous_kernel();
  const AttentionArgs& a = p.a;
  const Work<T> w(p);
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float dk[4][4] = {}, dv[4][4] = {};
  for (int64_t query = 0; query < a.L; query += kRows) {
    float s[4][4], dp[4][4];
    scores<T>(s, w.x, w.y, w.k, w.q, w.row, query, a.D);
    scores<T>(dp, w.x, w.y, w.v, w.dout, w.row, query, a.D);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t l = query + tx + 16 * j;
        s[i][j] = w.weight(a, s[i][j], l, w.row + ty * 4 + i);
        dp[i][j] = l < a.L ? s[i][j] * (dp[i][j] - w.rows[2 * a.L + l]) : 0.0f;
      }
    add_product(w, dv, s, w.dout, query, a.D);
    add_product(w, dk, dp, w.q, query, a.D);
  }
  write(w, a, dk, a.scale, p.dk, a.S);
  write(w, a, dv, 1.0f, p.dv, a.S);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) queries_simt_kernel(const __grid_constant__ BackwardParams p) {
  wait_for_previous_kernel();
  const AttentionArgs& a = p.a;
  const Work<T> w(p);
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float dq[4][4] = {};
  for (int64_t key = 0; key < a.S; key += kKeys) {
    float s[4][4], dp[4][4];
    scores<T>(s, w.x, w.y, w.q, w.k, w.row, key, a.D);
    scores<T>(dp, w.x, w.y, w.dout, w.v, w.row, key, a.D);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t l = w.row + ty * 4 + i;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[i][j] = w.weight(a, s[i][j], l, key + tx + 16 * j);
        dp[i][j] = l < a.L ? s[i][j] * (dp[i][j] - w.rows[2 * a.L + l]) : 0.0f;
      }
    }
    add_product(w, dq, dp, w.k, key, a.D);
  }
  write(w, a, dq, a.scale, p.dq, a.L);
}
}  // namespace

void start_backward_simt(const BackwardParams& all, const Launch& where) {
  const char* op = "attention_backward";
  BackwardParams p = all;
  const AttentionArgs& a = p.a;
  const int64_t queries = ceil_div(a.L, kRows), keys = ceil_div(a.S, kRows), columns = ceil_div(a.D, kColumns);
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch<rows_simt_kernel<T>>(op, p, Blocks(queries, a.H, a.N), kThreads, kShared, where);
    p.blocks_d = columns;
    launch<keys_simt_kernel<T>>(op, p, Blocks(keys * columns, a.H, a.N), kThreads, kShared, where);
    launch<queries_simt_kernel<T>>(op, p, Blocks(queries * columns, a.H, a.N), kThreads, kShared, where);
  });
}
}  // namespace attention_detail
}  // namespace ldmfast
