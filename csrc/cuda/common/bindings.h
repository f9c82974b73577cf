// How an op adds its Python functions to hpkernels._cuda: in csrc/cuda/<op>/<op>.cu write
//
//     HPK_BIND_CUDA(my_op) { m.def("my_op", [](uintptr_t x, int64_t n, int device, uintptr_t stream) { ... }); }
//
// Pointers come as integers (tensor.data_ptr()), sizes and strides count elements. Python checks and allocates; C++
// launches on the caller's device and stream, without waiting.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

namespace hpk::gpu {

using BindFunction = void (*)(py::module_& m);

struct Registrar {
  explicit Registrar(BindFunction bind);
};

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace hpk::gpu

#define HPK_BIND_CUDA(op)                                         \
  static void bind_##op(py::module_& m);                          \
  static const hpk::gpu::Registrar registrar_of_##op(&bind_##op); \
  static void bind_##op(py::module_& m)
