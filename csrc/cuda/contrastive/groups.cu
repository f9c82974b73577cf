// Launches of the log-sum-exp over groups and of its gradient.
#include "cuda/common/vector.cuh"
#include "cuda/contrastive/groups.cuh"
#include "cuda/contrastive/groups.h"

namespace hpk::gpu {

int group_panel() { return kPanel; }

int group_piece_bytes() { return kPieceBytes; }

template <class T>
void GroupLaunches<T>::contrastive_group_lse(uintptr_t x, int64_t rows, uintptr_t columns, int64_t count, int64_t depth,
                                             uintptr_t row_groups, uintptr_t column_groups, float scale,
                                             float first_shift, int shares, uintptr_t parts, uintptr_t stream) {
  const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
  const GroupPairs<T> pairs{pointer<const T>(columns), count, rows, pointer<const int>(row_groups),
                            pointer<const int>(column_groups)};
  launch(contrastive_stats_kernel<T, GroupWords<T>>, dim3(blocks_of(rows, kTile), shares), dim3(kTileThreads),
         kDenseStatsBytes, stream, job, pairs, first_shift, StatsParts{pointer<float>(parts), 1.0f});
}

template <class T>
void GroupLaunches<T>::contrastive_group_grad(uintptr_t x, int64_t rows, uintptr_t columns, int64_t count,
                                              int64_t depth, uintptr_t row_groups, uintptr_t column_groups, float scale,
                                              float shift, uintptr_t row_lse, uintptr_t row_factor,
                                              uintptr_t column_lse, uintptr_t column_factor, int shares,
                                              uintptr_t out_scale, uintptr_t out, uintptr_t partial, uintptr_t stream) {
  const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
  const GroupPairs<T> pairs{pointer<const T>(columns), count, rows, pointer<const int>(row_groups),
                            pointer<const int>(column_groups)};
  const GroupTables tables{pointer<const float>(row_lse), pointer<const float>(row_factor),
                           pointer<const float>(column_lse), pointer<const float>(column_factor), shift};
  const dim3 grid(blocks_of(rows, kPanel), shares, blocks_of(depth, kPiece<T>));
  launch(contrastive_group_grad_kernel<T>, grid, dim3(kTileThreads), sizeof(PanelMemory<T>), stream, job, pairs, tables,
         pointer<const float>(out_scale), pointer<T>(out), pointer<float>(partial));
}

template struct GroupLaunches<bf16>;
template struct GroupLaunches<fp16>;
template struct GroupLaunches<float>;

}  // namespace hpk::gpu
