// Tiles of s_ij = <a_i, b_j> in fp32, by 8 warps: 128 x 128 products, or another shape.
//
// Operands are row-major with rows of whole 16-byte chunks, fewer than 2^31 - 128 of them (offsets are 64-bit). A step
// brings 128 bytes of each row of the tile into one of `Stages` buffers by asynchronous copies; chunk c of row r lies
// at chunk c ^ (r % 8), so that neither ldmatrix nor the fp32 loads meet bank conflicts. Rows past the end repeat the
// last row (the caller ignores their products); chunks past the end of a row are zero.
//
// Every s_ij is one sum in ascending order of the depth, whatever tile or warp computes it: equal for all tilings, and
// s_ij = s_ji bit for bit. bf16 and fp16 run on the matrix units (m16n8k16), fp32 in IEEE fused multiply-adds.
// Both leave the accumulators in the same places: those of the m16n8 fragments.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/primitives.h"

namespace hpk::gpu {

constexpr int kTile = 128;  // rows and columns of the common tile
constexpr int kTileThreads = 256;
constexpr int kRowBytes = 128;  // of a row in a step

// Of kernels whose blocks are to share a multiprocessor: 128 registers a thread, too few for fp32 without spills.
template <class T>
constexpr int kBlocksPerMultiprocessor = std::is_same_v<T, float> ? 1 : 2;

// The rows and columns of a tile that this thread holds: acc[m][n][2 * h + b] belongs to (row(m, h), column(n, b)).
// Over (n, b) in order the columns ascend. WarpRows x WarpColumns warps have 16 M x 8 N products each; N is even.
// A column may come in `Parts`, whose products add up: kColumns rows of the second operand for each part in turn.
template <int WarpRows, int WarpColumns, int M, int N, int Parts = 1>
struct TilePlaces {
  static_assert(WarpRows * WarpColumns * 32 == kTileThreads && N % 2 == 0);
  static constexpr int kM = M, kN = N;
  static constexpr int kRows = WarpRows * M * 16, kColumns = WarpColumns * N * 8, kColumnRows = Parts * kColumns;
  static constexpr int kStageBytes = (kRows + kColumnRows) * kRowBytes;
  using Accumulators = float[M][N][4];  // [16 rows][8 columns][element of the fragment]

  int lane, warp_row, warp_column;

  __device__ TilePlaces()
      : lane(threadIdx.x % 32), warp_row(threadIdx.x / 32 / WarpColumns), warp_column(threadIdx.x / 32 % WarpColumns) {}
  __device__ int row(int m, int h) const { return (warp_row * M + m) * 16 + h * 8 + lane / 4; }
  __device__ int column(int n, int b) const { return (warp_column * N + n) * 8 + lane % 4 * 2 + b; }
};

using Places = TilePlaces<2, 4, 4, 4>;
using Accumulators = Places::Accumulators;
constexpr int kStageBytes = Places::kStageBytes;
static_assert(Places::kRows == kTile && Places::kColumns == kTile);

// Chunk `chunk` of row `row` of an operand with rows of `row_bytes`, a multiple of 128.
__device__ inline unsigned char* tile_chunk(unsigned char* operand, int row, int chunk, int row_bytes = kRowBytes) {
  return operand + row * row_bytes + ((chunk ^ (row & 7)) << 4);
}

struct alignas(16) FourFloats {
  float v[4];
};

constexpr int kTileWords = kTile / 32;  // words of bits of a tile's row

struct alignas(16) FourWords {
  uint32_t w[kTileWords];
};

// acc += the products of one step: on the matrix units, or for fp32 with each product and sum rounded once (IEEE).
template <class T, int WarpRows, int WarpColumns, int M, int N, int Parts>
__device__ inline void multiply_step(float (&acc)[M][N][4], unsigned char* a, unsigned char* b,
                                     const TilePlaces<WarpRows, WarpColumns, M, N, Parts>& at) {
  if constexpr (std::is_same_v<T, float>) {
    static_assert(Parts == 1);
#pragma unroll 2
    for (int chunk = 0; chunk < 8; ++chunk) {
      FourFloats a_part[M][2];
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          a_part[m][h] = *reinterpret_cast<const FourFloats*>(tile_chunk(a, at.row(m, h), chunk));
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const FourFloats b_part = *reinterpret_cast<const FourFloats*>(tile_chunk(b, at.column(n, e), chunk));
#pragma unroll
          for (int d = 0; d < 4; ++d)
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
              for (int h = 0; h < 2; ++h)
                acc[m][n][2 * h + e] = fmaf(a_part[m][h].v[d], b_part.v[d], acc[m][n][2 * h + e]);
        }
    }
  } else {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // 16 elements = 2 chunks
      uint32_t b_part[Parts][N][2];
#pragma unroll
      for (int part = 0; part < Parts; ++part)
#pragma unroll
        for (int n = 0; n < N; n += 2) {
          uint32_t four[4];
          const int row = part * at.kColumns + (at.warp_column * N + n) * 8 + at.lane % 8 + at.lane / 16 * 8;
          ldmatrix_x4(four, tile_chunk(b, row, pair * 2 + at.lane / 8 % 2));
          b_part[part][n][0] = four[0], b_part[part][n][1] = four[1];
          b_part[part][n + 1][0] = four[2], b_part[part][n + 1][1] = four[3];
        }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        uint32_t a_part[4];
        ldmatrix_x4(a_part, tile_chunk(a, (at.warp_row * M + m) * 16 + at.lane % 16, pair * 2 + at.lane / 16));
#pragma unroll
        for (int part = 0; part < Parts; ++part)
#pragma unroll
          for (int n = 0; n < N; ++n)
            mma_16816<T>(acc[m][n], a_part, b_part[part][n]);
      }
    }
  }
}

