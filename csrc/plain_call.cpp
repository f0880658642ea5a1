// The ordinary call of an op on the CPU, without Python in between: whether PyTorch's dispatcher would only pass it on,
// and ddim_step whole. Each returns "no" for anything unusual; ldmfast/ops then does it all in Python, errors included.
//
// No torch here either. Python hands over the functions that are asked (ldmfast/ops/dispatcher.py); a tensor's address, shape
// and type come through DLPack's exchange interface, a table of C functions that torch publishes from 2.10 on.
// Source: dlpack.h, version 1.3 (https://github.com/dmlc/dlpack), DLPackExchangeAPI.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <exception>
#include <string>

#include "ops.h"

using namespace ldmfast;

namespace {

struct DlTensor {
  char* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DlExchange {
  uint32_t major, minor;
  void *previous, *allocate, *from_object, *to_object;
  int (*read)(void* object, DlTensor* out);
};
constexpr int32_t kDlCpu = 1;
constexpr uint8_t kDlFloat = 2, kDlBfloat = 4;

// What Python handed over; kept for good.
struct {
  PyObject *tensor, *parameter;  // the types whose tensors are nothing but tensors
  PyObject* watchers;            // a tuple of functions; a true answer means that somebody looks on
  PyObject* grad_enabled;
  PyObject* empty_like;
  PyObject *requires_grad, *is_neg, *is_meta;  // names of attributes
  const DlExchange* exchange;                  // null before torch 2.10
} torch;

enum Answer { kError = -1, kNo = 0, kYes = 1 };

Answer truth(PyObject* value) {  // takes the reference
  if (!value) return kError;
  const Answer answer = Answer(PyObject_IsTrue(value));
  Py_DECREF(value);
  return answer;
}

Answer watched() {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.watchers); ++i) {
    if (const Answer answer = truth(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch.watchers, i)))) return answer;
  }
  return kNo;
}

bool is_plain_type(PyObject* value) {
  return (PyObject*)Py_TYPE(value) == torch.tensor || (PyObject*)Py_TYPE(value) == torch.parameter;
}

// whether a tensor of a plain type is one that autograd and the dispatcher have nothing to do with
Answer untouched(PyObject* value, bool grad) {
  if (grad) {
    if (const Answer answer = truth(PyObject_GetAttr(value, torch.requires_grad))) return answer == kYes ? kNo : kError;
  }
  const Answer negated = truth(PyObject_CallMethodNoArgs(value, torch.is_neg));
  return negated == kError ? kError : negated == kYes ? kNo : kYes;
}

