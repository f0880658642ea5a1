// The Python side of ops.h: one function an op, which fills the op's struct from a dict and launches.
// Built once for each set of launchers: LDMFAST_MODULE is _cpu, _cuda or _cuda_host. ldmfast/ops calls it:
//
//     module.attention({"q": q, "stride_qn": q.stride(0), ...}, device, stream, allocate)
//
// with every field of AttentionArgs by its name, in any order, but for the workspace: the binding asks allocate(bytes)
// for it. A pointer is a tensor or None. No torch here either: a tensor is what has a data_ptr().
// A dict, since keywords cost 1 us more: they are packed twice on the way. A call that comes again with other addresses
// alone is prepared once and then takes these (ldmfast/ops/native.py):
//
//     again = module.prepare_attention({"q": q, ...}, ("q", "k", "v", "out"))
//     again((q, k, v, out), device, stream, allocate)
#include <pybind11/pybind11.h>

#ifdef LDMFAST_CPU
#include <sys/mman.h>

#include <cstdlib>
#endif
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "fields.h"
#include "ops.h"

namespace py = pybind11;
using namespace ldmfast;

#ifdef LDMFAST_CPU
namespace ldmfast {
const char* compiled_isas();  // csrc/cpu/dispatch.cpp
const char* active_isa();
}  // namespace ldmfast
#endif

#ifdef LDMFAST_CUDA
namespace ldmfast {
void cuda_versions(int& runtime, int& driver);  // csrc/cuda/versions.cu
}  // namespace ldmfast
#endif

namespace {

// read(value, into) writes a field, or leaves Python's error set; kind(into) is what the value should have been.

template <class T> const char* kind(T*) { return "a tensor or None"; }
template <class T> void read(PyObject* value, T*& into) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  if (value == Py_None) return;
  const auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(value, data_ptr));
  if (address) into = static_cast<T*>(PyLong_AsVoidPtr(address.ptr()));
}

const char* kind(int64_t) { return "an integer of 64 bits"; }
void read(PyObject* value, int64_t& into) { into = PyLong_AsLongLong(value); }

const char* kind(bool) { return "a truth value"; }
void read(PyObject* value, bool& into) { into = PyObject_IsTrue(value) == 1; }

const char* kind(float) { return "a number"; }
void read(PyObject* value, float& into) { into = static_cast<float>(PyFloat_AsDouble(value)); }

// an enum's code, from 0 to its last
template <class Enum> void read_code(PyObject* value, Enum last, Enum& into) {
  const long code = PyLong_AsLong(value);
  if (code < 0 || code > static_cast<long>(last)) PyErr_SetNone(PyExc_ValueError);
  into = static_cast<Enum>(code);
}

const char* kind(DType) { return "a code of native.DTYPES"; }
void read(PyObject* value, DType& into) { read_code(value, DType::kBool, into); }

#ifdef LDMFAST_CPU
const char* kind(Activation) { return "a code of linear.ACTIVATIONS"; }
void read(PyObject* value, Activation& into) { read_code(value, Activation::kGeglu, into); }

const char* kind(ConvForm) { return "a code of conv2d.FORMS"; }
void read(PyObject* value, ConvForm& into) { read_code(value, ConvForm::kF4, into); }
#endif

const char* kind(const DdimCoefficients&) { return "seven numbers"; }
void read(PyObject* value, DdimCoefficients& into) {
  constexpr Py_ssize_t kCount = sizeof(into) / sizeof(float);
  float* const out = &into.x0_sample;
  const auto numbers = py::reinterpret_steal<py::object>(PySequence_Fast(value, "not a sequence"));
  if (!numbers) return;
  if (PySequence_Fast_GET_SIZE(numbers.ptr()) != kCount) return PyErr_SetNone(PyExc_ValueError);
  for (Py_ssize_t i = 0; i < kCount; ++i) read(PySequence_Fast_GET_ITEM(numbers.ptr(), i), out[i]);
}

[[noreturn]] void refuse(const char* op, const std::string& reason) {
  const std::string text = std::string(op) + ": " + reason;
  if (PyErr_Occurred()) py::raise_from(PyExc_TypeError, text.c_str());
  else PyErr_SetString(PyExc_TypeError, text.c_str());
  throw py::error_already_set();
}

