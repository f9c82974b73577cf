// Launches of the contrastive kernels. Sizes count rows, columns and elements.
#include "cuda/contrastive/columns.cuh"
#include "cuda/contrastive/contrastive.h"
#include "cuda/contrastive/dense.cuh"

namespace hpk::gpu {
namespace {

// Tiles of `size` rows that cover rows [first, end), the first of them starting at a multiple of `size`.
unsigned tiles_between(int64_t first, int64_t end, int64_t size) {
  return static_cast<unsigned>((end + size - 1) / size - first / size);
}

// The lists, the panels of rows of each, and a third count. Negatives: the rows that share a row of them.
dim3 panels_of_lists(const ContrastiveMasks& masks, Pairs pairs, unsigned z) {
  const int64_t sharing = (masks.anchors + masks.period - 1) / masks.period;
  if (pairs == Pairs::kNegatives)
    return dim3(static_cast<unsigned>(masks.period), tiles_between(0, sharing, kPanel), z);
  return dim3(tiles_between(0, masks.anchors, kPanel), 1, z);
}

template <class T>
unsigned pieces(int64_t depth) {
  return static_cast<unsigned>((depth + kPiece<T> - 1) / kPiece<T>);
}

}  // namespace

void contrastive_turn_negatives(const ContrastiveMasks& masks, int64_t columns, int64_t words, uintptr_t turned,
                                uintptr_t counts, uintptr_t stream) {
  launch(contrastive_turn_negatives_kernel, dim3(tiles_between(0, columns, kTileThreads)), dim3(kTileThreads), 0,
         stream, masks, columns, words, pointer<uint32_t>(turned), pointer<int>(counts));
}

template <class T>
void ContrastiveLaunches<T>::contrastive_stats(uintptr_t x, int64_t streams, int64_t rows, int64_t depth,
                                               const ContrastiveMasks& masks, float scale, float first_shift,
                                               float over_temperature, int shares, uintptr_t parts, uintptr_t stream) {
  const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
  const unsigned panels = tiles_between(masks.first_row, masks.first_row + masks.anchors, kTile);
  launch(contrastive_stats_kernel<T, BitWords>, dim3(panels, shares, static_cast<unsigned>(streams)),
         dim3(kTileThreads), kDenseStatsBytes, stream, job, masks, first_shift,
         StatsParts{pointer<float>(parts), over_temperature});
}

template <class T>
void ContrastiveLaunches<T>::contrastive_weights(uintptr_t x, int64_t rows, int64_t depth,
                                                 const ContrastiveMasks& masks, float scale, float shift,
                                                 const ContrastiveTables& tables, int64_t first_row, int64_t out_rows,
                                                 int64_t out_width, uintptr_t out, uintptr_t stream) {
  const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
  const unsigned tiles = tiles_between(0, rows, kTile) * tiles_between(0, out_rows, kTile);
  launch(contrastive_weights_kernel<T>, dim3(tiles), dim3(kTileThreads), kWeightsBytes, stream, job, masks, tables,
         shift, first_row, out_rows, out_width, pointer<T>(out));
}

template <class T>
void ContrastiveLaunches<T>::contrastive_listed_stats(uintptr_t x, int64_t streams, int64_t rows, int64_t depth,
                                                      const ContrastiveMasks& masks, Pairs pairs, float scale,
                                                      float first_shift, float over_temperature, int part, int shares,
                                                      uintptr_t parts, uintptr_t stream) {
  const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
  launch(contrastive_listed_stats_kernel<T>, panels_of_lists(masks, pairs, static_cast<unsigned>(streams)),
         dim3(kTileThreads), kListedStatsBytes, stream, job, masks, pairs, first_shift,
         StatsParts{pointer<float>(parts), over_temperature}, part, shares);
}

template <class T>
void ContrastiveLaunches<T>::contrastive_listed_grad(uintptr_t x, int64_t rows, int64_t depth,
                                                     const ContrastiveMasks& masks, Pairs pairs, float scale,
                                                     const ContrastiveTables& tables, uintptr_t out, uintptr_t partial,
                                                     bool add, uintptr_t out_scale, uintptr_t slots, int64_t above,
                                                     uintptr_t stream) {
  const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
  const PanelTarget<T> target{pointer<T>(out),
                              pointer<float>(partial),
                              add,
                              pointer<const float>(out_scale),
                              pointer<const int64_t>(slots),
                              above};
  launch(contrastive_listed_grad_kernel<T>, panels_of_lists(masks, pairs, pieces<T>(depth)), dim3(kTileThreads),
         sizeof(ListedPanelMemory<T>), stream, job, masks, tables, pairs, target);
}

template <class T>
void ContrastiveLaunches<T>::contrastive_column_side(uintptr_t x, int64_t rows, int64_t depth,
                                                     const ContrastiveMasks& masks, float scale,
                                                     const ContrastiveTables& tables, const ColumnSlots& slots,
                                                     int shares, uintptr_t workspace, uintptr_t stream) {
  const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
  const dim3 grid(static_cast<unsigned>(masks.period), shares, pieces<T>(depth));
  launch(contrastive_column_side_kernel<T>, grid, dim3(kTileThreads), sizeof(ListedPanelMemory<T>), stream, job, masks,
         tables, slots, pointer<T>(workspace));
}

template <class T>
void ContrastiveLaunches<T>::contrastive_column_sum(uintptr_t workspace, int64_t first_row, int64_t depth,
                                                    const ColumnSlots& slots, int blocks, uintptr_t partial,
                                                    uintptr_t out_scale, uintptr_t out, uintptr_t stream) {
  launch(contrastive_column_sum_kernel<T>, dim3(blocks), dim3(kTileThreads), 0, stream, first_row, depth, slots,
         pointer<const T>(workspace), pointer<const float>(partial), pointer<const float>(out_scale), pointer<T>(out));
}

template struct ContrastiveLaunches<bf16>;
template struct ContrastiveLaunches<fp16>;
template struct ContrastiveLaunches<float>;

}  // namespace hpk::gpu
