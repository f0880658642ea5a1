// out = softmax(scale * q k^T + mask) v, in blocks of queries and keys with a running maximum.
// Source: Milakov & Gimelshein 2018 (online softmax); Dao et al. 2022, algorithm 1 (the blocking).
//
//   for each head, each kTile keys:  pack K by columns, V by strips (32-bit words: one float, or two bfloat16)
//   for each head, each task of up to kTaskRows queries:     (by_head: a thread packs a head and does all its tasks)
//     q = its queries; o = 0, sum = 0, maximum = -inf for each of them                      begin()
//     for each block of keys, for each panel of queries:                                    block()
//       scores = q k^T, kRows queries and kTile keys in registers                           multiply()
//       before = maximum; maximum = max(maximum, scores * scale + mask)                     soften()
//       weight = 2^(scores - maximum); decay = 2^(before - maximum)       (in powers of two)
//       sum = sum * decay + weight's sum
//       o = o * decay + weight v, kRows queries and a strip of V in registers
//     out = o / sum                                                                         finish()
//
// With AMX, bfloat16 goes by tiles: attention_tiled.h.
#include <float.h>
#include <omp.h>

#include <algorithm>

#include "attention_tiled.h"
#include "attention_tiles.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kTaskRows = 64 / kRows * kRows;  // queries of one task, which share a block of K and V in the caches
// of K and V in one block of keys; what a block costs beside its products weighs more where products are 8 wide
constexpr int64_t kBlockBytes = (kLanes == 16 ? 36 : 128) * 1024;
constexpr int64_t kSerial = 256 * 1024;     // products below which waking threads costs more than it gives
constexpr int64_t kTaskFloats = 64 * 1024;  // queries and sums of one task
// Of these or fewer, each word of a packed K and V is used so seldom that fetching it from another core's cache shows,
// most where the cores share none (64 x 64, 8 heads of 160, two Zen 4 cores of one CCD and of two: 240 and 460 us).
constexpr int64_t kFewQueries = 1024;

struct Plan {
  int64_t depth, parts;           // words of a query or key; kPart words each
  int64_t width;                  // padded head width: words of a packed row of V, floats of a row of sums
  int64_t keys, key_words;        // S, padded; packed rows of V
  int64_t block;                  // keys between two updates of the maximum
  int64_t task_rows, head_tasks;  // queries of a task; tasks of a head
  int64_t panel;                  // queries that take a block of keys together: where a key is long, all of a task
  int64_t threads, scratch;       // floats of scratch per thread
  bool by_head;                   // a thread takes whole heads, and packs their K and V where it packed the last ones
  size_t bytes;
  float *k, *v, *thread;
};

Plan plan_of(const AttentionArgs& a, int pack) {
  Plan p;
  p.depth = ceil_div(a.D, pack);
  p.parts = ceil_div(p.depth, kPart);
  p.width = ceil_div(a.D, kLanes) * kLanes;
  if (kHalf && a.D > kLanes && p.width - a.D >= kHalf) p.width -= kHalf;
  p.keys = ceil_div(a.S, kTile) * kTile;
  p.key_words = ceil_div(a.S, pack);
  const int64_t fit = kBlockBytes / (4 * (p.depth + p.width / pack)) / kTile * kTile;
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
  p.scratch = p.task_rows * (p.parts * kPart + p.width + kLanes + 1) + 2 * p.panel * kKeys + kLanes;
  const int64_t packed = p.by_head ? p.threads : heads;  // heads
  const int64_t k_words = packed * p.keys * p.depth, v_words = packed * p.key_words * p.width;
  p.bytes = (size_t)(k_words + v_words + p.threads * p.scratch) * 4;
  p.k = (float*)a.workspace;
  p.v = p.k + k_words;
  p.thread = p.v + v_words;
  return p;
}

