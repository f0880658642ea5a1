// attention.cpp by tiles (AMX), in bfloat16.
//
//   for each head:  pack K as tiles [keys / 16, steps], V and a column of ones as tiles [columns, keys / 32]
//   for each task of queries of a head, for each unit, a block of keys and a panel of 32 queries:
//     scores[32, keys] = q k^T                                                               multiply_keys()
//     maximum; decay and shift of each query, as in attention.cpp                            find_maxima()
//     weights, in the place of the scores: word i of 32 keys is the pair (i, i + 16)         soften()
//     o = o * decay + weights v                                                              multiply_values()
//   out = o / the sum of its weights, which the column of ones has made                      finish()
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

constexpr int64_t kTiledKeys = 128;          // most keys between two updates of the maximum; a multiple of 32
constexpr int64_t kRow = kTiledKeys + 16;    // words from a row of scores to the next: an odd number of lines
constexpr int64_t kPanel = 2 * kTileRows;    // queries
constexpr int64_t kTiledRows = 256;          // most queries of a task, which share a block of K and V in the caches
constexpr int64_t kTiledFloats = 128 << 10;  // queries and sums of a task
constexpr int64_t kTiledSerial = 1 << 20;    // products and packing below which waking threads costs more

struct TiledPlan {
  int64_t steps, columns;         // tiles of a query or key; of a row of V and a one
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
  p.columns = ceil_div(a.D + 1, 16);
  p.keys = ceil_div(a.S, 32) * 32;
  p.threads = a.N * a.H * (a.L + 16) * a.S * a.D > kTiledSerial ? max64(1, omp_get_max_threads()) : 1;
  const int64_t wanted = ceil_div(a.N * a.H * a.L, 4 * p.threads * kPanel) * kPanel;  // four tasks a thread
  const int64_t fitting = kTiledFloats / (16 * (p.columns + p.steps)) / kPanel * kPanel;
  p.task_rows = max64(kPanel, min64(min64(wanted, fitting), kTiledRows));
  p.head_tasks = ceil_div(a.L, p.task_rows);
  p.scratch = ceil_div(p.task_rows * (16 * (p.steps + p.columns) + 1) + 2 * kPanel * kRow, kLanes) * kLanes;
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
    const __mmask16 one = left < 16 ? 1u << left : 0;
    for (int64_t i = 0; i < 16; ++i, to += 16) {
      const BFloat16 *first = v + i * a.stride_vs + column * 16, *second = first + 16 * a.stride_vs;
      const bool has_first = s + i < a.S, has_second = s + i + 16 < a.S;
      const VecF x = has_first ? Paired::value_words(first, has_second ? second : nullptr, left) : VecF{};
      store(to, (VecF)_mm512_mask_mov_epi32((__m512i)x, one, _mm512_set1_epi32(0x3f803f80)));
    }
  }
}

// to = a b, or to + a b: 16 or 32 rows and `columns` tiles of columns, summed over `steps` of 16 words
struct TileProduct {
  const float* a;  // rows `stride_a` apart, `step_a` to the next step, `second_a` to the second 16 rows
  int64_t stride_a, step_a, second_a;
  const float* b;  // steps are dense, `column_b` to the next tile of columns
  int64_t column_b;
  int64_t columns, steps;
  bool add;
  float* to;
  int64_t stride;
};

