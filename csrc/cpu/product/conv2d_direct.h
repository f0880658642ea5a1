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

// Groups of channels of a block, where a kernel has 9 taps
template <class M> constexpr int64_t kTapGroups = M::kTiles ? 8 : 2;

template <class M, class T> struct DirectConv {
  static constexpr int64_t kStep = kLanes * M::kPack;
  const Conv2dArgs& a;
  int64_t block_groups, groups;

  int64_t taps() const { return a.kernel * a.kernel; }
  int64_t first(int64_t block) const { return block * block_groups; }
  int64_t count(int64_t block) const { return min64(block_groups, groups - first(block)); }
  int64_t words(int64_t block) const { return taps() * count(block) * kLanes; }

  // words of one pixel's channels in the groups [first, first + count), which are all of x1 or all of x2
  void copy(const Group& run, int64_t count, int64_t n, int64_t y, int64_t x, int64_t group, float* to,
            int64_t part) const {
    const T* p = pixel_of<T>(a, run, n, y, x);
    for (int64_t i = 0; i < count; ++i) {
      VecF words = {};
      if (p && !a.norm_scale) words = M::words(p + i * kStep, run.valid - i * kStep);
      if (p && a.norm_scale) words = normalised(run, n, p, i * kStep);
      store(to + panel_word((group + i) * kLanes, part), words);
    }
  }
  VecF normalised(const Group& run, int64_t n, const T* p, int64_t i) const {
    return M::join(input_of<T>(a, run, n, p, i), M::kPack == 2 ? input_of<T>(a, run, n, p, i + kLanes) : VecF{});
  }

  const float* rows_in_place(int64_t, int64_t, int64_t&) const { return nullptr; }
  // a panel of output pixels, each [taps, groups of the block] words
  void rows(int64_t m, int rows, int64_t block, float* to, int64_t part = kPanelPart<M>) const {
    const int64_t begin = first(block), all = count(block), inside = groups_of<M>(a.C1) - begin;
    const int64_t one = max64(0, min64(all, inside));  // groups of x1
    const Group x1 = run_of(begin, one), x2 = run_of(begin + one, all - one);
    for (int r = 0; r < rows; ++r, to += kPart) {
      const int64_t n = (m + r) / (a.Ho * a.Wo), pixel = (m + r) % (a.Ho * a.Wo);
      const int64_t y = pixel / a.Wo * a.stride - a.padding, x = pixel % a.Wo * a.stride - a.padding;
      for (int64_t t = 0; t < taps(); ++t) {
        const int64_t ty = y + t / a.kernel, tx = x + t % a.kernel;
        if (one > 0) copy(x1, one, n, ty, tx, t * all, to, part);
        if (one < all) copy(x2, all - one, n, ty, tx, t * all + one, to, part);
      }
    }
  }
  Group run_of(int64_t g, int64_t groups) const {
    Group run = {};
    if (groups > 0) run = group_of<M>(a, g), run.valid = min64(groups * kStep, (run.second ? a.C2 : a.C1) - run.at);
    return run;
  }

  // group_columns of weights as stock lays them out: transposed straight into place
  void nine_taps(int64_t o, const Group& g, int64_t tap_words, float* to) const {
    const T* w = (const T*)a.weight + o * a.stride_wo + g.channel * 9;
    for (int64_t k = 0, channel = 0, tap = 0; k < 9 * kStep; k += kLanes) {
      VecF x[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        __builtin_prefetch(w + (r + kLanes) * a.stride_wo + k, 0, 2);
        x[r] = o + r < a.Co ? load(w + r * a.stride_wo + k) : VecF{};
      }
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        store(to + (tap * tap_words + channel) * kTile, x[i]);
        if (++tap == 9) tap = 0, ++channel;
      }
    }
  }

  // The same of 16-bit weights: the taps of two channels are 9 words as they lie, of which each word takes two halves.
  void nine_taps_paired(int64_t o, const Group& g, int64_t tap_words, float* to) const {
    const T* w = (const T*)a.weight + o * a.stride_wo + g.channel * 9;
    VecF words[9 * kLanes];
    for (int k = 0; k < 9 * kLanes; k += kLanes) {
      VecF x[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        __builtin_prefetch(w + r * a.stride_wo + 2 * k + 18 * kStep, 0, 2);  // two groups on
        x[r] = o + r < a.Co ? M::words(w + r * a.stride_wo + 2 * k, kStep) : VecF{};
      }
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) words[k + i] = x[i];
    }
    for (int c = 0; c < kLanes; ++c, to += kTile) {
      const VecF* pair = words + 9 * c;
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) {
        const VecU first = (VecU)pair[t / 2], second = (VecU)pair[(t + 9) / 2];
        const VecU word = t % 2 ? first >> 16 | second << 16 : (first & 0xffffu) | (second & 0xffff0000u);
        store(to + t * tap_words * kTile, (VecF)word);
      }
    }
  }

  // a group's words of kLanes output channels from o on
  void group_columns(int64_t o, const Group& g, int64_t tap_words, float* to) const {
    if (a.kernel == 1 && a.stride_wi == 1) {
      const T* w = (const T*)a.weight + o * a.stride_wo + g.channel;
      pack_transposed<M>(w, a.stride_wo, max64(0, min64(kLanes, a.Co - o)), g.valid, to, kTile);
      for (int64_t i = ceil_div(g.valid, M::kPack); i < kLanes; ++i) store(to + i * kTile, VecF{});
      return;
    }
    if (M::kPack == 1 && a.kernel == 3 && taps_together(a) && g.valid == kStep) return nine_taps(o, g, tap_words, to);
    if constexpr (M::kPack == 2) {
      if (a.kernel == 3 && taps_together(a) && g.valid == kStep) return nine_taps_paired(o, g, tap_words, to);
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

  bool straight(int64_t m, int64_t n) const {
    const int64_t pixels = a.Ho * a.Wo;
    return n + kTile <= a.Co && m / pixels == (m + M::kRows - 1) / pixels;
  }
  Straight<T> to(int64_t m, int64_t n) const {
    const int64_t image = m / (a.Ho * a.Wo), at = m * a.Co + n;
    return {(T*)a.out + at, a.residual ? (const T*)a.residual + at : nullptr, a.Co, a.Co,
            {bias_of<T>(a, image, n), bias_of<T>(a, image, n + kLanes)}, a.output_scale};
  }
  template <bool kFull>
  void finish(int64_t image, int64_t pixel, int64_t count, int64_t n, const float* sums, int64_t stride) const {
    for (int j = 0; j < 2 && n + j * kLanes < a.Co; ++j) {
      const int64_t o = n + j * kLanes;
      const VecF bias = bias_of<T>(a, image, o);
      for (int64_t r = 0; r < count; ++r) {
        write_output<T, kFull>(a, image, pixel + r, o, bias, load(sums + r * stride + j * kLanes));
      }
    }
  }
  void finish(int64_t m, int count, int64_t n, const float* sums, int64_t stride) const {
    const int64_t pixels = a.Ho * a.Wo, end = m + count;
    while (m < end) {  // an image at a time
      const int64_t image = m / pixels, pixel = m % pixels, some = min64(end - m, pixels - pixel);
      if (a.Co - n >= kTile) finish<true>(image, pixel, some, n, sums, stride);
      else finish<false>(image, pixel, some, n, sums, stride);
      m += some, sums += some * stride;
    }
  }
};

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
