// Lists of columns, made from bits by the block that walks them: nothing is stored, nothing can overflow.
#pragma once

#include "cuda/contrastive/masks.cuh"

namespace hpk::gpu {

constexpr int kPanel = 64;  // rows of a panel, and columns of a tile of its list
constexpr int kPanelStages = 2;
using PanelPlaces = TilePlaces<4, 2, 1, 4>;
static_assert(PanelPlaces::kRows == kPanel && PanelPlaces::kColumns == kPanel);

// first, first + step, ...: the rows of a panel. As the operand of a TileStream rows past the last repeat it.
template <class T>
struct SteppedRows {
  const T* x;
  int first, step, count;
  __device__ int at(int r) const { return first + step * (r < count ? r : count - 1); }
};

// The columns of a list, in shared memory.
template <class T>
struct ListedRows {
  const T* x;
  const int* list;
  int count;
  __device__ int at(int r) const { return list[r < count ? r : count - 1]; }
};

// Word `word` of the columns of a list is words(word, 0) | words(word, 1): two threads share a word.

struct NegativesRow {  // row `row` of M, within the columns [begin, end)
  const ContrastiveMasks& masks;
  int64_t row, begin, end;

  __device__ uint32_t operator()(int64_t word, int part) const {
    if (part) return 0;
    uint32_t bits = masks.negatives[row * masks.stride + word];
    if (word == begin / 32) bits &= 0xffffffffu << (begin % 32);
    if (word == end / 32) bits &= (1u << (end % 32)) - 1u;
    return bits;
  }
};

template <class T>
struct ColumnsOfPanel {  // those of any positive of the panel, or of its row of M, or all
  const ContrastiveMasks& masks;
  const SteppedRows<T>& panel;
  Pairs pairs;
  int64_t columns;

  __device__ uint32_t operator()(int64_t word, int part) const {
    if (pairs == Pairs::kNegatives) return NegativesRow{masks, blockIdx.x, 0, columns}(word, part);
    if (pairs != Pairs::kPositives) {
      const int64_t left = columns - word * 32;
      return left >= 32 ? 0xffffffffu : (1u << left) - 1u;
    }
    const uint32_t* const of_pairs[4] = {masks.positives, masks.positives_t, masks.extra, masks.extra_t};
    uint32_t bits = 0;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      if (of_pairs[m] == nullptr) continue;
      const uint32_t* of_row = of_pairs[m] + (panel.first - masks.first_row) * masks.stride + word;
#pragma unroll 4
      for (int r = part; r < panel.count; r += 2)
        bits |= of_row[r * masks.stride];
    }
    return bits;
  }
};

constexpr int kListWords = kTileThreads / 2;  // taken at a time
constexpr int kListRoom = kListWords * 32 + kPanel;

struct ColumnList {
  int columns[kListRoom];
  int of_warp[kTileThreads / 32];
};

// The set bits of the words [first_word, end_word) of a union, in order, as many at a time as the list holds.
template <class Union>
class ListWalk {
 public:
  __device__ ListWalk(ColumnList& list, const Union& words, int64_t first_word, int64_t end_word)
      : list_(list), words_(words), word_(first_word), end_(end_word) {}

  // Fills the list again. Returns the number of tiles of kPanel columns: all are full until the last call. 0: no more.
  // Every thread of the block takes part, and has left the tiles of the last call.
  __device__ int next() {
    const int rest = held_ - tiles_ * kPanel;  // less than a tile, or negative after the last
    __syncthreads();
    const int kept = int(threadIdx.x) < rest ? list_.columns[tiles_ * kPanel + threadIdx.x] : 0;
    __syncthreads();
    if (int(threadIdx.x) < rest) list_.columns[threadIdx.x] = kept;
    held_ = rest > 0 ? rest : 0;
    while (word_ < end_ && take_words()) {
    }
    tiles_ = word_ < end_ ? held_ / kPanel : (held_ + kPanel - 1) / kPanel;
    __syncthreads();
    return tiles_;
  }

  __device__ int held() const { return held_; }

 private:
  // Lists the next kListWords words; false, and nothing is done, if there is no room: then more than a tile is held.
  __device__ bool take_words() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = threadIdx.x % 2;
    const int64_t word = word_ + threadIdx.x / 2;
    uint32_t bits = word < end_ ? words_(word, part) : 0;
    bits |= __shfl_xor_sync(0xffffffffu, bits, 1);
    bits &= part ? 0xffff0000u : 0x0000ffffu;  // each of the two lists half of the word
    int before = __popc(bits);
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, distance);
      if (lane >= distance) before += other;
    }
    if (lane == 31) list_.of_warp[warp] = before;
    before -= __popc(bits);
    __syncthreads();
    int total = 0;
    for (int w = 0; w < kTileThreads / 32; ++w) {
      if (w == warp) before += total;
      total += list_.of_warp[w];
    }
    __syncthreads();  // the counts of the warps are read
    if (held_ + total > kListRoom) return false;
    for (int at = held_ + before; bits; bits &= bits - 1)
      list_.columns[at++] = static_cast<int>(word * 32) + __ffs(bits) - 1;
    held_ += total;
    word_ += kListWords;
    return true;
  }

  ColumnList& list_;
  const Union words_;
  int64_t word_, end_;
  int held_ = 0, tiles_ = 0;
};

