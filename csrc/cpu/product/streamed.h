// The matrix product beneath a few tokens: the weight is read where it lies, once, and nothing of it is packed.
//
//   X[words, tokens] = the rows, packed across: kLanes tokens a vector       # stays in the second level
//   for each task, a range of output channels and one of tokens:
//     for each block of the depth:
//       for each kR rows of the weight:                                      # while the next kR come from memory
//         for each group of kV vectors of tokens:
//           totals[kR, kV * kLanes] += weight * X                            # in registers
//     finish(the totals, turned round)                                       # a tile of kTile channels of kLanes tokens
//
// Where a thread has columns enough it packs X for itself: what another one packed would come from its cache. Of more
// tokens than its own cache holds it takes a range, if the ranges can be shared out evenly.
// The blocks of the depth are product.h's and so is the order of every sum: both give the same bits.
#pragma once
#include "product.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// Tokens, beyond which the weight is better packed. On one thread of Zen 5, K = N = 1280 in bfloat16, a cold weight,
// the time packed over the time here: 1.82 of 16 tokens, 1.28 of 64, 1.14 of 128, 1.01 of 256; of 1024 at most 0.84 to 0.92.
template <class M> constexpr int64_t kMostStreamed = M::kTiles ? 128 : 256;
template <class M>
constexpr int kMostVectors = M::kTiles ? 4 : kLanes == 16 ? 5 : 3;  // of tokens whose sums are in registers
constexpr int streamed_rows(int vectors) {          // rows of the weight likewise
  return kLanes == 16 ? (vectors <= 2 ? 14 : vectors == 3 ? 9 : vectors == 4 ? 6 : 5) : 12 / vectors;
}

constexpr int64_t kOwnColumns = 128;  // of a thread, from which on it packs X for itself
constexpr int64_t kOwnTokens = 128;   // of a thread's range, at most
constexpr int64_t kRangeTokens = 320, kRangeColumns = 160;  // of a task, at most: its part of X is in the second level

struct StreamedPlan {
  int64_t M, N;                 // tokens; columns as product.h counts them
  int64_t blocks, block_words;  // of the depth
  int64_t groups, vectors;      // of tokens; vectors of a group
  int64_t columns, range;       // of a task; groups of one
  int64_t column_tasks, ranges, threads;
  bool own;                     // whether each thread has an X of its own
  int64_t queues;               // of tasks: one, or one for each range, which a thread keeps to
  int64_t floats_x, scratch;    // of all X; of a thread
  int64_t lanes() const { return groups * vectors * kLanes; }
  int64_t stride() const { return range * vectors * kLanes; }  // of the totals
  int64_t floats() const { return (own ? threads : 1) * floats_x + threads * scratch + 32; }
};

// How many of the vectors make a group, such that the fewest are added to fill the last one.
LDMFAST_INLINE int64_t even_vectors(int64_t vectors, int64_t most) {
  int64_t best = min64(vectors, most);
  for (int64_t v = best - 1; v > 1; --v) {
    if (ceil_div(vectors, v) * v < ceil_div(vectors, best) * best) best = v;
  }
  return best;
}

// How many of the tiles of columns make a task, such that the thread with the most has the fewest.
LDMFAST_INLINE int64_t even_tiles(int64_t tiles, int64_t threads) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t tasks = 4; tasks > 0; --tasks) {  // of a thread: more of them even out what else a processor does
    const int64_t some = max64(1, min64(ceil_div(tiles, tasks * threads), kRangeColumns / kTile));
    const int64_t most = ceil_div(ceil_div(tiles, some), threads) * some;
    if (most < least) least = most, best = some;
  }
  return best;
}