// of kR x kC tiles, from `column` on
template <int kR, int kC> LDMFAST_INLINE void sum_tiles(const TileProduct& x, int64_t column) {
  const float *a = x.a, *b = x.b + column * x.column_b;
  float *to = x.to + 16 * column, *second = to + 16 * x.stride;
  const int64_t bytes = 4 * x.stride, bytes_a = 4 * x.stride_a;
  if (x.add) {
    _tile_loadd(0, to, bytes);
    if constexpr (kC == 2) _tile_loadd(1, to + 16, bytes);
    if constexpr (kR == 2) _tile_loadd(2, second, bytes);
    if constexpr (kR == 2 && kC == 2) _tile_loadd(3, second + 16, bytes);
  } else {
    zero_tiles<kR == 2>();
  }
  for (int64_t i = 0; i < x.steps; ++i, a += x.step_a, b += kTileFloats) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, bytes_a);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kC == 2) {
      _tile_loadd(7, b + x.column_b, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kR == 2) {
      _tile_loadd(5, a + x.second_a, bytes_a);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kC == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to, bytes);
  if constexpr (kC == 2) _tile_stored(1, to + 16, bytes);
  if constexpr (kR == 2) _tile_stored(2, second, bytes);
  if constexpr (kR == 2 && kC == 2) _tile_stored(3, second + 16, bytes);
}
template <int kR> void sum_columns(const TileProduct& x) {
  int64_t column = 0;
  for (; column + 2 <= x.columns; column += 2) sum_tiles<kR, 2>(x, column);
  if (column < x.columns) sum_tiles<kR, 1>(x, column);
}
void sum_product(int64_t rows, const TileProduct& x) {
  if (rows > 16) sum_columns<2>(x);
  else sum_columns<1>(x);
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
  constexpr int kOrder[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};  // as the tree leaves them
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

// scores to weights, in their place, for 32 * steps keys of one query
template <bool kRound> LDMFAST_INLINE void soften_row(float* row, int64_t steps, float factor, float shift) {
  for (int64_t i = 0; i < steps; ++i) {
    const VecU a = (VecU)weight_of(exponent_of<kRound>(load(row + 32 * i), factor, shift));
    const VecU b = (VecU)weight_of(exponent_of<kRound>(load(row + 32 * i + 16), factor, shift));
    _mm512_storeu_si512(row + 16 * i, _mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)(a >> 16), (__m512i)b));
  }
}

// A task's state and its one thread's scratch.
struct TiledTask {
  // up to 32 queries and a block of keys
  struct Unit {
    int64_t r, rows, s, count;        // queries of the task, keys
    float* scores;                    // [kPanel, kRow], then the weights
    alignas(64) float shift[kPanel];  // what is subtracted from a score times its factor
    alignas(64) float decay[kPanel];  // what the sums so far are to be multiplied by
  };

  const AttentionArgs& a;
  const TiledPlan& p;
  const int64_t head, first, rows;  // queries [first, first + rows) of the head
  const int64_t width;              // of a row of sums
  float *scores, *q, *o, *maximum;  // [2, kPanel, kRow], [rows / kPanel, steps, kPanel, 16], [rows, width], [rows]
  float factor;                     // of a score, in powers of two

  TiledTask(const AttentionArgs& a, const TiledPlan& p, int64_t i, float* scratch)
      : a(a), p(p), head(i / p.head_tasks), first(i % p.head_tasks * p.task_rows),
        rows(min64(p.task_rows, a.L - first)), width(16 * p.columns), scores(scratch) {
    q = scores + 2 * kPanel * kRow;
    o = q + p.task_rows * p.steps * 16;
    maximum = o + p.task_rows * width;
    // with a scale of 0 the keys that pad a block, whose score is -inf, would become NaN
    factor = (a.scale < 0 ? -a.scale : a.scale) * kLog2e;
    factor = factor > FLT_MIN ? factor : FLT_MIN;
  }

  void begin() {
    const BFloat16* from = (const BFloat16*)a.q + head / a.H * a.stride_qn + head % a.H * a.stride_qh +
                           first * a.stride_ql;
    const VecU flip = splat_u(a.scale < 0 ? Paired::kSign : 0);  // so that factors are positive, and maxima maxima
    for (int64_t r = 0; r < ceil_div(rows, kPanel) * kPanel; ++r) {
      float* to = q + r / kPanel * p.steps * 2 * kTileFloats + r % kPanel * 16;
      for (int64_t step = 0; step < p.steps; ++step, to += 2 * kTileFloats) {
        const VecF x = r < rows ? Paired::words(from + r * a.stride_ql + step * 32, a.D - step * 32) : VecF{};
        store(to, (VecF)((VecU)x ^ flip));
      }
      maximum[r] = -kInf;
    }
  }

  // unit i: its place, and its scores
  void multiply_keys(int64_t i, Unit& unit) {
    const int64_t panels = ceil_div(rows, kPanel);
    unit.r = i % panels * kPanel, unit.rows = min64(kPanel, rows - unit.r);
    unit.s = i / panels * kTiledKeys, unit.count = min64(kTiledKeys, a.S - unit.s);
    unit.scores = scores + i % 2 * kPanel * kRow;
    const float *from = q + unit.r * p.steps * 16, *k = p.k + head * p.head_k + unit.s * p.steps * 16;
    sum_product(unit.rows, {from, 16, 2 * kTileFloats, kTileFloats, k, p.steps * kTileFloats,
                            ceil_div(unit.count, 16), p.steps, false, unit.scores, kRow});
  }

