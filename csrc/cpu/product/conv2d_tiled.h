// A 3x3 convolution by tiles (AMX): each tap is a product of a padded copy's pixels, read where they lie.
//
//   for each region of the output:                                    # images, rows of an image, or parts of rows
//     copy[images, rows, width, words] = the input beneath it, its norm applied, zero around the picture
//     for each task, a range of output channels and one of positions:
//       for each block of the depth:
//         pack the columns of the weight  [groups, taps, kLanes, kTile] each     # stays in the second-level cache
//         for each 32 positions, for each kTile output channels:
//           sums[32, kTile] += copy[position + tap] * columns, over groups and taps         # in tiles
//           after the last block: write the pixels among them
//
// A large weight: all threads copy a region, and each of them has its own columns. A small one of many pixels: packed
// once, and each thread has regions of its own, whose copies stay in the second-level cache beside it.
// The order of an output's sum is that of its groups and taps, whatever else is computed.
#pragma once
#include "conv2d_direct.h"

#if defined(__AMX_BF16__)

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kRegionFloats = 2 << 20;          // of a shared copy, unless that is less than kRegionPixels
constexpr int64_t kRegionPixels = 4096;             // that share one packing of the weight
constexpr int64_t kColumnFloats = 256 << 10;        // of packed columns: half of a second-level cache of 2 MiB
constexpr int64_t kPackedFloats = 320 << 10;        // of a whole packed weight that each thread reads beside its copy
constexpr int64_t kOwnFloats = 96 << 10;            // of a thread's own copy
constexpr int64_t kOwnAcross = 64;                  // pixels across
constexpr int64_t kTapFloats = 9 * kLanes * kTile;  // of a group's columns

struct TiledPlan {
  int64_t groups, pixel;            // groups of channels; floats from a pixel of the copy to the next
  bool own;                         // whether each thread has regions of its own
  int64_t images, down, across;     // of a region: images, rows and pixels of a row of the output
  int64_t regions_down, regions_across, regions;
  int64_t rows, width;              // of its copy
  bool by_row;                      // whether a tile's positions are all in one row
  int64_t tiles;                    // of an image of a region, 16 positions each
  int64_t block, blocks;            // groups of a block of the depth
  int64_t columns, column_tasks;    // tiles of columns of a task
  int64_t range, range_tasks;       // tiles of positions of a task
  int64_t threads;
  int64_t floats_copy, floats_packed, scratch;  // of a copy; of the whole weight, if it is packed at once; of a thread
  int64_t floats() const { return (own ? floats_packed : floats_copy) + threads * scratch + 32; }
};

// the regions' size, and the size of a copy
inline void plan_regions(const Conv2dArgs& a, TiledPlan& p, int64_t down, int64_t across) {
  p.regions_down = ceil_div(a.Ho, min64(a.Ho, down));
  p.down = ceil_div(a.Ho, p.regions_down);
  p.regions_across = ceil_div(a.Wo, across);
  p.across = p.regions_across > 1 ? ceil_div(ceil_div(a.Wo, p.regions_across), kTileRows) * kTileRows : a.Wo;
  p.regions_across = ceil_div(a.Wo, p.across);
  const bool whole = p.regions_down == 1 && p.regions_across == 1;
  p.images = whole && !p.own ? min64(a.N, max64(1, kRegionPixels / (a.Ho * a.Wo))) : 1;
  p.regions = ceil_div(a.N, p.images) * p.regions_down * p.regions_across;
  p.rows = (p.down - 1) * a.stride + 3, p.width = (p.across - 1) * a.stride + 3;
  p.by_row = a.stride > 1 || p.across % kTileRows == 0;
  p.tiles = p.by_row ? p.down * ceil_div(p.across, kTileRows) : ceil_div((p.down - 1) * p.width + p.across, kTileRows);
  // what the last tile reads beyond the copy: the sums of those positions are not looked at
  p.floats_copy = (p.images * p.rows * p.width + 2 * kTileRows * a.stride) * p.pixel;
}

