// Pair masks: bit (i, j) is bit j & 31 of word [i, j >> 5]; rows are padded with zero bits to a multiple of 128.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HPK_HOST_DEVICE __host__ __device__
#else
#define HPK_HOST_DEVICE
#endif

namespace hpk {

HPK_HOST_DEVICE inline int64_t words_per_row(int64_t columns) { return (columns + 127) / 128 * 4; }

// The transpose of a 32 x 32 bit matrix, in place: swaps ever smaller off-diagonal squares.
HPK_HOST_DEVICE inline void transpose_32x32(uint32_t rows[32]) {
  uint32_t mask = 0x0000ffffu;
  for (int size = 16; size; size >>= 1, mask ^= mask << size) {
    for (int r = 0; r < 32; r = ((r | size) + 1) & ~size) {
      const uint32_t swapped = ((rows[r] >> size) ^ rows[r | size]) & mask;
      rows[r] ^= swapped << size;
      rows[r | size] ^= swapped;
    }
  }
}

}  // namespace hpk
