// What a warp does together, with the exact fragment layouts, and the approximate functions (host.h).
//
// With a seed, exp2 and 1 / x are moved by up to 2 ulp, the same for the same input, as ex2.approx, rcp.approx and
// rsqrt.approx may be, and a sum of mma is truncated, as a tensor core's is; denormals are flushed in any case.
#include <algorithm>
#include <limits>

#include "host_primitives.h"
#include "machine.h"

namespace ldmfast {
namespace host {
namespace {

template <class T> T& in(Gate& g, int lane) { return *reinterpret_cast<T*>(g.in[lane]); }
template <class T> T& out(Gate& g, int lane) { return *reinterpret_cast<T*>(g.out[lane]); }

struct Fragment { uint32_t r[4]; };
struct Matrices { int count; bool transpose; };
struct Product { uint32_t a[4], b[2]; float c[4]; };
struct Sum { float c[4]; };

// lane l passes the address of row l % 8 of matrix l / 8; each lane receives two neighbouring elements of each matrix
void spread_rows(Gate& g, const void* argument) {
  const Matrices& wanted = *static_cast<const Matrices*>(argument);
  for (int l = 0; l < kWarp; ++l)
    for (int m = 0; m < wanted.count; ++m) {
      const int major = l / 4, minor = l % 4 * 2;
      uint16_t e[2];
      for (int i = 0; i < 2; ++i) {
        const int row = wanted.transpose ? minor + i : major, column = wanted.transpose ? major : minor + i;
        e[i] = in<const uint16_t*>(g, m * 8 + row)[column];
      }
      out<Fragment>(g, l).r[m] = e[0] | uint32_t(e[1]) << 16;
    }
}

float truncated(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(double(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}
template <int K>
__attribute__((optimize("O3"), noinline))
void multiply(const float (&a)[16][K], const float (&b)[K][8], float (&c)[16][8]) {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
}
template <int K> void multiply_truncated(const float (&a)[16][K], const float (&b)[K][8], float (&c)[16][8]) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      double sum = c[m][n];
      for (int k = 0; k < K; ++k) sum += double(a[m][k]) * b[k][n];
      c[m][n] = truncated(sum);
    }
}
// row g, columns t, t + 1 of lane 4 g + t / 2; register i of a is 8 rows on with bit 0, 8 columns on with bit 1
template <typename T, int K> void multiply_fragments(Gate& g, const void*) {
  float A[16][K], B[K][8], C[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const Product& v = in<Product>(g, l);
    const int row = l / 4, t = l % 4 * 2;
    for (int i = 0; i < K / 4; ++i) {
      const float2 e = unpack2<T>(v.a[i]);
      A[row + 8 * (i & 1)][t + 8 * (i >> 1)] = e.x;
      A[row + 8 * (i & 1)][t + 8 * (i >> 1) + 1] = e.y;
    }
    for (int i = 0; i < K / 8; ++i) {
      const float2 e = unpack2<T>(v.b[i]);
      B[t + 8 * i][row] = e.x;
      B[t + 8 * i + 1][row] = e.y;
    }
    for (int i = 0; i < 4; ++i) C[row + 8 * (i >> 1)][t + (i & 1)] = v.c[i];
  }
  if (machine()->seeded) multiply_truncated<K>(A, B, C);
  else multiply<K>(A, B, C);
  for (int l = 0; l < kWarp; ++l)
    for (int i = 0; i < 4; ++i) out<Sum>(g, l).c[i] = C[l / 4 + 8 * (i >> 1)][l % 4 * 2 + (i & 1)];
}

float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}
// a finite number that is not 0, moved by -2 to 2 ulp
float moved(float y, float x) {
  const Machine& m = *machine();
  if (!m.seeded || y == 0.0f || !std::isfinite(y)) return y;
  uint64_t h = (float_to_bits(x) ^ m.seed << 32) + m.seed;
  h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9ULL, h = (h ^ h >> 27) * 0x94D049BB133111EBULL;
  const float there = bits_to_float(float_to_bits(y) + uint32_t((h >> 33) % 5) - 2);
  return std::isfinite(there) ? there : y;
}
}  // namespace

float shuffle_xor(float v, int mask, Site site) {
  float got;
  collective("shuffle_xor", site, &v, 4, &got, 4, [](Gate& g, const void* m) {
    for (int l = 0; l < kWarp; ++l) out<float>(g, l) = in<float>(g, l ^ *static_cast<const int*>(m));
  }, &mask);
  return got;
}
bool warp_any(bool v, Site site) {
  bool got;
  collective("warp_any", site, &v, 1, &got, 1, [](Gate& g, const void*) {
    bool any = false;
    for (int l = 0; l < kWarp; ++l) any = any || in<bool>(g, l);
    for (int l = 0; l < kWarp; ++l) out<bool>(g, l) = any;
  }, nullptr);
  return got;
}
void ldmatrix(uint32_t* r, const void* row, int matrices, bool transpose, Site site) {
  if (int(self().index.x % kWarp) < 8 * matrices) {
    check_shared(row, 16, 16, "ldmatrix");
    if (machine()->races) traced(row, 16, false, __builtin_return_address(0), true);
  }
  const Matrices wanted = {matrices, transpose};
  Fragment got;
  collective("ldmatrix", site, &row, sizeof(row), &got, sizeof(got), spread_rows, &wanted);
  std::copy(got.r, got.r + matrices, r);
}
void mma(float* c, const uint32_t* a, const uint32_t* b, int k, bool bfloat16, Site site) {
  Product mine = {};
  std::copy(a, a + k / 4, mine.a);
  std::copy(b, b + k / 8, mine.b);
  std::copy(c, c + 4, mine.c);
  Sum got;
  const auto compute = k == 16 ? bfloat16 ? multiply_fragments<bf16, 16> : multiply_fragments<f16, 16>
                               : bfloat16 ? multiply_fragments<bf16, 8> : multiply_fragments<f16, 8>;
  collective("mma", site, &mine, sizeof(mine), &got, sizeof(got), compute, nullptr);
  std::copy(got.c, got.c + 4, c);
}

float exp2(float x) { return flushed(moved(std::exp2(flushed(x)), x)); }
float reciprocal(float x) { return flushed(moved(1.0f / flushed(x), x)); }
float reciprocal_root(float x) { return moved(1.0f / std::sqrt(x), x); }
}  // namespace host
}  // namespace ldmfast
