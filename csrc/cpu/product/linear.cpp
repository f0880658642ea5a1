// out = (act(norm(x) w^T + bias) + residual) * output_scale; see gemm.h for the product.
//
//   rows of the product: tokens; columns: output channels; depth: input channels, two a word where M::kPack is 2
//   a few inputs and outputs: a row's are one vector, and packing would take longer than the products
//   up to 4 rows: scalar products instead, without packing; not where exact, for they sum in another order
//   GEGLU: a tile of columns is kLanes of h beside kLanes of g, so that finish has both
//   LayerNorm: mean and 1 / deviation of every row first, applied where a panel is packed; by tiles into a copy, for
//     each task's panels would take more time than its products
#include "../norm/layer_norm.h"
#include "epilogue.h"
#include "streamed.h"

namespace ldmfast {
namespace LDMFAST_ISA {

void layer_norm(const LayerNormArgs& a);

namespace {

template <class M, class T> struct Linear {
  const LinearArgs& a;
  int64_t block;       // words of a block of the depth
  const float* stats;  // [M, 2]: mean, 1 / deviation; LayerNorm only

  int64_t from(int64_t i) const { return i * block * M::kPack; }  // first element of a block
  int64_t elements(int64_t i) const { return min64(block * M::kPack, a.K - from(i)); }
  int64_t words(int64_t i) const { return ceil_div(elements(i), M::kPack); }
  bool gated() const { return a.activation == Activation::kGeglu; }

  VecF normalised(const T* x, int64_t k, int64_t n, float mean, float rstd) const {
    VecF y = (load_upto(x, n) - mean) * rstd;
    if (a.norm_weight) y *= load_upto((const T*)a.norm_weight + k, n);
    if (a.norm_bias) y += load_upto((const T*)a.norm_bias + k, n);
    return y;
  }
  void normalised_row(int64_t m, int64_t k, int64_t n, float* to, int64_t part) const {
    const T* x = (const T*)a.x + m * a.stride_x + k;
    const float mean = stats[2 * m], rstd = stats[2 * m + 1];
    for (int64_t i = 0, w = 0; i < n; i += kLanes * M::kPack, w += kLanes) {
      const VecF low = normalised(x + i, k + i, n - i, mean, rstd);
      const bool more = M::kPack == 2 && n - i > kLanes;
      const int64_t j = i + kLanes;
      store(to + panel_word(w, part), M::join(low, more ? normalised(x + j, k + j, n - j, mean, rstd) : VecF{}));
    }
  }

  // Where they are words as they stand, with AVX-512: 1 to 3 % faster on Zen 4. Not where rows would put each other out
  // of the first-level cache (64 sets of 8 lines); a copy is by 2 to 5 % faster for 4096 x 320, by 1 to 2 % with AVX2.
  const float* rows_in_place(int64_t m, int64_t i, int64_t& stride) const {
    constexpr bool kWords = kLanes == 16 && sizeof(T) * M::kPack == 4;
    if (!kWords || a.normalised || a.K % M::kPack || a.stride_x % M::kPack) return nullptr;
    stride = a.stride_x / M::kPack;
    const float* words = (const float*)((const T*)a.x + m * a.stride_x + from(i));
    if (M::kTiles) return m + M::kRows <= a.M ? words : nullptr;  // a tile reads all of its rows
    if (a.K <= 320 * M::kPack) return nullptr;
    int64_t sets = 64;
    for (int64_t lines = stride / 16; sets > 1 && lines % 2 == 0; lines /= 2) sets /= 2;
    if (stride % 16 == 0 && ceil_div(M::kRows, sets) > 4) return nullptr;
    return words;
  }
  void rows(int64_t m, int count, int64_t i, float* to, int64_t part = kPanelPart<M>) const {
    const T* x = (const T*)a.x + m * a.stride_x + from(i);
    for (int r = 0; r < count; ++r, to += kPart) {
      if (a.normalised) normalised_row(m + r, from(i), elements(i), to, part);
      else pack_row<M>(x + r * a.stride_x, elements(i), x + (r + M::kRows) * a.stride_x, to, part);
    }
  }

  void across(int64_t m, int64_t valid, int64_t i, float* rows, float* to, int64_t stride) const {
    if (a.normalised || a.stride_x % M::kPack) return pack_across(*this, m, valid, i, rows, to, stride);
    const float* x = (const float*)((const T*)a.x + m * a.stride_x + from(i));
    pack_transposed<Single>(x, a.stride_x / M::kPack, valid, words(i), to, stride);
  }
  int64_t outputs() const { return a.N; }
  int64_t weight_stride() const { return a.stride_w / M::kPack; }
  const float* weight_row(int64_t row, int64_t i) const {
    return (const float*)((const T*)a.weight + row * a.stride_w + from(i));
  }

  void columns(int64_t n, int64_t i, float* to) const {
    for (int j = 0; j < 2; ++j) {
      const int64_t first = gated() ? n / 2 + j * a.N : n + j * kLanes;
      const int64_t valid = gated() ? a.N - n / 2 : a.N - first;
      const T* w = (const T*)a.weight + first * a.stride_w + from(i);
      pack_transposed<M>(w, a.stride_w, max64(0, valid), elements(i), to + j * kLanes, kTile);
    }
  }

  bool straight(int64_t, int64_t n) const { return a.activation == Activation::kNone && n + kTile <= a.N; }
  Straight<T> to(int64_t m, int64_t n) const {
    const T* residual = a.residual ? (const T*)a.residual + m * a.stride_residual + n : nullptr;
    const T* bias = (const T*)a.bias + n;
    return {(T*)a.out + m * a.stride_out + n, residual, a.stride_out, a.stride_residual,
            {a.bias ? load(bias) : VecF{}, a.bias ? load(bias + kLanes) : VecF{}}, a.output_scale};
  }
  template <bool kFull> void write(int64_t m, int64_t n, VecF y) const {
    if (a.residual) y += load_upto<kFull>((const T*)a.residual + m * a.stride_residual + n, a.N - n);
    store_upto<kFull>((T*)a.out + m * a.stride_out + n, y * a.output_scale, a.N - n);
  }
  template <bool kFull> void finish_gated(int64_t m, int count, int64_t n, const float* sums, int64_t stride) const {
    const T* bias = (const T*)a.bias + n;
    const VecF h = a.bias ? load_upto<kFull>(bias, a.N - n) : VecF{};
    const VecF g = a.bias ? load_upto<kFull>(bias + a.N, a.N - n) : VecF{};
    for (int r = 0; r < count; ++r, sums += stride) {
      write<kFull>(m + r, n, (load(sums) + h) * gelu<AccuracyOf<T>::value>(load(sums + kLanes) + g));
    }
  }
  template <bool kFull, class Act>
  void finish_plain(int64_t m, int count, int64_t n, int64_t end, const float* sums, int64_t stride,
                    const Act& act) const {
    for (; n < end; n += kLanes, sums += kLanes) {
      const VecF bias = a.bias ? load_upto<kFull>((const T*)a.bias + n, a.N - n) : VecF{};
      for (int r = 0; r < count; ++r) write<kFull>(m + r, n, act(load(sums + r * stride) + bias));
    }
  }
  template <bool kFull> void finish(int64_t m, int count, int64_t n, const float* sums, int64_t stride) const {
    const int64_t end = min64(a.N, n + kTile);
    const auto gelu_of = [](VecF y) { return gelu<AccuracyOf<T>::value>(y); };
    const auto silu_of = [](VecF y) { return silu<AccuracyOf<T>::value>(y); };
    switch (a.activation) {
      case Activation::kGeglu: return finish_gated<kFull>(m, count, n / 2, sums, stride);
      case Activation::kGelu: return finish_plain<kFull>(m, count, n, end, sums, stride, gelu_of);
      case Activation::kSilu: return finish_plain<kFull>(m, count, n, end, sums, stride, silu_of);
      default: return finish_plain<kFull>(m, count, n, end, sums, stride, [](VecF y) { return y; });
    }
  }
  void finish(int64_t m, int count, int64_t n, const float* sums, int64_t stride) const {
    const bool full = gated() ? a.N - n / 2 >= kLanes : a.N - n >= kTile;
    return full ? finish<true>(m, count, n, sums, stride) : finish<false>(m, count, n, sums, stride);
  }
};

// A few rows: each output is a scalar product of two rows as they lie, so that the weight is read once and not packed.
constexpr int kFewRows = 4;

template <class M, class T, int kR> void few_rows_tile(const Linear<M, T>& source, int64_t n) {
  constexpr int kAbreast = 4;
  constexpr int64_t kStep = kLanes * M::kPack;
  const LinearArgs& a = source.a;
  const T* x = (const T*)a.x;
  float sums[kR * kTile] = {};
  for (int64_t j = 0; j < kTile && n + j < a.N; j += kAbreast) {
    VecF sum[kR][kAbreast] = {};
    const T* w[kAbreast];
    for (int i = 0; i < kAbreast; ++i) w[i] = (const T*)a.weight + min64(n + j + i, a.N - 1) * a.stride_w;
    const auto step = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
      for (int r = 0; r < kR; ++r) {
        const VecF y = M::words(x + r * a.stride_x + k, count);
        for (int i = 0; i < kAbreast; ++i) sum[r][i] = M::dot(sum[r][i], y, M::words(w[i] + k, count));
      }
    };
    int64_t k = 0;
    for (; k + kStep <= a.K; k += kStep) step(k, kStep);
    if (k < a.K) step(k, a.K - k);
    for (int r = 0; r < kR; ++r) for (int i = 0; i < kAbreast; ++i) sums[r * kTile + j + i] = reduce_add(sum[r][i]);
  }
  source.finish(0, kR, n, sums, kTile);
}
template <class M, class T, int kR = kFewRows> void few_rows(const Linear<M, T>& source, int64_t threads) {
  const LinearArgs& a = source.a;
  if (a.M == kR) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < a.N; n += kTile) few_rows_tile<M, T, kR>(source, n);
  } else if constexpr (kR > 1) {
    few_rows<M, T, kR - 1>(source, threads);
  }
}

