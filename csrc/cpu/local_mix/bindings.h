// The Python functions of csrc/cpu/local_mix.
#pragma once

#include "cpu/local_mix/local_mix.h"
#include "cpu/runtime/bindings.h"

namespace hpk::local_mix_bindings {

template <class T>
void weights(uintptr_t attention, int64_t batch, int64_t heads, int64_t height, int64_t width, double sigma, double low,
             double high, uintptr_t out, int threads) {
  const WeightsArgs<T> args{
      pointer<const T>(attention), pointer<T>(out), batch, heads, height, width, sigma, low, high, threads};
  HPK_DISPATCH(neighbor_weights(args));
}

template <class T>
void weights_qk(uintptr_t queries, int64_t query_image, int64_t query_row, uintptr_t keys, int64_t key_image,
                int64_t key_row, int64_t batch, int64_t depth, int64_t height, int64_t width, double scale,
                double sigma, double low, double high, uintptr_t out, int threads) {
  const WeightsQkArgs<T> args{{pointer<const T>(queries), query_image, query_row},
                              {pointer<const T>(keys), key_image, key_row},
                              pointer<T>(out),
                              batch,
                              depth,
                              height,
                              width,
                              scale,
                              sigma,
                              low,
                              high,
                              threads};
  HPK_DISPATCH(neighbor_weights_qk(args));
}

template <class T>
void mix(uintptr_t code, uintptr_t weights, int64_t batch, int64_t height, int64_t width, int64_t depth, uintptr_t out,
         int threads) {
  const MixArgs<T> args{pointer<const T>(code), pointer<const T>(weights), batch, height, width, depth, threads};
  HPK_DISPATCH(neighbor_mix(args, pointer<T>(out)));
}

template <class T>
void mix_grad(uintptr_t grad_out, uintptr_t code, uintptr_t weights, int64_t batch, int64_t height, int64_t width,
              int64_t depth, uintptr_t grad_code, uintptr_t grad_weights, int threads) {
  const MixArgs<T> args{pointer<const T>(code), pointer<const T>(weights), batch, height, width, depth, threads};
  HPK_DISPATCH(neighbor_mix_grad(args, pointer<const T>(grad_out), pointer<T>(grad_code), pointer<T>(grad_weights)));
}

inline void bind(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("neighbor_weights_f32", &weights<float>, Release());
  m.def("neighbor_weights_f64", &weights<double>, Release());
  m.def("neighbor_weights_qk_f32", &weights_qk<float>, Release());
  m.def("neighbor_weights_qk_f64", &weights_qk<double>, Release());
  m.def("neighbor_mix_f32", &mix<float>, Release());
  m.def("neighbor_mix_f64", &mix<double>, Release());
  m.def("neighbor_mix_grad_f32", &mix_grad<float>, Release());
  m.def("neighbor_mix_grad_f64", &mix_grad<double>, Release());
}

}  // namespace hpk::local_mix_bindings
