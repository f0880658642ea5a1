// A square of vectors, rows for columns.
#pragma once
#include "simd.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

LDMFAST_INLINE void transpose(VecF* x) {  // [kLanes, kLanes] in place
#if defined(__AVX512F__)
  __m512d t[16];
  __m512 u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = (__m512d)_mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
    t[i + 1] = (__m512d)_mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // u[i + j]: columns j, j + 4, j + 8, j + 12 of rows i to i + 3
    u[i] = (__m512)_mm512_unpacklo_pd(t[i], t[i + 2]);
    u[i + 1] = (__m512)_mm512_unpackhi_pd(t[i], t[i + 2]);
    u[i + 2] = (__m512)_mm512_unpacklo_pd(t[i + 1], t[i + 3]);
    u[i + 3] = (__m512)_mm512_unpackhi_pd(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[j + 4], 0x88), b = _mm512_shuffle_f32x4(u[j], u[j + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[j + 8], u[j + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[j + 8], u[j + 12], 0xdd);
    x[j] = (VecF)_mm512_shuffle_f32x4(a, c, 0x88);
    x[j + 4] = (VecF)_mm512_shuffle_f32x4(b, d, 0x88);
    x[j + 8] = (VecF)_mm512_shuffle_f32x4(a, c, 0xdd);
    x[j + 12] = (VecF)_mm512_shuffle_f32x4(b, d, 0xdd);
  }
#elif defined(__AVX2__)
  __m256d t[8];
  __m256 u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = (__m256d)_mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]);
    t[i + 1] = (__m256d)_mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = (__m256)_mm256_unpacklo_pd(t[i], t[i + 2]);
    u[i + 1] = (__m256)_mm256_unpackhi_pd(t[i], t[i + 2]);
    u[i + 2] = (__m256)_mm256_unpacklo_pd(t[i + 1], t[i + 3]);
    u[i + 3] = (__m256)_mm256_unpackhi_pd(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    x[j] = (VecF)_mm256_permute2f128_ps(u[j], u[j + 4], 0x20);
    x[j + 4] = (VecF)_mm256_permute2f128_ps(u[j], u[j + 4], 0x31);
  }
#else
  float from[kLanes][kLanes], to[kLanes][kLanes];
  memcpy(from, x, sizeof from);
  for (int i = 0; i < kLanes; ++i) for (int j = 0; j < kLanes; ++j) to[i][j] = from[j][i];
  memcpy(x, to, sizeof to);
#endif
}

}  // namespace
}  // namespace LDMFAST_ISA
}  // namespace ldmfast
