// How an op adds its Python functions to hpkernels._cpu: in csrc/cpu/<op>/<op>.cpp write
//
//     HPK_BIND(my_op) {
//       m.def("my_op", [](uintptr_t x, int64_t n, int threads) { ... }, py::call_guard<py::gil_scoped_release>());
//     }
//
// Nothing else needs editing. Pointers come as integers (tensor.data_ptr()), sizes and strides count elements. The
// Python side checks shapes, dtypes and contiguity; C++ trusts them. std::invalid_argument becomes ValueError.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

namespace hpk {

using BindFunction = void (*)(py::module_& m);

struct Registrar {
  explicit Registrar(BindFunction bind);
};

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace hpk

#define HPK_BIND(op)                                         \
  static void bind_##op(py::module_& m);                     \
  static const hpk::Registrar registrar_of_##op(&bind_##op); \
  static void bind_##op(py::module_& m)
