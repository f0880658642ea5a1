// A 3x3 convolution of a few input channels: one matrix product whose depth is [taps, channels], as pixels have them: the
// taps of a row of the kernel lie together.
//
// The forms by groups of channels would fill 4 channels up to 16 or 32. In bfloat16 it is taken for some more, if they are
// no level's width: a first layer's Winograd rounds what nothing after it averages. With 40 channels in, the whole network
// of scenes64 had 1.22 times stock's own error that way, and 0.90 this way.
#pragma once
#include "conv2d_direct.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kFewInputs = 8, kMostInputs = 47;

template <class M> bool has_few_inputs(const Conv2dArgs& a) {
  const bool few = a.C1 <= kFewInputs || (M::kPack == 2 && a.C1 <= kMostInputs && a.C1 % 16 != 0);
  return a.kernel == 3 && few && a.C2 == 0 && !a.norm_scale && taps_together(a);
}

template <class M, class T> struct FewInputs : DirectConv<M, T> {
  using DirectConv<M, T>::a;
  int64_t elements() const { return a.C1 * 9; }
  int64_t words(int64_t) const { return ceil_div(elements(), M::kPack); }

  void rows(int64_t m, int rows, int64_t, float* to) const {
    const Group all = {false, 0, 0, a.C1};
    const bool dense = a.upsample == 1 && a.stride_x1w == a.C1;
    T row[kMostInputs * 9];
    for (int r = 0; r < rows; ++r, to += kPart) {
      const int64_t n = (m + r) / (a.Ho * a.Wo), pixel = (m + r) % (a.Ho * a.Wo);
      const int64_t y = pixel / a.Wo * a.stride - a.padding, x = pixel % a.Wo * a.stride - a.padding;
      T* next = row;
      for (int64_t i = 0; i < 3; ++i, next += 3 * a.C1) {
        const T *first = pixel_of<T>(a, all, n, y + i, x), *last = pixel_of<T>(a, all, n, y + i, x + 2);
        if (dense && first && last) {
          memcpy(next, first, 3 * a.C1 * sizeof(T));
          continue;
        }
        for (int64_t j = 0; j < 3; ++j) {
          const T* p = pixel_of<T>(a, all, n, y + i, x + j);
          for (int64_t c = 0; c < a.C1; ++c) next[j * a.C1 + c] = p ? p[c] : T{};
        }
      }
      pack_row<M>(row, elements(), row, to);
    }
  }
  void columns(int64_t n, int64_t, float* to) const {
    float block[(kMostInputs * 9 + 1) * kLanes];
    for (int64_t j = 0; j < 2; ++j) {
      int64_t step_c, step_tap;
      weight_block<T>(a, n + j * kLanes, {false, 0, 0, a.C1}, a.C1, block, step_c, step_tap);
      const auto element = [&](int64_t i) {
        return i < elements() ? load(block + (i % a.C1 * step_c + i / a.C1 * step_tap) * kLanes) : VecF{};
      };
      for (int64_t w = 0; w < words(0); ++w) {
        store(to + w * kTile + j * kLanes, M::interleave(element(w * M::kPack), element(w * M::kPack + M::kPack - 1)));
      }
    }
  }
};

template <class M> Plan few_inputs_plan(const Conv2dArgs& a) {
  const int64_t depth = a.C1 * 9;
  return plan_of<M>(a.N * a.Ho * a.Wo, a.Co, 1, ceil_div(depth, M::kPack), depth);
}
template <class M, class T> size_t few_inputs_floats(const Conv2dArgs& a) {
  const Plan p = few_inputs_plan<M>(a);
  return (size_t)(p.split.threads * p.scratch);
}
template <class M, class T> void run_few_inputs(const Conv2dArgs& a) {
  run_product<M>(few_inputs_plan<M>(a), FewInputs<M, T>{{a, 1, 1}}, (float*)a.workspace);
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
