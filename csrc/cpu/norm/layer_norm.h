// The statistics of LayerNorm, for layer_norm.cpp and for linear's packing.
#pragma once
#include "../simd.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// mean and 1 / deviation of K elements, in two passes; four sums at a time, that they need not wait for each other. The
// second pass has what the first mean is off: of a row of like elements nothing else would be left, times 1 / sqrt(eps).
template <class T> LDMFAST_INLINE void row_statistics(const T* x, int64_t K, float eps, float& mean, float& rstd) {
  constexpr int64_t kStep = 4 * kLanes;
  VecF sums[4] = {}, off[4] = {}, squares[4] = {};
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] += load(x + k + i * kLanes);
  }
  for (; k < K; k += kLanes) sums[0] += load_first(x + k, min64(kLanes, K - k));
  mean = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)K;
  for (k = 0; k + kStep <= K; k += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const VecF d = load(x + k + i * kLanes) - mean;
      off[i] += d;
      squares[i] += d * d;
    }
  }
  for (; k < K; k += kLanes) {
    VecF d = load_first(x + k, min64(kLanes, K - k)) - mean;
    for (int64_t i = K - k; i < kLanes; ++i) d[i] = 0.0f;
    off[0] += d;
    squares[0] += d * d;
  }
  const float by = reduce_add((off[0] + off[1]) + (off[2] + off[3])) / (float)K;
  const float about = reduce_add((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)K;
  const float variance = about - by * by;
  mean += by;
  rstd = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps);  // NaN is not below 0
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
