// attention for float32 inputs and for heads wider than 256: flash attention with plain multiply-adds.
//
// A block takes 64 queries and 64 output columns (kColumns); 256 threads, 4 x 4 scores each. Wider heads get one block
// per 64 columns, each of which computes the scores again: right for any width, at D / 64 times the scores' cost. The
// widths that a U-Net runs at every step go through attention.cu.
#include "attention_simt.cuh"

namespace ldmfast {
namespace attention_detail {
namespace {
using namespace simt;

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) attention_simt_kernel(const __grid_constant__ Params p) {
  wait_for_previous_kernel();
  const AttentionArgs& a = p.a;
  float* q = reinterpret_cast<float*>(shared_memory());   // [64, kDepth + kPad]
  float* k = q + kRows * (kDepth + kPad);                 // [64, kDepth + kPad]
  float* v = k + kKeys * (kDepth + kPad);                 // [64, kColumns]
  float* prob = v + kKeys * kColumns;                     // [64, kKeys + kPad]
  const int64_t column = int64_t(blockIdx.x % unsigned(p.blocks_d)) * kColumns;
  const int64_t row = int64_t(blockIdx.x / unsigned(p.blocks_d)) * kRows, n = blockIdx.z, h = blockIdx.y;
  const T* q_head = static_cast<const T*>(a.q) + n * a.stride_qn + h * a.stride_qh;
  const T* k_head = static_cast<const T*>(a.k) + n * a.stride_kn + h * a.stride_kh;
  const T* v_head = static_cast<const T*>(a.v) + n * a.stride_vn + h * a.stride_vh;
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float o[4][4] = {}, top[4], sum[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) top[i] = -INFINITY;

  for (int64_t key = 0; key < a.S; key += kKeys) {
    float s[4][4];
    scores<T>(s, q, k, {q_head, a.stride_ql, a.L}, {k_head, a.stride_ks, a.S}, row, key, a.D);
    load_tile<T, kColumns, kColumns>(v, v_head, a.stride_vs, key, a.S, column, a.D);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t l = row + ty * 4 + i, at = n * a.stride_mn + h * a.stride_mh + l * a.stride_ml;
      float t = top[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t at_key = key + tx + 16 * j;
        s[i][j] = l < a.L && at_key < a.S ? masked_score(a, s[i][j], at, at_key) : -INFINITY;
        t = fmaxf(t, s[i][j]);
      }
      t = row_max(t);
      const float base = t == -INFINITY ? 0.0f : t, shrink = fast_exp2(top[i] - base);
      top[i] = t;
      sum[i] *= shrink;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float e = fast_exp2(s[i][j] - base);
        sum[i] += e;
        o[i][j] *= shrink;
        prob[(ty * 4 + i) * (kKeys + kPad) + tx + 16 * j] = e;
      }
    }
    __syncthreads();
    float tile[4][4] = {};                  // summed by itself: 4096 additions in one row would cost float32 a digit
    for (int e = 0; e < kKeys; e += 4) {
      float x[4][4], y[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_vector(prob + (ty * 4 + i) * (kKeys + kPad) + e, x[i]);
        load_vector(v + (e + i) * kColumns + tx * 4, y[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int f = 0; f < 4; ++f)
#pragma unroll
          for (int j = 0; j < 4; ++j) tile[i][j] += x[i][f] * y[f][j];
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) o[i / 4][i % 4] += tile[i / 4][i % 4];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float total = row_sum(sum[i]), inverse = total > 0.0f ? 1.0f / total : 0.0f;
    const int64_t l = row + ty * 4 + i;
    T* out = static_cast<T*>(a.out) + ((n * a.L + l) * a.H + h) * a.D;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (l < a.L && column + tx * 4 + j < a.D) out[column + tx * 4 + j] = from_float<T>(o[i][j] * inverse);
  }
}
}  // namespace

void start_simt(const AttentionArgs& a, const Launch& where) {
  const Params p = {a, ceil_div(a.D, kColumns), 1.0f, 0.0f, false, false, false, false};
  const Blocks blocks(ceil_div(a.L, kRows) * p.blocks_d, a.H, a.N);
  constexpr size_t kShared =
      sizeof(float) * ((kRows + kKeys) * (kDepth + kPad) + kKeys * kColumns + kRows * (kKeys + kPad));
  with_type(a.dtype, [&](auto zero) {
    launch<attention_simt_kernel<decltype(zero)>>("attention", p, blocks, kThreads, kShared, where);
  });
}
}  // namespace attention_detail
}  // namespace ldmfast
