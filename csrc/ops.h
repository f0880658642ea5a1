// The C++ contract of every op: one argument struct and one launcher each, listed in LDMFAST_OPS at the end.
//
// A launcher reads and writes exactly the memory that its struct describes. It neither allocates nor
// synchronises, so that a CUDA graph can capture it; scratch memory is passed in, sized by *_workspace.
// All checks are made in Python (ldmfast/ops); a launcher may trust its struct. Indices are 64 bits.
// Strides are in elements. A launcher throws std::runtime_error naming the op when the device refuses.
//
// LDMFAST_FIELDS names the fields of a struct again, for the binding (fields.h): Python gives each by its name.
#pragma once
#include <cstddef>
#include <cstdint>

#ifndef LDMFAST_FIELDS
#define LDMFAST_FIELDS(...)  // the kernels have no use for them
#endif

namespace ldmfast {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kBool = 3 };

// Where to run. The CPU ignores both; CUDA takes the device's index and a cudaStream_t.
struct Launch {
  int device = -1;
  void* stream = nullptr;
};

// y = act(GroupNorm(x + add) * (1 + scale) + shift), act = SiLU or the identity
struct GroupNormSiluArgs {
  const void* x;                       // [N, C, P], P = H * W; either stride_xp == 1 or stride_xc == 1
  int64_t stride_xn, stride_xc, stride_xp;
  void* y;                             // [N, C, P], dense, in the layout of x (see channels_last)
  const void* weight;                  // [C] or null
  const void* bias;                    // [C] or null
  const void* add;                     // [N, C], unit stride in C, or null
  const void* scale;                   // [N, C], unit stride in C, or null (null together with shift or alone)
  const void* shift;                   // [N, C], unit stride in C, or null
  int64_t stride_add, stride_scale, stride_shift;  // one row to the next
  int64_t N, C, P, groups;
  float eps;
  bool silu;
  bool channels_last;                  // true: stride_xc == 1 and y is [N, P, C] in memory; false: stride_xp == 1
  DType dtype;                         // of x and y
  DType param_dtype;                   // of weight and bias: dtype or kFloat32
  DType mod_dtype;                     // of add, scale and shift: dtype or kFloat32
  float* workspace;                    // group_norm_silu_workspace(args) bytes, or null where that is 0
};
LDMFAST_FIELDS(GroupNormSiluArgs, x, stride_xn, stride_xc, stride_xp, y, weight, bias, add, scale, shift, stride_add,
               stride_scale, stride_shift, N, C, P, groups, eps, silu, channels_last, dtype, param_dtype, mod_dtype,
               workspace)

// Statistics are recomputed. With xhat the normalised x + add, z = (weight * xhat + bias) * (1 + scale) + shift,
// g = dy * act'(z), d = weight * (1 + scale) * g and E the mean over a group:
// dx = rstd * (d - E[d] - xhat * E[d * xhat])
struct GroupNormSiluBackwardArgs {
  const void* dy;                      // [N, C, P], dense, in the layout of x (see channels_last)
  const void* x;                       // [N, C, P], as in GroupNormSiluArgs
  int64_t stride_xn, stride_xc, stride_xp;
  void* dx;                            // [N, C, P], dense, in the layout of x
  float* sums;                         // [3, N, C], over the pixels: of g, of g * xhat, of dx before it is rounded
  const void* weight;                  // [C] or null
  const void* bias;                    // [C] or null
  const void* add;                     // [N, C], unit stride in C, or null
  const void* scale;                   // [N, C], unit stride in C, or null
  const void* shift;                   // [N, C], unit stride in C, or null
  int64_t stride_add, stride_scale, stride_shift;  // one row to the next
  int64_t N, C, P, groups;
  float eps;
  bool silu;
  bool channels_last;                  // true: stride_xc == 1, dy and dx are [N, P, C] in memory; false: stride_xp == 1
  DType dtype;                         // of dy, x and dx
  DType param_dtype;                   // of weight and bias: dtype or kFloat32
  DType mod_dtype;                     // of add, scale and shift: dtype or kFloat32
  float* workspace;                    // group_norm_silu_backward_workspace(args) bytes, or null where that is 0
};
LDMFAST_FIELDS(GroupNormSiluBackwardArgs, dy, x, stride_xn, stride_xc, stride_xp, dx, sums, weight, bias, add, scale,
               shift, stride_add, stride_scale, stride_shift, N, C, P, groups, eps, silu, channels_last, dtype,
               param_dtype, mod_dtype, workspace)

