// out = (conv(act(norm(x))) + bias + add + residual) * output_scale, channels_last: the choice of its form.
//
//   1x1 of stride 1 with nothing before it: linear (linear.cpp), a pixel a row
//   other 1x1, small pictures: direct (conv2d_run_direct.h)
//   3x3 of a few channels: direct forms that do not fill them up (conv2d_few_inputs.h, conv2d_few_outputs.h)
//   3x3 of more: F(4x4, 3x3) or F(2x2, 3x3), and what F(2x2, 2x2) makes of stride 2 and of an enlarged picture
//     (winograd.h)
//   other 3x3 where products are by tiles: direct (conv2d_tiled.h)
#include "winograd.h"
#include "conv2d_run_direct.h"
#include "conv2d_few_inputs.h"
#include "conv2d_few_outputs.h"
#include "conv2d_tiled.h"

namespace ldmfast {
namespace LDMFAST_ISA {

size_t linear_workspace(const LinearArgs& a);
void linear(const LinearArgs& a);

namespace {

// F4 is F4Enlarged, and F2 is F2Strided, where their operands are float32.
template <class M> bool is_enlarged(const Conv2dArgs& a) { return M::kPack == 1 && a.upsample == 2 && a.padding == 1; }
template <class M> bool is_strided(const Conv2dArgs& a) { return M::kPack == 1 && a.upsample == 1 && a.stride == 2; }

// What a weight costs beside its products, in vector operations for a pair of a vector of output channels and a word of
// input channels. Measured on Zen 4: with AVX2 a weight from memory, on two threads; with AVX-512 one in the cache.
constexpr bool kCold = kLanes == 8;
constexpr int64_t kF2Weight = kCold ? 230 : 100, kF4Weight = kCold ? 400 : 160, kStridedWeight = kCold ? 210 : 80;

// The form with the least vector operations for such a pair.
template <class M, class T> ConvForm form_of(const Conv2dArgs& a) {
  const bool strided = is_strided<M>(a);
  if (a.kernel != 3 || (a.stride != 1 && !strided)) return ConvForm::kDirect;
  if (a.form != ConvForm::kAuto) return strided && a.form == ConvForm::kF4 ? ConvForm::kF2 : a.form;
  if (has_few_inputs<M>(a) || has_few_outputs(a)) return ConvForm::kDirect;
  if (M::kTiles) return ConvForm::kDirect;  // whose products are too fast for transforms
  const int64_t pixels = a.N * a.Ho * a.Wo;
  // read in place: nothing to transform and no wait for memory, but whole vectors of pixels; on one thread of Zen 5,
  // 1280 -> 1280 in bfloat16, 4.14 ms against 3.94 of F(2x2, 3x3) at 8x8, 1.41 against 2.56 at 4x4
  const int64_t streamed = 9 * kLanes * ceil_div(pixels, kLanes);
  const int64_t direct = !streams<M, T>(a) ? 9 * pixels + 60 : kCold ? streamed + 30 : streamed * 5 / 6;
  const int64_t tiles = a.N * ceil_div(a.Ho, 2) * ceil_div(a.Wo, 2);
  const int64_t two = strided ? 25 * tiles + kStridedWeight : 16 * tiles + kF2Weight * M::kPack;
  const int64_t four = 36 * a.N * ceil_div(a.Ho, 4) * ceil_div(a.Wo, 4) + kF4Weight;
  // F(4, 3) loses too many bits for operands of 16; where 16-bit types are widened, its operands are float32
  if (M::kPack == 1 && !strided && four < two && four < direct) return ConvForm::kF4;
  return two < direct ? ConvForm::kF2 : ConvForm::kDirect;
}

// What takes the form, with a type of winograd_transform.h; false where none is Winograd's.
template <class M, class Run> bool by_winograd(const Conv2dArgs& a, ConvForm form, const Run& run) {
  if (form == ConvForm::kDirect) return false;
  if (is_strided<M>(a)) run(F2Strided());
  else if (form == ConvForm::kF2) run(F2());
  else if (is_enlarged<M>(a)) run(F4Enlarged());
  else run(F4());
  return true;
}

#if defined(__AMX_BF16__)
// Whether conv2d_tiled.h takes it: more pixels than a weight is read in place for.
template <class M, class T> bool is_tiled(const Conv2dArgs& a) {
  return a.kernel == 3 && !streams<M, T>(a.norm_scale ? of_copy<T>(a, nullptr) : a);
}
#endif

// Whether it is a product of the pixels as they lie.
bool is_linear(const Conv2dArgs& a) {
  const bool plain = a.kernel == 1 && a.stride == 1 && a.padding == 0 && a.upsample == 1;
  const bool alone = a.C2 == 0 && !a.add && !a.norm_scale && (a.stride_wi == 1 || a.C1 == 1);
  const bool rows = a.H == 1 || a.stride_x1h == a.W * a.stride_x1w;
  return plain && alone && rows && (a.N == 1 || a.stride_x1n == a.H * a.W * a.stride_x1w);
}
LinearArgs linear_of(const Conv2dArgs& a) {
  LinearArgs b = {};
  b.x = a.x1, b.stride_x = a.stride_x1w, b.weight = a.weight, b.stride_w = a.stride_wo, b.bias = a.bias;
  b.residual = a.residual, b.stride_residual = a.Co, b.out = a.out, b.stride_out = a.Co;
  b.M = a.N * a.H * a.W, b.N = a.Co, b.K = a.C1;
  b.activation = Activation::kNone, b.output_scale = a.output_scale, b.exact = a.form == ConvForm::kDirect;
  b.dtype = a.dtype, b.workspace = a.workspace;
  return b;
}

template <class T> void run(const Conv2dArgs& a) {
  using M = typename MathOf<T>::type;
  using Vectors = typename VectorMathOf<T>::type;
  const auto winograd = [&](auto f) { run_winograd<Vectors, T, decltype(f)>(a); };
  if (by_winograd<Vectors>(a, form_of<M, T>(a), winograd)) return;
  if (has_few_outputs(a)) return run_few_outputs<M, T>(a);
  if (has_few_inputs<M>(a)) return run_few_inputs<M, T>(a);
#if defined(__AMX_BF16__)
  if constexpr (M::kTiles) {
    if (is_tiled<M, T>(a)) return run_tiled<M, T>(a);
  }
#endif
  run_direct<M, T>(a);
}

template <class T> size_t floats_of(const Conv2dArgs& a) {
  using M = typename MathOf<T>::type;
  using Vectors = typename VectorMathOf<T>::type;
  size_t floats = 0;
  const auto winograd = [&](auto f) { floats = winograd_plan<Vectors, decltype(f)>(a).floats; };
  if (by_winograd<Vectors>(a, form_of<M, T>(a), winograd)) return floats;
  if (has_few_outputs(a)) return few_outputs_floats<M, T>(a);
  if (has_few_inputs<M>(a)) return few_inputs_floats<M, T>(a);
#if defined(__AMX_BF16__)
  if (M::kTiles && is_tiled<M, T>(a)) return (size_t)tiled_plan(a, groups_of<M>(a)).floats();
#endif
  return direct_floats<M, T>(a);
}

}  // namespace

size_t conv2d_workspace(const Conv2dArgs& a) {
  if (a.N * a.Ho * a.Wo * a.Co == 0) return 0;
  if (is_linear(a)) return LDMFAST_ISA::linear_workspace(linear_of(a));
  if (a.dtype == DType::kFloat32) return 4 * floats_of<float>(a);
  return 4 * (a.dtype == DType::kBFloat16 ? floats_of<BFloat16>(a) : floats_of<Half>(a));
}

void conv2d(const Conv2dArgs& a) {
  if (a.N * a.Ho * a.Wo * a.Co == 0) return;
  if (is_linear(a)) return LDMFAST_ISA::linear(linear_of(a));
  if (a.dtype == DType::kFloat32) return run<float>(a);
  if (a.dtype == DType::kBFloat16) return run<BFloat16>(a);
  return run<Half>(a);
}

}  // namespace LDMFAST_ISA
}  // namespace ldmfast
