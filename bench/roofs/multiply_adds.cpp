// How many multiply-adds a second this processor makes: independent chains in registers, no memory, every thread.
// Built by roof.py once for each instruction set; a multiply and an add count as two operations. Tiles (AMX) are the
// calling process's when ldmfast's module has asked for them.

#include <immintrin.h>

namespace {

constexpr int kChains = 12;  // enough to cover a latency of 4 to 5 cycles on two ports

#if defined(__AVX512F__)
struct Float32 {
  using Register = __m512;
  static constexpr long long kOperations = 2 * 16;
  static Register set(float value) { return _mm512_set1_ps(value); }
  static Register multiply_add(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }
  static float any(Register a) { return _mm512_cvtss_f32(a); }
};
#elif defined(__AVX2__)
struct Float32 {
  using Register = __m256;
  static constexpr long long kOperations = 2 * 8;
  static Register set(float value) { return _mm256_set1_ps(value); }
  static Register multiply_add(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
  static float any(Register a) { return _mm256_cvtss_f32(a); }
};
#else
struct Float32 {
  using Register = __m128;
  static constexpr long long kOperations = 2 * 4;
  static Register set(float value) { return _mm_set1_ps(value); }
  static Register multiply_add(Register a, Register b, Register c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
  static float any(Register a) { return _mm_cvtss_f32(a); }
};
#endif

#if defined(__AVX512BF16__)
struct Bfloat16 {
  using Register = __m512;
  static constexpr long long kOperations = 2 * 32;
  static Register set(float value) { return _mm512_set1_ps(value); }
  static Register multiply_add(Register a, Register b, Register c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static float any(Register a) { return _mm512_cvtss_f32(a); }
};
#else
using Bfloat16 = Float32;  // widened: the processor has no product of its own
#endif

template <class T>
double operations(long long rounds, float* sink) {
  long long threads = 0;
#pragma omp parallel reduction(+ : threads)
  {
    threads = 1;
    typename T::Register sums[kChains];
    for (auto& sum : sums) sum = T::set(0.0f);
    auto a = T::set(1.0f), b = T::set(1e-9f);
    for (long long i = 0; i < rounds; ++i) {
      asm volatile("" : "+x"(a), "+x"(b));  // unknown to the compiler in every round
#pragma GCC unroll 12
      for (auto& sum : sums) sum = T::multiply_add(a, b, sum);
    }
    float total = 0;
    for (auto& sum : sums) total += T::any(sum);
#pragma omp atomic
    *sink += total;
  }
  return static_cast<double>(threads * rounds * kChains * T::kOperations);
}

#if defined(__AMX_BF16__)
struct alignas(64) Shapes {
  unsigned char palette, start, reserved[14];
  unsigned short bytes[16];
  unsigned char rows[16];
};

// four tiles of sums of zeros
double tile_operations(long long rounds) {
  long long threads = 0;
#pragma omp parallel reduction(+ : threads)
  {
    threads = 1;
    Shapes before, shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) shapes.bytes[i] = 64, shapes.rows[i] = 16;
    _tile_storeconfig(&before);
    _tile_loadconfig(&shapes);
    for (long long i = 0; i < rounds; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (before.palette) _tile_loadconfig(&before);
    else _tile_release();
  }
  return static_cast<double>(threads * rounds * 4) * (2 * 16 * 16 * 32);
}
#endif

}  // namespace

extern "C" double float32(long long rounds, float* sink) { return operations<Float32>(rounds, sink); }
#if defined(__AMX_BF16__)
extern "C" double bfloat16(long long rounds, float*) { return tile_operations(rounds); }
#else
extern "C" double bfloat16(long long rounds, float* sink) { return operations<Bfloat16>(rounds, sink); }
#endif
