// A 3x3 convolution of stride 1 to a few output channels: scalar products along the input channels.
//
//   for each band of rows of a strip of pixels:                   # tasks go to the threads
//     keep the last 3 rows of the strip, normalised               [3, pixels, words]
//     for each kPixels of them: sums[kPixels, outputs] += 3 x 3 x words     # in registers, added up over the lanes last
//
// The forms whose columns are output channels would fill 3 of them up to 32.
#pragma once
#include "conv2d_direct.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int kMostOutputs = kLanes < 8 ? kLanes : 8;
constexpr int kAbreast = kLanes == 16 ? 24 : 12;  // sums in registers
constexpr int64_t kStrip = 32;                    // pixels

inline bool has_few_outputs(const Conv2dArgs& a) { return a.kernel == 3 && a.stride == 1 && a.Co <= kMostOutputs; }

template <class M, class T> struct FewOutputs {
  static constexpr int64_t kStep = kLanes * M::kPack;
  const Conv2dArgs& a;
  int64_t groups, band, bands, strips;

  FewOutputs(const Conv2dArgs& a) : a(a), groups(groups_of<M>(a)) {
    const int64_t threads = max64(1, omp_get_max_threads());
    strips = ceil_div(a.Wo, kStrip);
    band = max64(8, min64(32, ceil_div(a.N * a.Ho * strips, 8 * threads)));
    bands = ceil_div(a.Ho, band);
  }
  int64_t words() const { return groups * kLanes; }
  int64_t row_floats() const { return (kStrip + kAbreast + 2) * words(); }
  int64_t scratch() const { return 9 * a.Co * words() + 3 * row_floats() + 16; }

  // to[taps, words, outputs of kLanes words]
  void pack_weights(float* to) const {
    for (int64_t t = 0; t < 9; ++t) {
      for (int64_t g = 0; g < groups; ++g) {
        const Group group = group_of<M>(a, g);
        for (int64_t o = 0; o < a.Co; ++o, to += kLanes) {
          T part[kStep] = {};
          const T* w = (const T*)a.weight + o * a.stride_wo + group.channel * a.stride_wi + t / 3 * a.stride_wh;
          for (int64_t i = 0; i < group.valid; ++i) part[i] = w[i * a.stride_wi + t % 3 * a.stride_ww];
          store(to, M::words(part, kStep));
        }
      }
    }
  }

  // row y of the strip from pixel x on
  void gather(int64_t n, int64_t y, int64_t x, int64_t pixels, float* to) const {
    for (int64_t i = 0; i < pixels; ++i) {
      for (int64_t g = 0; g < groups; ++g, to += kLanes) {
        const Group group = group_of<M>(a, g);
        const T* p = pixel_of<T>(a, group, n, y, x + i);
        VecF words = {};
        if (p && !a.norm_scale) words = M::words(p, group.valid);
        if (p && a.norm_scale) {
          const VecF low = input_of<T>(a, group, n, p, 0);
          words = M::join(low, M::kPack == 2 ? input_of<T>(a, group, n, p, kLanes) : VecF{});
        }
        store(to, words);
      }
    }
  }

  // sums[kR][o0 to o0 + kO]: of kR pixels, whose first is at rows[i] for each row of the kernel
  template <int kO, int kR>
  void sums_of(const float* const* rows, const float* weights, int64_t o0, float (*sums)[kLanes]) const {
    VecF sum[kR][kO] = {};
    for (int64_t t = 0; t < 9; ++t) {
      const float* x = rows[t / 3] + t % 3 * words();
      const float* w = weights + (t * groups * a.Co + o0) * kLanes;
      for (int64_t g = 0; g < groups; ++g, x += kLanes, w += a.Co * kLanes) {
        VecF y[kO];
#pragma GCC unroll 4
        for (int o = 0; o < kO; ++o) y[o] = load(w + o * kLanes);
#pragma GCC unroll 24
        for (int r = 0; r < kR; ++r) {
          const VecF pixel = load(x + r * words());
#pragma GCC unroll 4
          for (int o = 0; o < kO; ++o) sum[r][o] = M::dot(sum[r][o], pixel, y[o]);
        }
      }
    }
    for (int r = 0; r < kR; ++r) for (int o = 0; o < kO; ++o) sums[r][o0 + o] = reduce_add(sum[r][o]);
  }

  // kR pixels from x on, of which `pixels` are the picture's; kO outputs at a time
  template <int kO>
  void write_row(int64_t n, int64_t y, int64_t x, int64_t pixels, const float* const* rows, const float* weights) const {
    constexpr int kR = kAbreast / kO / 2 * 2;
    const VecF bias = bias_of<T>(a, n, 0);
    for (int64_t i = 0; i < pixels; i += kR) {
      const float* at[3] = {rows[0] + i * words(), rows[1] + i * words(), rows[2] + i * words()};
      float sums[kR][kLanes] = {};
      for (int64_t o = 0; o < a.Co; o += kO) sums_of<kO, kR>(at, weights, o, sums);
      for (int64_t r = 0; r < min64(kR, pixels - i); ++r) {
        write_output<T>(a, n, y * a.Wo + x + i + r, 0, bias, load(sums[r]));
      }
    }
  }

  void run_task(int64_t task, const float* weights, float* ring) const {
    const int64_t strip = task % strips, n = task / strips / bands;
    const int64_t x = strip * kStrip, pixels = min64(kStrip, a.Wo - x);
    const int64_t first = task / strips % bands * band, end = min64(a.Ho, first + band);
    const auto row = [&](int64_t y) { return ring + (y % 3 + 3) % 3 * row_floats(); };  // of the input
    const auto fetch = [&](int64_t y) { gather(n, y, x - a.padding, pixels + 2, row(y)); };
    fetch(first - a.padding), fetch(first - a.padding + 1);
    for (int64_t y = first; y < end; ++y) {
      const int64_t top = y - a.padding;
      fetch(top + 2);
      const float* rows[3] = {row(top), row(top + 1), row(top + 2)};
      if (a.Co % 4 == 0) write_row<4>(n, y, x, pixels, rows, weights);
      else if (a.Co % 3 == 0) write_row<3>(n, y, x, pixels, rows, weights);
      else if (a.Co % 2 == 0) write_row<2>(n, y, x, pixels, rows, weights);
      else write_row<1>(n, y, x, pixels, rows, weights);
    }
  }
};

template <class M, class T> size_t few_outputs_floats(const Conv2dArgs& a) {
  return (size_t)(max64(1, omp_get_max_threads()) * FewOutputs<M, T>(a).scratch());
}
template <class M, class T> void run_few_outputs(const Conv2dArgs& a) {
  const FewOutputs<M, T> conv(a);
  const int64_t threads = max64(1, omp_get_max_threads());
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* weights = aligned((float*)a.workspace + omp_get_thread_num() * conv.scratch());
    float* ring = weights + 9 * a.Co * conv.words();
    conv.pack_weights(weights);
    memset(ring, 0, 3 * conv.row_floats() * sizeof(float));
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < a.N * conv.bands * conv.strips; ++i) conv.run_task(i, weights, ring);
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
