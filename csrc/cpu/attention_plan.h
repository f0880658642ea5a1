// What attention.cpp's work is divided into, and the packing of a head's K and V.
#pragma once
#include <omp.h>

#include "attention_fixed.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kTaskRows = 64 / kRows * kRows;  // queries of one task, which share a block of K and V in the caches
// of K and V in one block of keys; what a block costs beside its products weighs more where products are 8 wide
constexpr int64_t kBlockBytes = (kLanes == 16 ? 36 : 128) * 1024;
// Of K and V of all heads of a sample, up to which a thread takes the same queries of all heads one after the other: a
// row of queries has all heads side by side, and so has the result (4096 x 77, 8 heads of 40, one Zen 4 core: 6.84 to
// 6.58 ms).
constexpr int64_t kTogetherBytes = 512 * 1024;
constexpr int64_t kSerial = 256 * 1024;     // products below which waking threads costs more than it gives
constexpr int64_t kTaskFloats = 64 * 1024;  // queries and sums of one task
// Of these or fewer, each word of a packed K and V is used so seldom that fetching it from another core's cache shows,
// most where the cores share none (64 x 64, 8 heads of 160, two Zen 4 cores of one CCD and of two: 240 and 460 us).
constexpr int64_t kFewQueries = 1024;

struct Plan {
  int64_t depth, parts;           // words of a query or key; kPart words each
  bool fixed;                     // Fixed is used, if a head's numbers allow it
  int64_t key_depth;              // words of a packed key: fewer then
  int64_t width;                  // padded head width: words of a packed row of V, floats of a row of sums
  int64_t keys, key_words;        // S, padded; packed rows of V
  int64_t block;                  // keys between two updates of the maximum
  int64_t task_rows, head_tasks;  // queries of a task; tasks of a head
  int64_t panel;                  // queries that take a block of keys together: where a key is long, all of a task
  int64_t together;               // heads whose tasks of the same queries a thread takes one after the other
  int64_t threads, scratch;       // floats of scratch per thread
  bool by_head;                   // a thread takes whole heads, and packs their K and V where it packed the last ones
  size_t bytes;
  float *k, *v, *norms, *thread;  // norms: [packed heads, 3, key_tiles], see norms_of
  int64_t key_tiles;              // of a head, padded to whole vectors
};

template <class T> Plan plan_of(const AttentionArgs& a) {
  constexpr int pack = MathOf<T>::type::kPack;
  Plan p;
  p.fixed = Fixed<T>::kUsed && a.D <= Fixed<T>::kWidest;
  p.depth = ceil_div(a.D, pack);
  p.parts = ceil_div(p.depth, kPart);
  p.key_depth = p.fixed ? ceil_div(a.D, Fixed<T>::kPack) : p.depth;
  p.width = ceil_div(a.D, kLanes) * kLanes;
  if (kHalf && a.D > kLanes && p.width - a.D >= kHalf) p.width -= kHalf;
  p.keys = ceil_div(a.S, kTile) * kTile;
  p.key_words = ceil_div(a.S, pack);
  const int64_t fit = kBlockBytes / (4 * (p.key_depth + p.width / pack)) / kTile * kTile;
  p.block = p.parts > 1 ? kKeys / 2 : max64(kTile, min64(kKeys, fit));
  p.threads = a.N * a.H * a.L * a.S * a.D > kSerial ? max64(1, omp_get_max_threads()) : 1;
  const int64_t heads = a.N * a.H, turns = ceil_div(heads, p.threads) * p.threads;
  p.by_head = p.threads == 1 || (a.L <= kFewQueries && (turns == heads || 16 * heads >= 15 * turns));
  const int64_t share = p.by_head ? a.L : ceil_div(heads * a.L, 4 * p.threads);  // four tasks a thread
  const int64_t wanted = ceil_div(share, kRows) * kRows;
  const int64_t fitting = kTaskFloats / (p.width + p.parts * kPart) / kRows * kRows;
  p.task_rows = max64(kRows, min64(min64(wanted, fitting), kTaskRows));
  p.head_tasks = ceil_div(a.L, p.task_rows);
  const bool odd = kStrip == 2 && p.width % (2 * kLanes) == kLanes;  // strip_rows
  p.panel = p.parts > 1 ? p.task_rows : min64(p.task_rows, odd ? 2 * kRows : kRows);
  p.scratch = p.task_rows * (p.parts * kPart + p.width + kLanes + 2) + 2 * p.panel * kKeys + kLanes;
  if (p.fixed) p.scratch += p.block * p.depth;
  const int64_t head_bytes = 4 * (p.keys * p.key_depth + p.key_words * p.width);
  p.together = p.fixed && !p.by_head && a.H * head_bytes <= kTogetherBytes ? a.H : 1;
  const int64_t packed = p.by_head ? p.threads : heads;  // heads
  p.key_tiles = ceil_div(p.keys / kTile, kLanes) * kLanes;
  const int64_t k_words = packed * p.keys * p.key_depth, v_words = packed * p.key_words * p.width;
  const int64_t norms = p.fixed ? packed * 3 * p.key_tiles : 0;
  p.bytes = (size_t)(k_words + v_words + norms + p.threads * p.scratch) * 4;
  p.k = (float*)a.workspace;
  p.v = p.k + k_words;
  p.norms = p.v + v_words;
  p.thread = p.norms + norms;
  return p;
}