PyObject* nothing_watches(PyObject*, PyObject* args) {
  Answer answer = watched();
  if (answer == kError) return nullptr;
  if (answer == kYes) Py_RETURN_FALSE;
  const Answer grad = truth(PyObject_CallNoArgs(torch.grad_enabled));
  if (grad == kError) return nullptr;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
    PyObject* value = PyTuple_GET_ITEM(args, i);
    if (!PyObject_TypeCheck(value, (PyTypeObject*)torch.tensor)) continue;
    if (!is_plain_type(value)) Py_RETURN_FALSE;
    answer = untouched(value, grad == kYes);
    if (answer == kError) return nullptr;
    if (answer == kNo) Py_RETURN_FALSE;
    answer = truth(PyObject_GetAttr(value, torch.is_meta));
    if (answer == kError) return nullptr;
    if (answer == kYes) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// ---- ddim_step ----

bool number(PyObject* value, double& out) {
  if (!PyFloat_CheckExact(value) && !PyLong_CheckExact(value)) return false;
  out = PyFloat_AsDouble(value);
  if (out == -1.0 && PyErr_Occurred()) return PyErr_Clear(), false;  // an integer too large: Python says so
  return true;
}

bool optional_number(PyObject* value, bool& given, double& out) {
  given = value != Py_None;
  return !given || number(value, out);
}

bool read(PyObject* object, DlTensor& out) {
  if (torch.exchange->read(object, &out) == 0) return true;
  PyErr_Clear();  // sparse, meta, ...: unusual, not wrong
  return false;
}

bool dtype_of(const DlTensor& t, DType& out) {
  if (t.lanes != 1) return false;
  if (t.code == kDlFloat && t.bits == 32) out = DType::kFloat32;
  else if (t.code == kDlFloat && t.bits == 16) out = DType::kFloat16;
  else if (t.code == kDlBfloat && t.bits == 16) out = DType::kBFloat16;
  else return false;
  return true;
}

constexpr int kContiguous[] = {3, 2, 1, 0}, kChannelsLast[] = {1, 3, 2, 0};  // dimensions, the innermost first

// whether t lies densely in this order; more than four dimensions only contiguously
bool dense(const DlTensor& t, const int* order) {
  int64_t expected = 1;
  for (int i = 0; i < t.ndim; ++i) {
    const int d = t.ndim == 4 ? order[i] : t.ndim - 1 - i;
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

bool matches(const DlTensor& t, const DlTensor& sample, int64_t times, const int* order) {
  if (t.device_type != kDlCpu || t.code != sample.code || t.bits != sample.bits || t.lanes != 1) return false;
  if (t.ndim != sample.ndim || t.shape[0] != times * sample.shape[0]) return false;
  for (int d = 1; d < t.ndim; ++d) {
    if (t.shape[d] != sample.shape[d]) return false;
  }
  return t.data && dense(t, order);
}

// The tensors' part of the arguments; false for what is unusual.
bool describe(PyObject* sample, PyObject* model_output, PyObject* noise, DdimStepArgs& a) {
  DlTensor x, m, w;
  if (!read(sample, x) || x.device_type != kDlCpu || x.ndim < 1 || !x.data || !dtype_of(x, a.dtype)) return false;
  const int* order = x.ndim != 4 || dense(x, kContiguous) ? kContiguous : kChannelsLast;
  if (!dense(x, order) || !read(model_output, m) || !matches(m, x, a.guided ? 2 : 1, order)) return false;
  if (noise != Py_None && (!read(noise, w) || !matches(w, x, 1, order))) return false;
  a.sample = x.data + x.byte_offset, a.model_output = m.data + m.byte_offset;
  a.noise = noise == Py_None ? nullptr : w.data + w.byte_offset;
  a.N = x.shape[0], a.M = 1;
  for (int d = 1; d < x.ndim; ++d) a.M *= x.shape[d];
  return a.N * a.M > 0;
}

PyObject* launch(DdimStepArgs& a, PyObject* sample) {
  PyObject *prev = PyObject_CallOneArg(torch.empty_like, sample), *x0 = nullptr;
  if (prev) x0 = PyObject_CallOneArg(torch.empty_like, sample);
  DlTensor p, z;
  if (x0 && torch.exchange->read(prev, &p) == 0 && torch.exchange->read(x0, &z) == 0) {
    a.prev = p.data + p.byte_offset, a.x0 = z.data + z.byte_offset;
    std::string refused;
    PyThreadState* state = PyEval_SaveThread();
    try {
      ddim_step(a, {});
    } catch (const std::exception& error) {
      refused = error.what();
    }
    PyEval_RestoreThread(state);
    if (!refused.empty()) PyErr_SetString(PyExc_RuntimeError, refused.c_str());
  }
  PyObject* both = PyErr_Occurred() ? nullptr : PyTuple_Pack(2, prev, x0);
  Py_XDECREF(prev);
  Py_XDECREF(x0);
  return both;
}

// The seven numbers from Python, which caches them: `coefficients(alpha_t, alpha_prev, sigma, prediction)` -> bytes.
Answer coefficients(PyObject* const* args, DdimStepArgs& a) {
  PyObject* packed = PyObject_Vectorcall(args[0], args + 1, 4, nullptr);
  if (!packed) {  // a value that is refused: Python says so again, after the checks that come before
    if (!PyErr_ExceptionMatches(PyExc_ValueError) && !PyErr_ExceptionMatches(PyExc_ArithmeticError)) return kError;
    return PyErr_Clear(), kNo;
  }
  std::memcpy(&a.coefficients, PyBytes_AS_STRING(packed), sizeof a.coefficients);
  Py_DECREF(packed);
  return kYes;
}

// (coefficients, alpha_t, alpha_prev, sigma, prediction, sample, model_output, guidance, noise, clip, backend or None)
// -> (previous sample, x0), or None
PyObject* ddim_step_plain(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 11) return PyErr_Format(PyExc_TypeError, "ddim_step_plain: %zd arguments, expected 11", count);
  PyObject *sample = args[5], *model_output = args[6], *noise = args[8], *name = args[10];
  double alpha_t, alpha_prev, sigma, guidance = 0, clip = 0;
  DdimStepArgs a{};
  if (!torch.exchange || !is_plain_type(sample) || !is_plain_type(model_output) ||
      (noise != Py_None && !is_plain_type(noise)) || !PyUnicode_CheckExact(args[4]) ||
      (name != Py_None && !(PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, "cpu") == 0)) ||
      !number(args[1], alpha_t) || !number(args[2], alpha_prev) || !number(args[3], sigma) ||
      !optional_number(args[7], a.guided, guidance) || !optional_number(args[9], a.clipped, clip) ||
      !(guidance - guidance == 0) || (a.clipped && !(clip > 0)) || (sigma != 0 && noise == Py_None)) {
    Py_RETURN_NONE;
  }
  const Answer looked = watched();
  const Answer grad = looked == kNo ? truth(PyObject_CallNoArgs(torch.grad_enabled)) : looked;
  if (looked == kError || grad == kError) return nullptr;
  if (looked == kYes) Py_RETURN_NONE;
  for (PyObject* value : {sample, model_output, noise}) {
    const Answer answer = value == Py_None ? kYes : untouched(value, grad == kYes);
    if (answer == kError) return nullptr;
    if (answer == kNo) Py_RETURN_NONE;
  }
  a.guidance = (float)guidance, a.clip = (float)clip;
  if (!describe(sample, model_output, noise, a)) Py_RETURN_NONE;
  const Answer known = coefficients(args, a);
  if (known == kError) return nullptr;
  if (known == kNo) Py_RETURN_NONE;
  return launch(a, sample);
}

// watch(tensor, parameter, watchers, grad_enabled, empty_like, exchange capsule or None): what the two above ask
PyObject* watch(PyObject*, PyObject* args) {
  PyObject* capsule;
  if (!PyArg_ParseTuple(args, "OOO!OOO", &torch.tensor, &torch.parameter, &PyTuple_Type, &torch.watchers,
                        &torch.grad_enabled, &torch.empty_like, &capsule)) {
    return nullptr;
  }
  Py_INCREF(args);  // for good, and with it all that was handed over
  torch.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch.is_neg = PyUnicode_InternFromString("is_neg");
  torch.is_meta = PyUnicode_InternFromString("is_meta");
  torch.exchange = nullptr;
  if (capsule != Py_None) {
    const auto* exchange = (const DlExchange*)PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!exchange) return nullptr;
    if (exchange->major == 1 && exchange->read) torch.exchange = exchange;
  }
  Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"watch", watch, METH_VARARGS, nullptr},
    {"nothing_watches", nothing_watches, METH_O, nullptr},
    {"ddim_step_plain", (PyCFunction)(void (*)(void))ddim_step_plain, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_plain_calls(PyObject* module) { return PyModule_AddFunctions(module, kMethods); }
