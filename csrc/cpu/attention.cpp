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
// With AMX, bfloat16 goes by tiles: attention_tiled.h. With AVX2 alone its scores are made of integers of 16 bits, if
// they are near enough: attention_fixed.h.
#include <float.h>
#include <omp.h>

#include <algorithm>

#include "attention_plan.h"
#include "attention_tiled.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// A task's state and its one thread's scratch.
template <class M, class T> struct Task {
  const AttentionArgs& a;
  const Plan& p;
  const int64_t head, slot, first, rows;  // queries [first, first + rows) of the head, whose K and V are in the slot
  float *q, *sum, *maximum, *o;     // [rows / kRows, parts, kRows, kPart], [rows, kLanes], [rows], [rows, width]
  float *scores, *weight;           // [panel, kKeys] each
  float *unit;                      // [rows]: what the scores are to be multiplied by
  float *loose_k;                   // a block of keys in float32, for queries that Fixed does not take
  bool loose[kTaskRows / kRows], any_loose = false;  // kRows queries each

  Task(const AttentionArgs& a, const Plan& p, int64_t head, int64_t slot, int64_t i, float* scratch)
      : a(a), p(p), head(head), slot(slot), first(i * p.task_rows), rows(min64(p.task_rows, a.L - first)) {
    scores = scratch;
    weight = scores + p.panel * kKeys;
    q = weight + p.panel * kKeys;
    sum = q + p.task_rows * p.parts * kPart;
    maximum = sum + p.task_rows * kLanes;
    unit = maximum + p.task_rows;
    loose_k = unit + p.task_rows;
    o = loose_k + (p.fixed ? p.block * p.depth : 0);  // followed by kLanes floats that finish may read
  }

  // kRows queries from r on, for M
  void take(const T* from, int64_t r) {
    const VecU flip = splat_u(a.scale < 0 ? M::kSign : 0);  // so that factors are positive, and maxima maxima
    for (int64_t i = 0; i < kRows; ++i, from += a.stride_ql) {
      for (int64_t w = 0; w < p.depth; w += kLanes) {
        const VecF x = r + i < rows ? M::words(from + w * M::kPack, a.D - w * M::kPack) : VecF{};
        store(q + (r * p.parts + w / kPart * kRows) * kPart + i * kPart + w % kPart, (VecF)((VecU)x ^ flip));
      }
      unit[r + i] = 1.0f;
    }
  }

  void begin() {
    const T* from = (const T*)a.q + head / a.H * a.stride_qn + head % a.H * a.stride_qh + first * a.stride_ql;
    const T* to = (const T*)a.out + (head / a.H * a.L + first) * a.H * a.D + head % a.H * a.D;
    KeyNorms keys{};
    if constexpr (Fixed<T>::kUsed) if (p.fixed) keys = norms_of<T>(a, p, slot, true);
    for (int64_t r = 0; r < rows; r += kRows, from += kRows * a.stride_ql) {
      for (int64_t i = 2 * kRows; Fixed<T>::kUsed && i < min64(3 * kRows, rows - r); ++i) {
        for (int64_t d = 0; d < a.D; d += 32) {
          __builtin_prefetch(from + i * a.stride_ql + d);
          if (p.together > 1) __builtin_prefetch(to + (r + i) * a.H * a.D + d, 1);  // no other thread writes there
        }
      }
      bool& here = loose[r / kRows];
      here = true;
      if constexpr (Fixed<T>::kUsed) {
        here = keys.scale == 0.0f || !Fixed<T>::pack_queries(from, a.stride_ql, rows - r, a.D, a.scale, keys,
                                                             kRows * kPart, q + r * p.parts * kPart, unit + r);
      }
      if (here) take(from, r);
      any_loose = any_loose || here;
    }
    if (a.S > 0) return;  // the first block of keys begins the rest
    for (int64_t i = 0; i < rows * p.width; ++i) o[i] = 0.0f;
    for (int64_t i = 0; i < rows * kLanes; ++i) sum[i] = 0.0f;
  }

  template <bool kLoose, int kVectors>
  LDMFAST_INLINE void multiply_tile(const float* q, const float* k, int64_t depth, int64_t words, bool add, float* s) {
    if constexpr (kLoose) multiply_keys<M, kVectors>(q, k, depth, words, add, s);
    else Fixed<T>::template multiply_keys<kVectors>(q, k, depth, words, add, s);
  }

  // The panel's scores, of queries that are loose or those that are not, and a block's keys as they are packed for
  // them; a part of a tile of keys stays in the first-level cache for all of its rows.
  template <bool kLoose>
  void multiply(int64_t r0, int64_t end, int64_t count, const float* keys, int64_t depth) {
    const int64_t parts = ceil_div(depth, kPart);
    for (int64_t s = 0; s < count; s += kTile) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t words = min64(kPart, depth - part * kPart);
        const float* k = keys + s * depth + part * kPart * kLanes;
        const float* next = part + 1 < parts ? k + kPart * kLanes : k + depth * kTile - part * kPart * kLanes;
        for (int64_t r = r0; r < end; r += kRows) {
          if (Fixed<T>::kUsed && loose[r / kRows] != kLoose) continue;
          if (parts > 1) {
            for (int j = 0; j < 2; ++j) fetch(next + j * depth * kLanes, kPart * kLanes, r - r0, end - r0);
          }
          const float* from = q + (r * p.parts + part * kRows) * kPart;
          float* to = scores + (r - r0) * kKeys + s;
          if (count - s > kLanes) multiply_tile<kLoose, 2>(from, k, depth, words, part > 0, to);
          else multiply_tile<kLoose, 1>(from, k, depth, words, part > 0, to);
        }
      }
    }
  }

  // the panel's scores, multiplied by 1 / unit
  void score(int64_t r0, int64_t end, int64_t s0, int64_t count) {
    const float* keys = p.k + (slot * p.keys + s0) * p.key_depth;
    if constexpr (Fixed<T>::kUsed) if (p.fixed) multiply<false>(r0, end, count, keys, p.key_depth);
    if (any_loose) multiply<true>(r0, end, count, p.fixed ? loose_k : keys, p.depth);
  }

  // scores to weights for kRows queries from r on; decay: what their sums so far are to be multiplied by, but for the
  // first keys
  void soften(int64_t r, int64_t s0, int64_t count, float* score, float* to, float* decay) {
    const int64_t padded = ceil_div(count, kTile) * kTile;
    // with a scale of 0 the keys that pad a block, whose score is -inf, would become NaN
    const float scale = (a.scale < 0 ? -a.scale : a.scale) * kLog2e;
    float factor[kRows], shift[kRows], change[kLanes] = {};
    static_assert(kRows <= kLanes, "the changes of all rows are one vector");
    for (int i = 0; i < kRows; ++i) {
      factor[i] = std::max(scale * unit[r + i], FLT_MIN);
      hide_from(count, padded, score + i * kKeys);
      if (!a.mask) continue;
      apply_mask(a, head, min64(first + r + i, a.L - 1), s0, count, factor[i], score + i * kKeys);
      factor[i] = 1.0f;
    }
    for (int i = 0; i < kRows; ++i) {
      const float before = s0 > 0 ? maximum[r + i] : -kInf, here = row_maximum(score + i * kKeys, padded) * factor[i];
      maximum[r + i] = here > before ? here : before;
      shift[i] = maximum[r + i] == -kInf ? 0.0f : maximum[r + i];  // no key attended to so far
      change[i] = before - shift[i];
    }
    if (s0 > 0) store(change, exp2v<Accuracy::kFull>(load(change)));
    for (int i = 0; i < kRows; ++i) {
      float *row = to + i * kKeys / M::kPack, *total = sum + (r + i) * kLanes;
      const VecF here = weights<M, AccuracyOf<T>::value>(score + i * kKeys, padded, factor[i], shift[i], row);
      store(total, s0 > 0 ? load(total) * change[i] + here : here);
      decay[i] = change[i];
    }
  }

  // a panel of queries from r0 on and the keys [s0, s0 + count)
  void block(int64_t r0, int64_t s0, int64_t count) {
    const int64_t end = min64(r0 + p.panel, ceil_div(rows, kRows) * kRows);
    float decay[kTaskRows];
    score(r0, end, s0, count);
    for (int64_t r = r0; r < end; r += kRows) {
      const int64_t at = (r - r0) * kKeys;
      soften(r, s0, count, scores + at, weight + at / M::kPack, decay + r - r0);
    }
    for (int64_t d = 0, strip; d < p.width; d += strip) {
      strip = strip_width(p.width - d);
      const float* v = p.v + slot * p.key_words * p.width + d * p.key_words + s0 / M::kPack * strip;
      const bool more = d + strip < p.width;
      const float* next = more ? v + strip * p.key_words : p.k + (slot * p.keys + s0 + count) * p.key_depth;
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
      if constexpr (Fixed<T>::kUsed) {
        const float total = Fixed<T>::sum_of(load(sum + r * kLanes));
        Fixed<T>::finish(o + r * p.width, total == 0.0f ? 0.0f : 1.0f / total, D, out);
        continue;
      }
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
      for (int64_t i = s; p.fixed && any_loose && i < min64(s + p.block, a.S); i += kTile) {
        interleave_tile<M>(keys_of<T>(a, head, i), a.stride_ks, a.S - i, a.D, p.depth, loose_k + (i - s) * p.depth);
      }
      for (int64_t r = 0; r < rows; r += p.panel) block(r, s, min64(p.block, a.S - s));
    }
    finish();
  }
};

