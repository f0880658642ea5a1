// softmax(scale * q k^T + mask) v with float16 and bfloat16 inputs: flash attention on tensor cores (mma.sync).
//
// A block of 4 warps takes 64 * MT queries of one head; a warp keeps MT tiles of 16 queries, whose scores (32 keys at a
// time), probabilities and output never leave its registers. K and V come in tiles of KEYS keys through two stages of
// shared memory. D = 40 is not padded: 40 = 16 + 16 + 8 for q k^T (m16n8k16 twice, m16n8k8 once), 5 columns of 8 for
// p v.
//
// Predicted for 16 heads x 4096 x 4096, D = 40, 132 multiprocessors at 1.75 GHz: the exponentials take 72 us (16 a
// clock), instruction issue 72 us (sm_90a: 212 a warp for 32 x 32 scores and 42 of the tiles' copies), the products 72
// us at 60 % of the tensor cores' rate (48, of which 4 are the rows' sums), shared memory 45 us with MT = 2 (with MT =
// 1 a fragment of K or V would feed one product only: 90 us). 512 blocks at 4 a multiprocessor are one wave, which
// wants 128 registers a thread.
//
// Left for a GPU to decide: K and V by the copy engine (sm_90: a bulk copy a row, and an mbarrier a stage). Estimated:
// of the copies' 42 instructions some 6 stay, 254 -> 218 issued, 72 -> 62 us; the exponentials and the products, 72 us
// each, are then what is waited for. So it gains where issue is the limit, which Nsight Compute's sm__inst_issued
// tells. The emulator gives cp.async's bytes at the last moment, and would have to do so for these and their barriers
// first.
#include "attention_mma.cuh"

namespace ldmfast {
namespace attention_detail {

// the scores in units of log2 with the mask in, for keys from `key` on
template <typename C>
__device__ __forceinline__ void mask_scores(const AttentionArgs& a, float (&s)[C::MT][kStep / 8][4], int64_t mask_head,
                                            int row, int key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < C::MT; ++m)
#pragma unroll
    for (int t = 0; t < kStep / 8; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int l = row + m * 16 + lane / 4 + i / 2 * 8, k = key + t * 8 + lane % 4 * 2 + i % 2;
        if (l < a.L && k < a.S) s[m][t][i] = masked_score(a, s[m][t][i], mask_head + l * a.stride_ml, k);
      }
}

// -inf for the keys behind the last
template <typename C> __device__ __forceinline__ void cut_scores(float (&s)[C::MT][kStep / 8][4], int left) {
#pragma unroll
  for (int t = 0; t < kStep / 8; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool out = int(t * 8 + threadIdx.x % 4 * 2 + i % 2) >= left;
#pragma unroll
      for (int m = 0; m < C::MT; ++m) s[m][t][i] = out ? -INFINITY : s[m][t][i];
    }
}

// o / sum, through the warp's own rows of shared memory so that the stores are whole 16-byte vectors
template <typename C>
__device__ __forceinline__ void write_output(Warp<C>& w, const Params& p, typename C::T* rows, int64_t offset,
                                             int64_t first) {
  using T = typename C::T;
  const AttentionArgs& a = p.a;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < C::MT; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = w.sum[2 * r + m];
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;   // no key attended: zeros
      T* to = rows + (m * 16 + r * 8 + lane / 4) * C::kStride + lane % 4 * 2;
#pragma unroll
      for (int c = 0; c < C::kColumns; ++c)
        *reinterpret_cast<uint32_t*>(to + c * 8) = pack2<T>(w.o[m][c][2 * r] * inverse, w.o[m][c][2 * r + 1] * inverse);
    }
  __syncwarp();
  T* out = static_cast<T*>(a.out) + offset;
  for (int i = lane; i < 16 * C::MT * C::kColumns; i += 32) {
    const int r = i / C::kColumns, c = i % C::kColumns * 8;
    if (first + r >= a.L) continue;
    const T* from = rows + r * C::kStride + c;
    T* to = out + (first + r) * a.H * a.D + c;
    if (p.wide_out) {
      uint32_t words[4];
      load_words(from, words);
      if (c < a.D) store_words(to, words);
    } else {
      for (int j = 0; j < 8 && c + j < a.D; ++j) to[j] = from[j];
    }
  }
}

