// product.h's task by tiles (AMX): a tile of sums is written while the next is summed.
#pragma once
#include "product_plan.h"

#if defined(__AMX_BF16__)

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

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

// run_task by tiles
template <class M, class Source>
void run_task_by_tiles(const Plan& p, const Source& source, int64_t task, float* scratch) {
  const auto [m0, m1, n0, n1, panel, columns, sums] = Task<M>(p, task, scratch);
  const Split& s = p.split;
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

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast

#endif
