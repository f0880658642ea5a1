// The gradient of softmax(scale * q k^T + mask) v with float16 and bfloat16 inputs, on tensor cores (mma.sync).
//
// A block of 4 warps takes 64 rows of one side, 16 a warp, and walks over the other side's in tiles of two stages. The
// kernel over keys has everything transposed, so that the weights, as they come out of one product, are the left
// operand of the next without leaving the registers. As in the forward, D = 40 is not padded. 8 products of L * S * D
// multiply-adds a head, where one kernel with atomics and the sums kept from the forward would take 5: the same bits
// each time, and nothing to keep.
//
// A prompt's 77 keys are 2 blocks a head: there the queries are split over blocks, whose sums a last launch adds.
#include "attention_backward_kernels.cuh"

namespace ldmfast {
namespace attention_detail {
namespace {
constexpr int kWidest = 160;
constexpr int64_t kFewBlocks = 264;        // two on each of 132 multiprocessors
constexpr int64_t kShare = 512;            // queries a block takes at least

bool on_tensor_cores(DType dtype, int64_t D) { return dtype != DType::kFloat32 && D <= kWidest; }

// how many blocks share a tile of keys' queries, from the shape alone
int splits_of(int64_t N, int64_t L, int64_t S, int64_t H, int64_t D, DType dtype) {
  if (!on_tensor_cores(dtype, D)) return 1;
  const int64_t blocks = ceil_div(S, 64) * H * N, wanted = ceil_div(kFewBlocks, blocks), most = ceil_div(L, kShare);
  return static_cast<int>(wanted < most ? wanted : most);
}

template <typename C, bool MASKED> void start_kernels(BackwardParams p, const Launch& where) {
  const char* op = "attention_backward";
  const AttentionArgs& a = p.a;
  p.factor = MASKED ? 1.0f : a.scale * kLog2e;
  const int64_t queries = ceil_div(a.L, C::kOwn), keys = ceil_div(a.S, C::kOwn);
  launch<rows_kernel<C, MASKED>>(op, p, Blocks(queries, a.H, a.N), kBackwardThreads, C::kShared, where);
  launch<keys_kernel<C, MASKED>>(op, p, Blocks(keys * p.splits, a.H, a.N), kBackwardThreads, C::kShared, where);
  if (p.splits > 1)
    launch<combine_kernel<typename C::T>>(op, p, ceil_div(a.N * a.H * a.S * a.D, kBackwardThreads), kBackwardThreads, 0,
                                          where);
  launch<queries_kernel<C, MASKED>>(op, p, Blocks(queries, a.H, a.N), kBackwardThreads, C::kShared, where);
}
template <typename T, int D> void start(const BackwardParams& p, const Launch& where) {
  if (p.a.mask || p.a.scale <= 0.0f)  // as in attention.cu; and 0 would make NaN of the keys that pad a tile
    start_kernels<BackwardConfig<T, D>, true>(p, where);
  else
    start_kernels<BackwardConfig<T, D>, false>(p, where);
}

bool wide(const void* p, int64_t D, int64_t a, int64_t b, int64_t c) {
  return aligned(p, 16) && D % 8 == 0 && a % 8 == 0 && b % 8 == 0 && c % 8 == 0;
}

template <typename T> void start_mma(BackwardParams p, const Launch& where) {
  const AttentionArgs& a = p.a;
  p.wide_q = wide(a.q, a.D, a.stride_qn, a.stride_ql, a.stride_qh);
  p.wide_k = wide(a.k, a.D, a.stride_kn, a.stride_ks, a.stride_kh);
  p.wide_v = wide(a.v, a.D, a.stride_vn, a.stride_vs, a.stride_vh);
  p.wide_out = wide(p.dout, a.D, 0, 0, 0) && aligned(p.dq, 16) && aligned(p.dk, 16) && aligned(p.dv, 16);
  if (a.D <= 40) start<T, 40>(p, where);
  else if (a.D <= 64) start<T, 64>(p, where);
  else if (a.D <= 80) start<T, 80>(p, where);
  else if (a.D <= 128) start<T, 128>(p, where);
  else start<T, 160>(p, where);
}

BackwardParams params_of(const AttentionBackwardArgs& b) {
  BackwardParams p{};
  AttentionArgs& a = p.a;
  a.q = b.q, a.k = b.k, a.v = b.v, a.out = const_cast<void*>(b.out), a.mask = b.mask, a.mask_dtype = b.mask_dtype;
  a.stride_qn = b.stride_qn, a.stride_ql = b.stride_ql, a.stride_qh = b.stride_qh;
  a.stride_kn = b.stride_kn, a.stride_ks = b.stride_ks, a.stride_kh = b.stride_kh;
  a.stride_vn = b.stride_vn, a.stride_vs = b.stride_vs, a.stride_vh = b.stride_vh;
  a.stride_mn = b.stride_mn, a.stride_mh = b.stride_mh, a.stride_ml = b.stride_ml, a.stride_ms = b.stride_ms;
  a.N = b.N, a.L = b.L, a.S = b.S, a.H = b.H, a.D = b.D, a.scale = b.scale, a.dtype = b.dtype;
  p.dout = b.dout, p.dq = b.dq, p.dk = b.dk, p.dv = b.dv;
  p.rows = static_cast<float*>(b.workspace);
  p.parts = p.rows + 3 * b.N * b.H * b.L;
  p.splits = splits_of(b.N, b.L, b.S, b.H, b.D, b.dtype);
  p.blocks_d = 1;
  return p;
}
}  // namespace
}  // namespace attention_detail

size_t attention_backward_workspace(const AttentionBackwardArgs& a) {
  const int64_t splits = attention_detail::splits_of(a.N, a.L, a.S, a.H, a.D, a.dtype);
  return size_t(3 * a.N * a.H * a.L + (splits > 1 ? splits * 2 * a.N * a.H * a.S * a.D : 0)) * sizeof(float);
}

void attention_backward(const AttentionBackwardArgs& a, const Launch& where) {
  using namespace attention_detail;
  if (a.N * a.L * a.S * a.H * a.D == 0) return;
  if (a.L > INT32_MAX - 256 || a.S > INT32_MAX - 256 || a.H > kMaxBlocksYZ || a.N > kMaxBlocksYZ)
    throw std::runtime_error("attention_backward: more than 2^31 rows, or 65535 heads or samples");
  const BackwardParams p = params_of(a);
  if (!on_tensor_cores(a.dtype, a.D)) start_backward_simt(p, where);
  else if (a.dtype == DType::kFloat16) start_mma<f16>(p, where);
  else start_mma<bf16>(p, where);
}
}  // namespace ldmfast
