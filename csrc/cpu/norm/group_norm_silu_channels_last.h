// group_norm_silu.cpp, channels_last: moments of chunks of pixels, then their merge, then the writing.
#pragma once
#include <omp.h>

#include "group_norm_silu_common.h"
#include "pivot.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kPixels = 128;            // pixels of a chunk, whose two passes stay in the first-level cache
constexpr int64_t kSlab = 256;              // channels that one task sums
constexpr int64_t kWriteBytes = 32 * 1024;  // of x that one task writes

struct Plan {
  int64_t chunks, slabs;       // chunks of pixels in a sample, slabs of channels
  int64_t bundle, bundles;     // groups that fill whole pairs of vectors, such bundles in a sample
  int64_t rows, blocks;        // pixels that one task writes, such blocks in a sample
  int64_t threads;
  float* sums;                 // [N, chunks, 2, C]: of x - pivot, and of squares about the chunk's mean
  float* coefficients;         // [N, 3, C]: mean, a, b
  size_t bytes;
};

Plan plan_of(const GroupNormSiluArgs& g) {
  Plan plan;
  plan.chunks = ceil_div(g.P, kPixels);
  plan.slabs = ceil_div(g.C, kSlab);
  int64_t common = g.C / g.groups;
  for (int64_t rest = kPair; rest;) {  // Euclid
    const int64_t next = common % rest;
    common = rest;
    rest = next;
  }
  plan.bundle = kPair / common;
  plan.bundles = ceil_div(g.groups, plan.bundle);
  plan.rows = max64(1, kWriteBytes / (g.C * (g.dtype == DType::kFloat32 ? 4 : 2)));
  plan.blocks = ceil_div(g.P, plan.rows);
  plan.threads = g.N * g.C * g.P > kSerial ? omp_get_max_threads() : 1;
  const int64_t sums = g.N * plan.chunks * 2 * g.C, coefficients = g.N * 3 * g.C;
  plan.sums = g.workspace;
  plan.coefficients = g.workspace + sums;
  plan.bytes = (size_t)(sums + coefficients) * 4;
  return plan;
}

// float32's sums are about a pivot
template <class T> constexpr bool kPivot = sizeof(T) == 4;

// Sums of kPairs * kPair channels over a chunk's pixels: of x - pivot, and of squares about the chunk's mean.
// ahead: elements from here to the block that is summed next, which no prefetcher of the processor finds
template <class T, int kPairs>
LDMFAST_INLINE void block_sums(const T* x, const Pivot<T>& pivot, int64_t pixels, int64_t stride, int64_t ahead,
                               float* sum, float* square) {
  constexpr int kVectors = 2 * kPairs;
  VecF m[kVectors] = {}, s[kVectors] = {}, q[kVectors] = {}, v[kVectors];
  const auto read = [&](const T* from) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j += 2) load_pair(from + j * kLanes, v[j], v[j + 1]);
  };
  const auto prefetch_next = [&](const T* from) {
    __builtin_prefetch(from + ahead, 0, 2);
    if (kPairs * kPair * sizeof(T) > 64) __builtin_prefetch(from + ahead + 64 / sizeof(T), 0, 2);
  };
  if (kPivot<T>) {
    VecF b[kVectors], c[kVectors];
    for (int j = 0; j < kVectors; j += 2) {
      load_pair(pivot.first + j * kLanes, m[j], m[j + 1]);
      load_pair(pivot.first + pivot.middle + j * kLanes, b[j], b[j + 1]);
      load_pair(pivot.first + pivot.last + j * kLanes, c[j], c[j + 1]);
    }
    for (int j = 0; j < kVectors; ++j) m[j] = between(m[j], b[j], c[j]);
    for (int64_t p = 0; p < pixels;) {
      VecF part[kVectors] = {};
      for (const int64_t end = min64(p + kRun, pixels); p < end; ++p) {
        read(x + p * stride);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) part[j] += v[j] - m[j];
      }
      for (int j = 0; j < kVectors; ++j) s[j] += part[j];
    }
    for (int j = 0; j < kVectors; ++j) m[j] += s[j] / (float)pixels;
    for (int64_t p = 0; p < pixels;) {
      VecF part[kVectors] = {};
      for (const int64_t end = min64(p + kRun, pixels); p < end; ++p) {
        prefetch_next(x + p * stride);
        read(x + p * stride);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) part[j] += (v[j] - m[j]) * (v[j] - m[j]);
      }
      for (int j = 0; j < kVectors; ++j) q[j] += part[j];
    }
  } else {
    // One pass, about the chunk's first pixel. Since that is one of them, the squares about the mean are at least
    // 1 / pixels of these, and the difference is right to 1e-3 at worst: enough for results of 16 bits.
    for (int j = 0; j < kVectors; j += 2) load_pair(x + j * kLanes, m[j], m[j + 1]);
    for (int64_t p = 0; p < pixels; ++p) {
      prefetch_next(x + p * stride);
      read(x + p * stride);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        v[j] -= m[j];
        s[j] += v[j];
        q[j] += v[j] * v[j];
      }
    }
    for (int j = 0; j < kVectors; ++j) {
      q[j] -= s[j] * s[j] / (float)pixels;
      s[j] += m[j] * (float)pixels;
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    store(sum + j * kLanes, s[j]);
    store(square + j * kLanes, q[j]);
  }
}