// out = softmax(scale * q k^T + mask) v. A row with every key masked, or S == 0, gives zeros.
struct AttentionArgs {
  const void* q;                       // [N, L, H, D], unit stride in D
  const void* k;                       // [N, S, H, D], unit stride in D
  const void* v;                       // [N, S, H, D], unit stride in D
  void* out;                           // [N, L, H, D], dense
  int64_t stride_qn, stride_ql, stride_qh;
  int64_t stride_kn, stride_ks, stride_kh;
  int64_t stride_vn, stride_vs, stride_vh;
  const void* mask;                    // [N, H, L, S] by strides (0 where broadcast), or null
  int64_t stride_mn, stride_mh, stride_ml, stride_ms;
  DType mask_dtype;                    // kBool (true: attend) or an additive floating type
  int64_t N, L, S, H, D;
  float scale;
  DType dtype;
  void* workspace;                     // attention_workspace(args) bytes, or null where that is 0
};
LDMFAST_FIELDS(AttentionArgs, q, k, v, out, stride_qn, stride_ql, stride_qh, stride_kn, stride_ks, stride_kh,
               stride_vn, stride_vs, stride_vh, mask, stride_mn, stride_mh, stride_ml, stride_ms, mask_dtype, N, L, S,
               H, D, scale, dtype, workspace)

// P = softmax(scale * q k^T + mask) and delta = sum_d dout * out are recomputed:
// dv = P^T dout, dS = P * (dout v^T - delta), dq = scale * dS k, dk = scale * dS^T q.
// A row with every key masked gives zeros; L and S are not 0.
struct AttentionBackwardArgs {
  const void* dout;                    // [N, L, H, D], dense
  const void* q;                       // [N, L, H, D], unit stride in D
  const void* k;                       // [N, S, H, D], unit stride in D
  const void* v;                       // [N, S, H, D], unit stride in D
  const void* out;                     // [N, L, H, D], dense: what the forward returned
  void* dq;                            // [N, L, H, D], dense
  void* dk;                            // [N, S, H, D], dense
  void* dv;                            // [N, S, H, D], dense
  int64_t stride_qn, stride_ql, stride_qh;
  int64_t stride_kn, stride_ks, stride_kh;
  int64_t stride_vn, stride_vs, stride_vh;
  const void* mask;                    // [N, H, L, S] by strides (0 where broadcast), or null
  int64_t stride_mn, stride_mh, stride_ml, stride_ms;
  DType mask_dtype;                    // kBool (true: attend) or an additive floating type
  int64_t N, L, S, H, D;
  float scale;
  DType dtype;                         // of every tensor but the mask
  void* workspace;                     // attention_backward_workspace(args) bytes, or null where that is 0
};
LDMFAST_FIELDS(AttentionBackwardArgs, dout, q, k, v, out, dq, dk, dv, stride_qn, stride_ql, stride_qh, stride_kn,
               stride_ks, stride_kh, stride_vn, stride_vs, stride_vh, mask, stride_mn, stride_mh, stride_ml,
               stride_ms, mask_dtype, N, L, S, H, D, scale, dtype, workspace)

// out = w2 silu(w1 sinusoid(t) + b1) + b2; the sinusoid is rounded to dtype, as the layers' input
struct TimestepMlpArgs {
  const float* t;                      // [N]
  const float* freqs;                  // [dim / 2], computed by ldmfast/ops/timestep_mlp.py
  const void* w1;                      // [F, dim], dense
  const void* b1;                      // [F] or null
  const void* w2;                      // [E, F], dense
  const void* b2;                      // [E] or null
  void* out;                           // [N, E], dense
  int64_t N, dim, F, E;
  bool flip_sin_to_cos;                // true: cosines first; an odd dim ends in a zero
  DType dtype;                         // of the weights, the biases and out
  float* workspace;                    // timestep_mlp_workspace(args) bytes
};
LDMFAST_FIELDS(TimestepMlpArgs, t, freqs, w1, b1, w2, b2, out, N, dim, F, E, flip_sin_to_cos, dtype, workspace)