__device__ inline bool bit_of(const uint32_t* bits, int64_t row, int64_t stride, int64_t j) {
  return bits[row * stride + (j >> 5)] >> (j & 31) & 1;
}

// The panel of block x, y: the anchors 64 x ... + 63 from the first on, or 64 y ... of those that use row x of the
// negatives. Its count may be 0 or less.
template <class T>
__device__ inline SteppedRows<T> panel_of_block(const T* x, const ContrastiveMasks& masks, Pairs pairs) {
  const bool of_negatives = pairs == Pairs::kNegatives;
  const int64_t begin = masks.first_row, end = begin + masks.anchors;
  const int64_t step = of_negatives ? masks.period : 1;
  int64_t first = begin + int64_t(blockIdx.x) * kPanel;
  if (of_negatives)
    first = begin + (blockIdx.x + masks.period - begin % masks.period) % masks.period + blockIdx.y * kPanel * step;
  const int64_t count = (end - first + step - 1) / step;
  return {x, static_cast<int>(first), static_cast<int>(step), static_cast<int>(count < kPanel ? count : kPanel)};
}

constexpr int kListedStatsBytes = kPanelStages * PanelPlaces::kStageBytes + sizeof(ColumnList);

// Block (x, y, z): list x, panel y of its rows, stream z; `part` of `shares` parts. kNegatives: the sums over M's
// columns; kPositives: those of the positives, without M's columns in the denominator.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    contrastive_listed_stats_kernel(ContrastiveRows<T> rows, ContrastiveMasks masks, Pairs pairs, float first_shift,
                                    StatsParts parts, int part, int shares) {
  const T* x = rows.x + blockIdx.z * rows.rows * rows.depth;
  const SteppedRows<T> panel = panel_of_block(x, masks, pairs);
  if (panel.count <= 0) return;
  RowStats sums[2] = {{{0.0f, first_shift}, 0.0f, 0.0f}, {{0.0f, first_shift}, 0.0f, 0.0f}};
  const bool fixed_shift = first_shift != -INFINITY;
  const PanelPlaces at;
  auto& list = *reinterpret_cast<ColumnList*>(dynamic_shared() + kPanelStages * PanelPlaces::kStageBytes);
  ListWalk<ColumnsOfPanel<T>> walk(list, {masks, panel, pairs, rows.rows}, 0, (rows.rows + 31) / 32);
  while (const int tiles = walk.next()) {
    const ListedRows<T> columns{panel.x, list.columns, walk.held()};
    TileStream<T, kPanelStages, PanelPlaces, SteppedRows<T>, ListedRows<T>> products(panel, columns, 0, tiles,
                                                                                     rows.depth, dynamic_shared());
    for (int tile = 0; tile < tiles; ++tile) {
      PanelPlaces::Accumulators acc;
      products.next(acc, at);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = at.row(0, h);
        const int64_t i = panel.at(row), mask_row = masks.mask_row(i);
        const int64_t negatives_row = masks.negatives ? masks.negatives_row(i) : 0;
        uint32_t inside = 0;
        float largest = -INFINITY;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int slot = tile * kPanel + at.column(e / 2, e % 2);
          if (row >= panel.count || slot >= columns.count) continue;
          const int64_t j = list.columns[slot];
          if (i == j) continue;
          const float s = acc[0][e / 2][2 * h + e % 2];
          bool in = true;
          if (pairs == Pairs::kPositives) {
            in = bit_of(masks.positives, mask_row, masks.stride, j);
            if (in) sums[h].pos += s;
            if (masks.extra && bit_of(masks.extra, mask_row, masks.stride, j)) sums[h].ext += s;
            if (in && masks.negatives) in = !bit_of(masks.negatives, negatives_row, masks.stride, j);
          }
          if (!in) continue;
          inside |= 1u << e;
          largest = fmaxf(largest, s * rows.scale);
        }
        ShiftedSum& denominator = sums[h].denominator;
        if (!fixed_shift) denominator.raise(largest);
        float total = 0.0f;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float p = exp2_fast(fmaf(acc[0][e / 2][2 * h + e % 2], rows.scale, -denominator.shift));
          total += inside >> e & 1 ? p : 0.0f;
        }
        denominator.total += total;
      }
    }
  }

  auto of_warp = reinterpret_cast<RowStats(*)[kPanel]>(dynamic_shared());  // the walk ends in a barrier
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    RowStats row = sums[h];
    for (int mask = 1; mask <= 2; mask *= 2)
      row.add({{__shfl_xor_sync(0xffffffffu, row.denominator.total, mask),
                __shfl_xor_sync(0xffffffffu, row.denominator.shift, mask)},
               __shfl_xor_sync(0xffffffffu, row.pos, mask),
               __shfl_xor_sync(0xffffffffu, row.ext, mask)});
    if (at.lane % 4 == 0) of_warp[at.warp_column][at.row(0, h)] = row;
  }
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= panel.count) return;
  RowStats sum = of_warp[0][row];
  sum.add(of_warp[1][row]);
  parts.store<true>(shares, part, gridDim.z, blockIdx.z, masks.anchors, panel.at(row) - masks.first_row, sum);
}

}  // namespace hpk::gpu
