// The backward launchers of ops.h, as bind.cpp binds the others.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "ops.h"

namespace py = pybind11;
using namespace ldmfast;

namespace {

using Address = uintptr_t;

template <class T = const void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

#ifdef LDMFAST_GROUP_NORM_SILU_BACKWARD
size_t group_norm_silu_backward_scratch(int64_t N, int64_t C, int64_t P, int64_t groups, bool channels_last,
                                        int dtype) {
  GroupNormSiluBackwardArgs a{};
  a.N = N, a.C = C, a.P = P, a.groups = groups, a.channels_last = channels_last, a.dtype = DType(dtype);
  return group_norm_silu_backward_workspace(a);
}

void run_group_norm_silu_backward(Address dy, Address x, int64_t stride_xn, int64_t stride_xc, int64_t stride_xp,
                                  Address dx, Address sums, Address weight, Address bias, Address add, Address scale,
                                  Address shift, int64_t stride_add, int64_t stride_scale, int64_t stride_shift,
                                  int64_t N, int64_t C, int64_t P, int64_t groups, float eps, bool silu,
                                  bool channels_last, int dtype, int param_dtype, int mod_dtype, Address workspace,
                                  int device, Address stream) {
  GroupNormSiluBackwardArgs a{};
  a.dy = pointer(dy), a.x = pointer(x), a.dx = pointer<void>(dx), a.sums = pointer<float>(sums);
  a.stride_xn = stride_xn, a.stride_xc = stride_xc, a.stride_xp = stride_xp;
  a.weight = pointer(weight), a.bias = pointer(bias);
  a.add = pointer(add), a.scale = pointer(scale), a.shift = pointer(shift);
  a.stride_add = stride_add, a.stride_scale = stride_scale, a.stride_shift = stride_shift;
  a.N = N, a.C = C, a.P = P, a.groups = groups, a.eps = eps, a.silu = silu, a.channels_last = channels_last;
  a.dtype = DType(dtype), a.param_dtype = DType(param_dtype), a.mod_dtype = DType(mod_dtype);
  a.workspace = pointer<float>(workspace);
  group_norm_silu_backward(a, {device, pointer<void>(stream)});
}
#endif

#ifdef LDMFAST_ATTENTION_BACKWARD
size_t attention_backward_scratch(int64_t N, int64_t L, int64_t S, int64_t H, int64_t D, int dtype) {
  AttentionBackwardArgs a{};
  a.N = N, a.L = L, a.S = S, a.H = H, a.D = D, a.dtype = DType(dtype);
  return attention_backward_workspace(a);
}

void run_attention_backward(Address dout, Address q, Address k, Address v, Address out, Address dq, Address dk,
                            Address dv, int64_t stride_qn, int64_t stride_ql, int64_t stride_qh, int64_t stride_kn,
                            int64_t stride_ks, int64_t stride_kh, int64_t stride_vn, int64_t stride_vs,
                            int64_t stride_vh, Address mask, int64_t stride_mn, int64_t stride_mh, int64_t stride_ml,
                            int64_t stride_ms, int mask_dtype, int64_t N, int64_t L, int64_t S, int64_t H, int64_t D,
                            float scale, int dtype, Address workspace, int device, Address stream) {
  AttentionBackwardArgs a{};
  a.dout = pointer(dout), a.q = pointer(q), a.k = pointer(k), a.v = pointer(v), a.out = pointer(out);
  a.dq = pointer<void>(dq), a.dk = pointer<void>(dk), a.dv = pointer<void>(dv);
  a.stride_qn = stride_qn, a.stride_ql = stride_ql, a.stride_qh = stride_qh;
  a.stride_kn = stride_kn, a.stride_ks = stride_ks, a.stride_kh = stride_kh;
  a.stride_vn = stride_vn, a.stride_vs = stride_vs, a.stride_vh = stride_vh;
  a.mask = pointer(mask), a.mask_dtype = DType(mask_dtype);
  a.stride_mn = stride_mn, a.stride_mh = stride_mh, a.stride_ml = stride_ml, a.stride_ms = stride_ms;
  a.N = N, a.L = L, a.S = S, a.H = H, a.D = D, a.scale = scale, a.dtype = DType(dtype);
  a.workspace = pointer<void>(workspace);
  attention_backward(a, {device, pointer<void>(stream)});
}
#endif

#ifdef LDMFAST_TIMESTEP_MLP_BACKWARD
size_t timestep_mlp_backward_scratch(int64_t N, int64_t dim, int64_t F, int64_t E, int dtype) {
  TimestepMlpBackwardArgs a{};
  a.N = N, a.dim = dim, a.F = F, a.E = E, a.dtype = DType(dtype);
  return timestep_mlp_backward_workspace(a);
}

void run_timestep_mlp_backward(Address dout, Address t, Address freqs, Address w1, Address b1, Address w2, Address dw1,
                               Address db1, Address dw2, Address db2, int64_t N, int64_t dim, int64_t F, int64_t E,
                               bool flip_sin_to_cos, int dtype, Address workspace, int device, Address stream) {
  TimestepMlpBackwardArgs a{};
  a.dout = pointer(dout), a.t = pointer<const float>(t), a.freqs = pointer<const float>(freqs);
  a.w1 = pointer(w1), a.b1 = pointer(b1), a.w2 = pointer(w2);
  a.dw1 = pointer<void>(dw1), a.db1 = pointer<void>(db1), a.dw2 = pointer<void>(dw2), a.db2 = pointer<void>(db2);
  a.N = N, a.dim = dim, a.F = F, a.E = E, a.flip_sin_to_cos = flip_sin_to_cos, a.dtype = DType(dtype);
  a.workspace = pointer<float>(workspace);
  timestep_mlp_backward(a, {device, pointer<void>(stream)});
}
#endif

#ifdef LDMFAST_DDIM_STEP_BACKWARD
void run_ddim_step_backward(Address dprev, Address dx0, Address sample, Address model_output, Address dsample,
                            Address dmodel_output, Address dnoise, int64_t N, int64_t M,
                            const std::array<double, 7>& c, Address table, std::optional<float> guidance,
                            std::optional<float> clip, int dtype, int device, Address stream) {
  DdimStepBackwardArgs a{};
  a.dprev = pointer(dprev), a.dx0 = pointer(dx0), a.sample = pointer(sample), a.model_output = pointer(model_output);
  a.dsample = pointer<void>(dsample), a.dmodel_output = pointer<void>(dmodel_output);
  a.dnoise = pointer<void>(dnoise), a.N = N, a.M = M;
  a.coefficients = {float(c[0]), float(c[1]), float(c[2]), float(c[3]), float(c[4]), float(c[5]), float(c[6])};
  a.table = pointer<const float>(table);
  a.guided = guidance.has_value(), a.guidance = guidance.value_or(0);
  a.clipped = clip.has_value(), a.clip = clip.value_or(0);
  a.dtype = DType(dtype);
  ddim_step_backward(a, {device, pointer<void>(stream)});
}
#endif

}  // namespace

void bind_backward(py::module_& m) {
  [[maybe_unused]] auto release = py::call_guard<py::gil_scoped_release>();
#ifdef LDMFAST_GROUP_NORM_SILU_BACKWARD
  m.def("group_norm_silu_backward_workspace", &group_norm_silu_backward_scratch);
  m.def("group_norm_silu_backward", &run_group_norm_silu_backward, release);
#endif
#ifdef LDMFAST_ATTENTION_BACKWARD
  m.def("attention_backward_workspace", &attention_backward_scratch);
  m.def("attention_backward", &run_attention_backward, release);
#endif
#ifdef LDMFAST_TIMESTEP_MLP_BACKWARD
  m.def("timestep_mlp_backward_workspace", &timestep_mlp_backward_scratch);
  m.def("timestep_mlp_backward", &run_timestep_mlp_backward, release);
#endif
#ifdef LDMFAST_DDIM_STEP_BACKWARD
  m.def("ddim_step_backward", &run_ddim_step_backward, release);
#endif
}
