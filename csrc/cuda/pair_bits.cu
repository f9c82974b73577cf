// Packed pairs: random bits, counts, transposition, pairs from index lists. Rows are whole 16-byte chunks of 4 words;
// each chunk is written once, by one thread.
#include "../shared/bits.h"
#include "../shared/philox.h"
#include "../shared/tile_order.h"
#include "bindings.h"
#include "vector.cuh"

namespace hpk::gpu {
namespace {

constexpr int kSide = 128;       // rows and columns of a tile of bits: one row of 4 words a thread
constexpr int kSideWords = kSide / 32;
constexpr int kListWords = 2048; // words of a row that a block of set_pairs_kernel holds

using Chunk = Packed<16>;

__device__ inline Chunk& chunk_at(uint32_t* bits, int64_t word) { return *reinterpret_cast<Chunk*>(bits + word); }

// Bits [0, columns) of the row's word `word`: those past the end are padding.
__device__ inline uint32_t valid_bits(int64_t word, int64_t columns) {
  const int64_t left = columns - 32 * word;
  return left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1u;
}

// Bernoulli(q / 2^32) bits, q in [0, 2^32], of the shared generator.
__global__ void __launch_bounds__(kWarpThreads) random_bits_kernel(const int64_t* seed, int64_t rows, int64_t columns,
                                                                   uint64_t q, uint32_t* bits) {
  const int64_t words = words_per_row(columns);
  const int64_t at = (int64_t(blockIdx.x) * kWarpThreads + threadIdx.x) * kSideWords;
  if (at >= rows * words) return;
  const int64_t row = at / words, first = at % words;
  Chunk chunk;
#pragma unroll 1
  for (int w = 0; w < kSideWords; ++w) {
    const uint32_t drawn = q >> 32 ? 0xffffffffu
                           : q == 0 ? 0u
                                    : bernoulli_word(static_cast<uint64_t>(*seed), static_cast<uint32_t>(row),
                                                     static_cast<uint32_t>(first + w), q);
    const uint32_t kept = drawn & valid_bits(first + w, columns);
    // The loop stays a loop (a generator of 80 rounds), so the register is chosen by comparison.
#pragma unroll
    for (int slot = 0; slot < kSideWords; ++slot)
      if (slot == w) chunk.word[slot] = kept;
  }
  chunk_at(bits, at) = chunk;
}

// A warp counts a row.
__global__ void __launch_bounds__(kWarpThreads) count_bits_kernel(const uint32_t* bits, int64_t rows, int64_t words,
                                                                  int32_t* counts) {
  const int64_t row = int64_t(blockIdx.x) * (kWarpThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  int count = 0;
  for (int64_t w = threadIdx.x % 32 * kSideWords; w < words; w += 32 * kSideWords) {
    const Chunk chunk = load_packed<16>(bits + row * words + w);
#pragma unroll
    for (int e = 0; e < kSideWords; ++e) count += __popc(chunk.word[e]);
  }
  count = warp_sum(count);
  if (threadIdx.x % 32 == 0) counts[row] = count;
}

// The transpose of the warp's 32 x 32 bits, lane r holding row r: swaps ever smaller off-diagonal squares.
__device__ inline uint32_t transpose_over_lanes(uint32_t word) {
  const int lane = threadIdx.x % 32;
  uint32_t low = 0x0000ffffu;  // the columns of the left half of each square
#pragma unroll
  for (int size = 16; size; size /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, word, size);
    word = lane & size ? (word & ~low) | ((other >> size) & low) : (word & low) | ((other & low) << size);
    low ^= low << (size / 2);
  }
  return word;
}

// turned[c] = the words of column c of a tile, thread r holding row r.
__device__ inline void turn(const Chunk& row, Chunk* turned) {
#pragma unroll
  for (int w = 0; w < kSideWords; ++w)
    turned[w * 32 + threadIdx.x % 32].word[threadIdx.x / 32] = transpose_over_lanes(row.word[w]);
}

__device__ inline Chunk row_of_tile(const uint32_t* bits, int64_t rows, int64_t words, const TilePlace& tile) {
  const int64_t row = tile.row * kSide + threadIdx.x;
  if (row >= rows) return Chunk{};
  return load_packed<16>(bits + row * words + tile.column * kSideWords);
}

// out (columns, words(rows)) = the transpose; one block, one tile.
__global__ void __launch_bounds__(kSide) transpose_bits_kernel(const uint32_t* bits, int64_t rows, int64_t columns,
                                                               uint32_t* out) {
  auto turned = reinterpret_cast<Chunk*>(dynamic_shared());
  const TilePlace tile = rectangle_tile(blockIdx.x, (rows + kSide - 1) / kSide, (columns + kSide - 1) / kSide);
  turn(row_of_tile(bits, rows, words_per_row(columns), tile), turned);
  __syncthreads();
  const int64_t column = tile.column * kSide + threadIdx.x;
  if (column < columns) chunk_at(out, column * words_per_row(rows) + tile.row * kSideWords) = turned[threadIdx.x];
}

// bits |= its transpose, without the diagonal, in place; one block owns a tile and its mirror image.
__global__ void __launch_bounds__(kSide) symmetrize_kernel(uint32_t* bits, int64_t rows) {
  const int64_t tiles = (rows + kSide - 1) / kSide, words = words_per_row(rows);
  const TilePlace tile = triangle_tile(blockIdx.x), mirror{tile.column, tile.row};
  if (tile.column >= tiles) return;  // the ragged end of the triangle's last group
  auto turned = reinterpret_cast<Chunk*>(dynamic_shared()), mirror_turned = turned + kSide;
  Chunk own = row_of_tile(bits, rows, words, tile), mirrored = row_of_tile(bits, rows, words, mirror);
  turn(own, turned);
  turn(mirrored, mirror_turned);
  __syncthreads();
  const uint32_t diagonal = tile.row == tile.column ? 1u << threadIdx.x % 32 : 0u;
#pragma unroll
  for (int w = 0; w < kSideWords; ++w) {
    const uint32_t cleared = int(threadIdx.x) / 32 == w ? diagonal : 0u;
    own.word[w] = (own.word[w] | mirror_turned[threadIdx.x].word[w]) & ~cleared;
    mirrored.word[w] |= turned[threadIdx.x].word[w];
  }
  const int64_t row = tile.row * kSide + threadIdx.x, mirror_row = mirror.row * kSide + threadIdx.x;
  if (row < rows) chunk_at(bits, row * words + tile.column * kSideWords) = own;
  if (mirror_row < rows && tile.row != tile.column)
    chunk_at(bits, mirror_row * words + tile.row * kSideWords) = mirrored;
}

// Bits (i, indices[i, n]); a block writes kListWords words of a row. An index outside [0, columns) is no pair.
__global__ void __launch_bounds__(kSide) set_pairs_kernel(const int64_t* indices, int64_t k, int64_t columns,
                                                          uint32_t* bits) {
  auto row_words = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int64_t row = blockIdx.x, words = words_per_row(columns), first = int64_t(blockIdx.y) * kListWords;
  const int count = static_cast<int>(words - first < kListWords ? words - first : kListWords);
  for (int w = threadIdx.x * kSideWords; w < count; w += kSide * kSideWords) chunk_at(row_words, w) = Chunk{};
  __syncthreads();
  for (int64_t n = threadIdx.x; n < k; n += kSide) {
    const int64_t column = indices[row * k + n], word = (column >> 5) - first;
    if (column >= 0 && column < columns && word >= 0 && word < count)
      atomicOr(&row_words[word], 1u << (column & 31));  // the order does not matter
  }
  __syncthreads();
  for (int w = threadIdx.x * kSideWords; w < count; w += kSide * kSideWords)
    chunk_at(bits, row * words + first + w) = chunk_at(row_words, w);
}

}  // namespace
}  // namespace hpk::gpu

