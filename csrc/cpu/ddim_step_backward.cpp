// The gradient of ddim_step with regard to its latents, in one pass. Traffic: every tensor once.
//
//   tasks: for each sample n, each block of kBlock elements     k = the coefficients, those of row n where a table is
//     for i in the block, a vector at a time:
//       de = k.prev_eps * dprev[i]                              what reaches eps, x0 and the model's output m
//       d0 = dx0[i] + k.prev_x0 * dprev[i]
//       d0 = 0 where the forward's clip held x0 (which is computed again for that)
//       dm = k.x0_model * d0 + k.eps_model * de
//       dsample[i] = k.x0_sample * d0 + k.eps_sample * de
//       dmodel_output[i] = dm, or with guidance (1 - guidance) * dm and guidance * dm for its two halves
//       dnoise[i] = k.sigma * dprev[i], if it is wanted
#include "simd.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

using Args = DdimStepBackwardArgs;

constexpr int64_t kBlock = 4096;        // elements of one task
constexpr int64_t kSerial = 64 * 1024;  // elements below which waking threads costs more than it gives

template <class T> LDMFAST_INLINE VecF read(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, n);
}
template <class T> LDMFAST_INLINE void write(T* p, VecF x, int64_t n) {
  if (n >= kLanes) store(p, x);
  else store_first(p, x, n);
}

// 1 where the clamp passed x0 through, 0 where it held it
template <class T> LDMFAST_INLINE VecF passed(const Args& d, const DdimCoefficients& k, int64_t i, int64_t n) {
  VecF m = read((const T*)d.model_output + i, n);
  if (d.guided) m += d.guidance * (read((const T*)d.model_output + d.N * d.M + i, n) - m);
  const VecF x0 = k.x0_sample * read((const T*)d.sample + i, n) + k.x0_model * m;
  return x0 < -d.clip ? VecF{} : x0 > d.clip ? VecF{} : splat(1.0f);
}

template <class T> void block(const Args& d, const DdimCoefficients& k, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = end - i;
    const VecF dprev = read((const T*)d.dprev + i, n), de = k.prev_eps * dprev;
    VecF d0 = read((const T*)d.dx0 + i, n) + k.prev_x0 * dprev;
    if (d.clipped) d0 *= passed<T>(d, k, i, n);
    const VecF dm = k.x0_model * d0 + k.eps_model * de;
    write((T*)d.dsample + i, k.x0_sample * d0 + k.eps_sample * de, n);
    write((T*)d.dmodel_output + i, d.guided ? (1.0f - d.guidance) * dm : dm, n);
    if (d.guided) write((T*)d.dmodel_output + d.N * d.M + i, d.guidance * dm, n);
    if (d.dnoise) write((T*)d.dnoise + i, k.sigma * dprev, n);
  }
}

template <class T> void run(const Args& d) {
  const int64_t blocks = ceil_div(d.M, kBlock);
#pragma omp parallel for schedule(static) if (d.N * d.M > kSerial)
  for (int64_t i = 0; i < d.N * blocks; ++i) {
    const int64_t n = i / blocks, begin = i % blocks * kBlock;
    DdimCoefficients k = d.coefficients;
    if (d.table) {
      const float* row = d.table + n * 7;
      k = {row[0], row[1], row[2], row[3], row[4], row[5], row[6]};
    }
    block<T>(d, k, n * d.M + begin, n * d.M + min64(d.M, begin + kBlock));
  }
}

}  // namespace

void ddim_step_backward(const DdimStepBackwardArgs& d) {
  if (d.N * d.M == 0) return;
  if (d.dtype == DType::kFloat32) return run<float>(d);
  if (d.dtype == DType::kBFloat16) return run<BFloat16>(d);
  return run<Half>(d);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
