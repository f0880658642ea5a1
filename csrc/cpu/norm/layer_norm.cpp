// y = (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension. Traffic: x once, y once.
// Source: Ba, Kiros & Hinton 2016.
#include <omp.h>

#include "layer_norm.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

template <class T> void run(const LayerNormArgs& a) {
  constexpr int64_t kSerial = 16 * 1024;  // elements below which waking threads costs more than it gives
  const int64_t threads = a.M * a.K > kSerial ? omp_get_max_threads() : 1;
  const T *weight = (const T*)a.weight, *bias = (const T*)a.bias;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t m = 0; m < a.M; ++m) {
    const T* x = (const T*)a.x + m * a.stride_x;
    T* y = (T*)a.y + m * a.K;
    float mean, rstd;
    row_statistics(x, a.K, a.eps, mean, rstd);
    int64_t k = 0;
    for (; k + kLanes <= a.K; k += kLanes) {
      VecF v = (load(x + k) - mean) * rstd;
      if (weight) v *= load(weight + k);
      if (bias) v += load(bias + k);
      store(y + k, v);
    }
    if (const int64_t rest = a.K - k) {
      VecF v = (load_first(x + k, rest) - mean) * rstd;
      if (weight) v *= load_first(weight + k, rest);
      if (bias) v += load_first(bias + k, rest);
      store_first(y + k, v, rest);
    }
  }
}

}  // namespace

void layer_norm(const LayerNormArgs& a) {
  if (a.M * a.K == 0) return;
  if (a.dtype == DType::kFloat32) return run<float>(a);
  if (a.dtype == DType::kBFloat16) return run<BFloat16>(a);
  return run<Half>(a);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