template <typename C, bool MASKED>
__global__ void __launch_bounds__(kThreads, C::kBlocks) attention_kernel(const __grid_constant__ Params p) {
  using T = typename C::T;
  const AttentionArgs& a = p.a;
  T* const q = reinterpret_cast<T*>(shared_memory());
  T* const k = q + C::kQueries * C::kStride, * const v = k + 2 * C::KEYS * C::kStride;   // two stages each
  const int64_t n = blockIdx.z, h = blockIdx.y;
  const int L = static_cast<int>(a.L), S = static_cast<int>(a.S), D = static_cast<int>(a.D);
  const int first = blockIdx.x * C::kQueries, warp_row = threadIdx.x / 32 * 16 * C::MT;
  const T* const q_head = static_cast<const T*>(a.q) + n * a.stride_qn + h * a.stride_qh;
  const T* const k_head = static_cast<const T*>(a.k) + n * a.stride_kn + h * a.stride_kh;
  const T* const v_head = static_cast<const T*>(a.v) + n * a.stride_vn + h * a.stride_vh;
  wait_for_previous_kernel();
  load_tile<C, C::kQueries>(q, q_head, a.stride_ql, first, L, D, p.wide_q);
  if (S > 0) {
    load_tile<C, C::KEYS>(k, k_head, a.stride_ks, 0, S, D, p.wide_k);
    load_tile<C, C::KEYS>(v, v_head, a.stride_vs, 0, S, D, p.wide_v);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  Warp<C> w = {};
#pragma unroll
  for (int m = 0; m < C::MT; ++m) w.ceiling[m][0] = w.ceiling[m][1] = kLowest;
  const SharedAddress q_at = plain_address(q + (warp_row + threadIdx.x % 16) * C::kStride + threadIdx.x % 32 / 16 * 8);
  if constexpr (C::kKeepQ) {
#pragma unroll
    for (int m = 0; m < C::MT; ++m)
#pragma unroll
      for (int s = 0; s < C::kSteps16 + C::kTail; ++s) load_q<C>(w.q[m][s], q_at, m, s);
  }
  const SharedAddress k_at = plain_address(k);
  int row = 0;                             // of the two stages' 2 * KEYS rows
  for (int key = 0; key < S; key += kStep) {
    if (row == 0 || row == C::KEYS) {
      cp_async_wait<0>();
      __syncthreads();                     // this tile is there, and the other stage is no longer read
      if (key + C::KEYS < S) {
        const int next = (C::KEYS - row) * C::kStride;
        load_tile<C, C::KEYS>(k + next, k_head, a.stride_ks, key + C::KEYS, S, D, p.wide_k);
        load_tile<C, C::KEYS>(v + next, v_head, a.stride_vs, key + C::KEYS, S, D, p.wide_v);
      }
      cp_async_commit();
    }
    const SharedAddress at = k_at + row * C::kStride * 2;
    float s[C::MT][kStep / 8][4];
    scores<C>(w, s, q_at, at);
    if constexpr (MASKED) mask_scores<C>(a, s, n * a.stride_mn + h * a.stride_mh, first + warp_row, key);
    if (key + kStep > S) cut_scores<C>(s, S - key);
    softmax<C>(w, s, p);
    values<C>(w, s, at + 2 * C::KEYS * C::kStride * 2);
    row = row + kStep == 2 * C::KEYS ? 0 : row + kStep;
  }
  write_output<C>(w, p, q + warp_row * C::kStride, (n * a.L * a.H + h) * a.D, first + warp_row);
}

template <typename C, bool MASKED> void start(Params p, const Launch& where) {
  p.factor = MASKED ? 1.0f : p.a.scale * kLog2e;
  p.slack = kSlack / p.factor;
  const Blocks blocks(ceil_div(p.a.L, C::kQueries), p.a.H, p.a.N);
  launch<attention_kernel<C, MASKED>>("attention", p, blocks, kThreads, C::kShared, where);
}
// MT: 16-query tiles a warp without a mask; the mask's addresses leave room for one
template <typename T, int D, int MT, int KEYS> void start(const Params& p, const Launch& where) {
  if (p.a.mask || p.a.scale <= 0.0f)       // a factor of no positive sign would turn the maximum around
    start<Config<T, D, 1, KEYS>, true>(p, where);
  else
    start<Config<T, D, MT, KEYS>, false>(p, where);
}

bool wide(const void* p, int64_t D, int64_t a, int64_t b, int64_t c) {
  return aligned(p, 16) && D % 8 == 0 && a % 8 == 0 && b % 8 == 0 && c % 8 == 0;
}

// The next width that is compiled; what lies between is zero. 96 keys a tile where they fit: a prompt's 77 in one.
template <typename T> void start_mma(const AttentionArgs& a, const Launch& where) {
  Params p = {a, 0, 1.0f, kSlack, false, false, false, false};
  p.wide_q = wide(a.q, a.D, a.stride_qn, a.stride_ql, a.stride_qh);
  p.wide_k = wide(a.k, a.D, a.stride_kn, a.stride_ks, a.stride_kh);
  p.wide_v = wide(a.v, a.D, a.stride_vn, a.stride_vs, a.stride_vh);
  p.wide_out = wide(a.out, a.D, 0, 0, 0);
  if (a.D <= 32) start<T, 32, 2, 96>(p, where);
  else if (a.D <= 40) start<T, 40, 2, 96>(p, where);
  else if (a.D <= 64) start<T, 64, 2, 96>(p, where);
  else if (a.D <= 80) start<T, 80, 1, 96>(p, where);
  else if (a.D <= 96) start<T, 96, 1, 64>(p, where);
  else if (a.D <= 128) start<T, 128, 1, 64>(p, where);
  else if (a.D <= 160) start<T, 160, 1, 32>(p, where);
  else start<T, 256, 1, 32>(p, where);
}
}  // namespace attention_detail

