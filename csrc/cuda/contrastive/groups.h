// Launches of the log-sum-exp over groups and of its gradient.
#pragma once

#include "cuda/common/launches.h"

namespace hpk::gpu {

int group_panel();        // rows of a block of the gradient
int group_piece_bytes();  // of a row

template <class T>
struct GroupLaunches {
  // x (rows, depth), columns (count, depth), groups (rows,) and (count,) int32; parts (2, shares, rows), see
  // StatsParts.
  static void contrastive_group_lse(uintptr_t x, int64_t rows, uintptr_t columns, int64_t count, int64_t depth,
                                    uintptr_t row_groups, uintptr_t column_groups, float scale, float first_shift,
                                    int shares, uintptr_t parts, uintptr_t stream);
  // Tables as in GroupTables, of the rows or columns that are anchors, else 0; out (rows, depth), or its parts in fp32:
  // partial (shares, rows, depth).
  static void contrastive_group_grad(uintptr_t x, int64_t rows, uintptr_t columns, int64_t count, int64_t depth,
                                     uintptr_t row_groups, uintptr_t column_groups, float scale, float shift,
                                     uintptr_t row_lse, uintptr_t row_factor, uintptr_t column_lse,
                                     uintptr_t column_factor, int shares, uintptr_t out_scale, uintptr_t out,
                                     uintptr_t partial, uintptr_t stream);
};

}  // namespace hpk::gpu
