#include "cpu/pair_bits/pair_bits.h"

namespace hpk {

void set_pairs(const int64_t* indices, int64_t rows, int64_t k, int64_t columns, bool symmetric, int64_t first_row,
               int64_t mask_rows, uint32_t* bits) {
  const int64_t words = words_for(columns);
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

}  // namespace hpk
