// Packed pairs: random bits, counts, transposition, pairs from index lists. Rows are whole 16-byte chunks of 4 words;
// each chunk is written once, by one thread.
#include "cuda/common/vector.cuh"
#include "cuda/pair_bits/pair_bits.h"
#include "shared/bits.h"
#include "shared/philox.h"
#include "shared/tile_order.h"

namespace hpk::gpu {
namespace {

constexpr int kSide = 128;  // rows and columns of a tile of bits: one row of 4 words a thread
constexpr int kSideWords = kSide / 32;
constexpr int kListWords = 2048;  // words of a row that a block of set_pairs_kernel holds

using Chunk = Packed<16>;

__device__ inline Chunk& chunk_at(uint32_t* bits, int64_t word) { return *reinterpret_cast<Chunk*>(bits + word); }

// Bits [0, columns) of the row's word `word`: those past the end are padding.
__device__ inline uint32_t valid_bits(int64_t word, int64_t columns) {
  const int64_t left = columns - 32 * word;
  return left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1u;
}

// Bernoulli(q / 2^32) bits, q in [0, 2^32], of the shared generator.
__global__ void __launch_bounds__(kWarpThreads)
    random_bits_kernel(const int64_t* seed, int64_t rows, int64_t columns, uint64_t q, uint32_t* bits) {
  const int64_t words = words_per_row(columns);
  const int64_t at = (int64_t(blockIdx.x) * kWarpThreads + threadIdx.x) * kSideWords;
  if (at >= rows * words) return;
  const int64_t row = at / words, first = at % words;
  Chunk chunk;
#pragma unroll 1
  for (int w = 0; w < kSideWords; ++w) {
    const uint32_t drawn = q >> 32  ? 0xffffffffu
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
__global__ void __launch_bounds__(kWarpThreads)
    count_bits_kernel(const uint32_t* bits, int64_t rows, int64_t words, int32_t* counts) {
  const int64_t row = int64_t(blockIdx.x) * (kWarpThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  int count = 0;
  for (int64_t w = threadIdx.x % 32 * kSideWords; w < words; w += 32 * kSideWords) {
    const Chunk chunk = load_packed<16>(bits + row * words + w);
#pragma unroll
    for (int e = 0; e < kSideWords; ++e)
      count += __popc(chunk.word[e]);
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

// out (columns, words(rows)) = the transpose; one block, one tile. Join: joined to what out holds, whose row c is row
// first_row + c of a symmetric mask, without that mask's diagonal.
template <bool Join>
__global__ void __launch_bounds__(kSide)
    transpose_bits_kernel(const uint32_t* bits, int64_t rows, int64_t columns, uint32_t* out, int64_t first_row) {
  auto turned = reinterpret_cast<Chunk*>(dynamic_shared());
  const TilePlace tile = rectangle_tile(blockIdx.x, (rows + kSide - 1) / kSide, (columns + kSide - 1) / kSide);
  turn(row_of_tile(bits, rows, words_per_row(columns), tile), turned);
  __syncthreads();
  const int64_t column = tile.column * kSide + threadIdx.x;
  if (column >= columns) return;
  const int64_t first_word = tile.row * kSideWords;
  Chunk& target = chunk_at(out, column * words_per_row(rows) + first_word);
  Chunk chunk = turned[threadIdx.x];
  if constexpr (Join) {
    const Chunk held = load_packed<16>(target.word);
    const int64_t diagonal = first_row + column;
#pragma unroll
    for (int w = 0; w < kSideWords; ++w) {
      chunk.word[w] |= held.word[w];
      if (diagonal >> 5 == first_word + w) chunk.word[w] &= ~(1u << (diagonal & 31));
    }
  }
  target = chunk;
}

// Bits (i, indices[i, n] - first_column); a block writes kListWords words of a row. What falls outside [0, columns) is
// no pair.
__global__ void __launch_bounds__(kSide)
    set_pairs_kernel(const int64_t* indices, int64_t k, int64_t first_column, int64_t columns, uint32_t* bits) {
  auto row_words = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int64_t row = blockIdx.x, words = words_per_row(columns), first = int64_t(blockIdx.y) * kListWords;
  const int count = static_cast<int>(words - first < kListWords ? words - first : kListWords);
  for (int w = threadIdx.x * kSideWords; w < count; w += kSide * kSideWords)
    chunk_at(row_words, w) = Chunk{};
  __syncthreads();
  for (int64_t n = threadIdx.x; n < k; n += kSide) {
    const int64_t index = indices[row * k + n], column = index - first_column, word = (column >> 5) - first;
    if (index >= 0 && column >= 0 && column < columns && word >= 0 && word < count)
      atomicOr(&row_words[word], 1u << (column & 31));  // the order does not matter
  }
  __syncthreads();
  for (int w = threadIdx.x * kSideWords; w < count; w += kSide * kSideWords)
    chunk_at(bits, row * words + first + w) = chunk_at(row_words, w);
}

}  // namespace

void random_bits(uintptr_t seed, int64_t rows, int64_t columns, uint64_t q, uintptr_t bits, uintptr_t stream) {
  const unsigned blocks = blocks_of(rows * words_per_row(columns), kWarpThreads * kSideWords);
  launch(random_bits_kernel, dim3(blocks), dim3(kWarpThreads), 0, stream, pointer<const int64_t>(seed), rows, columns,
         q, pointer<uint32_t>(bits));
}

void count_bits(uintptr_t bits, int64_t rows, int64_t words, uintptr_t counts, uintptr_t stream) {
  launch(count_bits_kernel, dim3(blocks_of(rows, kWarpThreads / 32)), dim3(kWarpThreads), 0, stream,
         pointer<const uint32_t>(bits), rows, words, pointer<int32_t>(counts));
}

void transpose_bits(uintptr_t bits, int64_t rows, int64_t columns, uintptr_t out, uintptr_t stream) {
  const int64_t tiles = int64_t(blocks_of(rows, kSide)) * blocks_of(columns, kSide);
  launch(transpose_bits_kernel<false>, dim3(static_cast<unsigned>(tiles)), dim3(kSide), kSide * sizeof(Chunk), stream,
         pointer<const uint32_t>(bits), rows, columns, pointer<uint32_t>(out), int64_t(0));
}

void join_transpose(uintptr_t others, int64_t rows, int64_t columns, int64_t first_row, uintptr_t bits,
                    uintptr_t stream) {
  const int64_t tiles = int64_t(blocks_of(rows, kSide)) * blocks_of(columns, kSide);
  launch(transpose_bits_kernel<true>, dim3(static_cast<unsigned>(tiles)), dim3(kSide), kSide * sizeof(Chunk), stream,
         pointer<const uint32_t>(others), rows, columns, pointer<uint32_t>(bits), first_row);
}

void set_pairs(uintptr_t indices, int64_t rows, int64_t k, int64_t first_column, int64_t columns, uintptr_t bits,
               uintptr_t stream) {
  const dim3 grid(static_cast<unsigned>(rows), blocks_of(words_per_row(columns), kListWords));
  launch(set_pairs_kernel, grid, dim3(kSide), kListWords * 4, stream, pointer<const int64_t>(indices), k, first_column,
         columns, pointer<uint32_t>(bits));
}

}  // namespace hpk::gpu
