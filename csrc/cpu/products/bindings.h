// The Python functions of csrc/cpu/products.
#pragma once

#include "cpu/products/products.h"
#include "cpu/runtime/bindings.h"

namespace hpk::products_bindings {

template <class T>
void product(uintptr_t a, int64_t a_stride, bool a_turned, uintptr_t b, int64_t b_stride, bool b_turned, int64_t rows,
             int64_t columns, int64_t depth, uintptr_t out, int threads) {
  const ProductArgs<T> args{{pointer<const T>(a), a_stride, a_turned},
                            {pointer<const T>(b), b_stride, b_turned},
                            rows,
                            columns,
                            depth,
                            pointer<T>(out),
                            threads};
  HPK_DISPATCH(product(args));
}

inline void bind(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("product_f32", &product<float>, Release());
  m.def("product_f64", &product<double>, Release());
}

}  // namespace hpk::products_bindings