// With e the sinusoid, a = w1 e + b1 and h = silu(a), both recomputed in float32:
// dw2 = dout^T h, db2 = sum_n dout, da = (dout w2) * silu'(a), dw1 = da^T e, db1 = sum_n da
struct TimestepMlpBackwardArgs {
  const void* dout;                    // [N, E], dense
  const float* t;                      // [N]
  const float* freqs;                  // [dim / 2]
  const void* w1;                      // [F, dim], dense
  const void* b1;                      // [F] or null
  const void* w2;                      // [E, F], dense
  void* dw1;                           // [F, dim], dense
  void* db1;                           // [F]
  void* dw2;                           // [E, F], dense
  void* db2;                           // [E]
  int64_t N, dim, F, E;
  bool flip_sin_to_cos;
  DType dtype;                         // of dout, the weights, the biases and their gradients
  float* workspace;                    // timestep_mlp_backward_workspace(args) bytes
};
LDMFAST_FIELDS(TimestepMlpBackwardArgs, dout, t, freqs, w1, b1, w2, dw1, db1, dw2, db2, N, dim, F, E, flip_sin_to_cos,
               dtype, workspace)

// m   = guided ? mu + guidance * (mc - mu) : model_output
// x0  = clamp(x0_sample * sample + x0_model * m, -clip, clip)
// eps = eps_sample * sample + eps_model * m
// prev = prev_x0 * x0 + prev_eps * eps + sigma * noise
struct DdimCoefficients {
  float x0_sample, x0_model, eps_sample, eps_model, prev_x0, prev_eps, sigma;
};
struct DdimStepArgs {
  const void* sample;                  // [N, M] dense
  const void* model_output;            // [N, M], or [2N, M] (unconditional half first) when guided
  const void* noise;                   // [N, M] or null
  void* prev;                          // [N, M]
  void* x0;                            // [N, M]
  int64_t N, M;
  DdimCoefficients coefficients;       // for every sample, unless table is given
  const float* table;                  // [rows, 7] in the order of DdimCoefficients, or null
  const int64_t* row;                  // sample n takes row[n * stride_row] of the table, or row n where it is null;
  int64_t rows, stride_row;            // the coefficients of a row that the table has not are NaN
  float guidance;
  bool guided;
  float clip;                          // used if clipped
  bool clipped;
  // A linear multistep method, where multistep is true: the terms that are null are left out.
  //   h = eps_sample * sample + eps_model * m                  which x0 takes in place of the clean sample
  //   e = weight0 * h + weight1 * history1 + weight2 * history2 + weight3 * history3
  //   x0 = clamp(x0_sample * sample + x0_model * e, -clip, clip),  prev = prev_x0 * x0 + prev_eps * e + sigma * noise
  bool multistep;
  float weight0, weight1, weight2, weight3;
  const void* history1;                // [N, M] or null
  const void* history2;                // [N, M] or null
  const void* history3;                // [N, M] or null
  DType dtype;                         // of every tensor but the table
};
LDMFAST_FIELDS(DdimStepArgs, sample, model_output, noise, prev, x0, N, M, coefficients, table, row, rows, stride_row,
               guidance, guided, clip, clipped, multistep, weight0, weight1, weight2, weight3, history1, history2,
               history3, dtype)

