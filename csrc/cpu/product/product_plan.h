// How product.h divides a product into tasks and blocks of the depth, and the memory that it needs.
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

// The rows and columns of a task, and its thread's scratch.
template <class M> struct Task {
  int64_t m0, m1, n0, n1;
  float *panel, *columns, *sums;  // sums: of the whole task, if there are several blocks

  Task(const Plan& p, int64_t i, float* scratch) {
    const Split& s = p.split;
    m0 = i % s.row_tasks * s.rows, m1 = min64(p.M, m0 + s.rows);
    n0 = i / s.row_tasks * s.columns, n1 = min64(p.N, n0 + s.columns);
    panel = aligned(scratch);
    columns = panel + ceil_div(p.block_words, kPart) * kPanelPart<M>;
    sums = columns + p.block_words * s.columns;
  }
};

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
