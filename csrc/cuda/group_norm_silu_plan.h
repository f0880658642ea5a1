// group_norm_silu: which kernel, how wide an access, how many groups a task and blocks a task. Host code only.
#pragma once
#include "group_norm_silu.cuh"

namespace ldmfast {
namespace group_norm {

struct Plan {
  Params params;
  int vector;        // elements an access
  bool fused;        // one launch
  int64_t blocks;
};

constexpr int64_t kSmallSlab = 24 << 10;     // two launches: several blocks a multiprocessor hide each other's waits
constexpr int64_t kPlainLimit = 64 << 10;    // fused without a cluster: fits the smallest chip's 99 KB with the rest
constexpr int64_t kClusterLimit = 200 << 10;
constexpr int64_t kFewBlocks = 96;           // below this a chip of 100 to 132 multiprocessors is left idle
constexpr int64_t kManyBlocks = 528;

inline bool can_access(const GroupNormSiluArgs& a, int64_t v) {
  const size_t bytes = v * size_of(a.dtype);
  if (!aligned(a.x, bytes) || !aligned(a.y, bytes) || (a.N > 1 && a.stride_xn % v)) return false;
  if (a.channels_last) return a.C % v == 0 && (a.P == 1 || a.stride_xp % v == 0);
  return a.P % v == 0 && (a.C == 1 || a.stride_xc % v == 0);
}

// groups a task: the fewest whose channels fill whole vectors and a 64-byte stretch, so that sectors are not shared
inline int64_t bundle_of(const GroupNormSiluArgs& a, int64_t v) {
  const int64_t gc = a.C / a.groups;
  int64_t best = 0;
  for (int64_t b = 1; b <= a.groups && b * gc <= kThreads * v; ++b) {
    if (a.groups % b || b * gc % v) continue;
    best = b;
    if (b * gc * int64_t(size_of(a.dtype)) >= 64) break;
  }
  return best;
}

inline Plan make_plan(const GroupNormSiluArgs& a, const Device* device) {
  Plan plan{};
  Params& p = plan.params;
  p.a = a;
  const int64_t gc = a.C / a.groups, size = size_of(a.dtype), wide = 16 / size;
  plan.vector = 1;
  for (int64_t v : {wide, int64_t(4)}) {
    const bool narrower = v < wide && !a.channels_last;    // only channels_last compiles the 8-byte access
    if (plan.vector > 1 || narrower || !can_access(a, v)) continue;
    if (a.channels_last && (gc < v || (bundle_of(a, v) == 0 && gc % v))) continue;
    plan.vector = static_cast<int>(v);
  }
  const int64_t v = plan.vector;
  int64_t bundle = a.channels_last ? bundle_of(a, v) : 1, tiles = 1, width = gc;
  if (bundle == 0) {                                       // a group wider than a block: columns in tiles
    bundle = 1;
    width = kThreads * v;
    tiles = ceil_div(gc, width);
  } else if (a.channels_last) {
    width = bundle * gc;
  }
  const int64_t extent = a.channels_last ? a.P : gc * a.P / v;
  const int64_t unit = (a.channels_last ? width : v) * size;   // bytes of one step of the extent
  const int64_t tasks = a.N * (a.groups / bundle) * tiles, bytes = extent * unit;
  if (extent > INT32_MAX || tasks > INT32_MAX / 1024 || gc > INT32_MAX)
    throw std::runtime_error("group_norm_silu: more than 2^31 elements a group or 2^21 groups");
  p.group_channels = static_cast<int>(gc);
  p.bundle = static_cast<int>(bundle);
  p.bundles = static_cast<int>(a.groups / bundle);
  p.tiles = static_cast<int>(tiles);
  p.tile_channels = static_cast<int>(width);
  p.extent = static_cast<int>(extent);
  p.row_vectors = a.channels_last ? 1 : static_cast<int>(a.P / v);
  const auto cut = [&](int64_t slices, int64_t slab_limit) {
    const int64_t slice = ceil_div(extent, slices), fits = slab_limit / unit > 0 ? slab_limit / unit : 1;
    const int64_t slab = fits < slice ? fits : slice, touched = ceil_div(slab * v, a.P) + 1;
    p.slices = static_cast<int>(slices);
    p.slice_extent = static_cast<int>(slice);
    p.slab_extent = static_cast<int>(slab);
    p.slab_bytes = static_cast<int>(round_up<16>(slab * unit));
    p.coefficients = static_cast<int>(a.channels_last ? width : touched < gc ? touched : gc);
    plan.blocks = tasks * slices;
  };
  const auto one_launch = [&](int64_t slices, int64_t limit) {
    if (tiles > 1 || ceil_div(bytes, slices) > limit) return false;
    cut(slices, limit);
    return storage_bytes(p) <= size_t(limit) && p.slab_extent == p.slice_extent;
  };
  // Whole groups in one block. This choice reads nothing of the device, since the workspace is sized by it.
  plan.fused = (tasks >= kFewBlocks || bytes <= kSmallSlab) && one_launch(1, kPlainLimit);
  if (device && device->major >= 9 && !(plan.fused && tasks >= kFewBlocks)) {
    int64_t slices = 1;                                    // 8 blocks are the largest portable cluster
    while (slices < 8 && (tasks * slices < kFewBlocks || bytes > slices * kPlainLimit) && bytes > slices * 4096)
      slices *= 2;
    if (one_launch(slices, device->shared_limit < kClusterLimit ? device->shared_limit : kClusterLimit)) {
      plan.fused = true;
      p.clustered = slices > 1;
      return plan;
    }
  }
  if (plan.fused) {
    one_launch(1, kPlainLimit);
    return plan;
  }
  const int64_t wanted = ceil_div(kManyBlocks, tasks), most = ceil_div(bytes, kSmallSlab);
  cut(wanted < most ? wanted : most, kSmallSlab);
  return plan;
}
}  // namespace group_norm
}  // namespace ldmfast