// The fields that Python gives, by name: all but the workspace. The strings are interned, and kept for good.
template <class Args> const std::vector<PyObject*>& names() {
  static const std::vector<PyObject*> all = [] {
    std::vector<PyObject*> found;
    Args args{};
    Fields<Args>::each(args, [&](const std::string& field, auto&) {
      if (field != "workspace") found.push_back(PyUnicode_InternFromString(field.c_str()));
    });
    return found;
  }();
  return all;
}

template <class Args> [[noreturn]] void refuse_unknown(const char* op, const py::dict& given) {
  for (const auto item : given) {
    bool known = false;
    for (PyObject* name : names<Args>()) known = known || item.first.equal(py::handle(name));
    if (!known) refuse(op, "has no field " + item.first.cast<std::string>() + " to be given");
  }
  refuse(op, "its fields changed while they were read");
}

template <class Args> Args filled(const char* op, const py::dict& given) {
  Args args{};
  auto name = names<Args>().begin();
  Fields<Args>::each(args, [&](const char* field, auto& into) {
    if (std::string_view(field) == "workspace") return;
    PyObject* value = PyDict_GetItemWithError(given.ptr(), *name++);
    if (!value) refuse(op, std::string("field ") + field + " is missing");
    read(value, into);
    if (!PyErr_Occurred()) return;
    refuse(op, std::string(field) + " is " + Py_TYPE(value)->tp_name + ", expected " + kind(into));
  });
  if (given.size() != names<Args>().size()) refuse_unknown<Args>(op, given);
  return args;
}

template <class Args> constexpr bool has_workspace() {
  Args args{};
  bool found = false;
  Fields<Args>::each(args, [&](std::string_view field, auto&) { found = found || field == "workspace"; });
  return found;
}

#if defined(LDMFAST_CPU) && !defined(__SANITIZE_ADDRESS__)
// A thread's workspace on the CPU, kept from call to call up to kKept bytes. malloc may give a freed one back to the
// system, and the next call then takes every page anew, zeroed: of attention of 64 x 64, 8 heads of 160, in float32 on
// one thread a fifth of the samples lay there. AddressSanitizer sees where a workspace ends only if it is allocated for
// the call.
class Kept {
 public:
  static constexpr size_t kKept = size_t{16} << 20;
  Kept() = default;
  Kept(const Kept&) = delete;
  ~Kept() { std::free(memory_); }
  // null where there is no memory
  void* of(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + kPage - 1) / kPage * kPage;
      memory_ = std::aligned_alloc(kPage, size_);
      if (!memory_) size_ = 0;
#ifdef MADV_HUGEPAGE
      if (memory_) madvise(memory_, size_, MADV_HUGEPAGE);  // a wish: where it is not granted, small pages do
#endif
    }
    return memory_;
  }

 private:
  static constexpr size_t kPage = size_t{2} << 20;
  void* memory_ = nullptr;
  size_t size_ = 0;
};
thread_local Kept kept;
#endif

bool launching = true;  // off for measuring what is around a launch (bench/checks/host_time.py)

// query: the bytes of workspace that the struct asks for
template <class Args, class Query, class Launcher>
void launch_with_workspace(Query query, Launcher launcher, Args& args, int device, uintptr_t stream,
                           const py::object& allocate) {
  py::object scratch;  // until after the launch
  if (const size_t bytes = query(args)) {
    void* memory = nullptr;
#if defined(LDMFAST_CPU) && !defined(__SANITIZE_ADDRESS__)
    if (bytes <= Kept::kKept) memory = kept.of(bytes);
#endif
    if (!memory) scratch = allocate(bytes);
    Fields<Args>::each(args, [&](std::string_view field, auto& into) {
      if (field != "workspace") return;
      if constexpr (std::is_pointer_v<std::remove_reference_t<decltype(into)>>) {
        if (memory) into = static_cast<std::remove_reference_t<decltype(into)>>(memory);
      }
      if (scratch) read(scratch.ptr(), into);
    });
    if (PyErr_Occurred()) throw py::error_already_set();
  }
  if (!launching) return;
  py::gil_scoped_release release;
  launcher(args, Launch{device, reinterpret_cast<void*>(stream)});
}