// A few inputs and outputs, as between an autoencoder's latents: lanes are outputs, and the weight is in registers.
constexpr int64_t kNarrow = 8;

inline bool is_narrow(const LinearArgs& a) {
  return a.K <= kNarrow && a.N <= kLanes && !a.normalised && a.activation != Activation::kGeglu;
}
template <class M, class T> void run_narrow(const Linear<M, T>& source, int64_t threads) {
  constexpr int64_t kTogether = 64;  // rows
  const LinearArgs& a = source.a;
  VecF w[kNarrow] = {};
  for (int64_t k = 0; k < a.K; ++k) {
    for (int64_t n = 0; n < a.N; ++n) w[k][n] = to_float(((const T*)a.weight)[n * a.stride_w + k]);
  }
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t m = 0; m < a.M; m += kTogether) {
    const int64_t rows = min64(kTogether, a.M - m);
    float sums[kTogether * kTile] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const T* x = (const T*)a.x + (m + r) * a.stride_x;
      VecF sum = {};
      for (int64_t k = 0; k < a.K; ++k) sum += splat(to_float(x[k])) * w[k];
      store(sums + r * kTile, sum);
    }
    source.finish(m, (int)rows, 0, sums, kTile);
  }
}

template <class M> Plan linear_plan(const LinearArgs& a) {
  const int64_t words = ceil_div(a.K, M::kPack), block = even_block<M>(words);
  const int64_t columns = a.activation == Activation::kGeglu ? ceil_div(a.N, kLanes) * kTile : a.N;
  return plan_of<M>(a.M, columns, ceil_div(words, block), block, a.K);
}

