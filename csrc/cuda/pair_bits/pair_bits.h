// Launches of the kernels on packed pairs.
#pragma once

#include "cuda/common/launches.h"

namespace hpk::gpu {

void random_bits(uintptr_t seed, int64_t rows, int64_t columns, uint64_t q, uintptr_t bits, uintptr_t stream);
void count_bits(uintptr_t bits, int64_t rows, int64_t words, uintptr_t counts, uintptr_t stream);
void transpose_bits(uintptr_t bits, int64_t rows, int64_t columns, uintptr_t out, uintptr_t stream);
// bits (columns, words(rows)), rows first_row .. of a symmetric mask, joined with the transpose of others (rows,
// words(columns)), without the mask's diagonal.
void join_transpose(uintptr_t others, int64_t rows, int64_t columns, int64_t first_row, uintptr_t bits,
                    uintptr_t stream);
// bits (rows, words(columns)) of the pairs (i, indices[i, n] - first_column).
void set_pairs(uintptr_t indices, int64_t rows, int64_t k, int64_t first_column, int64_t columns, uintptr_t bits,
               uintptr_t stream);

}  // namespace hpk::gpu
