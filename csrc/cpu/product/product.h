// The loops around gemm.h's kernel: tasks, blocks, panels, tiles.
#pragma once
#include "in_place.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// What packing costs a task beside its products, in multiply-adds for a vector of a row and a word of a column.
// A tile does that of 8 vectors in the same time; its processors have twice the second-level cache.
template <class M> constexpr int64_t kRowCost = M::kTiles ? 32 : 4;
template <class M> constexpr int64_t kColumnCost = M::kTiles ? 64 : 8;
template <class M> constexpr int64_t kMaxRows = M::kTiles ? 1024 : 72 * M::kRows;
template <class M> constexpr int64_t kMaxWords = M::kTiles ? 640 : 384;
constexpr int64_t kMaxColumns = 320;

struct Split {
  int64_t rows, columns;              // of a task; multiples of kRows and kTile, or all
  int64_t row_tasks, column_tasks, threads;
};

template <class M>
LDMFAST_INLINE Split split_into(int64_t rows, int64_t N, int64_t row_tasks, int64_t column_tasks) {
  Split s;
  s.rows = ceil_div(ceil_div(rows, M::kRows), row_tasks) * M::kRows;
  s.columns = ceil_div(ceil_div(N, kTile), column_tasks) * kTile;
  s.row_tasks = ceil_div(rows, s.rows);
  s.column_tasks = ceil_div(N, s.columns);
  return s;
}

// The split of rows x N that is estimated to take the least time on the threads.
template <class M> Split split_of(int64_t rows, int64_t N, int64_t depth) {
  constexpr int64_t kSerial = 128 * 1024;  // products below which waking threads costs more than it gives
  const int64_t threads = rows * N * depth > kSerial ? max64(1, omp_get_max_threads()) : 1;
  const int64_t least_rows = ceil_div(rows, kMaxRows<M>), least_columns = ceil_div(N, kMaxColumns);
  Split best = {};
  int64_t least = INT64_MAX;
  for (int64_t i = 0; i <= 2 * threads; ++i) {
    for (int64_t j = 0; j <= 2 * threads; ++j) {
      Split s = split_into<M>(rows, N, least_rows + i, least_columns + j);
      const int64_t task = (s.rows * s.columns + kRowCost<M> * kLanes * s.rows + kColumnCost<M> * s.columns);
      const int64_t time = ceil_div(s.row_tasks * s.column_tasks, threads) * task;
      if (time < least) least = time, best = s;
    }
  }
  best.threads = min64(threads, best.row_tasks * best.column_tasks);
  return best;
}

struct Plan {
  int64_t M, N;
  int64_t blocks, block_words;  // blocks of the depth, and the most words of one
  Split split;
  int64_t scratch;              // floats a thread
};

template <class M> Plan plan_of(int64_t rows, int64_t N, int64_t blocks, int64_t block_words, int64_t depth) {
  Plan p = {rows, N, blocks, block_words, split_of<M>(rows, N, depth), 0};
  const int64_t sums = blocks > 1 ? p.split.rows * p.split.columns : M::kRows * kTile;
  p.scratch = ceil_div(block_words, kPart) * kPanelPart<M> + block_words * p.split.columns + sums + 16;
  return p;
}

// Even blocks of a depth of words.
template <class M> LDMFAST_INLINE int64_t even_block(int64_t words) {
  const int64_t blocks = ceil_div(words, kMaxWords<M>);
  return ceil_div(ceil_div(words, blocks), kLanes) * kLanes;
}

LDMFAST_INLINE float* aligned(float* p) { return (float*)(((uintptr_t)p + 63) / 64 * 64); }

// Source has:
//   int64_t words(block)                                  the words of a block of the depth
//   const float* rows_in_place(first, block, stride)      the words of a row and the stride to the next, or null:
//   void rows(first, count, block, to)                    packs a panel [parts, kRows, kPart]
//   void columns(first, block, to)                        packs a tile of columns [words, kTile]
//   void finish(row, rows, column, sums, stride_sums)     writes a tile
//   bool straight(row, column), Straight<T> to(row, column)    whether and how a whole tile is written from the registers
template <class M, class Source> void run_task(const Plan& p, const Source& source, int64_t task, float* scratch) {
  const Split& s = p.split;
  const int64_t m0 = task % s.row_tasks * s.rows, m1 = min64(p.M, m0 + s.rows);
  const int64_t n0 = task / s.row_tasks * s.columns, n1 = min64(p.N, n0 + s.columns);
  float* panel = aligned(scratch);
  float* columns = panel + ceil_div(p.block_words, kPart) * kPanelPart<M>;
  float* sums = columns + p.block_words * s.columns;
  for (int64_t block = 0; block < p.blocks; ++block) {
    const int64_t words = source.words(block);
    for (int64_t n = n0; n < n1; n += kTile) source.columns(n, block, columns + (n - n0) * words);
    for (int64_t m = m0; m < m1; m += M::kRows) {
      const int rows = (int)min64(M::kRows, m1 - m);
      int64_t stride_a = 0;
      const float* a = source.rows_in_place(m, block, stride_a);
      if (!a) source.rows(m, rows, block, panel);
      const Ahead<M> next(a, stride_a, words, m1 - m - M::kRows, ceil_div(n1 - n0, kTile));
      for (int64_t n = n0; n < n1; n += kTile) {
        float* c = p.blocks > 1 ? sums + (m - m0) * s.columns + (n - n0) : sums;
        const int64_t stride = p.blocks > 1 ? s.columns : kTile;
        const float* b = columns + (n - n0) * words;
        const bool last = block == p.blocks - 1;
        if (a) next.fetch((n - n0) / kTile);
        if (last && rows == M::kRows && source.straight(m, n)) {
          const auto finish = source.to(m, n);
          if (a) multiply_in_place<M, M::kRows, 2>(a, stride_a, b, words, block > 0, c, stride, finish);
          else multiply<M, M::kRows, 2>(panel, b, words, block > 0, c, stride, finish);
          continue;
        }
        if (a) {
          multiply_rows_in_place<M>(rows, a, stride_a, b, words, block > 0, c, stride);
        } else {
          multiply_rows<M>(rows, panel, b, words, block > 0, c, stride);
        }
        if (last) source.finish(m, rows, n, c, stride);
      }
    }
  }
}

