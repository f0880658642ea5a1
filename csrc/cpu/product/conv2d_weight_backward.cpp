// The gradient of the weight of a 3x3 convolution of stride 1 in float32, by Winograd's F(3x3, 2x2).
//
//   for each block of tiles, of 2x2 outputs each:                       # all threads meet between blocks
//     V[16, groups, tiles, kLanes] = B^T d B      of 4x4 pixels of x    # groups of kLanes channels
//     G[16, groups, tiles, kLanes] = S g S^T      of 2x2 pixels of dy
//     for each of the 16 products:
//       W[Co, Ci] += G^T V                                              # over the tiles; kR x kV in registers
//   dw[Co, Ci, 3, 3] = A^T W A
//
// 16 multiplications for 36. Each element's sum has one order, whatever the threads.
// Source: Lavin & Gray 2016, "Fast algorithms for convolutional neural networks", section 4.1 (F(3, 2) in its place).
#include "epilogue.h"
#include "gemm.h"
#include "winograd_transform.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

using Args = Conv2dWeightBackwardArgs;
constexpr int kPlanes = 16, kRowsAbreast = kLanes == 16 ? 8 : 4, kGroupsAbreast = 3;  // sums in registers
constexpr int64_t kTiles = 128;  // of a block: kGroupsAbreast groups of them are in the first-level cache
constexpr int64_t kApart = 5 * 16;  // floats between two planes, that they lie in different sets of a cache

// dy's side of F(3, 2): two values to four; its other sides are F(2, 3)'s input and step_back
LDMFAST_INLINE void spread(const VecF* g, VecF* y) {
  const VecF half = g[0] * 0.5f, other = g[1] * 0.5f;
  y[0] = g[0];
  y[1] = half + other;
  y[2] = half - other;
  y[3] = g[1];
}
LDMFAST_INLINE void step_back(const VecF* m, VecF* y) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2];
  y[2] = m[1] + m[2] + m[3];
}

struct WeightPlan {
  int64_t across, down, tiles;     // of an image, and of all
  int64_t groups_i, groups_o;      // of channels
  int64_t plane_v, plane_g, plane_w;  // floats from one product to the next
  int64_t threads;
  explicit WeightPlan(const Args& a)
      : across(ceil_div(a.Wo, 2)), down(ceil_div(a.Ho, 2)), tiles(a.N * down * across),
        groups_i(ceil_div(a.Ci, kLanes)), groups_o(ceil_div(a.Co, kLanes)),
        plane_v(groups_i * kTiles * kLanes + kApart), plane_g(groups_o * kTiles * kLanes + kApart),
        plane_w(groups_o * kLanes * groups_i * kLanes + kApart), threads(max64(1, omp_get_max_threads())) {}
  int64_t floats() const { return kPlanes * (plane_v + plane_g + plane_w) + 16; }
};

struct WeightBackward {
  const Args& a;
  const WeightPlan& p;
  float *v, *g, *w;

  struct Tile { int64_t n, y, x; };
  Tile tile_of(int64_t t) const { return {t / (p.down * p.across), t / p.across % p.down * 2, t % p.across * 2}; }

  // tile t of the block, the t-th of all from `first` on
  void transform_x(int64_t t, int64_t first) const {
    const Tile tile = tile_of(first + t);
    const float* x = (const float*)a.x + tile.n * a.stride_xn;
    for (int64_t group = 0; group < p.groups_i; ++group) {
      const int64_t c = group * kLanes;
      float* to = v + (group * kTiles + t) * kLanes;
      const auto pixel = [&](int i, int j) __attribute__((always_inline)) {
        const int64_t y = tile.y - a.padding + i, z = tile.x - a.padding + j;
        if (y < 0 || z < 0 || y >= a.H || z >= a.W) return VecF{};
        return load_upto(x + y * a.stride_xh + z * a.stride_xw + c, a.Ci - c);
      };
      transform_input<F2>(pixel, [&](int i, int j, VecF y) { store(to + (i * 4 + j) * p.plane_v, y); });
    }
  }
  void transform_dy(int64_t t, int64_t first) const {
    const Tile tile = tile_of(first + t);
    const float* dy = (const float*)a.dy + tile.n * a.stride_dyn;
    for (int64_t group = 0; group < p.groups_o; ++group) {
      const int64_t c = group * kLanes;
      float* to = g + (group * kTiles + t) * kLanes;
      const auto pixel = [&](int i, int j) __attribute__((always_inline)) {
        const int64_t y = tile.y + i, z = tile.x + j;
        if (y >= a.Ho || z >= a.Wo) return VecF{};
        return load_upto(dy + y * a.stride_dyh + z * a.stride_dyw + c, a.Co - c);
      };
      transform<2, 4>(pixel, spread, [&](int i, int j, VecF y) { store(to + (i * 4 + j) * p.plane_g, y); });
    }
  }