size_t attention_workspace(const AttentionArgs&) { return 0; }

void attention(const AttentionArgs& all, const Launch& where) {
  if (all.N * all.L * all.H * all.D == 0) return;
  if (all.L > INT32_MAX - 256 || all.S > INT32_MAX - 256 || all.H > kMaxBlocksYZ)
    throw std::runtime_error("attention: more than 2^31 rows or 65535 heads");
  for (int64_t n = 0; n < all.N; n += kMaxBlocksYZ) {
    AttentionArgs a = all;
    const auto skip = [&](const void* p, int64_t stride, DType d) {
      return p ? static_cast<const char*>(p) + n * stride * int64_t(size_of(d)) : nullptr;
    };
    a.N = all.N - n < kMaxBlocksYZ ? all.N - n : kMaxBlocksYZ;
    a.q = skip(all.q, all.stride_qn, all.dtype);
    a.k = skip(all.k, all.stride_kn, all.dtype);
    a.v = skip(all.v, all.stride_vn, all.dtype);
    a.mask = skip(all.mask, all.stride_mn, all.mask_dtype);
    a.out = const_cast<char*>(skip(all.out, all.L * all.H * all.D, all.dtype));
    if (a.dtype == DType::kFloat32 || a.D > 256) attention_detail::start_simt(a, where);
    else if (a.dtype == DType::kFloat16) attention_detail::start_mma<f16>(a, where);
    else attention_detail::start_mma<bf16>(a, where);
  }
}
}  // namespace ldmfast