#if defined(__AMX_BF16__)
// The rows of a panel's tile that are yet to be written, some with each step of the next product.
template <class Source> struct Unwritten {
  const Source& source;
  const float* sums;  // of the next row
  int64_t stride, m, n;
  int rows;       // that are left
  int64_t share;  // of rows a step, in 1 / kShares
  int64_t due;
  static constexpr int64_t kShares = 64;

  explicit Unwritten(const Source& source) : source(source), sums(nullptr), rows(0), share(0), due(0) {}
  void set(int64_t row, int count, int64_t column, const float* from, int64_t stride_from) {
    m = row, rows = count, n = column, sums = from, stride = stride_from;
  }
  void write(int count) {
    source.finish(m, count, n, sums, stride);
    m += count, sums += count * stride, rows -= count;
  }
  void begin(int64_t steps) { share = ceil_div(rows * kShares, max64(1, steps)), due = 0; }
  void step() {
    due += share;
    const int count = (int)min64(rows, due / kShares);
    if (count > 0) write(count), due -= count * kShares;
  }
  void end() {
    if (rows > 0) write(rows);
  }
};

// run_task by tiles: a tile of sums is written while the next is summed
template <class M, class Source> void run_task_by_tiles(const Plan& p, const Source& source, int64_t task, float* scratch) {
  const Split& s = p.split;
  const int64_t m0 = task % s.row_tasks * s.rows, m1 = min64(p.M, m0 + s.rows);
  const int64_t n0 = task / s.row_tasks * s.columns, n1 = min64(p.N, n0 + s.columns);
  float* panel = aligned(scratch);
  float* columns = panel + ceil_div(p.block_words, kPart) * kPanelPart<M>;
  float* sums = columns + p.block_words * s.columns;
  alignas(64) float tiles[2][M::kRows * kTile];
  Unwritten<Source> unwritten(source);
  int turn = 0;
  for (int64_t block = 0; block < p.blocks; ++block) {
    const int64_t words = source.words(block);
    const bool last = block == p.blocks - 1;
    for (int64_t n = n0; n < n1; n += kTile) source.columns(n, block, columns + (n - n0) * words);
    for (int64_t m = m0; m < m1; m += M::kRows) {
      const int rows = (int)min64(M::kRows, m1 - m);
      int64_t stride_a = 0;
      const float* a = source.rows_in_place(m, block, stride_a);
      if (!a) source.rows(m, rows, block, panel);
      const TileRows from = a ? TileRows{a, stride_a, kPart} : TileRows{panel, kPart, kPanelPart<M>};
      for (int64_t n = n0; n < n1; n += kTile) {
        const float* before = block > 0 ? sums + (m - m0) * s.columns + (n - n0) : nullptr;
        float* to = last ? tiles[turn] : sums + (m - m0) * s.columns + (n - n0);
        const int64_t stride = last ? kTile : s.columns;
        multiply_tiles(rows, from, columns + (n - n0) * words, kTile, words, before, s.columns, to, stride, unwritten);
        if (last) unwritten.set(m, rows, n, to, stride), turn = 1 - turn;
      }
    }
  }
  unwritten.end();
}
#endif

template <class M, class Source> void run_product(const Plan& p, const Source& source, float* workspace) {
  const int64_t tasks = p.split.row_tasks * p.split.column_tasks;
#pragma omp parallel num_threads(p.split.threads) if (p.split.threads > 1)
  {
    float* scratch = workspace + omp_get_thread_num() * p.scratch;
    [[maybe_unused]] const TilesOf<M> tiles;
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < tasks; ++i) {
#if defined(__AMX_BF16__)
      if constexpr (M::kTiles) {
        run_task_by_tiles<M>(p, source, i, scratch);
        continue;
      }
#endif
      if constexpr (!M::kTiles) run_task<M>(p, source, i, scratch);
    }
  }
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
