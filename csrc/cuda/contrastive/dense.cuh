// The dense denominator: every 128 x 128 tile of the pairs, of the anchors' rows of tiles against all columns.
#pragma once

#include "cuda/contrastive/masks.cuh"
#include "shared/tile_order.h"

namespace hpk::gpu {

constexpr int kDenseStages = 2;  // two blocks a multiprocessor also where it has 164 KB

// The mask rows that a lane loads words for: of its rows (lane % 4, h).
struct HeldRows {
  int mask_rows[2], negatives_rows[2];

  __device__ HeldRows(const Places& at, const ContrastiveMasks& masks, int64_t first_row, int64_t rows) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first_row + at.row(at.lane % 4, h), i = row < rows ? row : rows - 1;
      mask_rows[h] = static_cast<int>(masks.mask_row(i));
      negatives_rows[h] = static_cast<int>(masks.negatives_row(i));
    }
  }
};

// The sum over the four lanes that hold a row, in all four.
__device__ inline float over_lanes(float sum) {
  for (int mask = 1; mask <= 2; mask *= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  return sum;
}
__device__ inline float max_over_lanes(float largest) {
  for (int mask = 1; mask <= 2; mask *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
  return largest;
}

// The pairs of a row with a thread's columns of a tile: bit 8 n + b is that of column (n, b).
struct PairWords {
  uint32_t inside, positive, extra;  // of the denominator, of P, of Q
};

// The pairs of a thread's rows as masks of bits have them.
class BitWords {
 public:
  using Masks = ContrastiveMasks;
  static constexpr bool kPositives = true;

  __device__ BitWords(const Places& at, const Masks& masks, int64_t first_row, int64_t rows)
      : masks_(masks), rows_(rows), held_(at, masks, first_row, rows) {}
  // The words of columns first_column ... + 31. All lanes, after the products: held during them they cost a spill.
  __device__ void load(const Places&, int64_t first_column) {
    first_column_ = first_column;
    positives_.load(masks_.positives, held_.mask_rows, masks_.stride, first_column / 32);
    extra_.load(masks_.extra, held_.mask_rows, masks_.stride, first_column / 32);
    negatives_.load(masks_.negatives, held_.negatives_rows, masks_.stride, first_column / 32);
  }
  // Of row i at (m, h). All lanes.
  __device__ PairWords of_row(const Places& at, int64_t i, int m, int h) const {
    const uint32_t others = other_columns(i, first_column_, rows_);
    const uint32_t positive = positives_.at(m, h, at.lane) & others, extra = extra_.at(m, h, at.lane) & others;
    const uint32_t inside = masks_.everything ? others : positive | (negatives_.at(m, h, at.lane) & others);
    const int first_bit = at.lane % 4 * 2;
    return {inside >> first_bit, positive >> first_bit, extra >> first_bit};
  }

 private:
  const Masks& masks_;
  int64_t rows_, first_column_;
  HeldRows held_;
  RowWords positives_, extra_, negatives_;
};

constexpr int kDenseStatsBytes = kDenseStages * kStageBytes + 4 * kTile * sizeof(RowStats);

// Block (x, y, z): the x-th row of tiles of the anchors, share y of the columns, stream z. first_shift: the shift of
// all sums, or -inf for the largest logit of the row so far. Words: BitWords, or what else says which pairs there are.
template <class T, class Words>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor<T>)
    contrastive_stats_kernel(ContrastiveRows<T> rows, typename Words::Masks masks, float first_shift,
                             StatsParts parts) {
  const bool fixed_shift = first_shift != -INFINITY;
  const int64_t first_row = (masks.first_row / kTile + blockIdx.x) * kTile;
  const T* x = rows.x + blockIdx.z * rows.rows * rows.depth;
  const ConsecutiveRows<T> columns = masks.columns(x, rows.rows);
  const int64_t tiles = (columns.count + kTile - 1) / kTile, share = (tiles + gridDim.y - 1) / gridDim.y;
  const int64_t begin = share * blockIdx.y < tiles ? share * blockIdx.y : tiles;
  const int64_t end = begin + share < tiles ? begin + share : tiles;

  const Places at;
  Words words(at, masks, first_row, rows.rows);
  // The sums of a warp's rows: in shared memory, because the products take half of the registers.
  auto of_warp = reinterpret_cast<RowStats(*)[kTile]>(dynamic_shared() + kDenseStages * kStageBytes);
  for (int e = threadIdx.x; e < 4 * kTile; e += kTileThreads)
    of_warp[0][e] = {{0.0f, first_shift}, 0.0f, 0.0f};
  TileStream<T, kDenseStages> products({x, rows.rows, first_row}, columns, begin, end - begin, rows.depth,
                                       dynamic_shared());
  for (int64_t tile = begin; tile < end; ++tile) {
    Accumulators acc;
    products.next(acc, at);
    words.load(at, tile * kTile + at.warp_column * 32);
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const PairWords pairs = words.of_row(at, first_row + at.row(m, h), m, h);
        RowStats& row = of_warp[at.warp_column][at.row(m, h)];
        float shift = first_shift;
        if (!fixed_shift) {
          float largest = -INFINITY;
#pragma unroll
          for (int e = 0; e < 8; ++e)
            if (pairs.inside >> (e / 2 * 8 + e % 2) & 1)
              largest = fmaxf(largest, acc[m][e / 2][2 * h + e % 2] * rows.scale);
          shift = fmaxf(row.denominator.shift, max_over_lanes(largest));
        }
        float total = 0.0f;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float p = exp2_fast(fmaf(acc[m][e / 2][2 * h + e % 2], rows.scale, -shift));
          total += pairs.inside >> (e / 2 * 8 + e % 2) & 1 ? p : 0.0f;
        }
        total = over_lanes(total);
        if (at.lane % 4 == 0) {
          row.denominator.raise(shift);
          row.denominator.total += total;
        }
        if constexpr (Words::kPositives) {
          if (__ballot_sync(0xffffffffu, (pairs.positive | pairs.extra) != 0) == 0) continue;  // few are positive
          float pos = 0.0f, ext = 0.0f;
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const float s = acc[m][e / 2][2 * h + e % 2];
            pos += pairs.positive >> (e / 2 * 8 + e % 2) & 1 ? s : 0.0f;
            ext += pairs.extra >> (e / 2 * 8 + e % 2) & 1 ? s : 0.0f;
          }
          pos = over_lanes(pos), ext = over_lanes(ext);
          if (at.lane % 4 == 0) row.pos += pos, row.ext += ext;
        }
      }
  }
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= kTile || !masks.is_anchor(first_row + row)) return;
  RowStats sum = of_warp[0][row];
  for (int warp = 1; warp < 4; ++warp)
    sum.add(of_warp[warp][row]);
  parts.store<Words::kPositives>(gridDim.y, blockIdx.y, gridDim.z, blockIdx.z, masks.anchors,
                                 first_row + row - masks.first_row, sum);
}

