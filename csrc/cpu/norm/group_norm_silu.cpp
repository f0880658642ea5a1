// SiLU(GroupNorm(x + add) * (1 + scale) + shift), contiguous or channels_last. Traffic: x once from memory where a
// group (contiguous) or the tensor (channels_last) stays in cache, y once.
// Source: Wu & He 2018, section 3; Chan, Golub & LeVeque 1983 for merging moments.
//
//   contiguous, x[n][c][p]; tasks: n, group            channels_last, x[n][p][c]; three rounds of tasks
//     for each chunk of the group, which is cached       for n, chunk of pixels, slab of channels:
//       mean and squares of x in two passes                sums[n][chunk][c] = sum, squares about the chunk's mean
//       merge them into the group's                      for n, group:
//     rstd = 1 / sqrt(variance + eps)                      merge its chunks and channels: mean, rstd
//     for each channel c of the group:                     for its channels c: mean[c], a[c], b[c]
//       a, b = rstd, weight, bias, scale, shift in two   for n, block of pixels p:
//       for p: y[p] = silu((x[p] - mean) * a + b)          for c: y[p][c] = silu((x[p][c] - mean[c]) * a[c] + b[c])
#include "group_norm_silu_channels_last.h"
#include "group_norm_silu_contiguous.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

template <class T> void run(const GroupNormSiluArgs& g) {
  if (g.channels_last) return g.silu ? channels_last<T, true>(g) : channels_last<T, false>(g);
  return g.silu ? contiguous<T, true>(g) : contiguous<T, false>(g);
}

}  // namespace

size_t group_norm_silu_workspace(const GroupNormSiluArgs& g) {
  return g.channels_last && g.N * g.C * g.P > 0 ? plan_of(g).bytes : 0;
}

void group_norm_silu(const GroupNormSiluArgs& g) {
  if (g.N * g.C * g.P == 0) return;
  if (g.dtype == DType::kFloat32) return run<float>(g);
  if (g.dtype == DType::kBFloat16) return run<BFloat16>(g);
  return run<Half>(g);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
