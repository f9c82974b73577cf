// Pair masks as bits: random masks, counts, transposes. See hpkernels/ops/pair_bits.
//
// A mask of N rows and M columns is uint32 words (N, W), W = 4 * ceil(M / 128); bit (i, j) is word[i][j >> 5] >> (j &
// 31) & 1 and padding bits are zero.
#pragma once

#include <cstdint>

#include "cpu/runtime/isa.h"

namespace hpk {

inline int64_t words_for(int64_t columns) { return (columns + 127) / 128 * 4; }

// Sets (i, indices[i][n]), and its mirror if `symmetric`, in a mask of the rows first_row .. first_row + mask_rows - 1;
// bits start out zero. Negative indices are ignored.
void set_pairs(const int64_t* indices, int64_t rows, int64_t k, int64_t columns, bool symmetric, int64_t first_row,
               int64_t mask_rows, uint32_t* bits);

}  // namespace hpk

HPK_DECLARE(void random_bits(uint64_t seed, int64_t rows, int64_t columns, uint64_t q, uint32_t* bits, int threads);
            void count_bits(const uint32_t* bits, int64_t rows, int64_t words, int32_t* counts, int threads);
            void transpose_bits(const uint32_t* bits, int64_t rows, int64_t columns, uint32_t* out, int threads);)
