// The direct form of a convolution run: its plan, its norm, and where its weight is read in place (streamed.h).
#pragma once
#include "conv2d_direct.h"
#include "streamed.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// Groups of channels of a block, where a kernel of 9 taps is read in place. Longer runs of a row were measured with AVX2:
// 3x3 of stride 2, 1280 -> 1280: 1.01 at 16x16 and 1.10 at 8x8 of the time with 2.
template <class M> constexpr int64_t kStreamedTapGroups = kLanes == 8 ? 8 : kTapGroups<M>;

// DirectConv of weights that are read where they lie: the depth is channels, then taps, as stock lays them out.
template <class M, class T> struct StreamedConv : DirectConv<M, T> {
  using Base = DirectConv<M, T>;
  using Base::a;
  static constexpr int64_t kStep = Base::kStep;

  bool gated() const { return false; }
  int64_t outputs() const { return a.Co; }
  int64_t weight_stride() const { return a.stride_wo / M::kPack; }
  const float* weight_row(int64_t row, int64_t block) const {
    return (const float*)((const T*)a.weight + row * a.stride_wo + this->first(block) * kStep * this->taps());
  }

  // the pixel beneath each tap of kLanes outputs, in the groups of g's part of the input, or null
  void pixels_of(const Group& g, int64_t m, int64_t valid, const T* (*p)[kLanes]) const {
    for (int64_t r = 0; r < kLanes; ++r) {
      const int64_t n = (m + r) / (a.Ho * a.Wo), pixel = (m + r) % (a.Ho * a.Wo);
      const int64_t y = pixel / a.Wo * a.stride - a.padding, x = pixel % a.Wo * a.stride - a.padding;
      for (int64_t t = 0; t < 9; ++t) p[t][r] = r < valid ? pixel_of<T>(a, g, n, y + t / 3, x + t % 3) : nullptr;
    }
  }
  // x[kLanes words] of a group of channels, `more` elements beyond the pixels
  static void turn(const T* const* p, int64_t more, VecF* x) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) x[r] = p[r] ? M::words(p[r] + more, kStep) : VecF{};
    transpose(x);
  }
  void across(int64_t m, int64_t valid, int64_t block, float* rows, float* to, int64_t stride) const {
    if (a.kernel == 1) return pack_across<Base>(*this, m, valid, block, rows, to, stride);
    const T* p[9][kLanes];
    VecF x[9][kLanes];
    Group of = {};
    for (int64_t i = 0; i < this->count(block); ++i) {
      const Group g = group_of<M>(a, this->first(block) + i);
      if (i == 0 || g.second != of.second) pixels_of(of = g, m, valid, p);
      for (int t = 0; t < 9; ++t) turn(p[t], g.at - of.at, x[t]);
      for (int c = 0; c < kLanes; ++c) {
        for (int t = 0; t < 9; ++t, to += stride) store(to, word_of(x, c, t));
      }
    }
  }
  // Word t of those that hold all taps of the channels of word c: x[t][c] is a channel, or two of them.
  static VecF word_of(const VecF (*x)[kLanes], int c, int t) {
    if constexpr (M::kPack == 1) {
      return x[t][c];
    } else {
      const auto low = [&](int tap) { return (VecU)x[tap][c] << 16 >> 16; };
      const auto high = [&](int tap) { return (VecU)x[tap][c] & 0xffff0000u; };
      if (t < 4) return (VecF)(low(2 * t) | (VecU)x[2 * t + 1][c] << 16);
      if (t == 4) return (VecF)(low(8) | high(0));
      return (VecF)((VecU)x[2 * t - 9][c] >> 16 | high(2 * t - 8));
    }
  }
};