template <class M> StreamedPlan streamed_plan(const Plan& p) {
  StreamedPlan s = {};
  s.M = p.M, s.N = p.N, s.blocks = p.blocks, s.block_words = p.block_words, s.threads = p.split.threads;
  const int64_t vectors = ceil_div(p.M, kLanes);
  s.vectors = M::kTiles ? (vectors > 2 ? 4 : 2) : even_vectors(vectors, kMostVectors<M>);
  s.groups = ceil_div(vectors, M::kTiles ? kMostVectors<M> : s.vectors);
  const auto split = [&](int64_t most) {
    s.range = ceil_div(s.groups, ceil_div(s.groups * s.vectors * kLanes, most)), s.ranges = ceil_div(s.groups, s.range);
  };
  s.own = p.N >= s.threads * kOwnColumns;
  split(kOwnTokens);
  s.queues = s.own && s.threads % s.ranges == 0 ? s.ranges : 1;
  if (s.queues < s.ranges) split(kRangeTokens);
  s.columns = even_tiles(ceil_div(p.N, kTile), s.threads / s.queues) * kTile;
  s.column_tasks = ceil_div(p.N, s.columns);
  s.floats_x = ceil_div(s.blocks * s.block_words * s.lanes(), 16) * 16;
  const int64_t rows = ceil_div(s.block_words, kPart) * kPart * kLanes;
  s.scratch = max64(rows, s.columns * s.stride() + kLanes * kTile) + 16;
  return s;
}