// With c = 1, or 0 where the clamp held x0:  d0 = c * (dx0 + prev_x0 * dprev),  de = prev_eps * dprev
// dsample = x0_sample * d0 + eps_sample * de,  dm = x0_model * d0 + eps_model * de,  dnoise = sigma * dprev
// dmodel_output = guided ? (1 - guidance) * dm, then guidance * dm : dm
struct DdimStepBackwardArgs {
  const void* dprev;                   // [N, M] dense
  const void* dx0;                     // [N, M]
  const void* sample;                  // [N, M]
  const void* model_output;            // [N, M] or, when guided, [2N, M]
  void* dsample;                       // [N, M]
  void* dmodel_output;                 // as model_output
  void* dnoise;                        // [N, M] or null: not wanted
  int64_t N, M;
  DdimCoefficients coefficients;       // for every sample, unless table is given
  const float* table;                  // [N, 7] in the order of DdimCoefficients, or null
  float guidance;
  bool guided;
  float clip;                          // used if clipped
  bool clipped;
  DType dtype;                         // of every tensor but the table
};
LDMFAST_FIELDS(DdimStepBackwardArgs, dprev, dx0, sample, model_output, dsample, dmodel_output, dnoise, N, M,
               coefficients, table, guidance, guided, clip, clipped, dtype)

// norm_scale = rstd * weight * (1 + scale), norm_shift = (bias - mean * rstd * weight) * (1 + scale) + shift: GroupNorm
// of [x1, x2] by channels, as conv2d applies it.
struct GroupNormAffineArgs {
  const void* x1;                      // [N, P, C1], unit stride in C
  int64_t stride_x1n, stride_x1p;
  const void* x2;                      // [N, P, C2] likewise, or null where C2 == 0
  int64_t stride_x2n, stride_x2p;
  const void* weight;                  // [C1 + C2] or null
  const void* bias;                    // [C1 + C2] or null
  const void* scale;                   // [N, C1 + C2], unit stride in C, or null
  const void* shift;                   // [N, C1 + C2], unit stride in C, or null
  int64_t stride_scale, stride_shift;  // one row to the next
  float* norm_scale;                   // [N, C1 + C2], dense
  float* norm_shift;                   // [N, C1 + C2], dense
  double* moments;                     // [N, groups, 2], dense: mean and variance
  int64_t N, C1, C2, P, groups;
  float eps;
  DType dtype;                         // of x1 and x2
  DType param_dtype;                   // of weight and bias: dtype or kFloat32
  DType mod_dtype;                     // of scale and shift: dtype or kFloat32
  float* workspace;                    // group_norm_affine_workspace(args) bytes
};
LDMFAST_FIELDS(GroupNormAffineArgs, x1, stride_x1n, stride_x1p, x2, stride_x2n, stride_x2p, weight, bias, scale, shift,
               stride_scale, stride_shift, norm_scale, norm_shift, moments, N, C1, C2, P, groups, eps, dtype,
               param_dtype, mod_dtype, workspace)

// y = (x - mean) * rstd * weight + bias over K
struct LayerNormArgs {
  const void* x;                       // [M, K], unit stride in K
  int64_t stride_x;
  void* y;                             // [M, K], dense
  const void* weight;                  // [K] or null
  const void* bias;                    // [K] or null
  int64_t M, K;
  float eps;
  DType dtype;                         // of every tensor
};
LDMFAST_FIELDS(LayerNormArgs, x, stride_x, y, weight, bias, M, K, eps, dtype)

enum class Activation : int { kNone = 0, kSilu = 1, kGelu = 2, kGeglu = 3 };

// out = (act(norm(x) w^T + bias) + residual) * output_scale. With kGeglu, w has 2N rows: h = the first N, g = the
// others, and act is h * gelu(g). norm is LayerNorm over K, or the identity.
struct LinearArgs {
  const void* x;                       // [M, K], unit stride in K
  int64_t stride_x;
  const void* weight;                  // [N, K] or [2N, K], unit stride in K
  int64_t stride_w;
  const void* bias;                    // [N] or [2N], or null
  const void* residual;                // [M, N], unit stride in N, or null
  int64_t stride_residual;
  void* out;                           // [M, N], unit stride in N
  int64_t stride_out;
  const void* norm_weight;             // [K], or null: 1
  const void* norm_bias;               // [K], or null: 0
  float eps;
  bool normalised;                     // LayerNorm of x first
  int64_t M, N, K;
  Activation activation;
  float output_scale;
  bool exact;                          // the same bits for a row whatever M is: no form of its own for few rows
  DType dtype;                         // of every tensor
  void* workspace;                     // linear_workspace(args) bytes
};
LDMFAST_FIELDS(LinearArgs, x, stride_x, weight, stride_w, bias, residual, stride_residual, out, stride_out,
               norm_weight, norm_bias, eps, normalised, M, N, K, activation, output_scale, exact, dtype, workspace)