// An operand of a TileStream: row r of the stream is row at(r) of x. Rows past the last repeat it.
template <class T>
struct ConsecutiveRows {  // first, first + 1, ... of `count` rows
  const T* x;
  int count, first;
  __device__ ConsecutiveRows(const T* x, int64_t count, int64_t first)
      : x(x), count(static_cast<int>(count)), first(static_cast<int>(first)) {}
  __device__ int at(int r) const { return first + r < count ? first + r : count - 1; }
};

// The products of the first rows of `a` with one tile of `b` after the other. The copies run ahead across tiles: while
// a caller works on the products of a tile the first steps of the next are on their way.
template <class T, int Stages, class Shape = Places, class A = ConsecutiveRows<T>, class B = ConsecutiveRows<T>>
class TileStream {
 public:
  static constexpr int kSharedBytes = Stages * Shape::kStageBytes;

  // The first rows of `a` against the tiles first_b_tile ... + tiles of `b`, rows of depth elements: a multiple of 16
  // bytes. `stages` holds kSharedBytes. Every thread of the block takes part.
  __device__ TileStream(const A& a, const B& b, int64_t first_b_tile, int64_t tiles, int64_t depth,
                        unsigned char* stages)
      : a_(a),
        b_(b),
        depth_(static_cast<int>(depth)),
        stages_(stages),
        steps_((depth_ + kDepth - 1) / kDepth),
        load_row_(static_cast<int>(first_b_tile) * Shape::kColumnRows),
        end_row_(load_row_ + static_cast<int>(tiles) * Shape::kColumnRows) {
    for (int s = 0; s < Stages - 1; ++s)
      issue();
  }

  // The products of the next tile. Call it once per tile, by all threads.
  __device__ void next(typename Shape::Accumulators& acc, const Shape& at) {
#pragma unroll
    for (int m = 0; m < Shape::kM; ++m)
#pragma unroll
      for (int n = 0; n < Shape::kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          acc[m][n][e] = 0.0f;
    for (int step = 0; step < steps_; ++step) {
      cp_async_wait<Stages - 2>();
      __syncthreads();  // the step has arrived for all threads, and all have left the buffer that is filled next
      issue();
      unsigned char* stage = stages_ + slot_ * Shape::kStageBytes;
      multiply_step<T>(acc, stage, stage + Shape::kRows * kRowBytes, at);
      slot_ = slot_ + 1 == Stages ? 0 : slot_ + 1;
    }
  }

 private:
  static constexpr int kDepth = int(kRowBytes / sizeof(T));  // elements of a row in a step
  static constexpr int kChunk = int(16 / sizeof(T));

  __device__ void issue() {
    if (load_row_ < end_row_) {
      unsigned char* stage = stages_ + load_slot_ * Shape::kStageBytes;
      copy_rows<Shape::kRows>(stage, a_, 0);
      copy_rows<Shape::kColumnRows>(stage + Shape::kRows * kRowBytes, b_, load_row_);
      if (++load_step_ == steps_) load_step_ = 0, load_row_ += Shape::kColumnRows;
    }
    cp_async_commit();  // an empty group keeps the count of groups in step
    load_slot_ = load_slot_ + 1 == Stages ? 0 : load_slot_ + 1;
  }

  template <int Rows, class Operand>
  __device__ void copy_rows(unsigned char* stage, const Operand& operand, int first) const {
    const int chunk = threadIdx.x % 8;
    const int d = load_step_ * kDepth + chunk * kChunk;
    const bool inside = d < depth_;
#pragma unroll
    for (int r = threadIdx.x / 8; r < Rows; r += kTileThreads / 8)
      cp_async_16(tile_chunk(stage, r, chunk), operand.x + int64_t(operand.at(first + r)) * depth_ + (inside ? d : 0),
                  inside);
  }

  const A a_;
  const B b_;
  int depth_;
  unsigned char* stages_;
  int steps_, load_row_, end_row_, load_step_ = 0, slot_ = 0, load_slot_ = 0;
};

}  // namespace hpk::gpu