  // maximum, shift and decay of the 16 queries of the unit from r on
  void find_maxima(Unit& unit, int64_t r) {
    const int64_t valid = min64(16, unit.rows - r);
    float* score = unit.scores + r * kRow;
    float by = factor;
    if (a.mask) {
      for (int64_t i = 0; i < valid; ++i) {
        apply_mask(a, head, first + unit.r + r + i, unit.s, unit.count, factor, score + i * kRow);
      }
      by = 1.0f;
    }
    const int64_t padded = ceil_div(unit.count, 32) * 32;
    if (unit.count < padded) {
      for (int64_t i = 0; i < 16; ++i) {
        for (int64_t s = unit.count; s < padded; ++s) score[i * kRow + s] = -kInf;
      }
    }
    VecF largest[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) largest[i] = splat(-kInf);
    for (int64_t s = 0; s < padded; s += 32) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {  // the second operand survives where the score is NaN
        largest[i] = vmax(load(score + i * kRow + s), largest[i]);
        largest[i] = vmax(load(score + i * kRow + s + 16), largest[i]);
      }
    }
    const VecF before = load(maximum + unit.r + r), here = largest_of_rows(largest) * by;
    const VecF now = here > before ? here : before;
    const VecF shift = now == splat(-kInf) ? VecF{} : now;  // no key attended to so far
    store(maximum + unit.r + r, now);
    store(unit.shift + r, shift);
    store(unit.decay + r, exp2v<Accuracy::kFull>(before - shift));
  }

  // scores to weights
  void soften(Unit& unit) {
    const int64_t steps = ceil_div(unit.count, 32);
    const float by = a.mask ? 1.0f : factor;
    for (int64_t i = 0; i < unit.rows; ++i) {
      float* row = unit.scores + i * kRow;
      if (std::fabs(unit.shift[i]) < kRounded) soften_row<false>(row, steps, by, unit.shift[i]);
      else soften_row<true>(row, steps, by, unit.shift[i]);
    }
  }

  void multiply_values(const Unit& unit) {
    float* to = o + unit.r * width;
    for (int64_t r = 0; unit.s > 0 && r < unit.rows; r += 16) decay_sums(unit.decay + r, to + r * width);
    sum_product(unit.rows, {unit.scores, kRow, 16, 16 * kRow, p.v + head * p.head_v + unit.s * 8, p.keys * 8,
                            p.columns, ceil_div(unit.count, 32), unit.s > 0, to, width});
  }

  // the sums of 16 queries
  void decay_sums(const float* decay, float* to) {
    uint32_t changed = _mm512_cmp_ps_mask(_mm512_load_ps(decay), _mm512_set1_ps(1.0f), _CMP_NEQ_UQ);
    for (; changed; changed &= changed - 1) {
      const int i = __builtin_ctz(changed);
      for (int64_t d = 0; d < width; d += kLanes) store(to + i * width + d, load(to + i * width + d) * decay[i]);
    }
  }

  void finish() {
    for (int64_t r = 0; r < rows; ++r) {
      BFloat16* out = (BFloat16*)a.out + (((head / a.H) * a.L + first + r) * a.H + head % a.H) * a.D;
      const float total = o[r * width + a.D], inverse = total == 0.0f ? 0.0f : 1.0f / total;
      for (int64_t d = 0; d < a.D; d += kLanes) {
        const VecF x = load(o + r * width + d) * inverse;
        if (a.D - d >= kLanes) store(out + d, x);
        else store_first(out + d, x, a.D - d);
      }
    }
  }

  void run() {
    begin();
    // Two units in turn: what one reads was stored a while before, and the reductions of its maxima are not waited for.
    const int64_t count = ceil_div(rows, kPanel) * ceil_div(a.S, kTiledKeys);
    Unit units[2];
    multiply_keys(0, units[0]);
    if (count > 1) multiply_keys(1, units[1]);
    for (int64_t r = 0; r < units[0].rows; r += 16) find_maxima(units[0], r);
    for (int64_t i = 0; i < count; ++i) {
      Unit &unit = units[i % 2], &next = units[(i + 1) % 2];
      soften(unit);
      for (int64_t r = 0; i + 1 < count && r < next.rows; r += 16) find_maxima(next, r);
      multiply_values(unit);
      if (i + 2 < count) multiply_keys(i + 2, unit);
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