template <class T>
void channel_sums(const T* x, const Pivot<T>& pivot, int64_t pixels, int64_t stride, float* sum, float* square) {
  const float about = kPivot<T> ? value(pivot) : 0.0f;
  float s = 0, q = 0;
  for (int64_t p = 0; p < pixels;) {
    float part = 0;
    for (const int64_t end = min64(p + kRun, pixels); p < end; ++p) part += to_float(x[p * stride]) - about;
    s += part;
  }
  const float mean = about + s / (float)pixels;
  for (int64_t p = 0; p < pixels;) {
    float part = 0;
    for (const int64_t end = min64(p + kRun, pixels); p < end; ++p) {
      const float delta = to_float(x[p * stride]) - mean;
      part += delta * delta;
    }
    q += part;
  }
  *sum = s;
  *square = q;
}

template <class T>
void slab_sums(const GroupNormSiluArgs& g, const Plan& plan, int64_t n, int64_t chunk, int64_t slab,
               bool own_pivot = false) {
  const int64_t first = chunk * kPixels, pixels = min64(kPixels, g.P - first), end = min64(g.C, (slab + 1) * kSlab);
  const T* sample = (const T*)g.x + n * g.stride_xn;
  const T* x = sample + first * g.stride_xp;   // [pixels, C]
  const Pivot<T> pivot = own_pivot ? pivot_of(x, pixels, g.stride_xp) : pivot_of(sample, g.P, g.stride_xp);
  float *sum = plan.sums + (n * plan.chunks + chunk) * 2 * g.C, *square = sum + g.C;
  int64_t c = slab * kSlab;
  for (; c + 2 * kPair <= end; c += 2 * kPair) {
    const int64_t ahead = c + 2 * kPair < g.C ? 2 * kPair : kPixels * g.stride_xp - c;
    block_sums<T, 2>(x + c, pivot.at(c), pixels, g.stride_xp, ahead, sum + c, square + c);
  }
  for (; c + kPair <= end; c += kPair) {
    block_sums<T, 1>(x + c, pivot.at(c), pixels, g.stride_xp, kPair, sum + c, square + c);
  }
  for (; c < end; ++c) channel_sums(x + c, pivot.at(c), pixels, g.stride_xp, sum + c, square + c);
}

// The sums of all chunks into those of chunk 0, for kLanes channels from c on.
void merge_chunks(const GroupNormSiluArgs& g, const Plan& plan, int64_t n, int64_t c) {
  const int64_t width = min64(kLanes, g.C - c);
  float* first = plan.sums + n * plan.chunks * 2 * g.C + c;
  VecF total{}, squares{}, lost_total{}, lost_squares{};
  const auto add = [](VecF& sum, VecF& lost, VecF term) {  // Kahan's: with what the last addition rounded away
    term -= lost;
    const VecF next = sum + term;
    lost = (next - sum) - term;
    sum = next;
  };
  for (int64_t i = 0; i < plan.chunks; ++i) add(total, lost_total, load_first(first + i * 2 * g.C, width));
  const VecF mean = total / (float)g.P;
  for (int64_t i = 0; i < plan.chunks; ++i) {
    const float pixels = (float)min64(kPixels, g.P - i * kPixels);
    const VecF delta = load_first(first + i * 2 * g.C, width) / pixels - mean;
    add(squares, lost_squares, load_first(first + (2 * i + 1) * g.C, width) + delta * delta * pixels);
  }
  store_first(first, total, width);
  store_first(first + g.C, squares, width);
}

