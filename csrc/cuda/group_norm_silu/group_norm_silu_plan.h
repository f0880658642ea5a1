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

inline int64_t unless_emulated(int64_t value, [[maybe_unused]] const char* name) {
#ifdef LDMFAST_CUDA_HOST
  if (const char* other = std::getenv(name)) return std::atoll(other);
#endif
  return value;
}
// two launches: several blocks a multiprocessor hide each other's waits
inline int64_t small_slab() { return unless_emulated(24 << 10, "LDMFAST_CUDA_HOST_SLAB"); }
inline int64_t many_blocks() { return unless_emulated(528, "LDMFAST_CUDA_HOST_BLOCKS"); }
constexpr int64_t kPlainLimit = 64 << 10;    // fused without a cluster: fits the smallest chip's 99 KB with the rest
constexpr int64_t kClusterLimit = 200 << 10;
constexpr int64_t kFewBlocks = 96;           // below this a chip of 100 to 132 multiprocessors is left idle
constexpr int64_t kCoefficients = 2048;      // channels a contiguous slab may touch: 24 KB of shared memory

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

// What follows from the tensor alone
struct Shape {
  int64_t vector, group_channels, bundle, tiles, width;   // width: channels of a task's tile
  int64_t extent, unit, bytes, tasks;                     // unit: bytes of one step of the extent; bytes: of a task
};

// elements an access, `widest` at most
inline int64_t vector_of(const GroupNormSiluArgs& a, int64_t widest) {
  const int64_t gc = a.C / a.groups, wide = 16 / int64_t(size_of(a.dtype));
  for (int64_t v : {wide, int64_t(4)}) {
    if (v > widest || !can_access(a, v)) continue;
    if (v < wide && !a.channels_last) continue;   // 8 bytes: compiled for channels_last only
    if (!a.channels_last || (gc >= v && (bundle_of(a, v) > 0 || gc % v == 0))) return v;
  }
  return 1;
}

constexpr int64_t kWidest = 8;   // 16 bytes of 16-bit elements

inline Shape shape_of(const GroupNormSiluArgs& a, int64_t widest = kWidest) {
  Shape s;
  s.vector = vector_of(a, widest);
  s.group_channels = s.width = a.C / a.groups;
  s.bundle = s.tiles = 1;
  if (a.channels_last) {
    s.bundle = bundle_of(a, s.vector);
    s.width = s.bundle * s.group_channels;
    if (s.bundle == 0) {                     // a group wider than a block: columns in tiles
      s.bundle = 1;
      s.width = kThreads * s.vector;
      s.tiles = ceil_div(s.group_channels, s.width);
    }
  }
  s.extent = a.channels_last ? a.P : s.group_channels * a.P / s.vector;
  s.unit = (a.channels_last ? s.width : s.vector) * int64_t(size_of(a.dtype));
  s.bytes = s.extent * s.unit;
  s.tasks = a.N * (a.groups / s.bundle) * s.tiles;
  if (s.extent > INT32_MAX || s.tasks > INT32_MAX / 1024 || s.group_channels > INT32_MAX)
    throw std::runtime_error("group_norm_silu: more than 2^31 elements a group or 2^21 groups");
  return s;
}

inline void cut(Plan& plan, const Shape& s, int64_t slices, int64_t slab_limit) {
  Params& p = plan.params;
  const GroupNormSiluArgs& a = p.a;
  const int64_t slice = ceil_div(s.extent, slices);
  int64_t slab = slab_limit / s.unit;
  if (!a.channels_last && slab > kCoefficients * a.P / s.vector) slab = kCoefficients * a.P / s.vector;
  slab = slab < 1 ? 1 : slab < slice ? slab : slice;
  const int64_t touched = a.channels_last ? s.width : ceil_div(slab * s.vector, a.P) + 1;
  p.slices = Divisor(slices);
  p.slice_extent = static_cast<int>(slice);
  p.slab_extent = static_cast<int>(slab);
  p.slab_bytes = static_cast<int>(round_up<16>(slab * s.unit));
  p.coefficients = static_cast<int>(touched);
  plan.blocks = s.tasks * slices;
}

// cuts for the fused kernel; false where a slice does not fit
inline bool fuse(Plan& plan, const Shape& s, int64_t slices, int64_t limit) {
  if (s.tiles > 1 || ceil_div(s.bytes, slices) > limit) return false;
  cut(plan, s, slices, limit);
  return storage_bytes(plan.params) <= size_t(limit) && plan.params.slab_extent == plan.params.slice_extent;
}

// what both plans begin with
inline Plan plan_of(const GroupNormSiluArgs& a, const Shape& s) {
  Plan plan{};
  plan.vector = static_cast<int>(s.vector);
  plan.params.a = a;
  plan.params.group_channels = Divisor(s.group_channels);
  plan.params.bundle = static_cast<int>(s.bundle);
  plan.params.bundles = Divisor(a.groups / s.bundle);
  plan.params.tiles = Divisor(s.tiles);
  plan.params.tile_channels = static_cast<int>(s.width);
  if (a.channels_last) {
    plan.params.columns[0] = Divisor(s.width / s.vector);
    plan.params.columns[1] = Divisor((s.bundle * s.group_channels - (s.tiles - 1) * s.width) / s.vector);
  }
  plan.params.extent = static_cast<int>(s.extent);
  plan.params.row_vectors = Divisor(a.channels_last ? 1 : a.P / s.vector);
  return plan;
}

inline void split(Plan& plan, const Shape& s, int64_t most_slices = INT32_MAX) {
  plan.fused = false;
  const int64_t wanted = ceil_div(many_blocks(), s.tasks), most = ceil_div(s.bytes, small_slab());
  const int64_t slices = wanted < most ? wanted : most;
  cut(plan, s, slices < most_slices ? slices : most_slices, small_slab());
}

// Two launches in any case, with at most most_parts moments a group (no fewer than its tiles)
inline Plan make_split_plan(const GroupNormSiluArgs& a, int64_t most_parts = INT32_MAX) {
  const Shape s = shape_of(a);
  Plan plan = plan_of(a, s);
  split(plan, s, most_parts / s.tiles);
  return plan;
}

// Without a device: what the workspace must hold for any; a device with clusters needs no more than that.
inline Plan make_plan(const GroupNormSiluArgs& a, const Device* device, int64_t widest = kWidest) {
  const Shape s = shape_of(a, widest);
  Plan plan = plan_of(a, s);
  const bool enough = s.tasks >= kFewBlocks;
  plan.fused = true;
  if (enough && fuse(plan, s, 1, kPlainLimit)) return plan;
  if (device && device->major >= 9) {
    int64_t slices = 1;                      // 8 blocks are the largest portable cluster
    while (slices < 8 && (s.tasks * slices < kFewBlocks || s.bytes > slices * kPlainLimit) && s.bytes > slices * 4096)
      slices *= 2;
    plan.params.clustered = slices > 1;
    if (fuse(plan, s, slices, device->shared_limit < kClusterLimit ? device->shared_limit : kClusterLimit)) return plan;
    plan.params.clustered = false;
  }
  if (s.bytes <= small_slab() && fuse(plan, s, 1, kPlainLimit)) return plan;
  split(plan, s);
  return plan;
}
}  // namespace group_norm
}  // namespace ldmfast
