// Gradients over lists: a panel of 64 rows owns its sums, W x with W = weights of the pairs, for up to 1 KB of a row.
#pragma once

#include "cuda/contrastive/lists.cuh"

namespace hpk::gpu {

constexpr int kChunkRows = 16;  // of x, in a step of the second product
constexpr int kPieceBytes = 1024;

template <class T>
constexpr int kPiece = int(kPieceBytes / sizeof(T));  // columns of x that a block sums

static_assert(kChunkRows * kPieceBytes >= kPanel * kPanel * 4);  // the logits of a tile fit

template <class T>
struct PanelMemory {
  unsigned char stages[kPanelStages * PanelPlaces::kStageBytes];
  unsigned char chunks[2][kChunkRows * kPieceBytes];
  unsigned char weights[kPanel * kPanel * sizeof(T)];
};

template <class T>
struct ListedPanelMemory : PanelMemory<T> {
  ColumnList list;
  int slots[kPanel];
};

// sums[64 rows][columns first_column ... of x] += W times 64 rows of x, tile after tile. Warp w has the columns
// 16 (8 q + w) ... + 15; sums[m][2 q + n] is a fragment of 16 rows and 8 columns.
template <class T>
class PanelSums {
 public:
  static constexpr int kN = kPiece<T> / 64;

  __device__ PanelSums(PanelMemory<T>& memory, int64_t depth)
      : memory_(memory), depth_(static_cast<int>(depth)), first_column_(blockIdx.z * kPiece<T>) {
    clear();
  }

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sums_[m][n][e] = 0.0f;
  }

  // Two adjacent weights of the tile.
  __device__ void set_weights(int row, int column, float low, float high) {
    constexpr int kChunk = 16 / sizeof(T);
    unsigned char* chunk = tile_chunk(memory_.weights, row, column / kChunk, kPanel * sizeof(T));
    store_two(reinterpret_cast<T*>(chunk) + column % kChunk, low, high);
  }

  // Starts the copies for add(b, first). All threads, after a barrier that follows the last add().
  template <class Rows>
  __device__ void begin(const Rows& b, int first) {
    copy(b, first, 0);
  }

