// attention.cpp by tiles (AMX), in bfloat16.
//
//   for each head:  pack K as tiles [keys / 16, steps], V as tiles [columns, keys / 32]; a tile has 16 words of 16
//   for each task of queries of a head, for each block of kTiledKeys keys, for each panel of 32 queries:
//     scores[32, keys] = q k^T                                                               multiply_block()
//     maximum, decay, as in attention.cpp                                                    update()
//     weights, in the place of the scores: word i of 32 keys is the pair (i, i + 16)         soften()
//     o = o * decay + weights v
//
// A step is 32 elements of the head width, or 32 keys: the words of a tile's row.
#pragma once
#include <float.h>
#include <omp.h>

#include "attention_tiles.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int64_t kPanel = 2 * kTileRows;    // queries
constexpr int64_t kTiledKeys = 256;          // most keys between two updates of the maximum; a multiple of 32
constexpr int64_t kRow = kTiledKeys + 16;    // words from a row of scores to the next: an odd number of lines
constexpr int64_t kTiledRows = 256;          // most queries of a task, which share a block of K and V in the caches
constexpr int64_t kTiledFloats = 128 << 10;  // queries and sums of a task
constexpr int64_t kTiledSerial = 1 << 20;    // products below which waking threads costs more than it gives

struct TiledPlan {
  int64_t steps, columns;         // tiles of a query or key; of a row of V
  int64_t keys;                   // S, padded to whole steps
  int64_t task_rows, head_tasks;  // queries of a task; tasks of a head
  int64_t threads, scratch;       // floats of scratch per thread
  int64_t head_k, head_v;         // words of a packed head
  size_t bytes;
  float *k, *v, *thread;
};

TiledPlan tiled_plan(const AttentionArgs& a) {
  TiledPlan p;
  p.steps = ceil_div(a.D, 32);
  p.columns = ceil_div(a.D, 16);
  p.keys = ceil_div(a.S, 32) * 32;
  p.threads = a.N * a.H * a.L * a.S * a.D > kTiledSerial ? max64(1, omp_get_max_threads()) : 1;
  const int64_t wanted = ceil_div(a.N * a.H * a.L, 4 * p.threads * kPanel) * kPanel;  // four tasks a thread
  const int64_t fitting = kTiledFloats / (16 * (p.columns + p.steps)) / kPanel * kPanel;
  p.task_rows = max64(kPanel, min64(min64(wanted, fitting), kTiledRows));
  p.head_tasks = ceil_div(a.L, p.task_rows);
  p.scratch = p.task_rows * (16 * (p.steps + p.columns) + kLanes + 1) + kPanel * kRow;
  p.scratch = ceil_div(p.scratch, kLanes) * kLanes;
  p.head_k = p.keys * p.steps * 16, p.head_v = p.keys * p.columns * 8;
  const int64_t heads = a.N * a.H;
  p.bytes = (size_t)(heads * (p.head_k + p.head_v) + p.threads * p.scratch) * 4;
  p.k = (float*)a.workspace;
  p.v = p.k + heads * p.head_k;
  p.thread = p.v + heads * p.head_v;
  return p;
}

// 32 keys of a head from s on
void pack_tiles(const AttentionArgs& a, const TiledPlan& p, int64_t head, int64_t s) {
  const int64_t n = head / a.H, h = head % a.H;
  const BFloat16* k = (const BFloat16*)a.k + n * a.stride_kn + h * a.stride_kh + s * a.stride_ks;
  const BFloat16* v = (const BFloat16*)a.v + n * a.stride_vn + h * a.stride_vh + s * a.stride_vs;
  float* to_k = p.k + head * p.head_k + s * p.steps * 16;
  for (int i = 0; i < 32; i += 16, to_k += p.steps * kTileFloats) {
    interleave<Paired>(k + i * a.stride_ks, a.stride_ks, a.S - s - i, a.D, p.steps * 16, to_k);
  }
  for (int64_t column = 0; column < p.columns; ++column) {
    float* to = p.v + head * p.head_v + (column * p.keys + s) * 8;
    const int64_t left = a.D - column * 16;
    for (int64_t i = 0; i < 16; ++i, to += 16) {
      const BFloat16 *first = v + i * a.stride_vs + column * 16, *second = first + 16 * a.stride_vs;
      const bool has_first = s + i < a.S, has_second = s + i + 16 < a.S;
      store(to, has_first ? Paired::value_words(first, has_second ? second : nullptr, left) : VecF{});
    }
  }
}

