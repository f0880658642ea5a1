// The loops around gemm.h's kernel: tasks, blocks, panels, tiles.
#pragma once
#include "product_tiled.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

// Source has:
//   int64_t words(block)                                  the words of a block of the depth
//   const float* rows_in_place(first, block, stride)      the words of a row and the stride to the next, or null:
//   void rows(first, count, block, to)                    packs a panel [parts, kRows, kPart]
//   void columns(first, block, to)                        packs a tile of columns [words, kTile]
//   void finish(row, rows, column, sums, stride_sums)     writes a tile
//   bool straight(row, column), Straight<T> to(row, column)    whether and how a whole tile is written from the registers
template <class M, class Source> void run_task(const Plan& p, const Source& source, int64_t task, float* scratch) {
  const auto [m0, m1, n0, n1, panel, columns, sums] = Task<M>(p, task, scratch);
  const Split& s = p.split;
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
