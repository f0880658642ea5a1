// y = SiLU(GroupNorm(x + add) * (1 + scale) + shift)
//
// Fused, one launch: a slice stays in shared memory from its only read to its only write; the blocks of a task form a
// cluster and exchange their moments through distributed shared memory. [2, 320, 64, 64] in 16 bits, channels_last: 16
// bundles of 80 bytes x 4096 pixels, clusters of 8, so 128 blocks of 40 KB, one wave on 132 multiprocessors; 10.5 MB in
// all, 3.5 us at 3 TB/s. Otherwise two launches: moments of each slice to the workspace, then normalise (reads twice).
//
// Left for a GPU to decide: the exchange by st.async to the others' shared memory and an mbarrier in each block. The
// arrive before it is a fence of all memory (MEMBAR.ALL.GPU, CCTL.IVALL). Estimated: 500 of its clocks would go, 0.25
// us of a call's 5.5, 15 us of a step's 61 calls. Each mbarrier must be seen before the first store comes, by one more
// cluster barrier in the shadow of the loads; the emulator would have to bring these stores at the last moment first.
#include "group_norm_silu_block.cuh"
#include "group_norm_silu_plan.h"

namespace ldmfast {
namespace group_norm {

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, 2) fused_kernel(const __grid_constant__ Params p) {
  Storage<T> s(p);
  const Place w = locate(p);
  const Slab<V, CL> slab(p, w, w.begin);
  wait_for_previous_kernel();
  stage(p, w, slab, s);
  load_coefficients(p, w, slab, s);
  reset(w, s);
  cp_async_wait<0>();
  __syncthreads();
  slab_moments(p, w, slab, s);
  if (p.clustered) {
    cluster_arrive();
    cluster_wait();
  }
  finish(p, w, s, p.clustered ? p.slices.value : 1, [&](int g, int r) {
    const float* m = s.moments + 4 * g;
    if (!p.clustered) return s.load(g);
    return Moments{cluster_load(m, r), cluster_load(m + 1, r), cluster_load(m + 2, r), cluster_load(m + 3, r)};
  });
  if (p.clustered) cluster_arrive_relaxed();
  __syncthreads();
  apply<T, V, CL, true>(p, w, slab, s);
  if (p.clustered) cluster_wait();   // the others may still read this block's moments
}

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, 2) apply_kernel(const __grid_constant__ Params p) {
  Storage<T> s(p);
  const Place w = locate(p);
  wait_for_previous_kernel();
  finish(p, w, s, p.tiles.value * p.slices.value, [&](int g, int i) {
    const float* from = moments_of(p, w, g) + i * 4;
    return Moments{from[0], from[1], from[2], from[3]};
  });
  for (int at = w.begin; at < w.end; at += p.slab_extent) {
    const Slab<V, CL> slab(p, w, at);
    __syncthreads();
    load_coefficients(p, w, slab, s);
    __syncthreads();
    apply<T, V, CL, false>(p, w, slab, s);
  }
}
}  // namespace group_norm

namespace {
using group_norm::Params;
using group_norm::Plan;

template <typename T, int V, bool CL> void start(const Plan& plan, const Launch& where) {
  const char* op = "group_norm_silu";
  const Params& p = plan.params;
  const size_t shared = storage_bytes(p);
  if (plan.fused) {
    launch<group_norm::fused_kernel<T, V, CL>>(op, p, plan.blocks, group_norm::kThreads, shared, where,
                                               p.clustered ? p.slices.value : 1);
    return;
  }
  launch<group_norm::statistics_kernel<T, V, CL>>(op, p, plan.blocks, group_norm::kThreads, shared, where);
  launch<group_norm::apply_kernel<T, V, CL>>(op, p, plan.blocks, group_norm::kThreads, shared, where);
}
template <typename T, bool CL> void start(const Plan& plan, const Launch& where) {
  constexpr int kWide = 16 / sizeof(T);
  if (plan.vector == kWide) start<T, kWide, CL>(plan, where);
  else if constexpr (CL && kWide != 4) plan.vector == 4 ? start<T, 4, CL>(plan, where) : start<T, 1, CL>(plan, where);
  else start<T, 1, CL>(plan, where);
}
}  // namespace

// The most that any addresses need: they are not known yet, and decide how wide an access is.
size_t group_norm_silu_workspace(const GroupNormSiluArgs& a) {
  if (a.N * a.C * a.P == 0) return 0;
  int64_t parts = 0;
  for (int64_t widest : {group_norm::kWidest, int64_t(4), int64_t(1)}) {
    const Plan plan = group_norm::make_plan(a, nullptr, widest);
    const int64_t wanted = int64_t(plan.params.tiles.value) * plan.params.slices.value;
    if (!plan.fused && wanted > parts) parts = wanted;
  }
  return a.N * a.groups * parts * 4 * sizeof(float);
}

void group_norm_silu(const GroupNormSiluArgs& a, const Launch& where) {
  if (a.N * a.C * a.P == 0) return;
  const Device device = device_of("group_norm_silu", where);
  const Plan plan = group_norm::make_plan(a, &device);
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.channels_last) start<T, true>(plan, where);
    else start<T, false>(plan, where);
  });
}
}  // namespace ldmfast