// The same call again with other values of some fields, without a dict: what the others hold was filled once.
struct Prepared {
  using Call = std::function<void(const py::tuple&, int, uintptr_t, const py::object&)>;
  Call call;
};

template <class Args, class Query, class Launcher>
Prepared prepared(const char* op, Query query, Launcher launcher, const py::dict& given, const py::tuple& varying) {
  const Args args = filled<Args>(op, given);
  // place[i]: which value of a call field i takes, or -1
  std::vector<int> place;
  size_t found = 0;
  Args walked = args;
  Fields<Args>::each(walked, [&](const char* field, auto& into) {
    place.push_back(-1);
    for (size_t i = 0; i < varying.size(); ++i)
      if (varying[i].cast<std::string>() == field) place.back() = static_cast<int>(i), ++found;
    if constexpr (std::is_pointer_v<std::remove_reference_t<decltype(into)>>) {
      if (into && place.back() < 0) refuse(op, std::string(field) + " is an address, and is not to vary");
    }
  });
  if (found != varying.size()) refuse(op, "a field that is to vary is unknown");
  const size_t count = varying.size();
  return {[=](const py::tuple& values, int device, uintptr_t stream, const py::object& allocate) {
    Args now = args;
    if (values.size() != count) refuse(op, "takes " + std::to_string(count) + " values");
    auto at = place.begin();
    Fields<Args>::each(now, [&](const char* field, auto& into) {
      const int i = *at++;
      if (i < 0) return;
      into = {};
      read(PyTuple_GET_ITEM(values.ptr(), i), into);
      if (PyErr_Occurred()) refuse(op, std::string(field) + " is of a wrong kind, expected " + kind(into));
    });
    launch_with_workspace(query, launcher, now, device, stream, allocate);
  }};
}

template <class Args> py::dict kinds() {
  py::dict found;
  Args args{};
  Fields<Args>::each(args, [&](const char* field, auto& into) { found[field] = kind(into); });
  return found;
}

}  // namespace

PYBIND11_MODULE(LDMFAST_MODULE, m) {
  m.attr("flags") = LDMFAST_FLAGS;
  m.def("set_launching", [](bool on) { launching = on; });
  py::class_<Prepared>(m, "Prepared", py::module_local())
      .def("__call__", [](const Prepared& self, const py::tuple& values, int device, uintptr_t stream,
                          const py::object& allocate) { self.call(values, device, stream, allocate); });
  py::dict fields;  // of every op's struct: what each holds
#define LDMFAST_BIND(op, Args, W)                                                                                  \
  static_assert(has_workspace<Args>() == LDMFAST_IF_##W(!) false, #op ": LDMFAST_OPS and its struct say otherwise"); \
  struct op##_query {                                                                                              \
    size_t operator()([[maybe_unused]] const Args& args) const {                                                   \
      LDMFAST_IF_##W(return op##_workspace(args);)                                                                 \
      return 0;                                                                                                    \
    }                                                                                                              \
  };                                                                                                               \
  m.def(#op, [](const py::dict& given, int device, uintptr_t stream, const py::object& allocate) {                 \
    Args args = filled<Args>(#op, given);                                                                          \
    launch_with_workspace(op##_query{}, op, args, device, stream, allocate);                                       \
  });                                                                                                              \
  m.def("prepare_" #op, [](const py::dict& given, const py::tuple& varying) {                                      \
    return prepared<Args>(#op, op##_query{}, op, given, varying);                                                  \
  });                                                                                                              \
  fields[#op] = kinds<Args>();
  LDMFAST_OPS(LDMFAST_BIND)
#ifdef LDMFAST_CPU
  LDMFAST_CPU_OPS(LDMFAST_BIND)
#else
  LDMFAST_GPU_OPS(LDMFAST_BIND)
#endif
  m.attr("fields") = fields;
#ifdef LDMFAST_CUDA
  m.def("versions", [] {
    int runtime = 0, driver = 0;
    cuda_versions(runtime, driver);
    return py::make_tuple(runtime, driver);
  });
#endif
#ifdef LDMFAST_CPU
  m.def("compiled_isas", &compiled_isas);
  m.def("active_isa", &active_isa);
#endif
}
