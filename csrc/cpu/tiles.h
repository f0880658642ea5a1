// Products by tiles (AMX): 16 x 16 sums in a register, of operands in bfloat16, two a word.
//
//   tiles 0 to 3: sums of 2 x 2 tiles; 4 and 5: 16 rows each of a, 16 words; 6 and 7: 16 words of b, 16 columns each
//
// A tile of a is 16 rows of 16 words, any distance apart; one of b is 16 words of 16 columns, as gemm.h packs them.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
#pragma once
#include "simd.h"

#if defined(__AMX_BF16__)

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int kTileRows = 16;  // and words of a row
constexpr int kTileFloats = kTileRows * 16;

// What a processor's tiles are; 64 bytes as LDTILECFG reads them.
struct alignas(64) TileShapes {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];  // of a row
  uint8_t rows[16];
};

// Sums, and a, of `first` and `second` rows.
LDMFAST_INLINE TileShapes tile_shapes(int first = kTileRows, int second = kTileRows) {
  TileShapes shapes = {};
  shapes.palette = 1;
  for (int i = 0; i < 8; ++i) {
    const bool by_row = i < 6;  // its rows are a's
    const bool of_second = i == 2 || i == 3 || i == 5;
    shapes.bytes[i] = 64;
    shapes.rows[i] = (uint8_t)(by_row ? (of_second ? second : first) : kTileRows);
  }
  return shapes;
}

// A thread's tiles, ours while it lives. Afterwards they are as they were: oneDNN, which shares the threads, keeps its
// own from one call to the next.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    set(kTileRows, kTileRows);
  }
  ~Tiles() {
    if (before_.palette) _tile_loadconfig(&before_);
    else _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  // what is in the tiles is lost
  static void set(int first, int second) {
    const TileShapes shapes = tile_shapes(first, second);
    _tile_loadconfig(&shapes);
  }

 private:
  TileShapes before_;
};

// Where 16 words of a row go on: a part holds 32 of each row, `part` words after the one before.
struct TileRows {
  const float* first;
  int64_t stride, part;  // words
  LDMFAST_INLINE const float* step(const TileRows& a, int64_t s) { return a.first + s / 2 * a.part + s % 2 * 16; }
};

// What a processor does between two steps, whose vectors are idle while its tiles multiply. begin: before the first of
// so many steps; step: after each; end: what is left.
struct Nothing {
  LDMFAST_INLINE void begin(int64_t) {}
  LDMFAST_INLINE void step() {}
  LDMFAST_INLINE void end() {}
};

// The sums of 2 x 2 tiles, in registers, += a b over so many steps of 16 words.
template <bool kSecond, class Between>
LDMFAST_INLINE void tile_steps(const TileRows& a, const float* b, int64_t stride_b, int64_t steps, Between& between) {
  const int64_t bytes_a = 4 * a.stride, bytes_b = 4 * stride_b;
  for (int64_t s = 0; s < steps; ++s, b += 16 * stride_b) {
    const float* from = TileRows::step(a, s);
    _tile_loadd(6, b, bytes_b);
    _tile_loadd(4, from, bytes_a);
    _tile_loadd(7, b + 16, bytes_b);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kSecond) {
      _tile_loadd(5, from + 16 * a.stride, bytes_a);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    between.step();
  }
}

// The last words of the depth, fewer than 16, with zeros after them. Of rows rows of a; what follows them is not read.
template <bool kSecond>
void tile_tail(const TileRows& a, int rows, const float* b, int64_t stride_b, int64_t step, int64_t count) {
  alignas(64) float ends_a[2 * kTileFloats] = {}, ends_b[2 * kTileFloats] = {};
  const float* from = TileRows::step(a, step);
  for (int r = 0; r < rows; ++r) memcpy(ends_a + r * 16, from + r * a.stride, 4 * count);
  for (int64_t w = 0; w < count; ++w) memcpy(ends_b + w * 32, b + (step * 16 + w) * stride_b, 128);
  Nothing nothing;
  tile_steps<kSecond>({ends_a, 16, 0}, ends_b, 32, 1, nothing);
}