template <class T> const T* keys_of(const AttentionArgs& a, int64_t head, int64_t s) {
  return (const T*)a.k + head / a.H * a.stride_kn + head % a.H * a.stride_kh + s * a.stride_ks;
}

// The norms of kTile keys of a head from s on, which its scale is chosen by.
template <class T> void scan_keys(const AttentionArgs& a, const Plan& p, int64_t head, int64_t slot, int64_t s) {
  if constexpr (Fixed<T>::kUsed) {
    float* norms = p.norms + slot * 3 * p.key_tiles + s / kTile;
    Fixed<T>::scan(keys_of<T>(a, head, s), a.stride_ks, a.S - s, a.D, norms, norms + p.key_tiles);
  }
}

// What the scans of all keys of a head found and, once they are packed, the largest rounding error.
template <class T> KeyNorms norms_of(const AttentionArgs& a, const Plan& p, int64_t slot, bool packed) {
  float most[3] = {};
  for (int i = 0; i < (packed ? 3 : 2); ++i) {
    const float* from = p.norms + (slot * 3 + i) * p.key_tiles;
    VecF x{};
    const int64_t count = ceil_div(a.S, kTile);
    for (int64_t tile = 0; tile < count; tile += kLanes) {
      x = vmax(x, count - tile >= kLanes ? load(from + tile) : load_first(from + tile, count - tile));
    }
    most[i] = reduce_max(x);
  }
  return Fixed<T>::norms_of(most[0], most[1], most[2]);
}

// kTile keys of a head from s on; slot: which packed K and V
template <class M, class T>
void pack_keys(const AttentionArgs& a, const Plan& p, int64_t head, int64_t slot, int64_t s) {
  const T* k = keys_of<T>(a, head, s);
  const T* v = (const T*)a.v + head / a.H * a.stride_vn + head % a.H * a.stride_vh + s * a.stride_vs;
  float* to_k = p.k + (slot * p.keys + s) * p.key_depth;
  if (!p.fixed) interleave_tile<M>(k, a.stride_ks, a.S - s, a.D, p.depth, to_k);
  if constexpr (Fixed<T>::kUsed) if (p.fixed) {
    const float scale = norms_of<T>(a, p, slot, false).scale;
    float error = 0.0f;
    for (int i = 0; i < kTile && scale != 0.0f; i += kLanes) {
      const float here = Fixed<T>::pack_keys(k + i * a.stride_ks, a.stride_ks, a.S - s - i, a.D, scale,
                                             to_k + i * p.key_depth);
      if (here > error) error = here;
    }
    p.norms[(slot * 3 + 2) * p.key_tiles + s / kTile] = error;
  }
  float* to_v = p.v + slot * p.key_words * p.width;  // strips of [key_words, strip]
  for (int64_t at = 0, strip; at < p.width; at += strip) {
    strip = strip_width(p.width - at);
    float* to = to_v + at * p.key_words + s / M::kPack * strip;
    for (int64_t i = 0; i < min64(kTile, a.S - s); i += M::kPack, to += strip) {
      const T *even = v + i * a.stride_vs + at, *odd = s + i + 1 < a.S ? even + a.stride_vs : nullptr;
      for (int64_t d = 0; d < strip; d += kLanes) {
        const VecF x = M::value_words(even + d, odd ? odd + d : nullptr, a.D - at - d);
        if (strip - d >= kLanes) store(to + d, x);
        else store_first(to + d, x, strip - d);
      }
    }
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