// Whether the weight is words as it stands, and the rows are few beside its own
template <class M, class T> bool streams(const LinearArgs& a) {
  if (sizeof(T) * M::kPack != 4 || a.K % M::kPack || a.stride_w % M::kPack) return false;
  return a.M <= min64(kMostStreamed<M>, a.N);
}
template <class T> int64_t product_floats(const LinearArgs& a, const Plan& p) {
  using M = typename MathOf<T>::type;
  if (streams<M, T>(a)) return streamed_plan<M>(p).floats();
  return p.split.threads * p.scratch;
}

template <class M, class T> void run_rows(const LinearArgs& a, const Plan& p, const float* stats) {
  const Linear<M, T> source{a, p.block_words, stats};
  if constexpr (sizeof(T) * M::kPack == 4) {
    if (streams<M, T>(a)) return run_streamed<M>(streamed_plan<M>(p), source, (float*)a.workspace);
  }
  run_product<M>(p, source, (float*)a.workspace);
}

template <class T> void run(const LinearArgs& a) {
  using M = typename MathOf<T>::type;
  const Plan p = linear_plan<M>(a);
  if (is_narrow(a)) return run_narrow(Linear<M, T>{a, 0, nullptr}, p.split.threads);
  if (a.M <= kFewRows && !a.exact && !a.normalised && a.activation != Activation::kGeglu) {
    return few_rows(Linear<M, T>{a, 0, nullptr}, p.split.threads);
  }
  float* stats = (float*)a.workspace + product_floats<T>(a, p);
  if (a.normalised && M::kTiles) {
    LinearArgs b = a;
    b.x = stats, b.stride_x = a.K, b.normalised = false;
    LDMFAST_ISA::layer_norm({a.x, a.stride_x, stats, a.norm_weight, a.norm_bias, a.M, a.K, a.eps, a.dtype});
    return run_rows<M, T>(b, p, nullptr);
  }
  if (a.normalised) {
#pragma omp parallel for num_threads(p.split.threads) if (p.split.threads > 1)
    for (int64_t m = 0; m < a.M; ++m) {
      row_statistics((const T*)a.x + m * a.stride_x, a.K, a.eps, stats[2 * m], stats[2 * m + 1]);
    }
  }
  run_rows<M, T>(a, p, stats);
}

template <class T> size_t floats_of(const LinearArgs& a) {
  using M = typename MathOf<T>::type;
  const int64_t norm = M::kTiles ? ceil_div(a.M * a.K, 2) : 2 * a.M;
  return (size_t)(product_floats<T>(a, linear_plan<M>(a)) + (a.normalised ? norm : 0));
}

}  // namespace

size_t linear_workspace(const LinearArgs& a) {
  if (a.M * a.N == 0) return 0;
  if (a.dtype == DType::kFloat32) return 4 * floats_of<float>(a);
  return 4 * (a.dtype == DType::kBFloat16 ? floats_of<BFloat16>(a) : floats_of<Half>(a));
}

void linear(const LinearArgs& a) {
  if (a.M * a.N == 0) return;
  if (a.dtype == DType::kFloat32) return run<float>(a);
  if (a.dtype == DType::kBFloat16) return run<BFloat16>(a);
  return run<Half>(a);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
