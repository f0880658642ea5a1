// The gradient of timestep_mlp with regard to its weights and biases. Traffic: the weights, and their gradients.
//
//   rounds of tasks, one parallel region; e, h, da are of all samples and float32:
//     for each sample n:              e[n] = sinusoid(t[n]); dout[n] in float32
//     for each row f of w1:           for n: a = w1[f] . e[n] + b1[f]; h[n][f] = silu(a); da[n][f] = silu'(a)
//     for each vector f of hidden:    for n: da[n][f] *= sum over rows i of w2 of dout[n][i] * w2[i][f]
//     for each row f of w1:           dw1[f] = sum over n of da[n][f] * e[n]; db1[f] = sum over n of da[n][f]
//     for each row i of w2:           dw2[i] = sum over n of dout[n][i] * h[n]; db2[i] = sum over n of dout[n][i]
//
//   weighted(), the sum over rows r of column[r] * rows[r]: a vector of rows' columns at a time, with a fresh sum every
//   kSum rows
#include "exponential.h"
#include "sinusoid.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

using Args = TimestepMlpBackwardArgs;

constexpr int64_t kSerial = 64 * 1024;  // products below which waking threads costs more than it gives
constexpr int64_t kSum = 128;           // products in one running sum, so that float32 keeps its last bits

struct Work { float *e, *h, *da, *dout; };  // [N, dim], [N, F], [N, F] (silu' before it is da), [N, E]

Work work_of(const Args& m) {
  Work w{m.workspace};
  w.h = w.e + m.N * m.dim;
  w.da = w.h + m.N * m.F;
  w.dout = w.da + m.N * m.F;
  return w;
}

template <class T> LDMFAST_INLINE VecF read(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, n);
}

template <class T> void write(T* p, VecF x, int64_t n) {
  if (n >= kLanes) store(p, x);
  else store_first(p, x, n);
}

template <class T> LDMFAST_INLINE float dot(const T* weight, const float* x, int64_t depth) {
  VecF sum{};
  for (int64_t i = 0; i < depth; i += kLanes) sum += read(weight + i, depth - i) * read(x + i, depth - i);
  return reduce_add(sum);
}

// the sum over depth rows r of column[r * stride] * rows[r, width], from one of rows' columns on; n are left of them
template <class T>
LDMFAST_INLINE VecF weighted(const float* column, int64_t stride, const T* rows, int64_t width, int64_t depth,
                             int64_t n) {
  VecF total{};
  for (int64_t r = 0; r < depth;) {
    VecF sum{};
    for (const int64_t end = min64(depth, r + kSum); r < end; ++r) sum += column[r * stride] * read(rows + r * width, n);
    total += sum;
  }
  return total;
}

// a = w1 e + b1, and of it h and silu'
template <class T> void hidden(const Args& m, const Work& w, int64_t f) {
  const float bias = m.b1 ? load_scalar(m.b1, m.dtype, f) : 0.0f;
  for (int64_t n = 0; n < m.N; ++n) {
    const VecF a = splat(dot((const T*)m.w1 + f * m.dim, w.e + n * m.dim, m.dim) + bias);
    const VecF s = sigmoid<Accuracy::kFull>(a);
    w.h[n * m.F + f] = (a * s)[0];
    w.da[n * m.F + f] = (s + s * a * (1.0f - s))[0];
  }
}

// gradient[width] = sum over N of column * rows; bias = that of column
template <class T>
void outer(const float* column, int64_t stride, const float* rows, int64_t width, int64_t N, T* gradient, T* bias) {
  for (int64_t i = 0; i < width; i += kLanes) {
    write(gradient + i, weighted(column, stride, rows + i, width, N, width - i), width - i);
  }
  float sum = 0;
  for (int64_t n = 0; n < N; ++n) sum += column[n * stride];
  write(bias, splat(sum), 1);
}

template <class T> void run(const Args& m) {
  const Work w = work_of(m);
#pragma omp parallel if (m.N * (m.dim + m.E) * m.F > kSerial)
  {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < m.N; ++n) {
      sinusoid<T>(m.t[n], m.freqs, m.dim, m.flip_sin_to_cos, w.e + n * m.dim, [](int64_t i) { return i; });
      for (int64_t i = 0; i < m.E; ++i) w.dout[n * m.E + i] = to_float(((const T*)m.dout)[n * m.E + i]);
    }
#pragma omp for schedule(static)
    for (int64_t f = 0; f < m.F; ++f) hidden<T>(m, w, f);
#pragma omp for schedule(static)
    for (int64_t f = 0; f < m.F; f += kLanes) {
      for (int64_t n = 0; n < m.N; ++n) {
        float* to = w.da + n * m.F + f;
        write(to, read(to, m.F - f) * weighted(w.dout + n * m.E, 1, (const T*)m.w2 + f, m.F, m.E, m.F - f), m.F - f);
      }
    }
#pragma omp for schedule(static) nowait
    for (int64_t f = 0; f < m.F; ++f) {
      outer(w.da + f, m.F, w.e, m.dim, m.N, (T*)m.dw1 + f * m.dim, (T*)m.db1 + f);
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < m.E; ++i) outer(w.dout + i, m.E, w.h, m.F, m.N, (T*)m.dw2 + i * m.F, (T*)m.db2 + i);
  }
}

}  // namespace

size_t timestep_mlp_backward_workspace(const TimestepMlpBackwardArgs& m) {
  return (size_t)(m.N * (m.dim + 2 * m.F + m.E)) * sizeof(float);
}

void timestep_mlp_backward(const TimestepMlpBackwardArgs& m) {
  if (m.dtype == DType::kFloat32) return run<float>(m);
  if (m.dtype == DType::kBFloat16) return run<BFloat16>(m);
  return run<Half>(m);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