template <class T> void run(const AttentionArgs& a) {
  using M = typename MathOf<T>::type;
  const Plan p = plan_of<T>(a);
  const int64_t heads = a.N * a.H, key_tiles = p.keys / kTile;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const int64_t thread = omp_get_thread_num();
    float* scratch = p.thread + thread * p.scratch;
    if (p.by_head) {
#pragma omp for schedule(dynamic) nowait
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t tile = 0; p.fixed && tile < key_tiles; ++tile) {
          scan_keys<T>(a, p, head, thread, tile * kTile);
        }
        for (int64_t tile = 0; tile < key_tiles; ++tile) pack_keys<M, T>(a, p, head, thread, tile * kTile);
        for (int64_t i = 0; i < p.head_tasks; ++i) Task<M, T>(a, p, head, thread, i, scratch).run();
      }
    } else {
      if (p.fixed) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads * key_tiles; ++i) {
          scan_keys<T>(a, p, i / key_tiles, i / key_tiles, i % key_tiles * kTile);
        }
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < heads * key_tiles; ++i) {
        pack_keys<M, T>(a, p, i / key_tiles, i / key_tiles, i % key_tiles * kTile);
      }
#pragma omp for schedule(dynamic, p.together) nowait
      for (int64_t i = 0; i < heads * p.head_tasks; ++i) {
        const int64_t j = i / p.together, first = j / p.head_tasks * p.together;  // of heads that are taken together
        Task<M, T>(a, p, first + i % p.together, first + i % p.together, j % p.head_tasks, scratch).run();
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
  if (a.dtype == DType::kBFloat16) return plan_of<BFloat16>(a).bytes;
  return plan_of<float>(a).bytes;
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