// How a 3x3 convolution of stride 1 is computed. kAuto chooses by shape and dtype. kF4 keeps 16 bits of a transformed
// operand too few: float32 only where accuracy counts.
enum class ConvForm : int { kAuto = 0, kDirect = 1, kF2 = 2, kF4 = 3 };

// out = (conv(act(x * norm_scale + norm_shift)) + bias + add + residual) * output_scale, x = [x1, x2] by channels,
// enlarged `upsample` times (nearest), zero outside; channels_last.
struct Conv2dArgs {
  const void* x1;                      // [N, H, W, C1] by strides, unit stride in C
  int64_t stride_x1n, stride_x1h, stride_x1w;
  const void* x2;                      // [N, H, W, C2] likewise, or null where C2 == 0
  int64_t stride_x2n, stride_x2h, stride_x2w;
  const void* weight;                  // [Co, C1 + C2, K, K] by strides
  int64_t stride_wo, stride_wi, stride_wh, stride_ww;
  const void* bias;                    // [Co] or null
  const void* add;                     // [N, Co], unit stride in Co, or null
  int64_t stride_add;
  const void* residual;                // [N, Ho, Wo, Co], dense, or null
  const float* norm_scale;             // [N, C1 + C2], dense, or null: the input's norm as a factor and a shift
  const float* norm_shift;             // [N, C1 + C2], dense, or null together with norm_scale
  void* out;                           // [N, Ho, Wo, Co], dense
  int64_t N, H, W, C1, C2, Co, Ho, Wo;
  int64_t kernel, stride, padding;     // K; padding is that above and to the left
  int64_t upsample;                    // 1 or 2
  float output_scale;
  bool silu;                           // of the normalised input
  ConvForm form;
  DType dtype;                         // of every tensor but norm_scale and norm_shift
  void* workspace;                     // conv2d_workspace(args) bytes
};
LDMFAST_FIELDS(Conv2dArgs, x1, stride_x1n, stride_x1h, stride_x1w, x2, stride_x2n, stride_x2h, stride_x2w, weight,
               stride_wo, stride_wi, stride_wh, stride_ww, bias, add, stride_add, residual, norm_scale, norm_shift,
               out, N, H, W, C1, C2, Co, Ho, Wo, kernel, stride, padding, upsample, output_scale, silu, form, dtype,
               workspace)

// The gradient of the weight of a 3x3 convolution of stride 1, everything in float32.
struct Conv2dWeightBackwardArgs {
  const void* dy;                      // [N, Ho, Wo, Co] by strides, unit stride in Co
  int64_t stride_dyn, stride_dyh, stride_dyw;
  const void* x;                       // [N, H, W, Ci] likewise; zero outside
  int64_t stride_xn, stride_xh, stride_xw;
  void* dw;                            // [Co, Ci, 3, 3], dense
  int64_t N, H, W, Ci, Co, Ho, Wo;     // of at least one output and channel
  int64_t padding;                     // above and to the left
  void* workspace;                     // conv2d_weight_backward_workspace(args) bytes
};
LDMFAST_FIELDS(Conv2dWeightBackwardArgs, dy, stride_dyn, stride_dyh, stride_dyw, x, stride_xn, stride_xh, stride_xw, dw,
               N, H, W, Ci, Co, Ho, Wo, padding, workspace)

// out = h * gelu(g), gelu with erf: h the first F of a row of x, g the others
struct GegluArgs {
  const void* x;                       // [M, 2F], unit stride in F
  int64_t stride_x;
  void* out;                           // [M, F], dense
  int64_t M, F;
  DType dtype;                         // of both
};
LDMFAST_FIELDS(GegluArgs, x, stride_x, out, M, F, dtype)