template <class T, bool kSilu>
void merge_channels(const GroupNormSiluArgs& g, const Plan& plan, int64_t n, int64_t group) {
  const int64_t D = g.C / g.groups;
  const float *sum = plan.sums + n * plan.chunks * 2 * g.C, *square = sum + g.C;
  const Pivot<T> pivot = pivot_of((const T*)g.x + n * g.stride_xn, g.P, g.stride_xp);
  Moments all{};
  for (int64_t c = group * D; c < (group + 1) * D; ++c) {
    const int64_t at = slot<T>(c, g.C);
    const double offset = (double)added(g, n, c) + (kPivot<T> ? (double)value(pivot.at(c)) : 0.0);
    all.merge((double)g.P, sum[at] / (double)g.P + offset, square[at]);
  }
  const double scale = rstd(all, g.eps);
  float* mean = plan.coefficients + n * 3 * g.C;
  for (int64_t c = group * D; c < (group + 1) * D; ++c) {
    const Affine k = affine<kFastSilu<T, kSilu>>(g, all.mean, scale, n, c);
    const int64_t at = slot<T>(c, g.C);
    mean[at] = k.mean;
    mean[g.C + at] = k.a;
    mean[2 * g.C + at] = k.b;
  }
}

template <class T, bool kSilu> void merge(const GroupNormSiluArgs& g, const Plan& plan, int64_t n, int64_t bundle) {
  const int64_t D = g.C / g.groups, first = bundle * plan.bundle, end = min64(g.groups, first + plan.bundle);
  for (int64_t c = first * D; c < end * D; c += kLanes) merge_chunks(g, plan, n, c);
  for (int64_t group = first; group < end; ++group) merge_channels<T, kSilu>(g, plan, n, group);
}

// kPairs pairs of vectors, each channel with its own map. A loop of its own beside the contiguous one's: one writer for
// both, on an object that gave the maps, took 6 to 9 % longer in float32 with AVX2 (GCC 12, Zen 4, one thread).
template <class T, bool kSilu, int kPairs>
LDMFAST_INLINE void write_channels(const T* x, T* y, const float* mean, const float* a, const float* b) {
  VecF v[2 * kPairs];
#pragma GCC unroll 3
  for (int j = 0; j < kPairs; ++j) load_pair(x + j * kPair, v[2 * j], v[2 * j + 1]);
#pragma GCC unroll 6
  for (int j = 0; j < 2 * kPairs; ++j) {
    v[j] = apply<T, kSilu>(v[j], load(mean + j * kLanes), load(a + j * kLanes), load(b + j * kLanes));
  }
#pragma GCC unroll 3
  for (int j = 0; j < kPairs; ++j) write_pair<T, kSilu>(y + j * kPair, v[2 * j], v[2 * j + 1]);
}

template <class T, bool kSilu>
void write_block(const GroupNormSiluArgs& g, const Plan& plan, int64_t n, int64_t block) {
  const int64_t end = min64(g.P, (block + 1) * plan.rows);
  const float *mean = plan.coefficients + n * 3 * g.C, *a = mean + g.C, *b = a + g.C;
  for (int64_t p = block * plan.rows; p < end; ++p) {
    const T* x = (const T*)g.x + n * g.stride_xn + p * g.stride_xp;  // [C]
    T* y = (T*)g.y + (n * g.P + p) * g.C;                            // [C]
    int64_t c = 0;
    for (; c + kAbreast * kPair <= g.C; c += kAbreast * kPair) {
      write_channels<T, kSilu, kAbreast>(x + c, y + c, mean + c, a + c, b + c);
    }
    for (; c + kPair <= g.C; c += kPair) write_channels<T, kSilu, 1>(x + c, y + c, mean + c, a + c, b + c);
    for (; c < g.C; c += kLanes) {
      const int64_t w = min64(kLanes, g.C - c);
      VecF v = apply<T, kSilu>(load_first(x + c, w), load_first(mean + c, w), load_first(a + c, w),
                               load_first(b + c, w));
      store_first(y + c, v, w);
    }
  }
}

template <class T, bool kSilu> void channels_last(const GroupNormSiluArgs& g) {
  const Plan plan = plan_of(g);
  const int64_t sums = plan.chunks * plan.slabs;
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.N * sums; ++i) {
      slab_sums<T>(g, plan, i / sums, i % sums / plan.slabs, i % plan.slabs);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.N * plan.bundles; ++i) merge<T, kSilu>(g, plan, i / plan.bundles, i % plan.bundles);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < g.N * plan.blocks; ++i) write_block<T, kSilu>(g, plan, i / plan.blocks, i % plan.blocks);
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
