// A 3x3 convolution by tiles (AMX): each tap is a product of a padded copy's pixels, read where they lie.
//
//   for each band of output rows, or of images:                       # its copy stays in the third-level cache
//     copy[images, rows, width, words] = the input, its norm applied, zero around it            # all threads
//     for each task, a range of output channels and one of positions:
//       for each block of the depth:
//         pack the columns of the weight  [groups, taps, kLanes, kTile] each     # stays in the second-level cache
//         for each 32 positions, for each kTile output channels:
//           sums[32, kTile] += copy[position + tap] * columns, over groups and taps         # in tiles
//           after the last block: write the pixels among them
//
// The order of an output's sum is that of its groups and taps, whatever else is computed.
#pragma once
#include "conv2d_direct.h"

#if defined(__AMX_BF16__)

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kBandFloats = 2 << 20;     // of a copy, unless that is less than kBandPixels
constexpr int64_t kBandPixels = 4096;        // that share one packing of the weight
constexpr int64_t kColumnFloats = 256 << 10;  // of packed columns, which stay in a second-level cache of 2 MiB
constexpr int64_t kTapFloats = 9 * kLanes * kTile;  // of a group's columns

struct TiledPlan {
  int64_t groups, pixel;            // groups of channels; floats from a pixel of the copy to the next
  int64_t width, rows, images;      // of a copy: pixels a row, rows an image, images
  int64_t band, bands;              // output rows of an image in a band; bands of all
  bool by_row;                      // whether a tile's positions are all in one row
  int64_t tiles;                    // of an image's band, 16 positions each
  int64_t block, blocks;            // groups of a block of the depth
  int64_t columns, column_tasks;    // tiles of columns of a task
  int64_t range, range_tasks;       // tiles of positions of a task
  int64_t threads;
  int64_t floats_copy, scratch;     // of the copy; of a thread
  int64_t floats() const { return floats_copy + threads * scratch + 32; }
};

inline TiledPlan tiled_plan(const Conv2dArgs& a, int64_t groups) {
  TiledPlan p = {};
  p.groups = groups;
  p.pixel = (groups | 1) * kLanes;  // an odd number of lines, so that pixels lie in different sets of a cache
  p.width = (a.Wo - 1) * a.stride + 3;
  p.threads = max64(1, omp_get_max_threads());
  const int64_t pixels = max64(kBandPixels, kBandFloats / p.pixel / (a.stride * a.stride));
  p.band = min64(a.Ho, ceil_div(pixels, a.Wo));
  p.band = ceil_div(a.Ho, ceil_div(a.Ho, p.band));
  p.images = p.band < a.Ho ? 1 : min64(a.N, max64(1, pixels / (a.Ho * a.Wo)));
  p.bands = p.band < a.Ho ? a.N * ceil_div(a.Ho, p.band) : ceil_div(a.N, p.images);
  p.rows = (p.band - 1) * a.stride + 3;
  p.by_row = a.stride > 1 || a.Wo % kTileRows == 0;
  p.tiles = p.by_row ? p.band * ceil_div(a.Wo, kTileRows) : ceil_div((p.band - 1) * p.width + a.Wo, kTileRows);
  p.blocks = ceil_div(groups * kTapFloats, kColumnFloats);
  p.block = ceil_div(groups, p.blocks);
  p.blocks = ceil_div(groups, p.block);
  const int64_t all = ceil_div(a.Co, kTile), most = max64(1, kColumnFloats / (p.block * kTapFloats));
  p.columns = ceil_div(all, p.threads * ceil_div(all, p.threads * most));
  p.column_tasks = ceil_div(all, p.columns);
  p.range_tasks = p.column_tasks % p.threads == 0 ? 1 : p.threads;
  // what the last tile reads beyond the copy: the sums of those positions are not looked at
  p.floats_copy = (p.images * p.rows * p.width + 2 * kTileRows * a.stride) * p.pixel;
  p.range = ceil_div(p.images * p.tiles, p.range_tasks);
  const int64_t sums = p.blocks > 1 ? p.range * kTileRows * p.columns * kTile : 0;
  p.scratch = p.columns * p.block * kTapFloats + sums + kTileRows;
  return p;
}

