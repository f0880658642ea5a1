// A 3x3 convolution by Winograd's transforms.
//
//   for each block of rows of tiles:                       # V of a block stays in the third-level cache
//     V[P, tiles, words] = B^T d B of all its channels     # P = kSide^2 products of a tile
//     for each kTile output channels (and range of tiles):
//       for each block of the depth:
//         U[P, words, kTile] = G g G^T                     # stays in the second-level cache
//         for each of the P products:
//           M[p, tiles, kTile] += V[p] U[p]                # gemm.h
//       out = A^T M A, and what follows it
//
// Where there are tiles enough each thread has blocks of its own: what one thread writes and another reads crosses from
// one third-level cache to another. Otherwise all threads share a block, whose weights are transformed once.
// The input goes through a strip of kSide rows in float32, where its norm is applied and its border is zero.
#pragma once
#include "winograd_plan.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

template <class M, class T, class F> struct WinogradConv {
  static constexpr int kSide = F::kSide, kPlanes = kSide * kSide, kIn = F::kIn, kOut = F::kOut;
  static constexpr int64_t kChannels = kLanes * M::kPack;  // of a group
  const Conv2dArgs& a;
  const WinogradPlan<F>& p;
  float* v;

  // ---- V ----

  // strip[kIn, width, groups, kChannels]: rows of pixels from (y, x) on. next: how far from its input the next strip's is,
  // which comes from memory meanwhile
  void gather(int64_t g, int64_t groups, int64_t n, int64_t y, int64_t x, int64_t width, int64_t next,
              float* strip) const {
    for (int64_t i = 0; i < kIn; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        for (int64_t k = 0; k < groups; ++k, strip += kChannels) {
          const Group group = group_of<M>(a, g + k);
          const T* pixel = pixel_of<T>(a, group, n, (y + i) * F::kEnlarged, (x + j) * F::kEnlarged);
          if (pixel) __builtin_prefetch(pixel + next, 0, 2);
          for (int64_t c = 0; c < kChannels; c += kLanes) {
            store(strip + c, pixel ? input_of<T>(a, group, n, pixel, c) : VecF{});
          }
        }
      }
    }
  }

  void transform_tile(const float* d, int64_t row, int64_t column, float* to) const {
    if constexpr (M::kPack == 1) {
      transform_input<F>([=](int i, int j) { return load(d + i * row + j * column); },
                          [=](int i, int j, VecF y) { store_ahead(to + (i * kSide + j) * p.plane_v, kPart, y); });
    } else {
      VecF low[kPlanes];
      transform_input<F>([=](int i, int j) { return load(d + i * row + j * column); },
                          [&](int i, int j, VecF y) { low[i * kSide + j] = y; });
      transform_input<F>([=](int i, int j) { return load(d + i * row + j * column + kLanes); },
                          [&](int i, int j, VecF y) {
                            store_ahead(to + (i * kSide + j) * p.plane_v, kPart, M::join(low[i * kSide + j], y));
                          });
    }
  }

  // a strip of tiles from `column` on of a row of tiles, groups from g on; next: see gather
  void transform_strip(int64_t first_row, int64_t row, int64_t column, int64_t g, int64_t groups, int64_t next,
                       float* strip) const {
    const int64_t n = row / p.down, count = min64(kStripTiles, p.across - column);
    const int64_t width = (count - 1) * F::kStep + kIn;
    const int64_t y = row % p.down * F::kStep - a.padding, x = column * F::kStep - a.padding;
    gather(g, groups, n, y, x, width, next, strip);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t k = 0; k < groups; ++k) {
        const int64_t tile = (row - first_row) * p.across + column + t;
        const float* from = strip + (t * F::kStep * groups + k) * kChannels;
        float* to = panel_of(tile, (g + k) * kLanes) + tile % M::kRows * kPart;
        transform_tile(from, width * groups * kChannels, groups * kChannels, to);
      }
    }
  }
  // where the panel of a tile has a word: V is [depth blocks, P, panels, parts, kRows, kPart], as it is read
  float* panel_of(int64_t tile, int64_t word) const {
    return v + word / p.depth * kPlanes * p.plane_v + tile / M::kRows * p.depth * M::kRows +
           panel_word(word % p.depth, kPanelPart<M>);
  }

  // ---- U ----

  // words [g, g + groups) * kLanes of kTile output channels from o on
  void transform_weights(int64_t o, int64_t g, int64_t groups, float* block, float* u) const {
    for (int64_t i = 0; i < groups; ++i, u += kLanes * kTile) {
      const Group group = group_of<M>(a, g + i);
      prefetch_weights(o, g + i + 1);
      for (int j = 0; j < 2; ++j) {
        int64_t step_i, step_tap;
        weight_block<T>(a, o + j * kLanes, group, kChannels, block, step_i, step_tap);
        for (int64_t w = 0; w < kLanes; ++w) {
          const float* from = block + w * M::kPack * step_i * kLanes;
          transform_word(from, step_i * kLanes, step_tap * kLanes, u + w * kTile + j * kLanes);
        }
      }
    }
  }
  void transform_word(const float* from, int64_t step_i, int64_t step_tap, float* to) const {
    const auto kernel = [=](int i, int j) { return load(from + (i * 3 + j) * step_tap); };
    if constexpr (M::kPack == 1) {
      transform_weight<F>(kernel, [=](int i, int j, VecF y) {
        store_ahead(to + (i * kSide + j) * p.plane_u, 2 * kTile, y);
      });
    } else {
      VecF even[kPlanes];
      transform_weight<F>(kernel, [&](int i, int j, VecF y) { even[i * kSide + j] = y; });
      const auto second = [=](int i, int j) { return load(from + step_i + (i * 3 + j) * step_tap); };
      transform_weight<F>(second, [&](int i, int j, VecF y) {
        const int k = i * kSide + j;
        store_ahead(to + k * p.plane_u, kTile, M::interleave(even[k], y));
      });
    }
  }

  // A group of weights comes from memory while the one before it is transformed.
  void prefetch_weights(int64_t o, int64_t g) const {
    if (a.stride_wi != 9 || g * kLanes >= p.words) return;
    const Group group = group_of<M>(a, g);
    for (int64_t r = o; r < min64(o + kTile, a.Co); ++r) {
      const T* w = (const T*)a.weight + r * a.stride_wo + group.channel * 9;
      for (int64_t i = 0; i < group.valid * 9; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(w + i, 0, 2);
    }
  }

  // ---- M and the output ----

  void multiply_planes(int64_t first, int64_t count, int64_t word, const float* u, float* m) const {
    const float* from = panel_of(first, word);
    const int64_t words = min64(p.depth, p.words - word);
    for (int k = 0; k < kPlanes; ++k) {
      const float* panel = from + k * p.plane_v;
      for (int64_t t = 0; t < count; t += M::kRows, panel += p.depth * M::kRows) {
        multiply_rows<M>((int)min64(M::kRows, count - t), panel, u + k * p.plane_u, words, word > 0,
                         m + k * p.plane_m + t * kTile, kTile);
      }
    }
  }

  // What the tile from (y, x) on is written to, and what is added to it, come from memory while the one before it is
  // written.
  void prefetch_output(int64_t n, int64_t y, int64_t x, int64_t o) const {
    for (int64_t i = 0; i < kOut; ++i) {
      const int64_t at = ((n * a.Ho + y + i) * a.Wo + x) * a.Co + o;
      for (int64_t k = 0; k < kOut; ++k) {
        if (a.residual) __builtin_prefetch((const T*)a.residual + at + k * a.Co);
        __builtin_prefetch((T*)a.out + at + k * a.Co, 1);
      }
    }
  }

  void write_tile(int64_t row, int64_t column, int64_t o, const float* m) const {
    const int64_t n = row / p.down, y = row % p.down * kOut, x = column * kOut;
    prefetch_output(n, y, x + kOut, o);
    const bool whole = y + kOut <= a.Ho && x + kOut <= a.Wo && o + kTile <= a.Co;
    for (int64_t j = o; j < min64(o + kTile, a.Co); j += kLanes, m += kLanes) {
      const VecF bias = bias_of<T>(a, n, j);
      const auto sums = [=](int i, int k) { return load(m + (i * kSide + k) * p.plane_m); };
      if (whole) {
        transform_output<F>(sums, [=](int i, int k, VecF out) {
          write_output<T, true>(a, n, (y + i) * a.Wo + x + k, j, bias, out);
        });
      } else {
        transform_output<F>(sums, [=](int i, int k, VecF out) {
          if (y + i < a.Ho && x + k < a.Wo) write_output<T>(a, n, (y + i) * a.Wo + x + k, j, bias, out);
        });
      }
    }
  }

  // kTile output channels from o on of the tiles [first, first + count) of a block
  void run_task(int64_t first_row, int64_t first, int64_t count, int64_t o, float* scratch) const {
    float *u = scratch, *m = u + kPlanes * p.plane_u, *block = m + kPlanes * p.plane_m;
    for (int64_t word = 0; word < p.words; word += p.depth) {
      const int64_t words = min64(p.depth, p.words - word);
      transform_weights(o, word / kLanes, words / kLanes, block, u);
      multiply_planes(first, count, word, u, m);
    }
    for (int64_t t = 0; t < count; ++t) {
      write_tile(first_row + (first + t) / p.across, (first + t) % p.across, o, m + t * kTile);
    }
  }

  // the groups of a chunk end here, which a task takes of a strip
  int64_t chunk_end(int64_t i) const { return (i + 1) * (p.words / kLanes) / p.chunks; }

  // From the channels of group g to those of another group, of a pixel so many tiles further on. From one part of the
  // input to the other it is the same everywhere only where their strides are; else there is nothing to fetch ahead.
  int64_t distance(int64_t g, int64_t other, int64_t tiles) const {
    const Group from = group_of<M>(a, g), to = group_of<M>(a, other);
    const int64_t aside = tiles * F::kStep * F::kEnlarged / a.upsample * (to.second ? a.stride_x2w : a.stride_x1w);
    if (from.second == to.second) return to.at - from.at + aside;
    if (a.stride_x1n != a.stride_x2n || a.stride_x1h != a.stride_x2h || a.stride_x1w != a.stride_x2w) return 0;
    const int64_t apart = ((intptr_t)a.x2 - (intptr_t)a.x1) / (int64_t)sizeof(T);
    return (to.second ? apart : -apart) + to.at - from.at + aside;
  }

  // part i of the block's V
  void run_strip(int64_t first_row, int64_t i, float* scratch) const {
    const int64_t strip = i / p.chunks, row = first_row + strip / p.strips, column = strip % p.strips * kStripTiles;
    const int64_t first = chunk_end(i % p.chunks - 1), end = chunk_end(i % p.chunks);
    for (int64_t g = first; g < end; g += kStripGroups) {
      const int64_t groups = min64(kStripGroups, end - g);
      const int64_t next = g + groups < end ? distance(g, g + groups, 0) : distance(g, first, kStripTiles);
      transform_strip(first_row, row, column, g, groups, next, scratch);
    }
  }

  // a block: alone, or by all threads of a parallel region
  template <bool kAlone> void run_block(int64_t first_row, float* scratch) const {
    const int64_t rows = min64(p.rows, a.N * p.down - first_row), tiles = rows * p.across;
    const int64_t parts = rows * p.strips * p.chunks, ranges = ceil_div(tiles, p.range);
    const auto task = [=](int64_t i) {
      const int64_t first = i % ranges * p.range;
      run_task(first_row, first, min64(p.range, tiles - first), i / ranges * kTile, scratch);
    };
    const int64_t tasks = ranges * ceil_div(a.Co, kTile);
    if constexpr (kAlone) {
      for (int64_t i = 0; i < parts; ++i) run_strip(first_row, i, scratch);
      for (int64_t i = 0; i < tasks; ++i) task(i);
    } else {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < parts; ++i) run_strip(first_row, i, scratch);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < tasks; ++i) task(i);
    }
  }
};

template <class M, class T, class F> void run_winograd(const Conv2dArgs& a) {
  const WinogradPlan<F> p = winograd_plan<M, F>(a);
  float* shared = aligned((float*)a.workspace);
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const int64_t before = omp_get_thread_num() * (p.own ? p.floats_v + p.scratch : p.scratch);
    float* v = p.own ? shared + before : shared;
    const WinogradConv<M, T, F> conv{a, p, v};
    float* scratch = p.own ? v + p.floats_v : v + p.floats_v + before;
    if (p.own) {
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < p.row_blocks; ++b) conv.template run_block<true>(b * p.rows, scratch);
    } else {
      for (int64_t b = 0; b < p.row_blocks; ++b) conv.template run_block<false>(b * p.rows, scratch);
    }
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
