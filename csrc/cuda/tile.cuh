// Tiles of s_ij = <a_i, b_j>: 128 x 128 products in fp32, by 8 warps.
//
// Operands are row-major with rows of whole 16-byte chunks. A step brings 128 bytes of each of the 128 + 128 rows into
// one of `Stages` buffers by asynchronous copies; chunk c of row r lies at chunk c ^ (r % 8), so that neither ldmatrix
// nor the fp32 loads meet bank conflicts. Rows past the end repeat the last row (the caller ignores their products);
// chunks past the end of a row are zero.
//
// Every s_ij is one sum in ascending order of the depth, whatever tile or warp computes it: equal for all tilings, and
// s_ij = s_ji bit for bit. bf16 and fp16 run on the matrix units (m16n8k16), fp32 in IEEE fused multiply-adds.
// Both leave the accumulators in the same places: those of the m16n8 fragments.
#pragma once

#include <cstdint>

#include "primitives.h"

namespace hpk::gpu {

constexpr int kTile = 128;          // rows and columns of a tile
constexpr int kTileThreads = 256;   // 2 x 4 warps of 64 x 32 products
constexpr int kRowBytes = 128;      // of a row in a step
constexpr int kStageBytes = 2 * kTile * kRowBytes;

using Accumulators = float[4][4][4];  // [16 rows][8 columns][element of the fragment]

// The rows and columns of a tile that this thread holds: acc[m][n][2 * h + b] belongs to (row(m, h), column(n, b)).
// Over (n, b) in order the columns ascend.
struct Places {
  int lane, warp_row, warp_column;

  __device__ Places() : lane(threadIdx.x % 32), warp_row(threadIdx.x / 128), warp_column(threadIdx.x / 32 % 4) {}
  __device__ int row(int m, int h) const { return warp_row * 64 + m * 16 + h * 8 + lane / 4; }
  __device__ int column(int n, int b) const { return warp_column * 32 + n * 8 + lane % 4 * 2 + b; }
};

// Chunk `chunk` of row `row` of a 128 x 128-byte operand.
__device__ inline unsigned char* tile_chunk(unsigned char* operand, int row, int chunk) {
  return operand + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// acc += the products of one step, on the matrix units.
template <class T>
__device__ inline void multiply_step(Accumulators& acc, unsigned char* a, unsigned char* b, const Places& at) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {  // 16 elements = 2 chunks
    uint32_t b_part[4][2];
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      uint32_t four[4];
      const int row = at.warp_column * 32 + n * 8 + at.lane % 8 + at.lane / 16 * 8;
      ldmatrix_x4(four, tile_chunk(b, row, pair * 2 + at.lane / 8 % 2));
      b_part[n][0] = four[0], b_part[n][1] = four[1];
      b_part[n + 1][0] = four[2], b_part[n + 1][1] = four[3];
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t a_part[4];
      ldmatrix_x4(a_part, tile_chunk(a, at.warp_row * 64 + m * 16 + at.lane % 16, pair * 2 + at.lane / 16));
#pragma unroll
      for (int n = 0; n < 4; ++n) mma_16816<T>(acc[m][n], a_part, b_part[n]);
    }
  }
}

struct alignas(16) FourFloats {
  float v[4];
};

// acc += the products of one step of fp32 operands, each product and sum rounded once (IEEE fused multiply-add).
template <>
__device__ inline void multiply_step<float>(Accumulators& acc, unsigned char* a, unsigned char* b, const Places& at) {
#pragma unroll 2
  for (int chunk = 0; chunk < 8; ++chunk) {
    FourFloats a_part[4][2];
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        a_part[m][h] = *reinterpret_cast<const FourFloats*>(tile_chunk(a, at.row(m, h), chunk));
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const FourFloats b_part = *reinterpret_cast<const FourFloats*>(tile_chunk(b, at.column(n, e), chunk));
#pragma unroll
        for (int d = 0; d < 4; ++d)
#pragma unroll
          for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              acc[m][n][2 * h + e] = fmaf(a_part[m][h].v[d], b_part.v[d], acc[m][n][2 * h + e]);
      }
  }
}

// The products of 128 rows of `a` with one tile of `b` after the other. The copies run ahead across tiles: while a
// caller works on the products of a tile the first steps of the next are on their way.
template <class T, int Stages>
class TileStream {
 public:
  static constexpr int kSharedBytes = Stages * kStageBytes;

  // Rows [first_a, first_a + 128) of a (a_rows x depth) against the tiles first_b_tile ... + tiles of b (b_rows x
  // depth). depth is a multiple of 16 bytes; `stages` holds kSharedBytes. Every thread of the block takes part.
  __device__ TileStream(const T* a, int64_t a_rows, int64_t first_a, const T* b, int64_t b_rows, int64_t first_b_tile,
                        int64_t tiles, int64_t depth, unsigned char* stages)
      : a_(a), b_(b), a_rows_(a_rows), b_rows_(b_rows), first_a_(first_a), depth_(depth), stages_(stages),
        steps_((depth + kDepth - 1) / kDepth), load_row_(first_b_tile * kTile), end_row_(load_row_ + tiles * kTile) {
    for (int s = 0; s < Stages - 1; ++s) issue();
  }

  // The products of the next tile. Call it once per tile, by all threads.
  __device__ void next(Accumulators& acc, const Places& at) {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;
    for (int64_t step = 0; step < steps_; ++step) {
      cp_async_wait<Stages - 2>();
      __syncthreads();  // the step has arrived for all threads, and all have left the buffer that is filled next
      issue();
      unsigned char* stage = stages_ + slot_ * kStageBytes;
      multiply_step<T>(acc, stage, stage + kTile * kRowBytes, at);
      slot_ = slot_ + 1 == Stages ? 0 : slot_ + 1;
    }
  }

 private:
  static constexpr int kDepth = kRowBytes / sizeof(T);  // elements of a row in a step
  static constexpr int kChunk = 16 / sizeof(T);

  __device__ void issue() {
    if (load_row_ < end_row_) {
      unsigned char* stage = stages_ + load_slot_ * kStageBytes;
      copy_rows(stage, a_, a_rows_, first_a_);
      copy_rows(stage + kTile * kRowBytes, b_, b_rows_, load_row_);
      if (++load_step_ == steps_) load_step_ = 0, load_row_ += kTile;
    }
    cp_async_commit();  // an empty group keeps the count of groups in step
    load_slot_ = load_slot_ + 1 == Stages ? 0 : load_slot_ + 1;
  }

  __device__ void copy_rows(unsigned char* operand, const T* x, int64_t rows, int64_t first) const {
    const int chunk = threadIdx.x % 8;
    const int64_t d = load_step_ * kDepth + chunk * kChunk;
    const bool inside = d < depth_;
#pragma unroll
    for (int r = threadIdx.x / 8; r < kTile; r += kTileThreads / 8) {
      const int64_t row = first + r < rows ? first + r : rows - 1;
      cp_async_16(tile_chunk(operand, r, chunk), x + row * depth_ + (inside ? d : 0), inside);
    }
  }

  const T *a_, *b_;
  int64_t a_rows_, b_rows_, first_a_, depth_;
  unsigned char* stages_;
  int64_t steps_, load_row_, end_row_, load_step_ = 0;
  int slot_ = 0, load_slot_ = 0;
};

}  // namespace hpk::gpu