template <class M, class T> struct TiledConv {
  static constexpr int64_t kStep = kLanes * M::kPack;
  const Conv2dArgs& a;
  const TiledPlan& p;
  const DirectConv<M, T> source;
  float* copy;

  float* pixel(int64_t image, int64_t y, int64_t x) const {
    return copy + ((image * p.rows + y) * p.width + x) * p.pixel;
  }

  // row y of the copy of an image, of the band whose first output row is `first`
  void copy_row(int64_t n, int64_t image, int64_t first, int64_t y) const {
    const int64_t one = groups_of<M>(a.C1), at = first * a.stride + y - a.padding;
    const Group x1 = source.run_of(0, one), x2 = source.run_of(one, p.groups - one);
    float* to = pixel(image, y, 0);
    for (int64_t x = 0; x < p.width; ++x, to += p.pixel) {
      source.copy(x1, one, n, at, x - a.padding, 0, to, kPart);
      if (one < p.groups) source.copy(x2, p.groups - one, n, at, x - a.padding, one, to, kPart);
    }
  }

  // which output row and pixel the first of a tile's 16 positions is
  void tile_of(int64_t tile, int64_t& y, int64_t& x) const {
    const int64_t across = ceil_div(a.Wo, kTileRows);
    y = p.by_row ? tile / across : tile * kTileRows / p.width;
    x = p.by_row ? tile % across * kTileRows : tile * kTileRows % p.width;
  }

  // The sums of a tile's 16 positions that are yet to be written, some with each step of the next product.
  struct Unwritten {
    const TiledConv& of;
    int64_t n, first, y, x, o;
    const float* sums;
    int left = 0;
    VecF bias[2];

    void set(int64_t image, int64_t first_row, int64_t tile, int64_t output, const float* from) {
      const Conv2dArgs& a = of.a;
      n = image, first = first_row, o = output, sums = from, left = kTileRows;
      of.tile_of(tile, y, x);
      bias[0] = bias_of<T>(a, n, o), bias[1] = o + kLanes < a.Co ? bias_of<T>(a, n, o + kLanes) : VecF{};
    }
    void step() {
      const Conv2dArgs& a = of.a;
      if (!left) return;
      if (!of.p.by_row && x == of.p.width) ++y, x = 0;
      if (x < a.Wo && y < min64(of.p.band, a.Ho - first)) {
        const int64_t at = (first + y) * a.Wo + x;
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

  const float* first_of(int64_t image, int64_t tile) const {
    int64_t y, x;
    tile_of(tile, y, x);
    return pixel(image, y * a.stride, x * a.stride);
  }

  // the columns from o on of the groups [g, g + groups)
  void pack_columns(int64_t o, int64_t g, int64_t groups, float* to) const {
    for (int64_t i = 0; i < groups; ++i, to += kTapFloats) {
      for (int j = 0; j < 2; ++j) source.group_columns(o + j * kLanes, group_of<M>(a, g + i), kLanes, to + j * kLanes);
    }
  }

  void run_task(int64_t n, int64_t images, int64_t first, int64_t task, float* columns) const {
    const int64_t o0 = task / p.range_tasks * p.columns * kTile, t0 = task % p.range_tasks * p.range;
    const int64_t o1 = min64(a.Co, o0 + p.columns * kTile), t1 = min64(images * p.tiles, t0 + p.range);
    float* sums = columns + p.columns * p.block * kTapFloats;  // of all tiles, if there are several blocks
    alignas(64) float tiles[2][2 * kTileRows * kTile];
    Unwritten unwritten[2] = {{*this}, {*this}};
    int turn = 0;
    for (int64_t g = 0; g < p.groups; g += p.block) {
      const int64_t groups = min64(p.block, p.groups - g);
      const bool last = g + groups == p.groups;
      for (int64_t o = o0; o < o1; o += kTile) pack_columns(o, g, groups, columns + (o - o0) / kTile * p.block * kTapFloats);
      float* sum = sums;
      for (int64_t t = t0; t < t1; t += 2) {
        const bool two = t + 1 < t1;
        const float* one = first_of(t / p.tiles, t % p.tiles) + g * kLanes;
        const float* other = two ? first_of((t + 1) / p.tiles, (t + 1) % p.tiles) + g * kLanes : one;
        for (int64_t o = o0; o < o1; o += kTile, sum += two ? 2 * kTileRows * kTile : kTileRows * kTile) {
          const float* packed = columns + (o - o0) / kTile * p.block * kTapFloats;
          float* to = last ? tiles[turn] : sum;
          if (two) multiply_two<true>(one, other, packed, groups, g > 0 ? sum : nullptr, to, unwritten);
          else multiply_two<false>(one, one, packed, groups, g > 0 ? sum : nullptr, to, unwritten);
          if (!last) continue;
          unwritten[0].set(n + t / p.tiles, first, t % p.tiles, o, to);
          if (two) unwritten[1].set(n + (t + 1) / p.tiles, first, (t + 1) % p.tiles, o, to + kTileRows * kTile);
          turn = 1 - turn;
        }
      }
    }
    unwritten[0].end();
    unwritten[1].end();
  }

  // all threads of a parallel region
  void run_band(int64_t band, float* scratch) const {
    const int64_t down = ceil_div(a.Ho, p.band);
    const int64_t n = p.band < a.Ho ? band / down : band * p.images, first = p.band < a.Ho ? band % down * p.band : 0;
    const int64_t images = min64(p.images, a.N - n);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < images * p.rows; ++i) copy_row(n + i / p.rows, i / p.rows, first, i % p.rows);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < p.column_tasks * p.range_tasks; ++i) run_task(n, images, first, i, scratch);
  }
};

template <class M, class T> void run_tiled(const Conv2dArgs& a) {
  const TiledPlan p = tiled_plan(a, groups_of<M>(a));
  float* copy = aligned((float*)a.workspace);
  const TiledConv<M, T> conv{a, p, {a, 1, p.groups}, copy};
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const Tiles tiles;
    float* scratch = aligned(copy + p.floats_copy + omp_get_thread_num() * p.scratch);
    for (int64_t b = 0; b < p.bands; ++b) conv.run_band(b, scratch);
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast

#endif