// Whether StreamedConv takes it, once its norm is gone or if it has one tap. Of 9 taps it sums in an order of its own,
// so not where the order may not depend on the batch (kDirect, which is asked for).
template <class M, class T> bool streams(const Conv2dArgs& a) {
  constexpr int64_t kStep = kLanes * M::kPack;
  if (sizeof(T) * M::kPack != 4 || a.stride_wo % M::kPack || a.C1 % kStep || a.C2 % kStep) return false;
  if (a.kernel == 1 ? a.stride_wi != 1 : a.form == ConvForm::kDirect || !taps_together(a)) return false;
  return a.N * a.Ho * a.Wo <= min64(kMostStreamed<M>, a.Co);
}

template <class M, class T> Plan direct_plan(const Conv2dArgs& a, int64_t& block_groups) {
  const int64_t groups = groups_of<M>(a), taps = a.kernel * a.kernel;
  const int64_t tap_groups = streams<M, T>(a) ? kStreamedTapGroups<M> : kTapGroups<M>;
  block_groups = min64(groups, taps > 1 ? tap_groups : even_block<M>(groups * kLanes) / kLanes);
  const int64_t blocks = ceil_div(groups, block_groups);
  return plan_of<M>(a.N * a.Ho * a.Wo, a.Co, blocks, taps * block_groups * kLanes, groups * kLanes * taps);
}

inline bool normalises_first(const Conv2dArgs& a) { return a.norm_scale && a.kernel > 1; }

// The convolution of a normalised copy of the input, [N, H, W, C1 + C2].
template <class T> Conv2dArgs of_copy(const Conv2dArgs& a, const T* copy) {
  Conv2dArgs b = a;
  b.x1 = copy, b.C1 = a.C1 + a.C2, b.x2 = nullptr, b.C2 = 0, b.norm_scale = b.norm_shift = nullptr;
  b.stride_x1w = b.C1, b.stride_x1h = a.W * b.C1, b.stride_x1n = a.H * a.W * b.C1;
  return b;
}
template <class T> void normalise(const Conv2dArgs& a, int64_t threads, T* copy) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < a.N * a.H * a.W; ++i) {
    const int64_t n = i / (a.H * a.W), y = i / a.W % a.H, x = i % a.W;
    for (int64_t g = 0; g < groups_of<Single>(a); ++g) {
      const Group group = group_of<Single>(a, g);
      const T* p = pixel_of<T>(a, group, n, y * a.upsample, x * a.upsample);
      store_upto(copy + i * (a.C1 + a.C2) + group.channel, input_of<T>(a, group, n, p, 0), group.valid);
    }
  }
}

template <class M, class T> int64_t direct_product_floats(const Conv2dArgs& a, const Plan& p) {
  return streams<M, T>(a) ? streamed_plan<M>(p).floats() : p.split.threads * p.scratch;
}
template <class M, class T> size_t direct_floats(const Conv2dArgs& a) {
  const bool first = normalises_first(a);
  int64_t block_groups;
  const Conv2dArgs b = first ? of_copy<T>(a, nullptr) : a;
  const Plan p = direct_plan<M, T>(b, block_groups);
  const int64_t copy = first ? ceil_div(a.N * a.H * a.W * (a.C1 + a.C2) * (int64_t)sizeof(T), 4) : 0;
  return (size_t)(direct_product_floats<M, T>(b, p) + copy);
}

template <class M, class T> void run_direct(const Conv2dArgs& args) {
  const bool first = normalises_first(args);
  int64_t block_groups;
  Conv2dArgs a = first ? of_copy<T>(args, nullptr) : args;
  const Plan p = direct_plan<M, T>(a, block_groups);
  if (first) {
    T* copy = (T*)((float*)args.workspace + direct_product_floats<M, T>(a, p));
    normalise<T>(args, p.split.threads, copy);
    a.x1 = copy;
  }
  const DirectConv<M, T> source{a, block_groups, groups_of<M>(a)};
  if constexpr (sizeof(T) * M::kPack == 4) {
    if (streams<M, T>(a)) return run_streamed<M>(streamed_plan<M>(p), StreamedConv<M, T>{source}, (float*)args.workspace);
  }
  run_product<M>(p, source, (float*)args.workspace);
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