// to = a b, or to + a b: kR x kC tiles, summed over steps. A step of a is 16 rows `stride_a` words apart, one of b a
// tile.
template <int kR, int kC>
LDMFAST_INLINE void sum_tiles(const float* a, int64_t step_a, int64_t second_a, int64_t stride_a, const float* b,
                              int64_t second_b, int64_t steps, bool add, float* to, int64_t stride) {
  if (add) {
    _tile_loadd(0, to, 4 * stride);
    if constexpr (kC == 2) _tile_loadd(1, to + 16, 4 * stride);
    if constexpr (kR == 2) _tile_loadd(2, to + 16 * stride, 4 * stride);
    if constexpr (kR == 2 && kC == 2) _tile_loadd(3, to + 16 * stride + 16, 4 * stride);
  } else {
    zero_tiles<kR == 2>();
  }
  for (int64_t i = 0; i < steps; ++i, a += step_a, b += kTileFloats) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 4 * stride_a);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kC == 2) {
      _tile_loadd(7, b + second_b, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kR == 2) {
      _tile_loadd(5, a + second_a, 4 * stride_a);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kC == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to, 4 * stride);
  if constexpr (kC == 2) _tile_stored(1, to + 16, 4 * stride);
  if constexpr (kR == 2) _tile_stored(2, to + 16 * stride, 4 * stride);
  if constexpr (kR == 2 && kC == 2) _tile_stored(3, to + 16 * stride + 16, 4 * stride);
}

// 2^t for t of at most 0, plus half a step of bfloat16: cut after the upper 16 bits, it is rounded. 2^t is 2^floor(t)
// times a number from 1 to 2, all of one exponent, so that half a step is in the polynomial's constant.
LDMFAST_INLINE VecF weight_of(VecF t) {
  const VecF f = (VecF)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t - floor(t)
  VecF p = f * 0.0780245221f + 0.226067155f;
  p = p * f + 0.695833499f;
  p = p * f + (0.999925223f + 0x1p-8f);
  return (VecF)_mm512_scalef_ps((__m512)p, (__m512)t);
}

// lane i: the largest of 16 rows' lanes, of row i
LDMFAST_INLINE VecF largest_of_rows(const VecF* rows) {
  constexpr int kOrder[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
  __m512 x[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)rows[kOrder[i]], b = (__m512)rows[kOrder[i + 8]];
    x[i] = _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_max_ps(_mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512d a = (__m512d)x[i], b = (__m512d)x[i + 2];
    x[i] = _mm512_max_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
  return (VecF)_mm512_max_ps(_mm512_shuffle_ps(x[0], x[1], 0x88), _mm512_shuffle_ps(x[0], x[1], 0xdd));
}

// scores to weights, in their place, for 32 * steps keys of one query; returns their lane sums, of what is stored
LDMFAST_INLINE VecF soften_row(float* row, int64_t steps, float factor, float shift) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  __m512 total = _mm512_setzero_ps();
  for (int64_t i = 0; i < steps; ++i) {
    const VecU a = (VecU)weight_of(load(row + 32 * i) * factor - shift);
    const VecU b = (VecU)weight_of(load(row + 32 * i + 16) * factor - shift);
    const __m512i pairs = _mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)(a >> 16), (__m512i)b);
    _mm512_storeu_si512(row + 16 * i, pairs);
    total = _mm512_dpbf16_ps(total, (__m512bh)pairs, ones);
  }
  return (VecF)total;
}

// A task's state and its one thread's scratch.
struct TiledTask {
  const AttentionArgs& a;
  const TiledPlan& p;
  const int64_t head, first, rows;  // queries [first, first + rows) of the head
  const int64_t width;              // of a row of sums
  float *scores, *q, *o;            // [kPanel, kRow], [rows / kPanel, steps, kPanel, 16], [rows, width]
  float *sum, *maximum;             // [rows, kLanes], [rows]

  TiledTask(const AttentionArgs& a, const TiledPlan& p, int64_t i, float* scratch)
      : a(a), p(p), head(i / p.head_tasks), first(i % p.head_tasks * p.task_rows),
        rows(min64(p.task_rows, a.L - first)), width(16 * p.columns) {
    scores = scratch;
    q = scores + kPanel * kRow;
    o = q + p.task_rows * p.steps * 16;
    sum = o + p.task_rows * width;
    maximum = sum + p.task_rows * kLanes;
  }

  void begin() {
    const BFloat16* from = (const BFloat16*)a.q + head / a.H * a.stride_qn + head % a.H * a.stride_qh +
                           first * a.stride_ql;
    const VecU flip = splat_u(a.scale < 0 ? Paired::kSign : 0);  // so that factors are positive, and maxima maxima
    for (int64_t r = 0; r < ceil_div(rows, kPanel) * kPanel; ++r) {
      float* to = q + r / kPanel * p.steps * kPanel * 16 + r % kPanel * 16;
      for (int64_t step = 0; step < p.steps; ++step, to += kPanel * 16) {
        const VecF x = r < rows ? Paired::words(from + r * a.stride_ql + step * 32, a.D - step * 32) : VecF{};
        store(to, (VecF)((VecU)x ^ flip));
      }
      store(sum + r * kLanes, VecF{});
      maximum[r] = -kInf;
    }
  }

