// The gradient of out = softmax(scale * q k^T + mask) v. Products are float32. No sum depends on the number of threads.
// Source: Dao et al. 2022, algorithm 4, but scores are computed once: a block of queries holds those of all keys.
//
//   for each head, which is one task:
//     k in rows; k and v in columns of kTile keys; dk = dv = 0                              pack()
//     for each kQueries queries:
//       q, dout in float32; delta = the row sums of dout * out; dq = 0                      begin()
//       P = softmax(scale * q k^T + mask), for all keys                                     weights()
//       for each kBlock keys:                                                               block()
//         dP = dout v^T
//         dv += P^T dout
//         dS = P * (dP - delta)
//         dk += dS^T q;  dq += dS k
//       write scale * dq                                                                    write()
//     write scale * dk, dv
#include <omp.h>

#include "attention_backward.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

using Args = AttentionBackwardArgs;

constexpr int64_t kQueries = 32;        // of a block
constexpr int64_t kBlock = 256;         // keys that go through all three gradients together
constexpr int64_t kSerial = 64 * 1024;  // products below which waking threads costs more than it gives

struct Plan {
  int64_t keys, width;  // S and D, padded to whole tiles and vectors
  int64_t threads;
  int64_t head, floats;  // floats of a head's operands, and of all that a thread has
};

Plan plan_of(const Args& a) {
  Plan p;
  p.keys = ceil_div(a.S, kTile) * kTile;
  p.width = ceil_div(a.D, kLanes) * kLanes;
  p.threads = a.N * a.H * a.L * a.S * a.D > kSerial ? max64(1, min64(a.N * a.H, omp_get_max_threads())) : 1;
  p.head = p.keys * p.width * 5;
  p.floats = p.head + kQueries * (3 * p.width + p.keys + kBlock + 1);
  return p;
}