  // Adds the weights, set by all threads, times rows first ... + 63 of b.
  template <class Rows>
  __device__ void add(const Rows& b, int first, const PanelPlaces& at) {
    const int warp = threadIdx.x / 32;
    for (int step = 0; step < kPanel / kChunkRows; ++step) {
      cp_async_wait<0>();
      __syncthreads();
      if (step + 1 < kPanel / kChunkRows) copy(b, first, step + 1);
      unsigned char* chunk = memory_.chunks[step % 2];
      if constexpr (std::is_same_v<T, float>) {
        for (int k = 0; k < kChunkRows; ++k) {
          const int j = step * kChunkRows + k;
          float w[4][2];
#pragma unroll
          for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int row = m * 16 + h * 8 + at.lane / 4;
              w[m][h] = reinterpret_cast<const float*>(tile_chunk(memory_.weights, row, j / 4, kPanel * 4))[j % 4];
            }
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            if (first_column_ + column_of(n, warp) >= depth_) break;  // the same for the whole warp
            const int column = column_of(n, warp) + at.lane % 4 * 2;
            const float2 two =
                load_two(reinterpret_cast<const float*>(tile_chunk(chunk, k, column / 4, kPieceBytes)) + column % 4);
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                sums_[m][n][2 * h] = fmaf(w[m][h], two.x, sums_[m][n][2 * h]);
                sums_[m][n][2 * h + 1] = fmaf(w[m][h], two.y, sums_[m][n][2 * h + 1]);
              }
          }
        }
      } else {
        uint32_t w[4][4];
#pragma unroll
        for (int m = 0; m < 4; ++m)
          ldmatrix_x4(w[m], tile_chunk(memory_.weights, m * 16 + at.lane % 16, step * 2 + at.lane / 16));
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
          const int column = column_of(n, warp);
          if (first_column_ + column >= depth_) break;
          uint32_t four[4];
          ldmatrix_x4_trans(four, tile_chunk(chunk, at.lane % 16, column / 8 + at.lane / 16, kPieceBytes));
          const uint32_t low[2] = {four[0], four[1]}, high[2] = {four[2], four[3]};
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            mma_16816<T>(sums_[m][n], w[m], low);
            mma_16816<T>(sums_[m][n + 1], w[m], high);
          }
        }
      }
    }
  }

  // take(row, column, low, high) for each two adjacent columns of x, to depth.
  template <class Take>
  __device__ void for_each_pair(const PanelPlaces& at, const Take& take) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int column = first_column_ + column_of(n, threadIdx.x / 32) + at.lane % 4 * 2;
      if (column >= depth_) continue;
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          take(m * 16 + h * 8 + at.lane / 4, column, sums_[m][n][2 * h], sums_[m][n][2 * h + 1]);
    }
  }

 private:
  __device__ static int column_of(int n, int warp) { return (n / 2 * 8 + warp) * 16 + n % 2 * 8; }

  template <class Rows>
  __device__ void copy(const Rows& b, int first, int step) {
    constexpr int kChunk = 16 / sizeof(T), kChunks = kPieceBytes / 16;
    for (int e = threadIdx.x; e < kChunkRows * kChunks; e += kTileThreads) {
      const int row = e / kChunks, chunk = e % kChunks, column = first_column_ + chunk * kChunk;
      const bool inside = column < depth_;
      const T* from = b.x + int64_t(b.at(first + step * kChunkRows + row)) * depth_ + (inside ? column : 0);
      cp_async_16(tile_chunk(memory_.chunks[step % 2], row, chunk, kPieceBytes), from, inside);
    }
    cp_async_commit();
  }

  PanelMemory<T>& memory_;
  int depth_, first_column_;
  float sums_[4][kN][4];
};

// The weight of pair (i, j) for logit z; 0 on the diagonal.
__device__ inline float pair_weight(const ContrastiveMasks& masks, const ContrastiveTables& tables, Pairs pairs,
                                    int64_t i, int64_t j, float z) {
  if (i == j) return 0.0f;
  bool in = pairs == Pairs::kNegatives, in_t = pairs == Pairs::kNamed;
  float weight = 0.0f;
  if (!in && !in_t) {
    const bool by_bits = masks.negatives != nullptr;
    in = by_bits && pairs != Pairs::kNamedByBits && bit_of(masks.negatives, masks.negatives_row(i), masks.stride, j);
    in_t = by_bits && bit_of(masks.negatives, masks.negatives_row(j), masks.stride, i);
    if (pairs != Pairs::kNamedByBits) {
      const int64_t row = masks.mask_row(i);
      const bool p = bit_of(masks.positives, row, masks.stride, j);
      const bool p_t = masks.positives_t ? bit_of(masks.positives_t, row, masks.stride, j) : p;
      const bool outside = pairs == Pairs::kPositives;
      in = outside ? p && !in : masks.everything || p || in;
      in_t = outside ? p_t && !in_t : masks.everything || p_t || in_t;
      if (p) weight += tables.grad_pos[i];
      if (p_t) weight += tables.grad_pos[j];
      if (masks.extra) {
        const bool q = bit_of(masks.extra, row, masks.stride, j);
        if (q) weight += tables.grad_ext[i];
        if (masks.extra_t ? bit_of(masks.extra_t, row, masks.stride, j) : q) weight += tables.grad_ext[j];
      }
    }
  }
  if (in) weight += tables.grad_lse[i] * exp2_fast(z - tables.lse[i]);
  if (in_t) weight += tables.grad_lse[j] * exp2_fast(z - tables.lse[j]);
  return weight;
}

