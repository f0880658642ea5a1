// The gradient of SiLU(GroupNorm(x + add) * (1 + scale) + shift), contiguous or channels_last.
// Traffic: x and dy once, dx once, where a group (contiguous) or the tensors (channels_last) stay in cache. No sum
// depends on the number of threads.
// Source: Wu & He 2018, section 3, differentiated; Chan, Golub & LeVeque 1983 for merging moments.
//
//   with m = x - mean and z = m * slope + offset as in the forward; each line that sums is a pass over the pixels
//     for its channels c:  mean and squares of x[c] over the pixels
//     for its groups:      mean, rstd; slope, offset of its channels from weight, bias, scale, shift   finish_moments()
//     for its channels c:  g = dy * act'(z);  sum of g, sum of g * m
//     for its groups:      constant, linear from the sums; sums of g, of g * xhat, of dx               finish_sums()
//     for its channels c:  dx = g * slope - constant - m * linear
//
//   contiguous: a task is a group; a channel is a row, the lanes are its pixels
//   channels_last: each pass goes chunk of pixels by chunk, which are its tasks; the lanes are channels
#include "group_norm_silu_backward_channels_last.h"
#include "group_norm_silu_backward_contiguous.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

template <class T, bool kSilu> void run(const Args& a) {
  const Plan plan = plan_of(a);
  return a.channels_last ? channels_last<T, kSilu>(a, plan) : contiguous<T, kSilu>(a, plan);
}

template <class T> void run(const Args& a) { return a.silu ? run<T, true>(a) : run<T, false>(a); }

}  // namespace

size_t group_norm_silu_backward_workspace(const GroupNormSiluBackwardArgs& a) {
  return a.N * a.C * a.P == 0 ? 0 : plan_of(a).bytes;
}

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& a) {
  if (a.N * a.C * a.P == 0) return;
  if (a.dtype == DType::kFloat32) return run<float>(a);
  if (a.dtype == DType::kBFloat16) return run<BFloat16>(a);
  return run<Half>(a);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