template <class T> struct Head {
  const Args& a;
  const Plan& p;
  const int64_t n, h;
  float *k, *k_tiles, *v_tiles, *dk, *dv;        // [keys, width], [keys / kTile, D, kTile] twice, [keys, width] twice
  float *q, *dout, *dq, *weight, *ds, *delta;    // [kQueries, width] thrice, [.., keys], [.., kBlock], [..]

  Head(const Args& a, const Plan& p, int64_t i, float* scratch) : a(a), p(p), n(i / a.H), h(i % a.H) {
    const int64_t size = p.keys * p.width;
    k = scratch, k_tiles = k + size, v_tiles = k_tiles + size, dk = v_tiles + size, dv = dk + size;
    q = scratch + p.head, dout = q + kQueries * p.width, dq = dout + kQueries * p.width;
    weight = dq + kQueries * p.width, ds = weight + kQueries * p.keys, delta = ds + kQueries * kBlock;
  }

  // element d of row `row` of a dense [N, rows, H, D]
  int64_t dense(int64_t rows, int64_t row) const { return ((n * rows + row) * a.H + h) * a.D; }

  void pack() {
    const T *from_k = (const T*)a.k + n * a.stride_kn + h * a.stride_kh;
    const T *from_v = (const T*)a.v + n * a.stride_vn + h * a.stride_vh;
    for (int64_t s = 0; s < p.keys; ++s) {
      unpack_row(s < a.S ? from_k + s * a.stride_ks : nullptr, a.D, p.width, k + s * p.width);
    }
    for (int64_t s = 0; s < p.keys; s += kTile) {
      transpose(from_k + s * a.stride_ks, a.stride_ks, a.S - s, a.D, k_tiles + s * a.D);
      transpose(from_v + s * a.stride_vs, a.stride_vs, a.S - s, a.D, v_tiles + s * a.D);
    }
    memset(dk, 0, (size_t)(2 * p.keys * p.width) * sizeof(float));
  }

  void begin(int64_t first) {
    const T* from = (const T*)a.q + n * a.stride_qn + h * a.stride_qh;
    for (int64_t r = 0; r < kQueries; ++r) {
      const int64_t l = first + r;
      const bool valid = l < a.L;  // the others are zero, and add nothing
      unpack_row(valid ? from + l * a.stride_ql : nullptr, a.D, p.width, q + r * p.width);
      unpack_row(valid ? (const T*)a.dout + dense(a.L, l) : nullptr, a.D, p.width, dout + r * p.width);
      unpack_row(valid ? (const T*)a.out + dense(a.L, l) : nullptr, a.D, p.width, dq + r * p.width);
      VecF sum{};
      for (int64_t d = 0; d < p.width; d += kLanes) sum += load(dout + r * p.width + d) * load(dq + r * p.width + d);
      delta[r] = reduce_add(sum);
    }
    memset(dq, 0, (size_t)(kQueries * p.width) * sizeof(float));
  }

  // scores of the block's queries and all keys, then their softmax
  void weights(int64_t first) {
    const float factor = a.scale * kLog2e;
    for (int64_t s = 0; s < p.keys; s += kTile) {
      multiply<true>({q, p.width, 1}, {k_tiles + s * a.D, kTile, 0}, kQueries, kTile, a.D, weight + s, p.keys);
    }
    for (int64_t r = 0; r < kQueries; ++r) {
      float* row = weight + r * p.keys;
      for (int64_t s = a.S; s < p.keys; ++s) row[s] = 0.0f;
      if (a.mask) mask_row_of(a, n * a.H + h, min64(first + r, a.L - 1), factor, row);
      soften<AccuracyOf<T>::value>(row, a.S, p.keys, a.mask ? 1.0f : factor);
    }
  }

  // the keys [s, s + count) and all three gradients
  void block(int64_t s, int64_t count) {
    for (int64_t t = 0; t < count; t += kTile) {
      multiply<true>({dout, p.width, 1}, {v_tiles + (s + t) * a.D, kTile, 0}, kQueries, kTile, a.D, ds + t, kBlock);
    }
    multiply<false>({weight + s, 1, p.keys}, {dout, p.width, kTile}, count, p.width, kQueries, dv + s * p.width,
                    p.width);
    for (int64_t r = 0; r < kQueries; ++r) {
      for (int64_t t = 0; t < count; t += kLanes) {
        store(ds + r * kBlock + t, load(weight + r * p.keys + s + t) * (load(ds + r * kBlock + t) - delta[r]));
      }
    }
    multiply<false>({ds, 1, kBlock}, {q, p.width, kTile}, count, p.width, kQueries, dk + s * p.width, p.width);
    multiply<false>({ds, kBlock, 1}, {k + s * p.width, p.width, kTile}, kQueries, p.width, count, dq, p.width);
  }

  void write(const float* from, int64_t rows, float factor, int64_t first, int64_t of, void* to) const {
    for (int64_t r = 0; r < rows; ++r) {
      T* row = (T*)to + dense(of, first + r);
      for (int64_t d = 0; d < a.D; d += kLanes) {
        const VecF x = load(from + r * p.width + d) * factor;
        if (a.D - d >= kLanes) store(row + d, x);
        else store_first(row + d, x, a.D - d);
      }
    }
  }

  void run() {
    pack();
    for (int64_t first = 0; first < a.L; first += kQueries) {
      begin(first);
      weights(first);
      for (int64_t s = 0; s < p.keys; s += kBlock) block(s, min64(kBlock, p.keys - s));
      write(dq, min64(kQueries, a.L - first), a.scale, first, a.L, a.dq);
    }
    write(dk, a.S, a.scale, 0, a.S, a.dk);
    write(dv, a.S, 1.0f, 0, a.S, a.dv);
  }
};

template <class T> void run(const Args& a) {
  const Plan p = plan_of(a);
#pragma omp parallel for schedule(dynamic) num_threads(p.threads) if (p.threads > 1)
  for (int64_t i = 0; i < a.N * a.H; ++i) {
    Head<T>(a, p, i, (float*)a.workspace + omp_get_thread_num() * p.floats).run();
  }
}

}  // namespace

size_t attention_backward_workspace(const AttentionBackwardArgs& a) {
  const Plan p = plan_of(a);
  return (size_t)(p.threads * p.floats) * sizeof(float);
}

void attention_backward(const AttentionBackwardArgs& a) {
  if (a.N * a.L * a.H * a.D * a.S == 0) return;
  if (a.dtype == DType::kFloat32) return run<float>(a);
  if (a.dtype == DType::kBFloat16) return run<BFloat16>(a);
  return run<Half>(a);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