// totals[kR, kV * kLanes] = or += w[kR, words] x[words, kV * kLanes]; next: the rows that follow, to be fetched.
// Not inlined: among run_task's variables the strides had no registers left and were loaded again with every word.
template <class M, int kR, int kV>
__attribute__((noinline)) void multiply_streamed(const float* w, int64_t stride_w, const float* x, int64_t words,
                                                 bool add, float* totals, int64_t stride_t, const float* next) {
  constexpr int kAbreast = 3, kPointers = (kR + kAbreast - 1) / kAbreast;
  constexpr int64_t kLine = 16;  // words
  VecF sum[kR][kV] = {};
  const float* row[kPointers];
  for (int i = 0; i < kPointers; ++i) row[i] = w + i * kAbreast * stride_w;
  const auto step = [&]() __attribute__((always_inline)) {
    VecF tokens[kV];
#pragma GCC unroll 5
    for (int j = 0; j < kV; ++j) tokens[j] = load(x + j * kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < kR; ++r) {
      const VecF y = broadcast(row[r / kAbreast] + r % kAbreast * stride_w);
#pragma GCC unroll 5
      for (int j = 0; j < kV; ++j) sum[r][j] = M::dot(sum[r][j], y, tokens[j]);
    }
    x += kV * kLanes;
#pragma GCC unroll 5
    for (int i = 0; i < kPointers; ++i) ++row[i];
  };
  int64_t left = words;
  for (; left > 0; left -= kLine, next += kLine) {
#pragma GCC unroll 14
    for (int r = 0; r < kR; ++r) __builtin_prefetch(next + r * stride_w, 0, 2);
    const int64_t count = min64(kLine, left);
    if (count == kLine) {
#pragma GCC unroll kUnroll
      for (int d = 0; d < kLine; ++d) step();
    } else {
      for (int64_t d = 0; d < count; ++d) step();
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 5
    for (int j = 0; j < kV; ++j) {
      float* to = totals + r * stride_t + j * kLanes;
      store(to, add ? load(to) + sum[r][j] : sum[r][j]);
    }
  }
}

// Packs kLanes tokens from m on across, of which `valid` are there: to[words, stride], from rows[kLanes, words] in parts.
template <class Source>
void pack_across(const Source& source, int64_t m, int64_t valid, int64_t block, float* rows, float* to, int64_t stride) {
  constexpr int64_t kAcrossPart = kLanes * kPart;
  const int64_t words = source.words(block);
  if (valid > 0) source.rows(m, (int)valid, block, rows, kAcrossPart);
  for (int64_t w = 0; w < words; w += kPart, rows += kAcrossPart, to += kPart * stride) {
    pack_transposed<Single>(rows, kPart, valid, min64(kPart, words - w), to, stride);
  }
}

// Source has, beside what product.h asks for:
//   void across(m, valid, block, rows, to, stride)                  pack_across, or a way of its own
//   const float* weight_row(row, block), int64_t weight_stride()    the words of a row of the weight, where they lie
//   bool gated(), int64_t outputs()                                 whether a tile is of two runs of rows, and their length
template <class M, class Source> struct Streamed {
  const StreamedPlan& p;
  const Source& source;
  float* x;

  float* x_of(int64_t block, int64_t group) const {
    return x + block * p.block_words * p.lanes() + group * source.words(block) * p.vectors * kLanes;
  }

  void pack(int64_t vector, int64_t block, float* rows) const {
    const int64_t m = vector * kLanes, stride = p.vectors * kLanes;
    float* to = x_of(block, vector / p.vectors) + vector % p.vectors * kLanes;
    source.across(m, max64(0, min64(kLanes, p.M - m)), block, rows, to, stride);
  }

#if defined(__AMX_BF16__)
  // By tiles: 32 rows by two vectors of tokens, or 16 by four, so that the weight is loaded once where all of them are
  // one group. Nothing is fetched ahead: the loads of a tile are as many as the processor keeps up, and prefetches took
  // from them (1280 -> 1280, 3x3, 16x16: 4.3 ms with them, 3.9 without).
  void tile_rows(int64_t row, int64_t end, int64_t block, int64_t g0, int64_t g1, float* totals) const {
    const int64_t words = source.words(block), stride = source.weight_stride(), wide = p.vectors * kLanes;
    const int step = p.vectors == 4 ? kTileRows : 2 * kTileRows;
    for (; row < end; row += step, totals += step * p.stride()) {
      const int rows = (int)min64(step, end - row);
      const int first = (int)min64(kTileRows, rows), second = rows > kTileRows ? rows - kTileRows : first;
      if (rows < step) Tiles::set(first, second);
      const TileRows w = {source.weight_row(row, block), stride, kPart};
      for (int64_t g = g0; g < g1; ++g) {
        float* to = totals + (g - g0) * wide;
        const float* x = x_of(block, g);
        if (wide == 4 * kLanes) multiply_wide(rows, w, x, words, block > 0, to, p.stride());
        else multiply_tiles(rows, w, x, kTile, words, block > 0 ? to : nullptr, p.stride(), to, p.stride());
      }
      if (rows < step) Tiles::set(kTileRows, kTileRows);
    }
  }
#endif

  // rows of the weight of one block times the groups [g0, g1)
  template <int kR, int kV>
  void some_rows(int64_t row, int64_t end, int64_t block, int64_t g0, int64_t g1, const float* next,
                 float* totals) const {
    const int64_t words = source.words(block), stride = source.weight_stride();
    for (; row + kR <= end; row += kR, totals += kR * p.stride()) {
      const float* w = source.weight_row(row, block);
      const float* ahead = row + 2 * kR <= end ? w + kR * stride : next;
      for (int64_t g = g0; g < g1; ++g) {
        multiply_streamed<M, kR, kV>(w, stride, x_of(block, g), words, block > 0, totals + (g - g0) * kV * kLanes,
                                     p.stride(), g > g0 ? w : ahead);
      }
    }
    if constexpr (kR > 1) {
      if (row < end) some_rows<(kR > 4 ? 4 : kR > 2 ? 2 : 1), kV>(row, end, block, g0, g1, next, totals);
    }
  }
  template <int kV = kMostVectors<M>>
  void all_rows(int64_t row, int64_t end, int64_t block, int64_t g0, int64_t g1, const float* next,
                float* totals) const {
#if defined(__AMX_BF16__)
    if constexpr (M::kTiles) return tile_rows(row, end, block, g0, g1, totals);
#endif
    if (p.vectors == kV) return some_rows<streamed_rows(kV), kV>(row, end, block, g0, g1, next, totals);
    if constexpr (kV > 1) all_rows<kV - 1>(row, end, block, g0, g1, next, totals);
  }

  // a tile of the totals, whose runs have `length` rows; n: its column within the task
  void turn_round(const float* totals, int64_t n, int64_t length, float* tile) const {
    for (int j = 0; j < 2; ++j) {
      const int64_t row = source.gated() ? n / 2 : n + j * kLanes;
      const float* from = totals + (row + (source.gated() ? j * (p.columns / 2) : 0)) * p.stride();
      VecF y[kLanes];
      for (int r = 0; r < kLanes; ++r) y[r] = r < length - row ? load(from + r * p.stride()) : VecF{};
      transpose(y);
      for (int r = 0; r < kLanes; ++r) store(tile + r * kTile + j * kLanes, y[r]);
    }
  }

  void run_task(int64_t task, float* totals) const {
    const int64_t g0 = task % p.ranges * p.range, g1 = min64(p.groups, g0 + p.range);
    const int64_t n0 = task / p.ranges * p.columns, n1 = min64(p.N, n0 + p.columns);
    const int runs = source.gated() ? 2 : 1;
    const int64_t first = n0 / runs, length = min64(source.outputs(), ceil_div(n1, runs)) - first;
    const int64_t step = p.queues == p.ranges ? p.threads / p.queues * p.columns : 0;
    const int64_t later = (n0 + step) / runs;  // a task of this thread, likely
    for (int64_t block = 0; block < p.blocks; ++block) {
      const bool last = block + 1 == p.blocks;
      const int64_t follows = min64(last ? later : first, source.outputs() - 1);
      for (int run = 0; run < runs; ++run) {
        const int64_t row = run * source.outputs() + first;
        const float* next = source.weight_row(run * source.outputs() + follows, last ? 0 : block + 1);
        all_rows(row, row + length, block, g0, g1, next, totals + run * (p.columns / runs) * p.stride());
      }
    }
    float* tile = totals + p.columns * p.stride();  // [kLanes, kTile]
    const int64_t m0 = g0 * p.vectors * kLanes, m1 = min64(p.M, g1 * p.vectors * kLanes);
    for (int64_t n = n0; n < n1; n += kTile) {
      for (int64_t m = m0; m < m1; m += kLanes) {
        turn_round(totals + m - m0, n - n0, length, tile);
        source.finish(m, (int)min64(kLanes, p.M - m), n, tile, kTile);
      }
    }
  }
};

template <class M, class Source> void run_streamed(const StreamedPlan& p, const Source& source, float* workspace) {
  float* shared = aligned(workspace);
  const int64_t tasks = p.column_tasks * p.ranges / p.queues;  // of a queue
  int64_t taken[kMostStreamed<Single> / kOwnTokens + 1] = {};
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();  // perhaps fewer than were asked for
    const int64_t packings = p.blocks * p.groups * p.vectors;
    const int64_t share = p.queues > 1 ? p.range * p.vectors * p.blocks : packings;  // of a queue
    const Streamed<M, Source> product{p, source, shared + (p.own ? thread * p.floats_x : 0)};
    float* scratch = aligned(shared + (p.own ? p.threads : 1) * p.floats_x + thread * p.scratch);
    [[maybe_unused]] const TilesOf<M> tiles;
    const auto pack = [&](int64_t i) { product.pack(i / p.blocks, i % p.blocks, scratch); };
    if (!p.own) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < packings; ++i) pack(i);
    }
    for (int64_t queue = thread % p.queues; queue < p.queues; queue += team) {
      if (p.own) {
        for (int64_t i = queue * share; i < min64(packings, (queue + 1) * share); ++i) pack(i);
      }
      for (int64_t i; (i = __atomic_fetch_add(&taken[queue], 1, __ATOMIC_RELAXED)) < tasks;) {
        product.run_task(i * p.queues + queue, scratch);
      }
    }
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