template <bool kSecond> LDMFAST_INLINE void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kSecond) {
    _tile_zero(2);
    _tile_zero(3);
  }
}
template <bool kSecond> LDMFAST_INLINE void load_tiles(const float* c, int64_t stride) {
  _tile_loadd(0, c, 4 * stride);
  _tile_loadd(1, c + 16, 4 * stride);
  if constexpr (kSecond) {
    _tile_loadd(2, c + 16 * stride, 4 * stride);
    _tile_loadd(3, c + 16 * stride + 16, 4 * stride);
  }
}
template <bool kSecond> LDMFAST_INLINE void store_tiles(float* c, int64_t stride) {
  _tile_stored(0, c, 4 * stride);
  _tile_stored(1, c + 16, 4 * stride);
  if constexpr (kSecond) {
    _tile_stored(2, c + 16 * stride, 4 * stride);
    _tile_stored(3, c + 16 * stride + 16, 4 * stride);
  }
}

// to[rows, 32] = a b, or c + a b, of `words` words; rows are those that a has, 32 or 16, or what Tiles::set says.
template <bool kSecond, class Between>
void multiply_some_tiles(int rows, const TileRows& a, const float* b, int64_t stride_b, int64_t words, const float* c,
                         int64_t stride_c, float* to, int64_t stride_to, Between& between) {
  between.begin(words / 16);
  if (c) load_tiles<kSecond>(c, stride_c);
  else zero_tiles<kSecond>();
  tile_steps<kSecond>(a, b, stride_b, words / 16, between);
  if (words % 16) tile_tail<kSecond>(a, rows, b, stride_b, words / 16, words % 16);
  store_tiles<kSecond>(to, stride_to);
  between.end();
}
template <class Between>
LDMFAST_INLINE void multiply_tiles(int rows, const TileRows& a, const float* b, int64_t stride_b, int64_t words,
                                   const float* c, int64_t stride_c, float* to, int64_t stride_to, Between& between) {
  if (rows > 16) multiply_some_tiles<true>(rows, a, b, stride_b, words, c, stride_c, to, stride_to, between);
  else multiply_some_tiles<false>(rows, a, b, stride_b, words, c, stride_c, to, stride_to, between);
}
LDMFAST_INLINE void multiply_tiles(int rows, const TileRows& a, const float* b, int64_t stride_b, int64_t words,
                                   const float* c, int64_t stride_c, float* to, int64_t stride_to) {
  Nothing nothing;
  multiply_tiles(rows, a, b, stride_b, words, c, stride_c, to, stride_to, nothing);
}

// The same with the sums of 1 x 4 tiles in registers: each word of a is loaded once, which may come from memory.
LDMFAST_INLINE void wide_step(const float* a, int64_t bytes_a, const float* b) {
  _tile_loadd(4, a, bytes_a);
  _tile_loadd(6, b, 256);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b + 16, 256);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(6, b + 32, 256);
  _tile_dpbf16ps(2, 4, 6);
  _tile_loadd(7, b + 48, 256);
  _tile_dpbf16ps(3, 4, 7);
}
// c[rows, 64] = or += a b, of b [words, 64] and 16 rows, or fewer, which Tiles::set was told twice.
void multiply_wide(int rows, const TileRows& a, const float* b, int64_t words, bool add, float* c, int64_t stride_c) {
  if (add) {
    _tile_loadd(0, c, 4 * stride_c);
    _tile_loadd(1, c + 16, 4 * stride_c);
    _tile_loadd(2, c + 32, 4 * stride_c);
    _tile_loadd(3, c + 48, 4 * stride_c);
  } else {
    zero_tiles<true>();
  }
  const int64_t steps = words / 16, bytes_a = 4 * a.stride;
  for (int64_t s = 0; s < steps; ++s, b += 16 * 64) wide_step(TileRows::step(a, s), bytes_a, b);
  if (words % 16) {
    alignas(64) float ends_a[kTileFloats] = {}, ends_b[4 * kTileFloats] = {};
    const float* from = TileRows::step(a, steps);
    for (int r = 0; r < rows; ++r) memcpy(ends_a + r * 16, from + r * a.stride, 4 * (words % 16));
    memcpy(ends_b, b, 256 * (words % 16));
    wide_step(ends_a, 64, ends_b);
  }
  _tile_stored(0, c, 4 * stride_c);
  _tile_stored(1, c + 16, 4 * stride_c);
  _tile_stored(2, c + 32, 4 * stride_c);
  _tile_stored(3, c + 48, 4 * stride_c);
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast

#endif