// Adds to `sums` the rows b of `tiles` tiles, for each row i of the panel a with the weights weight_of(i, j, z_ij).
template <class T, class A, class B, class Weight>
__device__ inline void add_tiles(PanelSums<T>& sums, PanelMemory<T>& memory, const ContrastiveRows<T>& rows, const A& a,
                                 const B& b, int tiles, const PanelPlaces& at, const Weight& weight_of) {
  TileStream<T, kPanelStages, PanelPlaces, A, B> products(a, b, 0, tiles, rows.depth, memory.stages);
  for (int tile = 0; tile < tiles; ++tile) {
    PanelPlaces::Accumulators acc;
    products.next(acc, at);
    sums.begin(b, tile * kPanel);
    // The logits change hands: the sums leave no registers for a thread to make the weights of its own places, and a
    // warp that works on one row reads neighbouring bits.
    unsigned char* logits = memory.chunks[1];  // unused until add() waits for all threads
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int row = at.row(0, h), column = at.column(n, 0);
        store_two(reinterpret_cast<float*>(tile_chunk(logits, row, column / 4, kPanel * 4)) + column % 4,
                  acc[0][n][2 * h] * rows.scale, acc[0][n][2 * h + 1] * rows.scale);
      }
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < kPanel * kPanel / 2; e += kTileThreads) {
      const int row = e / (kPanel / 2), column = e % (kPanel / 2) * 2, place = tile * kPanel + column;
      const float2 z =
          load_two(reinterpret_cast<const float*>(tile_chunk(logits, row, column / 4, kPanel * 4)) + column % 4);
      const int i = a.at(row), j = b.at(place), next = b.at(place + 1);
      const bool first_there = row < a.count && place < b.count, second_there = row < a.count && place + 1 < b.count;
      sums.set_weights(row, column, first_there ? weight_of(i, j, z.x) : 0.0f,
                       second_there ? weight_of(i, next, z.y) : 0.0f);
    }
    sums.add(b, tile * kPanel, at);
  }
}

// Where the sums of a panel go, rows counted from the first anchor: out = out_scale sums in x's type or, where out is
// null, partial = sums or (add) partial += sums. With `slots` nothing is done unless *slots > above.
template <class T>
struct PanelTarget {
  T* out;
  float* partial;
  bool add;
  const float* out_scale;
  const int64_t* slots;
  int64_t above;
};

// Block (x, y, z): list x, panel y of its rows, piece z of the columns of x; one stream.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    contrastive_listed_grad_kernel(ContrastiveRows<T> rows, ContrastiveMasks masks, ContrastiveTables tables,
                                   Pairs pairs, PanelTarget<T> target) {
  if (target.slots && *target.slots <= target.above) return;
  const SteppedRows<T> panel = panel_of_block(rows.x, masks, pairs);
  if (panel.count <= 0) return;
  auto& memory = *reinterpret_cast<ListedPanelMemory<T>*>(dynamic_shared());
  PanelSums<T> sums(memory, rows.depth);
  const PanelPlaces at;
  const auto weight_of = [&](int i, int j, float z) { return pair_weight(masks, tables, pairs, i, j, z); };
  ListWalk<ColumnsOfPanel<T>> walk(memory.list, {masks, panel, pairs, rows.rows}, 0, (rows.rows + 31) / 32);
  while (const int tiles = walk.next()) {
    const ListedRows<T> columns{rows.x, memory.list.columns, walk.held()};
    add_tiles(sums, memory, rows, panel, columns, tiles, at, weight_of);
  }

  const float out_scale = *target.out_scale;
  sums.for_each_pair(at, [&](int row, int column, float low, float high) {
    if (row >= panel.count) return;
    const int64_t to = (panel.at(row) - masks.first_row) * rows.depth + column;
    if (target.out) {
      store_two(target.out + to, low * out_scale, high * out_scale);
    } else {
      const float2 before = target.add ? load_two(target.partial + to) : float2{0.0f, 0.0f};
      store_two(target.partial + to, before.x + low, before.y + high);
    }
  });
}

}  // namespace hpk::gpu