inline TiledPlan tiled_plan(const Conv2dArgs& a, int64_t groups) {
  TiledPlan p = {};
  p.groups = groups;
  p.pixel = (groups | 1) * kLanes;  // an odd number of lines, so that pixels lie in different sets of a cache
  p.threads = max64(1, omp_get_max_threads());
  const int64_t all = ceil_div(a.Co, kTile), area = a.stride * a.stride;
  p.floats_packed = all * groups * kTapFloats;
  p.own = p.floats_packed <= kPackedFloats && a.N * a.Ho * a.Wo >= 4 * p.threads * kOwnAcross * kTileRows;
  if (p.own) {
    const int64_t row = (min64(a.Wo, kOwnAcross) * a.stride + 2) * p.pixel;
    plan_regions(a, p, max64(2, (kOwnFloats / row - 2) / a.stride), kOwnAcross);
    p.block = groups, p.blocks = 1, p.columns = all, p.column_tasks = 1;
    p.range = p.tiles, p.range_tasks = 1;
    p.scratch = p.floats_copy + kTileRows;
    return p;
  }
  plan_regions(a, p, ceil_div(max64(kRegionPixels, kRegionFloats / p.pixel / area), a.Wo), a.Wo);
  p.blocks = ceil_div(groups * kTapFloats, kColumnFloats);
  p.block = ceil_div(groups, p.blocks);
  p.blocks = ceil_div(groups, p.block);
  const int64_t most = max64(1, kColumnFloats / (p.block * kTapFloats));
  p.columns = ceil_div(all, p.threads * ceil_div(all, p.threads * most));
  p.column_tasks = ceil_div(all, p.columns);
  p.range_tasks = p.column_tasks % p.threads == 0 ? 1 : p.threads;
  p.range = ceil_div(p.images * p.tiles, p.range_tasks);
  const int64_t sums = p.blocks > 1 ? p.range * kTileRows * p.columns * kTile : 0;
  p.scratch = p.columns * p.block * kTapFloats + sums + kTileRows;
  return p;
}

// A part of the output, and the copy of the input beneath it.
struct Region {
  int64_t n, images, y, x;  // its images, and its first row and pixel
  float* copy;
};

