// What every form of conv2d shares: the input by vectors of channels, blocks of the weight, and the output.
#pragma once
#include "epilogue.h"
#include "gemm.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// Channels in groups of kLanes words, the last group of x1 and that of x2 filled up with zeros.
struct Group {
  bool second;      // of x2
  int64_t at;       // first channel within x1 or x2
  int64_t channel;  // first channel of the weight
  int64_t valid;    // channels
};
template <class M> LDMFAST_INLINE int64_t groups_of(int64_t C) { return ceil_div(C, kLanes * M::kPack); }
template <class M> LDMFAST_INLINE int64_t groups_of(const Conv2dArgs& a) {
  return groups_of<M>(a.C1) + groups_of<M>(a.C2);
}
template <class M> LDMFAST_INLINE Group group_of(const Conv2dArgs& a, int64_t g) {
  const int64_t first = groups_of<M>(a.C1), step = kLanes * M::kPack;
  const bool second = g >= first;
  const int64_t at = (second ? g - first : g) * step;
  return {second, at, second ? a.C1 + at : at, min64(step, (second ? a.C2 : a.C1) - at)};
}

// ---- input ----

// A pixel's channels from group g on, or null outside. y and x are those of the enlarged picture.
template <class T>
LDMFAST_INLINE const T* pixel_of(const Conv2dArgs& a, const Group& g, int64_t n, int64_t y, int64_t x) {
  if (y < 0 || x < 0 || y >= a.H * a.upsample || x >= a.W * a.upsample) return nullptr;
  if (a.upsample == 2) y /= 2, x /= 2;
  if (g.second) return (const T*)a.x2 + n * a.stride_x2n + y * a.stride_x2h + x * a.stride_x2w + g.at;
  return (const T*)a.x1 + n * a.stride_x1n + y * a.stride_x1h + x * a.stride_x1w + g.at;
}

// kLanes channels, normalised; i is the first of them within the group
template <class T> LDMFAST_INLINE VecF input_of(const Conv2dArgs& a, const Group& g, int64_t n, const T* p, int64_t i) {
  const int64_t valid = g.valid - i;
  if (valid <= 0) return VecF{};
  VecF x = load_upto(p + i, valid);
  if (!a.norm_scale) return x;
  const int64_t at = n * (a.C1 + a.C2) + g.channel + i;
  x = x * load_upto(a.norm_scale + at, valid) + load_upto(a.norm_shift + at, valid);
  return a.silu ? silu<AccuracyOf<T>::value>(x) : x;
}

// ---- weight ----

// Whether the taps of an input channel lie together, as stock has them.
LDMFAST_INLINE bool taps_together(const Conv2dArgs& a) {
  return a.stride_wi == a.kernel * a.kernel && (a.kernel == 1 || (a.stride_ww == 1 && a.stride_wh == a.kernel));
}

// to[kLanes words of input channels, taps, kLanes output channels], as float32: the kPack channels of a word stand one
// after the other. step_i, step_tap: where it put them, in vectors.
template <class T>
void weight_block(const Conv2dArgs& a, int64_t o, const Group& g, int64_t channels, float* to, int64_t& step_i,
                  int64_t& step_tap) {
  const int64_t taps = a.kernel * a.kernel, valid = min64(kLanes, a.Co - o);
  const T* w = (const T*)a.weight + o * a.stride_wo + g.channel * a.stride_wi;
  step_i = taps, step_tap = 1;
  if (taps_together(a)) {
    pack_elements(w, a.stride_wo, valid, g.valid * taps, to);
  } else if (a.stride_wi == 1) {
    step_i = 1, step_tap = channels;
    for (int64_t t = 0; t < taps; ++t) {
      const T* tap = w + t / a.kernel * a.stride_wh + t % a.kernel * a.stride_ww;
      pack_elements(tap, a.stride_wo, valid, g.valid, to + t * channels * kLanes);
    }
  } else {
    for (int64_t i = 0; i < g.valid; ++i) {
      for (int64_t t = 0; t < taps; ++t) {
        const T* tap = w + i * a.stride_wi + t / a.kernel * a.stride_wh + t % a.kernel * a.stride_ww;
        for (int64_t l = 0; l < kLanes; ++l) {
          to[(i * taps + t) * kLanes + l] = l < valid ? to_float(tap[l * a.stride_wo]) : 0.0f;
        }
      }
    }
  }
  for (int64_t i = g.valid; i < channels; ++i) {
    for (int64_t t = 0; t < taps; ++t) store(to + (i * step_i + t * step_tap) * kLanes, VecF{});
  }
}

// ---- output ----

// kLanes channels from o on of one pixel
template <class T, bool kFull = false>
LDMFAST_INLINE void write_output(const Conv2dArgs& a, int64_t n, int64_t pixel, int64_t o, VecF bias, VecF y) {
  const int64_t valid = a.Co - o, at = (n * a.Ho * a.Wo + pixel) * a.Co + o;
  y += bias;
  if (a.residual) y += load_upto<kFull>((const T*)a.residual + at, valid);
  store_upto<kFull>((T*)a.out + at, y * a.output_scale, valid);
}
template <class T> LDMFAST_INLINE VecF bias_of(const Conv2dArgs& a, int64_t n, int64_t o) {
  VecF y = a.bias ? load_upto((const T*)a.bias + o, a.Co - o) : VecF{};
  return a.add ? y + load_upto((const T*)a.add + n * a.stride_add + o, a.Co - o) : y;
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
