// A convolution as one matrix product, its input laid out while a panel is packed (implicit im2col).
//
//   rows of the product: output pixels; columns: output channels
//   depth: blocks of groups of channels; in a block, the taps of the kernel one after the other
//   a norm before a kernel of several taps is applied first, to a copy, so that it is computed once a pixel
#pragma once
#include "conv2d.h"
#include "product.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kTapGroups = 2;  // groups of channels of a block, where a kernel has 9 taps

template <class M, class T> struct DirectConv {
  static constexpr int64_t kStep = kLanes * M::kPack;
  const Conv2dArgs& a;
  int64_t block_groups, groups;

  int64_t taps() const { return a.kernel * a.kernel; }
  int64_t first(int64_t block) const { return block * block_groups; }
  int64_t count(int64_t block) const { return min64(block_groups, groups - first(block)); }
  int64_t words(int64_t block) const { return taps() * count(block) * kLanes; }

  VecF words_of(const Group& g, int64_t n, const T* p) const {
    if (!a.norm_scale) return M::words(p, g.valid);
    return M::join(input_of<T>(a, g, n, p, 0), M::kPack == 2 ? input_of<T>(a, g, n, p, kLanes) : VecF{});
  }

  void row(int64_t m, int64_t block, float* to) const {
    const int64_t n = m / (a.Ho * a.Wo), pixel = m % (a.Ho * a.Wo);
    const int64_t y = pixel / a.Wo * a.stride - a.padding, x = pixel % a.Wo * a.stride - a.padding;
    int64_t w = 0;
    for (int64_t t = 0; t < taps(); ++t) {
      for (int64_t i = 0; i < count(block); ++i, w += kLanes) {
        const Group g = group_of<M>(a, first(block) + i);
        const T* p = pixel_of<T>(a, g, n, y + t / a.kernel, x + t % a.kernel);
        store(to + panel_word(w), p ? words_of(g, n, p) : VecF{});
      }
    }
  }
  void rows(int64_t m, int count, int64_t block, float* to) const {
    for (int r = 0; r < count; ++r) row(m + r, block, to + r * kPart);
  }

  // a group's words of kLanes output channels from o on
  void group_columns(int64_t o, const Group& g, int64_t tap_words, float* to) const {
    if (a.kernel == 1 && a.stride_wi == 1) {
      const T* w = (const T*)a.weight + o * a.stride_wo + g.channel;
      pack_transposed<M>(w, a.stride_wo, max64(0, min64(kLanes, a.Co - o)), g.valid, to, kTile);
      for (int64_t i = ceil_div(g.valid, M::kPack); i < kLanes; ++i) store(to + i * kTile, VecF{});
      return;
    }
    float block[kStep * 9 * kLanes];
    int64_t step_i, step_tap;
    weight_block<T>(a, o, g, kStep, block, step_i, step_tap);
    for (int64_t t = 0; t < taps(); ++t) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const float* from = block + (i * M::kPack * step_i + t * step_tap) * kLanes;
        const VecF odd = M::kPack == 2 ? load(from + step_i * kLanes) : VecF{};
        store(to + (t * tap_words + i) * kTile, M::interleave(load(from), odd));
      }
    }
  }
  void columns(int64_t n, int64_t block, float* to) const {
    for (int64_t i = 0; i < count(block); ++i) {
      const Group g = group_of<M>(a, first(block) + i);
      for (int j = 0; j < 2; ++j) {
        group_columns(n + j * kLanes, g, count(block) * kLanes, to + i * kLanes * kTile + j * kLanes);
      }
    }
  }

  void finish(int64_t m, int count, int64_t n, const float* sums, int64_t stride) const {
    for (int r = 0; r < count; ++r, sums += stride) {
      const int64_t image = (m + r) / (a.Ho * a.Wo), pixel = (m + r) % (a.Ho * a.Wo);
      for (int j = 0; j < 2 && n + j * kLanes < a.Co; ++j) {
        write_output<T>(a, image, pixel, n + j * kLanes, load(sums + j * kLanes));
      }
    }
  }
};

template <class M> Plan direct_plan(const Conv2dArgs& a, int64_t& block_groups) {
  const int64_t groups = groups_of<M>(a), taps = a.kernel * a.kernel;
  block_groups = min64(groups, taps > 1 ? kTapGroups : even_block(groups * kLanes) / kLanes);
  const int64_t blocks = ceil_div(groups, block_groups);
  return plan_of(a.N * a.Ho * a.Wo, a.Co, blocks, taps * block_groups * kLanes, groups * kLanes * taps);
}

inline bool normalises_first(const Conv2dArgs& a) { return a.norm_scale && a.kernel > 1; }

template <class M> size_t direct_floats(const Conv2dArgs& a) {
  int64_t block_groups;
  const Plan p = direct_plan<M>(a, block_groups);
  const int64_t bytes = a.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t copy = normalises_first(a) ? ceil_div(a.N * a.H * a.W * (a.C1 + a.C2) * bytes, 4) : 0;
  return (size_t)(p.split.threads * p.scratch + copy);
}

// The convolution of a normalised copy of the input, [N, H, W, C1 + C2].
template <class M, class T> Conv2dArgs normalise(const Conv2dArgs& a, int64_t threads, T* to) {
  const int64_t C = a.C1 + a.C2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < a.N * a.H; ++i) {
    for (int64_t x = 0; x < a.W; ++x) {
      for (int64_t g = 0; g < groups_of<Single>(a); ++g) {
        const Group group = group_of<Single>(a, g);
        const T* p = pixel_of<T>(a, group, i / a.H, i % a.H * a.upsample, x * a.upsample);
        store_upto(to + (i * a.W + x) * C + group.channel, input_of<T>(a, group, i / a.H, p, 0), group.valid);
      }
    }
  }
  Conv2dArgs b = a;
  b.x1 = to, b.C1 = C, b.x2 = nullptr, b.C2 = 0, b.norm_scale = b.norm_shift = nullptr;
  b.stride_x1n = a.H * a.W * C, b.stride_x1h = a.W * C, b.stride_x1w = C;
  return b;
}

template <class M, class T> void run_direct(const Conv2dArgs& a) {
  int64_t block_groups;
  Plan p = direct_plan<M>(a, block_groups);
  if (!normalises_first(a)) {
    return run_product<M>(p, DirectConv<M, T>{a, block_groups, groups_of<M>(a)}, (float*)a.workspace);
  }
  T* copy = (T*)((float*)a.workspace + p.split.threads * p.scratch);
  const Conv2dArgs b = normalise<M>(a, p.split.threads, copy);
  const int64_t threads = p.split.threads, scratch = p.scratch;
  p = direct_plan<M>(b, block_groups);
  if (p.split.threads * p.scratch > threads * scratch) __builtin_trap();
  run_product<M>(p, DirectConv<M, T>{b, block_groups, groups_of<M>(b)}, (float*)a.workspace);
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