template <class M, class T> struct TiledConv {
  static constexpr int64_t kStep = kLanes * M::kPack;
  const Conv2dArgs& a;
  const TiledPlan& p;
  const DirectConv<M, T> source;

  Region region_of(int64_t i, float* copy) const {
    const int64_t x = i % p.regions_across, y = i / p.regions_across % p.regions_down;
    const int64_t n = i / (p.regions_across * p.regions_down) * p.images;
    return {n, min64(p.images, a.N - n), y * p.down, x * p.across, copy};
  }
  float* pixel(const Region& r, int64_t image, int64_t y, int64_t x) const {
    return r.copy + ((image * p.rows + y) * p.width + x) * p.pixel;
  }

  // row i of the copy, of all images
  void copy_row(const Region& r, int64_t i) const {
    const int64_t one = groups_of<M>(a.C1), image = i / p.rows;
    const int64_t y = r.y * a.stride + i % p.rows - a.padding, x0 = r.x * a.stride - a.padding;
    const Group x1 = source.run_of(0, one), x2 = source.run_of(one, p.groups - one);
    float* to = pixel(r, image, i % p.rows, 0);
    for (int64_t x = x0; x < x0 + p.width; ++x, to += p.pixel) {
      source.copy(x1, one, r.n + image, y, x, 0, to, kPart);
      if (one < p.groups) source.copy(x2, p.groups - one, r.n + image, y, x, one, to, kPart);
    }
  }

  // which output row and pixel of a region the first of a tile's 16 positions is
  void tile_of(int64_t tile, int64_t& y, int64_t& x) const {
    const int64_t across = ceil_div(p.across, kTileRows);
    y = p.by_row ? tile / across : tile * kTileRows / p.width;
    x = p.by_row ? tile % across * kTileRows : tile * kTileRows % p.width;
  }
  const float* first_of(const Region& r, int64_t tile) const {
    int64_t y, x;
    tile_of(tile % p.tiles, y, x);
    return pixel(r, tile / p.tiles, y * a.stride, x * a.stride);
  }

  // The sums of a tile's 16 positions that are yet to be written, some with each step of the next product.
  struct Unwritten {
    const TiledConv& of;
    int64_t n, y, x, o;           // of the output; x counts within the region
    int64_t first, end_y, end_x;  // the region's first pixel of a row; where it ends
    const float* sums;
    int left = 0;
    VecF bias[2];

    void set(const Region& r, int64_t tile, int64_t output, const float* from) {
      const Conv2dArgs& a = of.a;
      n = r.n + tile / of.p.tiles, first = r.x, o = output, sums = from, left = kTileRows;
      of.tile_of(tile % of.p.tiles, y, x);
      y += r.y, end_y = min64(a.Ho, r.y + of.p.down), end_x = min64(of.p.across, a.Wo - r.x);
      bias[0] = bias_of<T>(a, n, o), bias[1] = o + kLanes < a.Co ? bias_of<T>(a, n, o + kLanes) : VecF{};
    }
    void step() {
      const Conv2dArgs& a = of.a;
      if (!left) return;
      if (!of.p.by_row && x == of.p.width) ++y, x = 0;
      if (x < end_x && y < end_y) {
        const int64_t at = y * a.Wo + first + x;
        if (o + kTile <= a.Co) {
          write_output<T, true>(a, n, at, o, bias[0], load(sums));
          write_output<T, true>(a, n, at, o + kLanes, bias[1], load(sums + kLanes));
        } else {
          write_output<T>(a, n, at, o, bias[0], load(sums));
          if (o + kLanes < a.Co) write_output<T>(a, n, at, o + kLanes, bias[1], load(sums + kLanes));
        }
      }
      ++x, sums += kTile, --left;
    }
    void end() {
      while (left) step();
    }
  };

  // the sums of two tiles' positions, or of one
  template <bool kSecond>
  void multiply_two(const float* first, const float* second, const float* columns, int64_t groups, const float* before,
                    float* sums, Unwritten* unwritten) const {
    const int64_t bytes = 4 * p.pixel * a.stride, row = p.width * p.pixel;
    if (before) load_tiles<kSecond>(before, kTile);
    else zero_tiles<kSecond>();
    for (int64_t g = 0; g < groups; ++g, first += kLanes, second += kLanes) {
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j, columns += kLanes * kTile) {
          const int64_t tap = i * row + j * p.pixel;
          _tile_loadd(6, columns, 4 * kTile);
          _tile_loadd(4, first + tap, bytes);
          _tile_loadd(7, columns + kLanes, 4 * kTile);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          if constexpr (kSecond) {
            _tile_loadd(5, second + tap, bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
          unwritten[0].step();
          unwritten[1].step();
        }
      }
    }
    unwritten[0].end();
    unwritten[1].end();
    store_tiles<kSecond>(sums, kTile);
  }

  // the columns from o on of the groups [g, g + groups)
  void pack_columns(int64_t o, int64_t g, int64_t groups, float* to) const {
    for (int64_t i = 0; i < groups; ++i, to += kTapFloats) {
      for (int j = 0; j < 2; ++j) source.group_columns(o + j * kLanes, group_of<M>(a, g + i), kLanes, to + j * kLanes);
    }
  }

  // the tiles [t0, t1) of a region times the output channels [o0, o1)
  void run_tiles(const Region& r, int64_t t0, int64_t t1, int64_t o0, int64_t o1, int64_t g, int64_t groups,
                 const float* columns, float* sum, float (*tiles)[2 * kTileRows * kTile], Unwritten* unwritten) const {
    const bool last = g + groups == p.groups;
    int turn = 0;
    for (int64_t t = t0; t < t1; t += 2) {
      const bool two = t + 1 < t1;
      const float* one = first_of(r, t) + g * kLanes;
      const float* other = two ? first_of(r, t + 1) + g * kLanes : one;
      for (int64_t o = o0; o < o1; o += kTile, sum += two ? 2 * kTileRows * kTile : kTileRows * kTile) {
        const float* packed = columns + (o - o0) / kTile * p.block * kTapFloats;
        float* to = last ? tiles[turn] : sum;
        if (two) multiply_two<true>(one, other, packed, groups, g > 0 ? sum : nullptr, to, unwritten);
        else multiply_two<false>(one, one, packed, groups, g > 0 ? sum : nullptr, to, unwritten);
        if (!last) continue;
        unwritten[0].set(r, t, o, to);
        if (two) unwritten[1].set(r, t + 1, o, to + kTileRows * kTile);
        turn = 1 - turn;
      }
    }
    unwritten[0].end();
    unwritten[1].end();
  }

  void run_task(const Region& r, int64_t task, float* columns) const {
    const int64_t o0 = task / p.range_tasks * p.columns * kTile, o1 = min64(a.Co, o0 + p.columns * kTile);
    const int64_t t0 = task % p.range_tasks * p.range, t1 = min64(r.images * p.tiles, t0 + p.range);
    float* sums = columns + p.columns * p.block * kTapFloats;  // of all tiles, if there are several blocks
    alignas(64) float tiles[2][2 * kTileRows * kTile];
    Unwritten unwritten[2] = {{*this}, {*this}};
    for (int64_t g = 0; g < p.groups; g += p.block) {
      const int64_t groups = min64(p.block, p.groups - g);
      for (int64_t o = o0; o < o1; o += kTile) {
        pack_columns(o, g, groups, columns + (o - o0) / kTile * p.block * kTapFloats);
      }
      run_tiles(r, t0, t1, o0, o1, g, groups, columns, sums, tiles, unwritten);
    }
  }
  void run_own(const Region& r, const float* packed) const {
    alignas(64) float tiles[2][2 * kTileRows * kTile];
    Unwritten unwritten[2] = {{*this}, {*this}};
    for (int64_t i = 0; i < r.images * p.rows; ++i) copy_row(r, i);
    run_tiles(r, 0, r.images * p.tiles, 0, a.Co, 0, p.groups, packed, nullptr, tiles, unwritten);
  }

  // all threads of a parallel region
  void run_shared(float* copy, float* scratch) const {
    for (int64_t i = 0; i < p.regions; ++i) {
      const Region r = region_of(i, copy);
#pragma omp for schedule(dynamic)
      for (int64_t row = 0; row < r.images * p.rows; ++row) copy_row(r, row);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < p.column_tasks * p.range_tasks; ++task) run_task(r, task, scratch);
    }
  }
  void run_apart(float* packed, float* scratch) const {
#pragma omp for schedule(dynamic)
    for (int64_t o = 0; o < a.Co; o += kTile) pack_columns(o, 0, p.groups, packed + o / kTile * p.block * kTapFloats);
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < p.regions; ++i) run_own(region_of(i, scratch), packed);
  }
};

template <class M, class T> void run_tiled(const Conv2dArgs& a) {
  const TiledPlan p = tiled_plan(a, groups_of<M>(a));
  float* shared = aligned((float*)a.workspace);
  const TiledConv<M, T> conv{a, p, {a, 1, p.groups}};
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const Tiles tiles;
    float* scratch = aligned(shared + (p.own ? p.floats_packed : p.floats_copy) + omp_get_thread_num() * p.scratch);
    if (p.own) conv.run_apart(shared, scratch);
    else conv.run_shared(shared, scratch);
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast

#endif