// kTile keys of a head from s on; slot: which packed K and V
template <class M, class T>
void pack_keys(const AttentionArgs& a, const Plan& p, int64_t head, int64_t slot, int64_t s) {
  const int64_t n = head / a.H, h = head % a.H;
  const T* k = (const T*)a.k + n * a.stride_kn + h * a.stride_kh + s * a.stride_ks;
  const T* v = (const T*)a.v + n * a.stride_vn + h * a.stride_vh + s * a.stride_vs;
  float* to_k = p.k + (slot * p.keys + s) * p.depth;
  for (int i = 0; i < kTile; i += kLanes) {
    interleave<M>(k + i * a.stride_ks, a.stride_ks, a.S - s - i, a.D, p.depth, to_k + i * p.depth);
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

// A task's state and its one thread's scratch.
template <class M, class T> struct Task {
  const AttentionArgs& a;
  const Plan& p;
  const int64_t head, slot, first, rows;  // queries [first, first + rows) of the head, whose K and V are in the slot
  float *q, *sum, *maximum, *o;     // [rows / kRows, parts, kRows, kPart], [rows, kLanes], [rows], [rows, width]
  float *scores, *weight;           // [panel, kKeys] each

  Task(const AttentionArgs& a, const Plan& p, int64_t head, int64_t slot, int64_t i, float* scratch)
      : a(a), p(p), head(head), slot(slot), first(i * p.task_rows), rows(min64(p.task_rows, a.L - first)) {
    scores = scratch;
    weight = scores + p.panel * kKeys;
    q = weight + p.panel * kKeys;
    sum = q + p.task_rows * p.parts * kPart;
    maximum = sum + p.task_rows * kLanes;
    o = maximum + p.task_rows;  // followed by kLanes floats that finish may read
  }

  void begin() {
    const T* from = (const T*)a.q + head / a.H * a.stride_qn + head % a.H * a.stride_qh + first * a.stride_ql;
    const VecU flip = splat_u(a.scale < 0 ? M::kSign : 0);  // so that factors are positive, and maxima maxima
    for (int64_t r = 0; r < ceil_div(rows, kRows) * kRows; ++r) {
      for (int64_t w = 0; w < p.depth; w += kLanes) {
        const VecF x = r < rows ? M::words(from + r * a.stride_ql + w * M::kPack, a.D - w * M::kPack) : VecF{};
        store(q + (r / kRows * p.parts + w / kPart) * kRows * kPart + r % kRows * kPart + w % kPart,
              (VecF)((VecU)x ^ flip));
      }
    }
    if (a.S > 0) return;  // the first block of keys begins the rest
    for (int64_t i = 0; i < rows * p.width; ++i) o[i] = 0.0f;
    for (int64_t i = 0; i < rows * kLanes; ++i) sum[i] = 0.0f;
  }

  // the panel's scores; a part of a tile of keys stays in the first-level cache for all of its rows
  void multiply(int64_t r0, int64_t end, int64_t s0, int64_t count) {
    for (int64_t s = 0; s < count; s += kTile) {
      for (int64_t part = 0; part < p.parts; ++part) {
        const int64_t words = min64(kPart, p.depth - part * kPart);
        const float* k = p.k + (slot * p.keys + s0 + s) * p.depth + part * kPart * kLanes;
        const float* next = part + 1 < p.parts ? k + kPart * kLanes : k + p.depth * kTile - part * kPart * kLanes;
        for (int64_t r = r0; r < end; r += kRows) {
          if (p.parts > 1) {
            for (int j = 0; j < 2; ++j) fetch(next + j * p.depth * kLanes, kPart * kLanes, r - r0, end - r0);
          }
          const float* from = q + (r * p.parts + part * kRows) * kPart;
          float* to = scores + (r - r0) * kKeys + s;
          if (count - s > kLanes) multiply_keys<M, 2>(from, k, p.depth, words, part > 0, to);
          else multiply_keys<M, 1>(from, k, p.depth, words, part > 0, to);
        }
      }
    }
  }

  // scores to weights for kRows queries from r on; decay: what their sums so far are to be multiplied by, but for the
  // first keys
  void soften(int64_t r, int64_t s0, int64_t count, float* score, float* to, float* decay) {
    const int64_t padded = ceil_div(count, kTile) * kTile;
    // with a scale of 0 the keys that pad a block, whose score is -inf, would become NaN
    float factor = std::max((a.scale < 0 ? -a.scale : a.scale) * kLog2e, FLT_MIN), shift[kRows], change[kLanes] = {};
    static_assert(kRows <= kLanes, "the changes of all rows are one vector");
    for (int i = 0; i < kRows; ++i) {
      hide_from(count, padded, score + i * kKeys);
      if (a.mask) apply_mask(a, head, min64(first + r + i, a.L - 1), s0, count, factor, score + i * kKeys);
    }
    if (a.mask) factor = 1.0f;
    for (int i = 0; i < kRows; ++i) {
      const float before = s0 > 0 ? maximum[r + i] : -kInf, here = row_maximum(score + i * kKeys, padded) * factor;
      maximum[r + i] = here > before ? here : before;
      shift[i] = maximum[r + i] == -kInf ? 0.0f : maximum[r + i];  // no key attended to so far
      change[i] = before - shift[i];
    }
    if (s0 > 0) store(change, exp2v<Accuracy::kFull>(load(change)));
    for (int i = 0; i < kRows; ++i) {
      float *row = to + i * kKeys / M::kPack, *total = sum + (r + i) * kLanes;
      const VecF here = weights<M, AccuracyOf<T>::value>(score + i * kKeys, padded, factor, shift[i], row);
      store(total, s0 > 0 ? load(total) * change[i] + here : here);
      decay[i] = change[i];
    }
  }

  // a panel of queries from r0 on and the keys [s0, s0 + count)
  void block(int64_t r0, int64_t s0, int64_t count) {
    const int64_t end = min64(r0 + p.panel, ceil_div(rows, kRows) * kRows);
    float decay[kTaskRows];
    multiply(r0, end, s0, count);
    for (int64_t r = r0; r < end; r += kRows) {
      const int64_t at = (r - r0) * kKeys;
      soften(r, s0, count, scores + at, weight + at / M::kPack, decay + r - r0);
    }
    for (int64_t d = 0, strip; d < p.width; d += strip) {
      strip = strip_width(p.width - d);
      const float* v = p.v + slot * p.key_words * p.width + d * p.key_words + s0 / M::kPack * strip;
      const bool more = d + strip < p.width;
      const float* next = more ? v + strip * p.key_words : p.k + (slot * p.keys + s0 + count) * p.depth;
      for (int64_t r = r0, some; r < end; r += some) {
        some = strip_rows(strip, end - r);
        if (p.parts > 1) fetch(next, ceil_div(count, M::kPack) * strip, r - r0, end - r0);
        multiply_strip<M>(some, strip, weight + (r - r0) * kKeys / M::kPack, v, ceil_div(count, M::kPack), p.width,
                          s0 > 0 ? decay + r - r0 : nullptr, o + r * p.width + d);
      }
    }
  }

  void finish() {
    const int64_t D = a.D, step = a.H * D;
    T* out = (T*)a.out + (head / a.H * a.L + first) * step + head % a.H * D;
    for (int64_t r = 0; r < rows; ++r, out += step) {
      const float total = reduce_add(load(sum + r * kLanes)), inverse = total == 0.0f ? 0.0f : 1.0f / total;
      for (int64_t d = 0; d < D; d += kLanes) {
        const VecF x = load(o + r * p.width + d) * inverse;
        if (D - d >= kLanes) store(out + d, x);
        else store_first(out + d, x, D - d);
      }
    }
  }

  void run() {
    begin();
    for (int64_t s = 0; s < a.S; s += p.block) {
      for (int64_t r = 0; r < rows; r += p.panel) block(r, s, min64(p.block, a.S - s));
    }
    finish();
  }
};

template <class T> void run(const AttentionArgs& a) {
  using M = typename MathOf<T>::type;
  const Plan p = plan_of(a, M::kPack);
  const int64_t heads = a.N * a.H, key_tiles = p.keys / kTile;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const int64_t thread = omp_get_thread_num();
    float* scratch = p.thread + thread * p.scratch;
    if (p.by_head) {
#pragma omp for schedule(dynamic) nowait
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t tile = 0; tile < key_tiles; ++tile) pack_keys<M, T>(a, p, head, thread, tile * kTile);
        for (int64_t i = 0; i < p.head_tasks; ++i) Task<M, T>(a, p, head, thread, i, scratch).run();
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < heads * key_tiles; ++i) {
        pack_keys<M, T>(a, p, i / key_tiles, i / key_tiles, i % key_tiles * kTile);
      }
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < heads * p.head_tasks; ++i) {
        Task<M, T>(a, p, i / p.head_tasks, i / p.head_tasks, i % p.head_tasks, scratch).run();
      }
    }
  }
}

}  // namespace

size_t attention_workspace(const AttentionArgs& a) {
  if (a.N * a.L * a.H * a.D == 0) return 0;
#if defined(__AMX_BF16__)
  if (a.dtype == DType::kBFloat16) return tiled_plan(a).bytes;
#endif
  return plan_of(a, a.dtype == DType::kBFloat16 ? MathOf<BFloat16>::type::kPack : 1).bytes;
}

void attention(const AttentionArgs& a) {
  if (a.N * a.L * a.H * a.D == 0) return;
  if (a.dtype == DType::kFloat32) return run<float>(a);
#if defined(__AMX_BF16__)
  if (a.dtype == DType::kBFloat16) return tiled_attention(a);
#else
  if (a.dtype == DType::kBFloat16) return run<BFloat16>(a);
#endif
  return run<Half>(a);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