// What the weights of a tile need of its rows and columns.
struct WeightTables {
  float lse[2][kTile], grad_lse[2][kTile], grad_pos[2][kTile], grad_ext[2][kTile];  // [rows, columns]
  uint32_t turned[kTile][kTileWords];  // the negatives of the column's row, along the rows of the tile

  // Every thread of the block takes part: 128 have a row, 128 a column.
  __device__ void load(const ContrastiveMasks& masks, const ContrastiveTables& tables, int64_t first_row,
                       int64_t first_column, int64_t rows) {
    const int side = threadIdx.x / kTile, place = threadIdx.x % kTile;
    const int64_t r = (side ? first_column : first_row) + place, i = r < rows ? r : rows - 1;
    lse[side][place] = tables.lse[i];
    grad_lse[side][place] = tables.grad_lse[i];
    grad_pos[side][place] = tables.grad_pos[i];
    grad_ext[side][place] = tables.grad_ext[i];
    if (side == 0) return;
    const auto words = reinterpret_cast<FourWords*>(turned[place]);
    *words = FourWords{};
    if (masks.negatives)
      *words =
          *reinterpret_cast<const FourWords*>(masks.negatives + masks.negatives_row(i) * masks.stride + first_row / 32);
  }
};

constexpr int kWeightsBytes = kDenseStages * kStageBytes + sizeof(WeightTables);

