// What the Python functions of hpkernels._cpu share. An op has its own in csrc/cpu/<op>/bindings.h:
//
//     namespace hpk::my_op_bindings {
//     inline void bind(py::module_& m) {
//       m.def("my_op", [](uintptr_t x, int64_t n, int threads) { ... }, py::call_guard<py::gil_scoped_release>());
//     }
//     }
//
// and csrc/cpu/bindings.cpp calls it. Pointers come as integers (tensor.data_ptr()), sizes and strides count elements.
// The Python side checks shapes, dtypes and contiguity; C++ trusts them. std::invalid_argument becomes ValueError.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

namespace hpk {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace hpk
