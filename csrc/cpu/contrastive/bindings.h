// The Python functions of csrc/cpu/contrastive.
#pragma once

#include <string>

#include "cpu/contrastive/contrastive.h"
#include "cpu/runtime/bindings.h"

namespace hpk::contrastive_bindings {

using Masks = ContrastiveMasks;

// Addresses are 0 for masks that are not given; a missing transpose means that the mask is symmetric.
inline Masks masks(uintptr_t positives, uintptr_t positives_t, uintptr_t extra, uintptr_t extra_t, uintptr_t negatives,
                   int64_t words, int64_t negative_rows) {
  return {pointer<const uint32_t>(positives),
          pointer<const uint32_t>(positives_t ? positives_t : positives),
          pointer<const uint32_t>(extra),
          pointer<const uint32_t>(extra_t ? extra_t : extra),
          pointer<const uint32_t>(negatives),
          words,
          negative_rows};
}

template <class T>
void stats(uintptr_t x, int64_t streams, int64_t rows, int64_t depth, int64_t first, int64_t count, const Masks& masks,
           const std::string& denominator, double temperature, uintptr_t lse, uintptr_t pos, uintptr_t ext,
           int threads) {
  const ContrastiveArgs<T> args{pointer<const T>(x), streams, rows, depth, first, count, masks, temperature, threads};
  const ContrastiveStats<T> out{pointer<T>(lse), pointer<T>(pos), pointer<T>(ext)};
  if (denominator == "sparse") {
    HPK_DISPATCH(contrastive_sparse_stats(args, out));
  } else {
    HPK_DISPATCH(contrastive_dense_stats(args, denominator == "all", out));
  }
}

template <class T>
void grad(uintptr_t x, int64_t streams, int64_t rows, int64_t depth, int64_t first, int64_t count, const Masks& masks,
          const std::string& denominator, double temperature, uintptr_t lse, uintptr_t grad_lse, uintptr_t grad_pos,
          uintptr_t grad_ext, uintptr_t grad_x, int threads) {
  const ContrastiveArgs<T> args{pointer<const T>(x), streams, rows, depth, first, count, masks, temperature, threads};
  const ContrastiveGrads<T> grads{pointer<const T>(lse), pointer<const T>(grad_lse), pointer<const T>(grad_pos),
                                  pointer<const T>(grad_ext), pointer<T>(grad_x)};
  if (denominator == "sparse") {
    HPK_DISPATCH(contrastive_sparse_grad(args, grads));
  } else {
    HPK_DISPATCH(contrastive_dense_grad(args, denominator == "all", grads));
  }
}

// Groups instead of bits. Of the gradients only lse and grad_lse are read.
template <class T>
void group_lse(uintptr_t x, int64_t rows, int64_t depth, int64_t first, int64_t count, uintptr_t query, uintptr_t key,
               double temperature, uintptr_t lse, int threads) {
  const ContrastiveArgs<T> args{pointer<const T>(x), 1, rows, depth, first, count, {}, temperature, threads};
  const ContrastiveGroups groups{pointer<const int32_t>(query), pointer<const int32_t>(key)};
  HPK_DISPATCH(contrastive_group_lse(args, groups, pointer<T>(lse)));
}

template <class T>
void group_grad(uintptr_t x, int64_t rows, int64_t depth, int64_t first, int64_t count, uintptr_t query, uintptr_t key,
                double temperature, uintptr_t lse, uintptr_t grad_lse, uintptr_t zeros, uintptr_t grad_x, int threads) {
  const ContrastiveArgs<T> args{pointer<const T>(x), 1, rows, depth, first, count, {}, temperature, threads};
  const ContrastiveGroups groups{pointer<const int32_t>(query), pointer<const int32_t>(key)};
  const ContrastiveGrads<T> grads{pointer<const T>(lse), pointer<const T>(grad_lse), pointer<const T>(zeros),
                                  pointer<const T>(zeros), pointer<T>(grad_x)};
  HPK_DISPATCH(contrastive_group_grad(args, groups, grads));
}

inline void bind(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<Masks>(m, "ContrastiveMasks").def(py::init(&masks));
  m.def("contrastive_stats_f32", &stats<float>, Release());
  m.def("contrastive_stats_f64", &stats<double>, Release());
  m.def("contrastive_grad_f32", &grad<float>, Release());
  m.def("contrastive_grad_f64", &grad<double>, Release());
  m.def("contrastive_group_lse_f32", &group_lse<float>, Release());
  m.def("contrastive_group_lse_f64", &group_lse<double>, Release());
  m.def("contrastive_group_grad_f32", &group_grad<float>, Release());
  m.def("contrastive_group_grad_f64", &group_grad<double>, Release());
}

}  // namespace hpk::contrastive_bindings
