// pairs_above: the bits of s_ij > theta_ij, and of their transpose from the same products.
//
// The sign of theta_ij - s_ij is the bit; a thread shifts 32 of them into a word, and only words change lanes.
#pragma once

#include <cmath>

#include "cuda/common/tile.cuh"
#include "shared/tile_order.h"

namespace hpk::gpu {

constexpr int kPairStages = 3;

template <class T>
struct PairSearch {
  const T *x, *keys;                         // (rows, depth), (columns, depth)
  const float *thresholds, *key_thresholds;  // (rows,); (columns,) or null
  uint32_t* bits;                            // (rows, 4 ceil(columns / 128))
  int64_t rows, columns, depth;
  bool symmetric;  // keys is x: [i != j][s_ij > min(t_i, t_j)], decided for i < j
};

// A threshold as the comparison takes it: with one zero, 0.0, because -0.0 - 0.0 has a sign.
__device__ inline float limit(float threshold) { return threshold + 0.0f; }

// Ones from bit `first` on.
__device__ inline uint32_t ones_from(int64_t first) {
  return first <= 0 ? 0xffffffffu : first < 32 ? 0xffffffffu << first : 0u;
}

// One bit of the position within a word, that of value Shift, trades places with one bit of the lane.
template <int Shift>
__device__ inline uint32_t swap_bits(uint32_t word, int lane, int lane_bit) {
  constexpr uint32_t kLow = 0xffffffffu / ((1u << Shift) + 1);  // the positions without that bit
  const int shift = lane & lane_bit ? 0 : Shift;
  const uint32_t coming = __shfl_xor_sync(0xffffffffu, (word >> shift) & kLow, lane_bit);
  return (word & (kLow << (Shift - shift))) | (coming << shift);
}

// 32 x 32 pairs of the warp, of which the thread holds m = 2 block, 2 block + 1: the lane's row of them, as a word.
// The row is 8 (lane % 4) + lane / 4.
__device__ inline uint32_t pack_rows(const Accumulators& acc, int block, const float (&row_limits)[4][2],
                                     const float (&column_limits)[4][2], int lane) {
  uint32_t word = 0;
#pragma unroll
  for (int position = 31; position >= 0; --position) {  // bits: 2 of n, m, h, b
    const int n = position >> 3, m = 2 * block + (position >> 2 & 1), h = position >> 1 & 1, b = position & 1;
    const float theta = least(row_limits[m][h], column_limits[n][b]);
    word = word << 1 | difference_bits(theta, acc[m][n][2 * h + b]) >> 31;  // theta < s
  }
  return swap_bits<2>(swap_bits<4>(word, lane, 2), lane, 1);  // m and h go, the lane's columns come
}

// The same pairs by columns: the lane's column, of the same number, from all rows.
__device__ inline uint32_t turn(uint32_t word, int lane) {
  word = swap_bits<1>(word, lane, 4);
  word = swap_bits<2>(word, lane, 8);
  word = swap_bits<4>(word, lane, 16);
  word = swap_bits<8>(word, lane, 1);
  return swap_bits<16>(word, lane, 2);
}

// Words [row][0..3] of a tile to row first_row + row of the mask, 16 bytes a thread.
__device__ inline void store_words(const uint32_t (*words)[kTileWords], uint32_t* bits, int64_t rows, int64_t stride,
                                   int64_t first_row, int64_t first_word) {
  const int64_t row = first_row + threadIdx.x;
  if (threadIdx.x >= kTile || row >= rows) return;
  *reinterpret_cast<FourWords*>(bits + row * stride + first_word) =
      *reinterpret_cast<const FourWords*>(words[threadIdx.x]);
}

// One block, one tile; with `symmetric` a tile of the upper triangle and its mirror image.
template <class T>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor<T>) pairs_above_kernel(PairSearch<T> job) {
  const int64_t row_tiles = (job.rows + kTile - 1) / kTile, column_tiles = (job.columns + kTile - 1) / kTile;
  const TilePlace tile =
      job.symmetric ? triangle_tile(blockIdx.x) : rectangle_tile(blockIdx.x, row_tiles, column_tiles);
  if (tile.column >= column_tiles) return;  // the ragged end of the triangle's last group
  const int64_t first_row = tile.row * kTile, first_column = tile.column * kTile;

  const Places at;
  Accumulators acc;
  TileStream<T, kPairStages> products({job.x, job.rows, first_row}, {job.keys, job.columns, 0}, tile.column, 1,
                                      job.depth, dynamic_shared());
  products.next(acc, at);

  float row_limits[4][2], column_limits[4][2];
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int64_t j = first_column + at.column(n, b);
      column_limits[n][b] = job.key_thresholds && j < job.columns ? limit(job.key_thresholds[j]) : INFINITY;
    }
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t i = first_row + at.row(m, h);
      row_limits[m][h] = limit(job.thresholds[i < job.rows ? i : job.rows - 1]);
    }

  __syncthreads();  // the products are done in all warps: their buffers become those of the words
  auto words = reinterpret_cast<uint32_t (*)[kTileWords]>(dynamic_shared());
  auto turned = words + kTile;
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    const int place = at.lane % 4 * 8 + at.lane / 4;
    const int row = (at.warp_row * 2 + block) * 32 + place, column = at.warp_column * 32;
    uint32_t word = pack_rows(acc, block, row_limits, column_limits, at.lane);
    word &= ~ones_from(job.columns - first_column - column);
    if (job.symmetric) {
      word &= ones_from(first_row + row + 1 - first_column - column);
      turned[column + place][at.warp_row * 2 + block] = turn(word, at.lane);
    }
    words[row][at.warp_column] = word;
  }
  __syncthreads();
  const int64_t stride = words_per_row(job.columns);
  const bool diagonal = job.symmetric && tile.row == tile.column;
  if (diagonal && threadIdx.x < kTile)
    for (int w = 0; w < kTileWords; ++w)
      words[threadIdx.x][w] |= turned[threadIdx.x][w];
  store_words(words, job.bits, job.rows, stride, first_row, tile.column * kTileWords);
  if (job.symmetric && !diagonal) store_words(turned, job.bits, job.rows, stride, first_column, tile.row * kTileWords);
}

}  // namespace hpk::gpu
