// How winograd.h divides its work, and the memory that it needs.
#pragma once
#include "conv2d.h"
#include "winograd_transform.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kSkew = 5 * 16;              // floats between two planes, that they lie in different sets of a cache
constexpr int64_t kStripTiles = 16;            // tiles of a strip
constexpr int64_t kStripGroups = 4;            // groups of channels of a strip
constexpr int64_t kTaskTiles = 256;            // tiles that share one transform of the weight
constexpr int64_t kBlockFloats = 2 << 20;      // of V, if that many tiles need no more: all threads meet between blocks
constexpr int64_t kOwnTiles = 128;             // of a thread's own V, at least
constexpr int64_t kOwnVFloats = 1 << 20;       // of it, if that many tiles need no more
constexpr int64_t kAllOwnFloats = 32 << 20;    // of all threads' own: beyond that they share one
constexpr int64_t kWeightFloats = 100 * 1024;  // of U at one time: it stays in a second-level cache of 1 MiB

template <class F> struct WinogradPlan {
  static constexpr int kPlanes = F::kSide * F::kSide;
  int64_t across, down;          // tiles of an image
  bool own;                      // whether each thread has blocks of its own
  int64_t rows, row_blocks;      // rows of tiles of a block; blocks
  int64_t strips, chunks;        // of a row of tiles; of the channels
  int64_t tiles;                 // of a block
  int64_t words, depth;          // of a tile; in one U
  int64_t range;                 // tiles of a task
  int64_t plane_v, plane_u, plane_m;  // floats from one product to the next
  int64_t floats_v;              // of V
  int64_t threads, scratch;      // floats a thread
  size_t floats;
};

template <class M, class F> WinogradPlan<F> winograd_plan(const Conv2dArgs& a) {
  WinogradPlan<F> p;
  p.across = ceil_div(a.Wo, F::kOut), p.down = ceil_div(a.Ho, F::kOut);
  const int64_t all = a.N * p.down;
  p.words = groups_of<M>(a) * kLanes;
  p.threads = max64(1, omp_get_max_threads());
  const int64_t one = p.kPlanes * p.words, own = max64(kOwnTiles, kOwnVFloats / one);  // floats of a tile; tiles
  const bool many = all >= p.threads && all * p.across >= p.threads * kOwnTiles;
  const int64_t rows = ceil_div(own, p.across) * p.across;  // whole rows of them
  p.own = p.threads > 1 && many && p.threads * rows * one <= kAllOwnFloats;
  const int64_t wanted = p.own ? own : max64(kTaskTiles, kBlockFloats / one);
  p.rows = min64(p.own ? all / p.threads : all, ceil_div(wanted, p.across));
  p.row_blocks = ceil_div(all, p.rows);
  if (p.own) p.row_blocks = min64(all, ceil_div(p.row_blocks, p.threads) * p.threads);  // as many for each
  p.rows = ceil_div(all, p.row_blocks);
  p.strips = ceil_div(p.across, kStripTiles);
  p.tiles = p.rows * p.across;
  const int64_t parts = ceil_div(p.words, kPart);
  const int64_t most = max64(1, kWeightFloats / (p.kPlanes * kTile * kPart));
  p.depth = ceil_div(parts, ceil_div(parts, most)) * kPart;
  const int64_t panels = ceil_div(p.tiles, M::kRows), columns = ceil_div(a.Co, kTile);
  const int64_t few = ceil_div(panels, ceil_div(kTaskTiles, M::kRows));
  const int64_t even = p.own ? 1 : min64(panels / 4, ceil_div(4 * p.threads, columns) - 1);  // of 4 panels or more
  const int64_t ranges = max64(few, even);
  p.range = ceil_div(panels, ranges) * M::kRows;
  p.plane_v = panels * p.depth * M::kRows + kSkew;
  p.plane_u = p.depth * kTile + kSkew;
  p.plane_m = p.range * kTile + kSkew;
  p.floats_v = ceil_div(ceil_div(p.words, p.depth) * p.kPlanes * p.plane_v, 16) * 16;  // whole lines, as of scratch
  p.chunks = p.own ? 1 : max64(1, min64(p.words / kLanes / kStripGroups, 4 * p.threads / (p.rows * p.strips)));
  const int64_t strip = F::kIn * ((kStripTiles - 1) * F::kStep + F::kIn) * kStripGroups * kLanes * M::kPack;
  const int64_t block = kLanes * M::kPack * 9 * kLanes;
  p.scratch = ceil_div(max64(strip, p.kPlanes * (p.plane_u + p.plane_m) + block), 16) * 16;
  p.floats = (size_t)(p.own ? p.threads * (p.floats_v + p.scratch) : p.floats_v + p.threads * p.scratch) + 16;
  return p;
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