  // kRowsAbreast output channels and kV groups of input channels of one product, over `tiles` tiles
  template <int kV> void multiply(const float* rows, const float* columns, int64_t tiles, bool add, float* to) const {
    VecF sum[kRowsAbreast][kV] = {};
    for (int64_t t = 0; t < tiles; ++t, rows += kLanes, columns += kLanes) {
      VecF x[kV];
#pragma GCC unroll 3
      for (int j = 0; j < kV; ++j) x[j] = load(columns + j * kTiles * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRowsAbreast; ++r) {
        const VecF y = broadcast(rows + r);
#pragma GCC unroll 3
        for (int j = 0; j < kV; ++j) sum[r][j] += y * x[j];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRowsAbreast; ++r) {
#pragma GCC unroll 3
      for (int j = 0; j < kV; ++j) {
        float* c = to + r * p.groups_i * kLanes + j * kLanes;
        store(c, add ? load(c) + sum[r][j] : sum[r][j]);
      }
    }
  }
  // one product, the groups of output channels [o0, o1)
  void accumulate(int k, int64_t o0, int64_t o1, int64_t tiles, bool add) const {
    for (int64_t i = 0; i < p.groups_i; i += kGroupsAbreast) {
      const float* columns = v + k * p.plane_v + i * kTiles * kLanes;
      for (int64_t row = o0 * kLanes; row < o1 * kLanes; row += kRowsAbreast) {
        const float* rows = g + k * p.plane_g + row / kLanes * kTiles * kLanes + row % kLanes;
        float* to = w + k * p.plane_w + (row * p.groups_i + i) * kLanes;
        switch (min64(kGroupsAbreast, p.groups_i - i)) {
          case 1: multiply<1>(rows, columns, tiles, add, to); break;
          case 2: multiply<2>(rows, columns, tiles, add, to); break;
          default: multiply<3>(rows, columns, tiles, add, to);
        }
      }
    }
  }

  void write(int64_t o) const {
    float* out = (float*)a.dw + o * a.Ci * 9;
    for (int64_t i = 0; i < a.Ci; i += kLanes) {
      float taps[9][kLanes];
      const float* from = w + o * p.groups_i * kLanes + i;
      transform<4, 3>([&](int y, int x) { return load(from + (y * 4 + x) * p.plane_w); }, step_back,
                      [&](int y, int x, VecF tap) { store(taps[y * 3 + x], tap); });
      for (int64_t c = 0; c < min64(kLanes, a.Ci - i); ++c) {
        for (int t = 0; t < 9; ++t) out[(i + c) * 9 + t] = taps[t][c];
      }
    }
  }

  void run() const {  // all threads of a parallel region
    constexpr int64_t kSome = 8;  // tiles of a task
    const int64_t parts = min64(p.groups_o, ceil_div(4 * p.threads, kPlanes));  // of a product's output channels
    for (int64_t first = 0; first < p.tiles; first += kTiles) {
      const int64_t tiles = min64(kTiles, p.tiles - first);
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < tiles; t += kSome) {
        for (int64_t i = t; i < min64(tiles, t + kSome); ++i) transform_x(i, first), transform_dy(i, first);
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < kPlanes * parts; ++i) {
        const int64_t part = i % parts;
        accumulate((int)(i / parts), part * p.groups_o / parts, (part + 1) * p.groups_o / parts, tiles, first > 0);
      }
    }
#pragma omp for
    for (int64_t o = 0; o < a.Co; ++o) write(o);
  }
};

}  // namespace

size_t conv2d_weight_backward_workspace(const Args& a) { return 4 * (size_t)WeightPlan(a).floats(); }

void conv2d_weight_backward(const Args& a) {
  const WeightPlan p(a);
  float* v = (float*)(((uintptr_t)a.workspace + 63) / 64 * 64);
  const WeightBackward backward{a, p, v, v + kPlanes * p.plane_v, v + kPlanes * (p.plane_v + p.plane_g)};
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  backward.run();
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