HPK_BIND_CUDA(pair_bits) {
  using namespace hpk;
  using namespace hpk::gpu;
  m.def("random_bits", [](uintptr_t seed, int64_t rows, int64_t columns, uint64_t q, uintptr_t bits, uintptr_t stream) {
    const unsigned blocks = blocks_of(rows * words_per_row(columns), kWarpThreads * kSideWords);
    launch(random_bits_kernel, dim3(blocks), dim3(kWarpThreads), 0, stream, pointer<const int64_t>(seed), rows, columns,
           q, pointer<uint32_t>(bits));
  });
  m.def("count_bits", [](uintptr_t bits, int64_t rows, int64_t words, uintptr_t counts, uintptr_t stream) {
    launch(count_bits_kernel, dim3(blocks_of(rows, kWarpThreads / 32)), dim3(kWarpThreads), 0, stream,
           pointer<const uint32_t>(bits), rows, words, pointer<int32_t>(counts));
  });
  m.def("transpose_bits", [](uintptr_t bits, int64_t rows, int64_t columns, uintptr_t out, uintptr_t stream) {
    const int64_t tiles = int64_t(blocks_of(rows, kSide)) * blocks_of(columns, kSide);
    launch(transpose_bits_kernel, dim3(static_cast<unsigned>(tiles)), dim3(kSide), kSide * sizeof(Chunk), stream,
           pointer<const uint32_t>(bits), rows, columns, pointer<uint32_t>(out));
  });
  // bits (rows, words(columns)); symmetric: the mirrored pairs too, and no diagonal (columns = rows).
  m.def("set_pairs", [](uintptr_t indices, int64_t rows, int64_t k, int64_t columns, bool symmetric, uintptr_t bits,
                        uintptr_t stream) {
    const dim3 grid(static_cast<unsigned>(rows), blocks_of(words_per_row(columns), kListWords));
    launch(set_pairs_kernel, grid, dim3(kSide), kListWords * 4, stream, pointer<const int64_t>(indices), k, columns,
           pointer<uint32_t>(bits));
    if (!symmetric) return;
    const int64_t groups = (blocks_of(rows, kSide) + kTileGroup - 1) / kTileGroup;
    launch(symmetrize_kernel, dim3(static_cast<unsigned>(triangle_tiles(groups))), dim3(kSide),
           2 * kSide * sizeof(Chunk), stream, pointer<uint32_t>(bits), rows);
  });
}