  // the scores of a panel's 16 or 32 rows and 16-key tiles [0, tiles) of the block
  template <int kR> void multiply_block(const float* from, const float* k, int64_t tiles) {
    const int64_t tile = p.steps * kTileFloats;
    for (int64_t i = 0; i < tiles; i += 2, k += 2 * tile) {
      float* to = scores + i * 16;
      if (i + 1 < tiles) sum_tiles<kR, 2>(from, 2 * kTileFloats, kTileFloats, 16, k, tile, p.steps, false, to, kRow);
      else sum_tiles<kR, 1>(from, 2 * kTileFloats, kTileFloats, 16, k, tile, p.steps, false, to, kRow);
    }
  }
  template <int kR> void multiply_values(float* to, const float* v, int64_t steps, bool add) {
    const int64_t column = p.keys * 8;
    for (int64_t i = 0; i < p.columns; i += 2, to += 32, v += 2 * column) {
      if (i + 1 < p.columns) sum_tiles<kR, 2>(scores, 16, 16 * kRow, kRow, v, column, steps, add, to, width);
      else sum_tiles<kR, 1>(scores, 16, 16 * kRow, kRow, v, column, steps, add, to, width);
    }
  }

  // scores to weights for the 16 queries from r on, whose scores are `score`, and their sums so far times their decay
  void soften(int64_t r, int64_t s0, int64_t count, float* score) {
    const int64_t valid = min64(16, rows - r), tiles = ceil_div(count, 16), steps = ceil_div(count, 32);
    // with a scale of 0 the keys that pad a block, whose score is -inf, would become NaN
    float factor = (a.scale < 0 ? -a.scale : a.scale) * kLog2e;
    factor = factor > FLT_MIN ? factor : FLT_MIN;
    if (a.mask) {
      for (int64_t i = 0; i < valid; ++i) apply_mask(a, head, first + r + i, s0, count, factor, score + i * kRow);
      factor = 1.0f;
    }
    for (int64_t s = count; s < 32 * steps; ++s) {
      for (int64_t i = 0; i < 16; ++i) score[i * kRow + s] = -kInf;
    }
    VecF largest[16];
    for (int64_t i = 0; i < 16; ++i) {
      VecF m0 = splat(-kInf), m1 = m0;
      for (int64_t s = 0; s < tiles * 16; s += 32) {
        m0 = vmax(load(score + i * kRow + s), m0);  // the second operand survives where the score is NaN
        m1 = vmax(load(score + i * kRow + s + 16), m1);
      }
      largest[i] = vmax(m0, m1);
    }
    const VecF before = load(maximum + r), here = largest_of_rows(largest) * factor;
    const VecF now = here > before ? here : before;
    const VecF shift = now == splat(-kInf) ? VecF{} : now;  // no key attended to so far
    const VecF change = exp2v<Accuracy::kFull>(before - shift);
    store(maximum + r, now);
    float shifts[16], changes[16];
    store(shifts, shift);
    store(changes, change);
    for (int64_t i = 0; i < valid; ++i) {
      float* total = sum + (r + i) * kLanes;
      store(total, load(total) * changes[i] + soften_row(score + i * kRow, steps, factor, shifts[i]));
      if (s0 == 0 || changes[i] == 1.0f) continue;
      float* row = o + (r + i) * width;
      for (int64_t d = 0; d < width; d += kLanes) store(row + d, load(row + d) * changes[i]);
    }
  }

  template <int kR> void block(int64_t r, int64_t s0) {
    const int64_t count = min64(kTiledKeys, a.S - s0);
    multiply_block<kR>(q + r * p.steps * 16, p.k + head * p.head_k + s0 * p.steps * 16, ceil_div(count, 16));
    for (int i = 0; i < kR; ++i) soften(r + 16 * i, s0, count, scores + 16 * i * kRow);
    multiply_values<kR>(o + r * width, p.v + head * p.head_v + s0 * 8, ceil_div(count, 32), s0 > 0);
  }

  void finish() {
    for (int64_t r = 0; r < rows; ++r) {
      BFloat16* out = (BFloat16*)a.out + (((head / a.H) * a.L + first + r) * a.H + head % a.H) * a.D;
      const float total = reduce_add(load(sum + r * kLanes)), inverse = total == 0.0f ? 0.0f : 1.0f / total;
      for (int64_t d = 0; d < a.D; d += kLanes) {
        const VecF x = load(o + r * width + d) * inverse;
        if (a.D - d >= kLanes) store(out + d, x);
        else store_first(out + d, x, a.D - d);
      }
    }
  }

  void run() {
    begin();
    for (int64_t s = 0; s < a.S; s += kTiledKeys) {
      for (int64_t r = 0; r < rows; r += kPanel) {
        if (rows - r > kTileRows) block<2>(r, s);
        else block<1>(r, s);
      }
    }
    finish();
  }
};

void tiled_attention(const AttentionArgs& a) {
  const TiledPlan p = tiled_plan(a);
  const int64_t heads = a.N * a.H, groups = p.keys / 32;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads * groups; ++i) pack_tiles(a, p, i / groups, i % groups * 32);
    const Tiles tiles;
    float* scratch = p.thread + omp_get_thread_num() * p.scratch;
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < heads * p.head_tasks; ++i) TiledTask(a, p, i, scratch).run();
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast

#endif
