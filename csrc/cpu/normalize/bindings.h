// The Python functions of csrc/cpu/normalize.
#pragma once

#include "cpu/normalize/normalize.h"
#include "cpu/runtime/bindings.h"

namespace hpk::normalize_bindings {

inline void bind(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "normalize_rows",
      [](bool is_double, uintptr_t x, int64_t rows, int64_t width, uintptr_t y, int threads) {
        if (is_double)
          return HPK_DISPATCH(normalize_rows(pointer<double>(x), rows, width, pointer<double>(y), threads));
        return HPK_DISPATCH(normalize_rows(pointer<float>(x), rows, width, pointer<float>(y), threads));
      },
      Release());
  m.def(
      "normalize_rows_grad",
      [](bool is_double, uintptr_t g, uintptr_t x, int64_t rows, int64_t width, uintptr_t grad_x, int threads) {
        if (is_double) {
          HPK_DISPATCH(normalize_rows_grad(pointer<double>(g), pointer<double>(x), rows, width, pointer<double>(grad_x),
                                           threads));
        } else {
          HPK_DISPATCH(
              normalize_rows_grad(pointer<float>(g), pointer<float>(x), rows, width, pointer<float>(grad_x), threads));
        }
      },
      Release());
}

}  // namespace hpk::normalize_bindings
