// out = softmax(scale * q k^T + mask) v, in blocks of queries and keys with a running maximum.
// K and V are first packed once per head; a task then takes a block of queries through all keys.
// Source: Milakov & Gimelshein 2018 (online softmax); Dao et al. 2022, algorithm 1 (the blocking).
#include <omp.h>

#include "simd.h"

namespace ldmfast {
namespace LDMFAST_ISA {
namespace {

constexpr int kRows = kLanes == 16 ? 8 : 4;  // queries whose sums are in registers at one time: 32 registers, or 16
constexpr int kTile = 2 * kLanes;            // keys whose sums are in registers at one time
constexpr int64_t kKeys = 256;               // keys between two updates of the maximum; a multiple of kTile
constexpr int64_t kPart = 128;                // products in one running sum of a score
constexpr int64_t kTaskRows = 64;            // queries of one task, which share K and V in the caches

// All packed operands are 32-bit words, held in float: one float32, or two neighbours in bfloat16.
struct Single {
  static constexpr int kPack = 1;
  static constexpr uint32_t kSign = 0x80000000u;
  LDMFAST_INLINE VecF dot(VecF sum, VecF a, VecF b) { return sum + a * b; }
  template <class T> LDMFAST_INLINE VecF words(const T* row, int64_t n) {
    return n >= kLanes ? load(row) : load_first(row, n);
  }
  template <class T> LDMFAST_INLINE VecF value_words(const T* row, const T*, int64_t n) { return words(row, n); }
  LDMFAST_INLINE void store_weights(float* p, VecF a, VecF b) {
    store(p, a);
    store(p + kLanes, b);
  }
};

#if defined(__AVX512BF16__)
struct Paired {
  static constexpr int kPack = 2;
  static constexpr uint32_t kSign = 0x80008000u;
  LDMFAST_INLINE VecF dot(VecF sum, VecF a, VecF b) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  LDMFAST_INLINE VecF words(const BFloat16* row, int64_t n) {  // n elements remain in the row
    VecF x{};
    memcpy(&x, row, (size_t)min64(n * 2, sizeof x));
    return x;
  }
  LDMFAST_INLINE VecF value_words(const BFloat16* even, const BFloat16* odd, int64_t n) {
    VecU a = (VecU)Single::words(even, n), b = odd ? (VecU)Single::words(odd, n) : VecU{};
    return (VecF)(a >> 16 | b);
  }
  LDMFAST_INLINE void store_weights(float* p, VecF a, VecF b) {
    __m512bh h = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    memcpy(p, &h, sizeof h);
  }
};
#endif

template <class T> struct MathOf { using type = Single; };
#if defined(__AVX512BF16__)
template <> struct MathOf<BFloat16> { using type = Paired; };
#endif

struct Plan {
  int64_t depth;        // words of a query or key
  int64_t width;        // padded head width: words of a packed row of V, floats of a row of sums
  int64_t keys;         // S, padded
  int64_t key_words;    // packed rows of V
  int64_t task_rows, tasks;  // of one head
  int64_t threads, scratch;  // floats of scratch per thread
  size_t bytes;
  float *k, *v, *thread;
};

Plan plan_of(const AttentionArgs& a, int pack) {
  Plan p;
  p.depth = ceil_div(a.D, pack);
  p.width = ceil_div(a.D, kLanes) * kLanes;
  p.keys = ceil_div(a.S, kTile) * kTile;
  p.key_words = ceil_div(a.S, pack);
  p.threads = max64(1, omp_get_max_threads());
  const int64_t wanted = ceil_div(a.N * a.H * a.L, 4 * p.threads * kRows) * kRows;  // four tasks a thread
  const int64_t fitting = max64(1, 32768 / (p.width + p.depth)) / kRows * kRows;    // 128 KiB of queries and sums
  p.task_rows = max64(kRows, min64(min64(wanted, fitting), kTaskRows));
  p.tasks = ceil_div(a.L, p.task_rows);
  p.scratch = p.task_rows * (p.depth + p.width + 2) + 2 * kRows * kKeys;
  const int64_t k_words = a.N * a.H * p.keys * p.depth, v_words = a.N * a.H * p.key_words * p.width;
  p.bytes = (size_t)(k_words + v_words + p.threads * p.scratch) * 4;
  p.k = (float*)a.workspace;
  p.v = p.k + k_words;
  p.thread = p.v + v_words;
  return p;
}

// to[word * kCount + row] = word of from[row]; rows from valid on are zero
template <class M, class T, int kCount>
void interleave(const T* from, int64_t stride, int64_t valid, int64_t D, uint32_t flip, float* to) {
  uint32_t words[kLanes];
  for (int row = 0; row < kCount; ++row) {
    for (int64_t w = 0; w * M::kPack < D; w += kLanes) {
      VecF x = row < valid ? M::words(from + row * stride + w * M::kPack, D - w * M::kPack) : VecF{};
      VecU bits = (VecU)x ^ flip;
      memcpy(words, &bits, sizeof bits);
      const int64_t count = min64(kLanes, ceil_div(D, M::kPack) - w);
      for (int64_t i = 0; i < count; ++i) memcpy(to + (w + i) * kCount + row, words + i, 4);
    }
  }
}

template <class M, class T> void pack_keys(const AttentionArgs& a, const Plan& p, int64_t head, int64_t s) {
  const int64_t n = head / a.H, h = head % a.H;
  const T* k = (const T*)a.k + n * a.stride_kn + h * a.stride_kh + s * a.stride_ks;
  const T* v = (const T*)a.v + n * a.stride_vn + h * a.stride_vh + s * a.stride_vs;
  float* to_k = p.k + (head * p.keys + s) * p.depth;
  for (int i = 0; i < kTile; i += kLanes) {
    interleave<M, T, kLanes>(k + i * a.stride_ks, a.stride_ks, a.S - s - i, a.D, 0, to_k + i * p.depth);
  }
  float* to_v = p.v + (head * p.key_words + s / M::kPack) * p.width;
  for (int64_t i = 0; i < min64(kTile, a.S - s); i += M::kPack, to_v += p.width) {
    const T *even = v + i * a.stride_vs, *odd = s + i + 1 < a.S ? even + a.stride_vs : nullptr;
    for (int64_t d = 0; d < a.D; d += kLanes) {
      store(to_v + d, M::value_words(even + d, odd ? odd + d : nullptr, a.D - d));
    }
  }
}

LDMFAST_INLINE VecF broadcast(const float* p) {
  uint32_t bits;
  memcpy(&bits, p, 4);
  return (VecF)(bits - VecU{});
}

// s[kRows, kTile] = q k^T, of q [depth, kRows] and k [2, depth, kLanes]; long sums in parts, for float32's sake
template <class M> void multiply_keys(const float* q, const float* k, int64_t depth, float* s) {
  for (int64_t begin = 0; begin < depth; begin += kPart) {
    const int64_t end = min64(depth, begin + kPart);
    VecF sum[kRows][2] = {};
    for (int64_t d = begin; d < end; ++d) {
      const VecF k0 = load(k + d * kLanes), k1 = load(k + (depth + d) * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const VecF x = broadcast(q + d * kRows + r);
        sum[r][0] = M::dot(sum[r][0], x, k0);
        sum[r][1] = M::dot(sum[r][1], x, k1);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float* to = s + r * kKeys;
      store(to, begin ? load(to) + sum[r][0] : sum[r][0]);
      store(to + kLanes, begin ? load(to + kLanes) + sum[r][1] : sum[r][1]);
    }
  }
}

// o[kRows, kVectors] = o * decay + p v, of p [kRows, words] and v [words, width]
template <class M, int kVectors>
void multiply_values(const float* p, const float* v, int64_t words, int64_t width, const float* decay, float* o) {
  VecF sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) sum[r][j] = load(o + r * width + j * kLanes) * decay[r];
  }
  for (int64_t w = 0; w < words; ++w) {
    VecF x[kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) x[j] = load(v + w * width + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const VecF weight = broadcast(p + r * kKeys / M::kPack + w);
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sum[r][j] = M::dot(sum[r][j], weight, x[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) store(o + r * width + j * kLanes, sum[r][j]);
  }
}

template <class M>
void all_values(const float* p, const float* v, int64_t words, int64_t width, const float* decay, float* o) {
  for (int64_t d = 0; d < width;) {
    const int64_t left = (width - d) / kLanes, step = left == 3 || left > 4 ? 3 : left == 1 ? 1 : 2;
    if (step == 3) multiply_values<M, 3>(p, v + d, words, width, decay, o + d);
    if (step == 2) multiply_values<M, 2>(p, v + d, words, width, decay, o + d);
    if (step == 1) multiply_values<M, 1>(p, v + d, words, width, decay, o + d);
    d += step * kLanes;
  }
}

template <class U> LDMFAST_INLINE void mask_row(const U* mask, float factor, int64_t count, float* s) {
  for (int64_t i = 0; i < count; i += kLanes) {
    VecF m = count - i >= kLanes ? load(mask + i) : load_first(mask + i, count - i);
    store(s + i, load(s + i) * factor + m * kLog2e);
  }
}

// s = s * factor + mask * log2(e), for the block's keys from s0 on and one query
void apply_mask(const AttentionArgs& a, int64_t head, int64_t l, int64_t s0, int64_t count, float factor, float* s) {
  const int64_t at = head / a.H * a.stride_mn + head % a.H * a.stride_mh + l * a.stride_ml + s0 * a.stride_ms;
  if (a.mask_dtype == DType::kBool) {
    const uint8_t* mask = (const uint8_t*)a.mask + at;
    for (int64_t i = 0; i < count; ++i) s[i] = mask[i * a.stride_ms] ? s[i] * factor : -kInf;
  } else if (a.stride_ms != 1) {
    for (int64_t i = 0; i < count; ++i) {
      s[i] = s[i] * factor + load_scalar(a.mask, a.mask_dtype, at + i * a.stride_ms) * kLog2e;
    }
  } else if (a.mask_dtype == DType::kFloat32) {
    mask_row((const float*)a.mask + at, factor, count, s);
  } else if (a.mask_dtype == DType::kBFloat16) {
    mask_row((const BFloat16*)a.mask + at, factor, count, s);
  } else {
    mask_row((const Half*)a.mask + at, factor, count, s);
  }
}

// p = 2^(s * factor - maximum), the weights of count keys (padded to kTile) for one query
template <class M, Accuracy A>
LDMFAST_INLINE float weights(const float* s, int64_t count, float factor, float maximum, float* p) {
  VecF total0{}, total1{};
  for (int64_t i = 0; i < count; i += kTile) {
    const VecF a = exp2v<A>(load(s + i) * factor - maximum), b = exp2v<A>(load(s + i + kLanes) * factor - maximum);
    total0 += a;
    total1 += b;
    M::store_weights(p + i / M::kPack, a, b);
  }
  return reduce_add(total0 + total1);
}

LDMFAST_INLINE float row_maximum(const float* s, int64_t count) {
  VecF m0 = splat(-kInf), m1 = m0;
  for (int64_t i = 0; i < count; i += kTile) {
    m0 = vmax(load(s + i), m0);  // the second operand survives where the score is NaN
    m1 = vmax(load(s + i + kLanes), m1);
  }
  return reduce_max(vmax(m0, m1));
}

// A task's state and its one thread's scratch.
template <class M, class T> struct Task {
  const AttentionArgs& a;
  const Plan& p;
  const int64_t head, first, rows;  // queries [first, first + rows) of the head
  float *q, *o, *maximum, *sum;     // [rows / kRows, depth, kRows], [rows, width], [rows], [rows]
  float *scores, *weight;           // [kRows, kKeys] each

  Task(const AttentionArgs& a, const Plan& p, int64_t i, float* scratch)
      : a(a), p(p), head(i / p.tasks), first(i % p.tasks * p.task_rows), rows(min64(p.task_rows, a.L - first)) {
    scores = scratch;
    weight = scores + kRows * kKeys;
    q = weight + kRows * kKeys;
    o = q + p.task_rows * p.depth;
    maximum = o + p.task_rows * p.width;
    sum = maximum + p.task_rows;
  }

  void begin() {
    const T* from = (const T*)a.q + head / a.H * a.stride_qn + head % a.H * a.stride_qh + first * a.stride_ql;
    for (int64_t r = 0; r < rows; r += kRows) {  // a negative scale becomes q's sign, so that factors are positive
      interleave<M, T, kRows>(from + r * a.stride_ql, a.stride_ql, rows - r, a.D, a.scale < 0 ? M::kSign : 0,
                              q + r * p.depth);
    }
    for (int64_t i = 0; i < p.task_rows * p.width; ++i) o[i] = 0.0f;
    for (int64_t i = 0; i < p.task_rows; ++i) {
      maximum[i] = -kInf;
      sum[i] = 0.0f;
    }
  }

  // kRows queries from row r on and the keys [s0, s0 + count)
  void block(int64_t r, int64_t s0, int64_t count) {
    const int64_t padded = ceil_div(count, kTile) * kTile;
    const float *k = p.k + (head * p.keys + s0) * p.depth, *v = p.v + (head * p.key_words + s0 / M::kPack) * p.width;
    for (int64_t s = 0; s < padded; s += kTile) multiply_keys<M>(q + r * p.depth, k + s * p.depth, p.depth, scores + s);

    float factor = (a.scale < 0 ? -a.scale : a.scale) * kLog2e, shift[kRows], decay[kLanes] = {};
    for (int i = 0; i < kRows; ++i) {
      float* row = scores + i * kKeys;
      for (int64_t s = count; s < padded; ++s) row[s] = -kInf;
      if (a.mask) apply_mask(a, head, min64(first + r + i, a.L - 1), s0, count, factor, row);
    }
    if (a.mask) factor = 1.0f;
    for (int i = 0; i < kRows; ++i) {
      const float before = maximum[r + i], here = row_maximum(scores + i * kKeys, padded) * factor;
      maximum[r + i] = here > before ? here : before;
      shift[i] = maximum[r + i] == -kInf ? 0.0f : maximum[r + i];  // no key attended to so far
      decay[i] = before - shift[i];
    }
    store(decay, exp2v<Accuracy::kFull>(load(decay)));
    for (int i = 0; i < kRows; ++i) {
      float* to = weight + i * kKeys / M::kPack;
      float here = weights<M, AccuracyOf<T>::value>(scores + i * kKeys, padded, factor, shift[i], to);
      sum[r + i] = sum[r + i] * decay[i] + here;
    }
    all_values<M>(weight, v, ceil_div(count, M::kPack), p.width, decay, o + r * p.width);
  }

  void finish() {
    for (int64_t r = 0; r < rows; ++r) {
      T* out = (T*)a.out + (((head / a.H) * a.L + first + r) * a.H + head % a.H) * a.D;
      const float inverse = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
      for (int64_t d = 0; d < a.D; d += kLanes) {
        const VecF x = load(o + r * p.width + d) * inverse;
        if (a.D - d >= kLanes) store(out + d, x);
        else store_first(out + d, x, a.D - d);
      }
    }
  }

  void run() {
    begin();
    for (int64_t s = 0; s < a.S; s += kKeys) {
      for (int64_t r = 0; r < rows; r += kRows) block(r, s, min64(kKeys, a.S - s));
    }
    finish();
  }
};

template <class T> void run(const AttentionArgs& a) {
  using M = typename MathOf<T>::type;
  const Plan p = plan_of(a, M::kPack);
  const int64_t heads = a.N * a.H, key_tiles = p.keys / kTile;
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads * key_tiles; ++i) pack_keys<M, T>(a, p, i / key_tiles, i % key_tiles * kTile);
    float* scratch = p.thread + omp_get_thread_num() * p.scratch;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < heads * p.tasks; ++i) Task<M, T>(a, p, i, scratch).run();
  }
}

}  // namespace

size_t attention_workspace(const AttentionArgs& a) {
  if (a.N * a.L * a.H * a.D == 0) return 0;
  return plan_of(a, a.dtype == DType::kBFloat16 ? MathOf<BFloat16>::type::kPack : 1).bytes;
}

void attention(const AttentionArgs& a) {
  if (a.N * a.L * a.H * a.D == 0) return;
  if (a.dtype == DType::kFloat32) return run<float>(a);
  if (a.dtype == DType::kBFloat16) return run<BFloat16>(a);
  return run<Half>(a);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
