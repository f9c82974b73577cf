// The Python functions of csrc/cpu/cluster_assign.
#pragma once

#include "cpu/cluster_assign/cluster_assign.h"
#include "cpu/runtime/bindings.h"

namespace hpk::cluster_assign_bindings {

template <class T>
bool assign(uintptr_t x, int64_t rows, int64_t depth, uintptr_t centroids, uintptr_t directions, uintptr_t bias,
            int64_t clusters, uintptr_t labels, uintptr_t distances, uintptr_t sums, uintptr_t counts, int threads) {
  const ClusterArgs<T> args{pointer<const T>(x),
                            rows,
                            depth,
                            pointer<const T>(centroids),
                            pointer<const T>(directions),
                            pointer<const T>(bias),
                            clusters,
                            pointer<int64_t>(labels),
                            pointer<T>(distances),
                            pointer<double>(sums),
                            pointer<int64_t>(counts),
                            threads};
  return HPK_DISPATCH(cluster_assign(args));
}

inline void bind(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("cluster_assign_f32", &assign<float>, Release());
  m.def("cluster_assign_f64", &assign<double>, Release());
}

}  // namespace hpk::cluster_assign_bindings
