// attention: what both kernels share. attention.cu: 16-bit inputs on tensor cores. attention_simt.cu: everything else.
#pragma once
#include "../launch.cuh"

namespace ldmfast {
namespace attention_detail {

constexpr float kLog2e = 1.4426950408889634f;

struct Params {
  AttentionArgs a;
  int64_t blocks_d;         // output column tiles (attention_simt.cu)
  float factor;             // attention.cu: from the scores to units of log2, 1 where masked_score did that
  float slack;              // attention.cu: kSlack in units of the scores
  bool wide_q, wide_k, wide_v, wide_out;   // 16-byte accesses are aligned
};

// The score of one query and key in units of log2: scale * s + mask. A finite mask stays finite, as float32 would have
// it: a row of finfo.min is a plain average, a row of -inf is empty.
__device__ __forceinline__ float masked_score(const AttentionArgs& a, float s, int64_t mask_row, int64_t key) {
  s *= a.scale * kLog2e;
  if (!a.mask) return s;
  const int64_t at = mask_row + key * a.stride_ms;
  if (a.mask_dtype == DType::kBool) return static_cast<const uint8_t*>(a.mask)[at] ? s : -INFINITY;
  const float m = load_as_float(a.mask, at, a.mask_dtype);
  return m == -INFINITY ? m : max_or_nan(s + m * kLog2e, -3.4028235e38f);   // fmaxf would make a number of a NaN
}

// D > 256, or float32: attention_simt.cu
void start_simt(const AttentionArgs& a, const Launch& where);
}  // namespace attention_detail
}  // namespace ldmfast
