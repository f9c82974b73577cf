#include "cpu/pair_bits/pair_bits.h"

#include "cpu/runtime/bindings.h"

namespace {

// Sets (i, indices[i][n]), and its mirror if `symmetric`, in a mask of the rows first_row .. first_row + mask_rows - 1;
// bits start out zero. Negative indices are ignored.
void set_pairs(const int64_t* indices, int64_t rows, int64_t k, int64_t columns, bool symmetric, int64_t first_row,
               int64_t mask_rows, uint32_t* bits) {
  const int64_t words = hpk::words_for(columns);
  const auto set = [&](int64_t i, int64_t j) {
    const int64_t row = i - first_row;
    if (row >= 0 && row < mask_rows) bits[row * words + (j >> 5)] |= 1u << (j & 31);
  };
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t n = 0; n < k; ++n) {
      const int64_t j = indices[i * k + n];
      if (j < 0 || (symmetric && j == i)) continue;
      set(i, j);
      if (symmetric) set(j, i);
    }
  }
}

}  // namespace

HPK_BIND(pair_bits) {
  using hpk::pointer;
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