// y = (x + bias + add + residual) * output_scale
struct BiasResidualArgs {
  const void* x;                       // [N, C, P], dense in the layout that channels_last says
  const void* bias;                    // [C] or null
  const void* add;                     // [N, C], unit stride in C, or null
  int64_t stride_add;
  const void* residual;                // as x, or null
  void* y;                             // as x
  int64_t N, C, P;
  float output_scale;
  bool channels_last;                  // true: [N, P, C] in memory
  DType dtype;                         // of every tensor
};
LDMFAST_FIELDS(BiasResidualArgs, x, bias, add, stride_add, residual, y, N, C, P, output_scale, channels_last, dtype)

// sum = x + residual, rounded; y = (sum - mean) * rstd * weight + bias over K
struct ResidualLayerNormArgs {
  const void* x;                       // [M, K], unit stride in K
  const void* residual;                // [M, K], unit stride in K
  int64_t stride_x, stride_residual;
  const void* weight;                  // [K] or null
  const void* bias;                    // [K] or null
  void* sum;                           // [M, K], dense
  void* y;                             // [M, K], dense
  int64_t M, K;
  float eps;
  DType dtype;                         // of every tensor
};
LDMFAST_FIELDS(ResidualLayerNormArgs, x, residual, stride_x, stride_residual, weight, bias, sum, y, M, K, eps, dtype)

// Every op once: its launcher, its struct, and whether it has a workspace. The launchers' declarations, the choice of
// an instruction set (cpu/dispatch.cpp) and the binding (bind.cpp) are made from these lists: those of every module, ...
#define LDMFAST_OPS(OP)                                                   \
  OP(group_norm_silu, GroupNormSiluArgs, WORKSPACE)                       \
  OP(attention, AttentionArgs, WORKSPACE)                                 \
  OP(timestep_mlp, TimestepMlpArgs, WORKSPACE)                            \
  OP(ddim_step, DdimStepArgs, NO_WORKSPACE)                               \
  OP(group_norm_silu_backward, GroupNormSiluBackwardArgs, WORKSPACE)      \
  OP(attention_backward, AttentionBackwardArgs, WORKSPACE)                \
  OP(timestep_mlp_backward, TimestepMlpBackwardArgs, WORKSPACE)           \
  OP(ddim_step_backward, DdimStepBackwardArgs, NO_WORKSPACE)
// ... those that the CPU's module has alone; a GPU's libraries have them ...
#define LDMFAST_CPU_OPS(OP)                                               \
  OP(group_norm_affine, GroupNormAffineArgs, WORKSPACE)                   \
  OP(layer_norm, LayerNormArgs, NO_WORKSPACE)                             \
  OP(linear, LinearArgs, WORKSPACE)                                       \
  OP(conv2d, Conv2dArgs, WORKSPACE)                                       \
  OP(conv2d_weight_backward, Conv2dWeightBackwardArgs, WORKSPACE)
// ... and those that it lacks: what its linear and conv2d take in themselves
#define LDMFAST_GPU_OPS(OP)                                               \
  OP(geglu, GegluArgs, NO_WORKSPACE)                                      \
  OP(bias_residual, BiasResidualArgs, NO_WORKSPACE)                       \
  OP(residual_layer_norm, ResidualLayerNormArgs, NO_WORKSPACE)

#define LDMFAST_IF_WORKSPACE(...) __VA_ARGS__
#define LDMFAST_IF_NO_WORKSPACE(...)

// void op(const Args&, const Launch&), and size_t op_workspace(const Args&): the bytes that args.workspace must have
#define LDMFAST_DECLARE(op, Args, W)                    \
  void op(const Args& args, const Launch& launch);      \
  LDMFAST_IF_##W(size_t op##_workspace(const Args& args);)
LDMFAST_OPS(LDMFAST_DECLARE)
LDMFAST_CPU_OPS(LDMFAST_DECLARE)
LDMFAST_GPU_OPS(LDMFAST_DECLARE)
#undef LDMFAST_DECLARE

}  // namespace ldmfast