// out[i - first_row][j] = G_ij + G_ji in x's type for `out_rows` rows i from first_row on, a multiple of 128; 0 on the
// diagonal and from column `rows` to out_width, a multiple of 16 bytes. Rows that are no anchors hold anything finite.
// One block, one tile, one stream. With a shared exponential (shift > 0) tables.grad_lse holds grad_lse_i
// exp2(shift - lse_i), so that one exponential serves both directions.
template <class T>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor<T>)
    contrastive_weights_kernel(ContrastiveRows<T> rows, ContrastiveMasks masks, ContrastiveTables tables, float shift,
                               int64_t first_row, int64_t out_rows, int64_t out_width, T* out) {
  const TilePlace tile = rectangle_tile(blockIdx.x, (out_rows + kTile - 1) / kTile, (rows.rows + kTile - 1) / kTile);
  const int64_t first_tile_row = first_row + tile.row * kTile, first_tile_column = tile.column * kTile;
  const Places at;
  const int64_t first_column = first_tile_column + at.warp_column * 32, word = first_column / 32;
  const bool shared_exponential = shift > 0.0f;
  auto& of_tile = *reinterpret_cast<WeightTables*>(dynamic_shared() + kDenseStages * kStageBytes);
  of_tile.load(masks, tables, first_tile_row, first_tile_column, rows.rows);

  Accumulators acc;
  TileStream<T, kDenseStages> products({rows.x, rows.rows, first_tile_row}, {rows.x, rows.rows, 0}, tile.column, 1,
                                       rows.depth, dynamic_shared());
  products.next(acc, at);
  const HeldRows held(at, masks, first_tile_row, rows.rows);
  RowWords positives, positives_t, extra, extra_t, negatives;
  positives.load(masks.positives, held.mask_rows, masks.stride, word);
  positives_t.load(masks.positives_t ? masks.positives_t : masks.positives, held.mask_rows, masks.stride, word);
  extra.load(masks.extra, held.mask_rows, masks.stride, word);
  extra_t.load(masks.extra_t ? masks.extra_t : masks.extra, held.mask_rows, masks.stride, word);
  negatives.load(masks.negatives, held.negatives_rows, masks.stride, word);
  __syncthreads();  // the buffers of the products become the tile of weights
  constexpr int kChunk = 16 / sizeof(T), kWidth = kTile * sizeof(T);

#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = at.row(m, h);
      const uint32_t others = other_columns(first_tile_row + row, first_column, rows.rows);
      const uint32_t p = positives.at(m, h, at.lane), p_t = positives_t.at(m, h, at.lane);
      const uint32_t q = extra.at(m, h, at.lane), q_t = extra_t.at(m, h, at.lane);
      const uint32_t inside = p | negatives.at(m, h, at.lane);
      const bool any = __ballot_sync(0xffffffffu, (p | p_t | q | q_t) != 0) != 0;  // few pairs are positive
      const float grad_lse_i = of_tile.grad_lse[0][row], lse_i = of_tile.lse[0][row];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float weight[2];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int column = at.column(n, b), bit = column % 32;
          const float z = acc[m][n][2 * h + b] * rows.scale;
          const bool in = masks.everything || (inside >> bit & 1);
          const bool in_t = masks.everything || ((p_t >> bit | of_tile.turned[column][row / 32] >> row % 32) & 1);
          const float row_part = in ? grad_lse_i : 0.0f, column_part = in_t ? of_tile.grad_lse[1][column] : 0.0f;
          float w;
          if (shared_exponential) {
            w = (row_part + column_part) * exp2_fast(z - shift);
          } else {  // an excluded pair's exponential may be infinite
            w = (in ? row_part * exp2_fast(z - lse_i) : 0.0f);
            w += (in_t ? column_part * exp2_fast(z - of_tile.lse[1][column]) : 0.0f);
          }
          if (any) {
            w += p >> bit & 1 ? of_tile.grad_pos[0][row] : 0.0f;
            w += p_t >> bit & 1 ? of_tile.grad_pos[1][column] : 0.0f;
            w += q >> bit & 1 ? of_tile.grad_ext[0][row] : 0.0f;
            w += q_t >> bit & 1 ? of_tile.grad_ext[1][column] : 0.0f;
          }
          weight[b] = others >> bit & 1 ? w : 0.0f;
        }
        const int column = at.column(n, 0);
        unsigned char* chunk = tile_chunk(dynamic_shared(), row, column / kChunk, kWidth);
        store_two(reinterpret_cast<T*>(chunk) + column % kChunk, weight[0], weight[1]);
      }
    }
  __syncthreads();
  for (int e = threadIdx.x; e < kTile * kTile / kChunk; e += kTileThreads) {
    const int row = e / (kTile / kChunk), chunk = e % (kTile / kChunk);
    const int64_t out_row = first_tile_row - first_row + row, column = first_tile_column + chunk * kChunk;
    if (out_row < out_rows && column < out_width)
      *reinterpret_cast<FourFloats*>(out + out_row * out_width + column) =
          *reinterpret_cast<const FourFloats*>(tile_chunk(dynamic_shared(), row, chunk, kWidth));
  }
}

}  // namespace hpk::gpu
