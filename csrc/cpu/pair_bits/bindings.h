// The Python functions of csrc/cpu/pair_bits.
#pragma once

#include "cpu/pair_bits/pair_bits.h"
#include "cpu/runtime/bindings.h"

namespace hpk::pair_bits_bindings {

inline void bind(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "random_bits",
      [](uint64_t seed, int64_t rows, int64_t columns, uint64_t q, uintptr_t bits, int threads) {
        HPK_DISPATCH(random_bits(seed, rows, columns, q, pointer<uint32_t>(bits), threads));
      },
      Release());
  m.def(
      "count_bits",
      [](uintptr_t bits, int64_t rows, int64_t words, uintptr_t counts, int threads) {
        HPK_DISPATCH(count_bits(pointer<uint32_t>(bits), rows, words, pointer<int32_t>(counts), threads));
      },
      Release());
  m.def(
      "transpose_bits",
      [](uintptr_t bits, int64_t rows, int64_t columns, uintptr_t out, int threads) {
        HPK_DISPATCH(transpose_bits(pointer<uint32_t>(bits), rows, columns, pointer<uint32_t>(out), threads));
      },
      Release());
  m.def(
      "set_pairs",
      [](uintptr_t indices, int64_t rows, int64_t k, int64_t columns, bool symmetric, int64_t first_row,
         int64_t mask_rows, uintptr_t bits) {
        set_pairs(pointer<int64_t>(indices), rows, k, columns, symmetric, first_row, mask_rows,
                  pointer<uint32_t>(bits));
      },
      Release());
}

}  // namespace hpk::pair_bits_bindings
