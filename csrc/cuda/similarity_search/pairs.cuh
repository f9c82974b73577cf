// pairs_above: the bits of s_ij > theta_ij, and of their transpose from the same products.
#pragma once

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

// The smaller, NaN if either is: a NaN threshold selects nothing.
__device__ inline float least(float a, float b) { return a < b || a != a ? a : b; }

__device__ inline uint32_t or_over_lanes(uint32_t word, int first_mask, int last_mask) {
  for (int mask = first_mask; mask <= last_mask; mask *= 2)
    word |= __shfl_xor_sync(0xffffffffu, word, mask);
  return word;
}

// words[row][word] = the tile's bits by rows; turned[column][word] = by columns. `hits` has bit (m * 4 + n) * 4 + e
// for the thread's accumulator [m][n][e].
__device__ inline void pack_tile(uint64_t hits, const Places& at, uint32_t (*words)[kTileWords],
                                 uint32_t (*turned)[kTileWords]) {
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {  // the 4 lanes of a row hold the 32 columns of the warp
      uint32_t word = 0;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t two = static_cast<uint32_t>(hits >> ((m * 4 + n) * 4 + 2 * h)) & 3u;
        word |= two << (n * 8 + at.lane % 4 * 2);
      }
      word = or_over_lanes(word, 1, 2);
      if (at.lane % 4 == 0) words[at.row(m, h)][at.warp_column] = word;
    }
  if (turned == nullptr) return;
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // the 8 lanes of a column hold 32 of the warp's 64 rows
        uint32_t word = 0;
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int m = 2 * half + part / 2, h = part % 2;
          word |= (static_cast<uint32_t>(hits >> ((m * 4 + n) * 4 + 2 * h + b)) & 1u) << (part * 8 + at.lane / 4);
        }
        word = or_over_lanes(word, 4, 16);
        if (at.lane / 4 == 0) turned[at.column(n, b)][at.warp_row * 2 + half] = word;
      }
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

  float column_theta[4][2];
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int64_t j = first_column + at.column(n, b);
      column_theta[n][b] = job.key_thresholds && j < job.columns ? job.key_thresholds[j] : 0.0f;
    }
  uint64_t hits = 0;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t i = first_row + at.row(m, h);
      const float row_theta = job.thresholds[i < job.rows ? i : job.rows - 1];
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int64_t j = first_column + at.column(n, b);
          const float theta = job.key_thresholds ? least(row_theta, column_theta[n][b]) : row_theta;
          const bool inside = i < job.rows && j < job.columns && (!job.symmetric || i < j);
          const bool hit = inside && acc[m][n][2 * h + b] > theta;
          hits |= static_cast<uint64_t>(hit) << ((m * 4 + n) * 4 + 2 * h + b);
        }
    }

  __syncthreads();  // the products are done in all warps: their buffers become those of the words
  auto words = reinterpret_cast<uint32_t (*)[kTileWords]>(dynamic_shared());
  auto turned = job.symmetric ? words + kTile : nullptr;
  pack_tile(hits, at, words, turned);
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
