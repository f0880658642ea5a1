// The Python side of ops.h: addresses, sizes, strides, dtype codes, device index and stream in; exceptions out.
// Built once for each set of launchers: LDMFAST_MODULE is _cpu, _cuda or _cuda_host. ldmfast/ops/native.py calls it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "ops.h"

namespace py = pybind11;
using namespace ldmfast;

void bind_backward(py::module_& m);  // csrc/bind_backward.cpp
int add_plain_calls(PyObject* module);  // csrc/plain_call.cpp

#ifdef LDMFAST_CPU
namespace ldmfast {
const char* compiled_isas();  // csrc/cpu/dispatch.cpp
const char* active_isa();
}  // namespace ldmfast
#endif

namespace {

using Address = uintptr_t;

template <class T = const void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

size_t group_norm_silu_scratch(int64_t N, int64_t C, int64_t P, int64_t groups, bool channels_last, int dtype) {
  GroupNormSiluArgs a{};
  a.N = N, a.C = C, a.P = P, a.groups = groups, a.channels_last = channels_last, a.dtype = DType(dtype);
  return group_norm_silu_workspace(a);
}

void run_group_norm_silu(Address x, int64_t stride_xn, int64_t stride_xc, int64_t stride_xp, Address y, Address weight,
                         Address bias, Address add, Address scale, Address shift, int64_t stride_add,
                         int64_t stride_scale, int64_t stride_shift, int64_t N, int64_t C, int64_t P, int64_t groups,
                         float eps, bool silu, bool channels_last, int dtype, int param_dtype, int mod_dtype,
                         Address workspace, int device, Address stream) {
  GroupNormSiluArgs a{};
  a.x = pointer(x), a.stride_xn = stride_xn, a.stride_xc = stride_xc, a.stride_xp = stride_xp;
  a.y = pointer<void>(y), a.weight = pointer(weight), a.bias = pointer(bias);
  a.add = pointer(add), a.scale = pointer(scale), a.shift = pointer(shift);
  a.stride_add = stride_add, a.stride_scale = stride_scale, a.stride_shift = stride_shift;
  a.N = N, a.C = C, a.P = P, a.groups = groups, a.eps = eps, a.silu = silu, a.channels_last = channels_last;
  a.dtype = DType(dtype), a.param_dtype = DType(param_dtype), a.mod_dtype = DType(mod_dtype);
  a.workspace = pointer<float>(workspace);
  group_norm_silu(a, {device, pointer<void>(stream)});
}

size_t attention_scratch(int64_t N, int64_t L, int64_t S, int64_t H, int64_t D, int dtype) {
  AttentionArgs a{};
  a.N = N, a.L = L, a.S = S, a.H = H, a.D = D, a.dtype = DType(dtype);
  return attention_workspace(a);
}

void run_attention(Address q, Address k, Address v, Address out, int64_t stride_qn, int64_t stride_ql,
                   int64_t stride_qh, int64_t stride_kn, int64_t stride_ks, int64_t stride_kh, int64_t stride_vn,
                   int64_t stride_vs, int64_t stride_vh, Address mask, int64_t stride_mn, int64_t stride_mh,
                   int64_t stride_ml, int64_t stride_ms, int mask_dtype, int64_t N, int64_t L, int64_t S, int64_t H,
                   int64_t D, float scale, int dtype, Address workspace, int device, Address stream) {
  AttentionArgs a{};
  a.q = pointer(q), a.k = pointer(k), a.v = pointer(v), a.out = pointer<void>(out);
  a.stride_qn = stride_qn, a.stride_ql = stride_ql, a.stride_qh = stride_qh;
  a.stride_kn = stride_kn, a.stride_ks = stride_ks, a.stride_kh = stride_kh;
  a.stride_vn = stride_vn, a.stride_vs = stride_vs, a.stride_vh = stride_vh;
  a.mask = pointer(mask), a.mask_dtype = DType(mask_dtype);
  a.stride_mn = stride_mn, a.stride_mh = stride_mh, a.stride_ml = stride_ml, a.stride_ms = stride_ms;
  a.N = N, a.L = L, a.S = S, a.H = H, a.D = D, a.scale = scale, a.dtype = DType(dtype);
  a.workspace = pointer<void>(workspace);
  attention(a, {device, pointer<void>(stream)});
}

size_t timestep_mlp_scratch(int64_t N, int64_t dim, int64_t F, int64_t E, int dtype) {
  TimestepMlpArgs a{};
  a.N = N, a.dim = dim, a.F = F, a.E = E, a.dtype = DType(dtype);
  return timestep_mlp_workspace(a);
}

void run_timestep_mlp(Address t, Address freqs, Address w1, Address b1, Address w2, Address b2, Address out, int64_t N,
                      int64_t dim, int64_t F, int64_t E, bool flip_sin_to_cos, int dtype, Address workspace,
                      int device, Address stream) {
  TimestepMlpArgs a{};
  a.t = pointer<const float>(t), a.freqs = pointer<const float>(freqs);
  a.w1 = pointer(w1), a.b1 = pointer(b1), a.w2 = pointer(w2), a.b2 = pointer(b2), a.out = pointer<void>(out);
  a.N = N, a.dim = dim, a.F = F, a.E = E, a.flip_sin_to_cos = flip_sin_to_cos, a.dtype = DType(dtype);
  a.workspace = pointer<float>(workspace);
  timestep_mlp(a, {device, pointer<void>(stream)});
}

void run_ddim_step(Address sample, Address model_output, Address noise, Address prev, Address x0, int64_t N, int64_t M,
                   const std::array<double, 7>& c, Address table, std::optional<float> guidance,
                   std::optional<float> clip, int dtype, int device, Address stream) {
  DdimStepArgs a{};
  a.sample = pointer(sample), a.model_output = pointer(model_output), a.noise = pointer(noise);
  a.prev = pointer<void>(prev), a.x0 = pointer<void>(x0), a.N = N, a.M = M;
  a.coefficients = {float(c[0]), float(c[1]), float(c[2]), float(c[3]), float(c[4]), float(c[5]), float(c[6])};
  a.table = pointer<const float>(table);
  a.guided = guidance.has_value(), a.guidance = guidance.value_or(0);
  a.clipped = clip.has_value(), a.clip = clip.value_or(0);
  a.dtype = DType(dtype);
  ddim_step(a, {device, pointer<void>(stream)});
}

}  // namespace

PYBIND11_MODULE(LDMFAST_MODULE, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("group_norm_silu_workspace", &group_norm_silu_scratch);
  m.def("group_norm_silu", &run_group_norm_silu, release());
  m.def("attention_workspace", &attention_scratch);
  m.def("attention", &run_attention, release());
  m.def("timestep_mlp_workspace", &timestep_mlp_scratch);
  m.def("timestep_mlp", &run_timestep_mlp, release());
  m.def("ddim_step", &run_ddim_step, release());
  bind_backward(m);
  m.attr("flags") = LDMFAST_FLAGS;
#ifdef LDMFAST_CPU
  if (add_plain_calls(m.ptr())) throw py::error_already_set();
  m.def("compiled_isas", &compiled_isas);
  m.def("active_isa", &active_isa);
#endif
}
