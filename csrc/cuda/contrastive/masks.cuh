// What the contrastive kernels share: the masks, and how a tile's threads read them.
#pragma once

#include <cmath>

#include "cuda/common/tile.cuh"
#include "cuda/contrastive/contrastive.h"

namespace hpk::gpu {

template <class T>
__device__ inline ConsecutiveRows<T> ContrastiveMasks::columns(const T* x, int64_t rows) const {
  return {x, rows, 0};
}

// Rows of one stream, and its row tables over all rows. Logits are kept in base 2: z_ij = scale <x_i, x_j>.
template <class T>
struct ContrastiveRows {
  const T* x;  // (rows, depth)
  int64_t rows, depth;
  float scale;  // log2(e) / temperature
};

// One mask's words for the thread's rows of a tile: a row's 32 columns of a warp are one word. The four lanes that
// hold a row share the loads: lane q keeps the words of rows (q, 0) and (q, 1).
class RowWords {
 public:
  // `rows` holds the mask's rows of the lane's two rows.
  __device__ void load(const uint32_t* bits, const int (&rows)[2], int64_t stride, int64_t word) {
    for (int h = 0; h < 2; ++h)
      held_[h] = bits ? bits[rows[h] * stride + word] : 0;
  }
  __device__ uint32_t at(int m, int h, int lane) const { return __shfl_sync(0xffffffffu, held_[h], (lane & ~3) | m); }

 private:
  uint32_t held_[2];
};

// The columns first_column ... + 31 that exist and are not row i.
__device__ inline uint32_t other_columns(int64_t i, int64_t first_column, int64_t columns) {
  const int64_t left = columns - first_column, own = i - first_column;
  uint32_t word = left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1u;
  return own >= 0 && own < 32 ? word & ~(1u << own) : word;
}

// A sum of exponentials: total 2^shift. -inf is the shift of the empty sum.
struct ShiftedSum {
  float total, shift;

  __device__ void raise(float largest) {
    if (largest > shift) total *= exp2_fast(shift - largest), shift = largest;
  }
  __device__ void add(const ShiftedSum& other) {
    if (other.total == 0.0f) return;  // also an empty sum, whose shift may be -inf
    raise(other.shift);
    total += other.total * exp2_fast(other.shift - shift);
  }
};

// What a row's statistics are made of; pos and ext sum the products, not yet over the temperature.
struct RowStats {
  ShiftedSum denominator;
  float pos, ext;

  __device__ void add(const RowStats& other) {
    denominator.add(other.denominator);
    pos += other.pos;
    ext += other.ext;
  }
};

// Where the statistics of a share of the pairs go: (4, shares, streams, anchors) = totals, shifts, pos and ext, or (2,
// ...) without the sums of the positives.
struct StatsParts {
  float* out;
  float over_temperature;

  template <bool kPositives>
  __device__ void store(int64_t shares, int64_t share, int64_t streams, int64_t stream, int64_t anchors, int64_t anchor,
                        const RowStats& row) const {
    const int64_t at = (share * streams + stream) * anchors + anchor, table = shares * streams * anchors;
    out[at] = row.denominator.total;
    out[at + table] = row.denominator.shift;
    if constexpr (kPositives) {
      out[at + 2 * table] = row.pos * over_temperature;
      out[at + 3 * table] = row.ext * over_temperature;
    }
  }
};

}  // namespace hpk::gpu
