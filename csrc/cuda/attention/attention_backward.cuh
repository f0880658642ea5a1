// attention_backward: what its kernels share. attention_backward.cu: 16-bit inputs on tensor cores, up to a head width
// of 160. attention_backward_simt.cu: everything else.
//
// Three launches, without atomics: 1 each query's largest score, the inverse of its sum, and delta = sum_d dout * out,
// to the workspace; 2 dk and dv, a block a tile of keys; 3 dq, a block a tile of queries. The weights are recomputed as
// exp2(score - largest) / sum rather than from the sum's logarithm, which a mask of finfo.min would swallow.
#pragma once
#include "attention.cuh"

namespace ldmfast {
namespace attention_detail {

struct BackwardParams {
  AttentionArgs a;          // q, k, v, mask; out is what the forward returned
  const void* dout;         // [N, L, H, D], dense
  void* dq;                 // [N, L, H, D], dense
  void* dk;                 // [N, S, H, D], dense
  void* dv;
  float* rows;              // [N, H, 3, L]: the largest score in units of log2, 1 / sum, delta
  float* parts;             // [splits, 2, N, H, S, D]: dk / scale and dv of a share of the queries, or null
  int splits;
  int64_t blocks_d;         // column tiles (attention_backward_simt.cu)
  float factor;             // from the scores to units of log2, 1 where masked_score did that
  bool wide_q, wide_k, wide_v, wide_out;   // 16-byte accesses are aligned; wide_out: of all that is dense
};

__device__ __forceinline__ float* rows_of(const BackwardParams& p, int64_t n, int64_t h) {
  return p.rows + (n * p.a.H + h) * 3 * p.a.L;
}

void start_backward_simt(const BackwardParams& p, const Launch& where);
}  // namespace attention_detail
}  // namespace ldmfast
