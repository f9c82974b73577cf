// Launches of the log-sum-exp over groups and of its gradient, and their Python functions.
#include "cuda/common/bindings.h"
#include "cuda/contrastive/groups.cuh"
#include "cuda/common/vector.cuh"

namespace hpk::gpu {
namespace {

template <class T>
void bind(py::module_& m, const std::string& suffix) {
  // x (rows, depth), columns (count, depth), groups (rows,) and (count,) int32; parts (2, shares, rows), see StatsParts.
  m.def(("contrastive_group_lse_" + suffix).c_str(),
        [](uintptr_t x, int64_t rows, uintptr_t columns, int64_t count, int64_t depth, uintptr_t row_groups,
           uintptr_t column_groups, float scale, float first_shift, int shares, uintptr_t parts, uintptr_t stream) {
          const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
          const GroupPairs<T> pairs{pointer<const T>(columns), count, rows, pointer<const int>(row_groups),
                                    pointer<const int>(column_groups)};
          launch(contrastive_stats_kernel<T, GroupWords<T>>, dim3(blocks_of(rows, kTile), shares), dim3(kTileThreads),
                 kDenseStatsBytes, stream, job, pairs, first_shift, StatsParts{pointer<float>(parts), 1.0f});
        });
  // Tables as in GroupTables, of the rows or columns that are anchors, else 0; out (rows, depth), or its parts in fp32:
  // partial (shares, rows, depth).
  m.def(("contrastive_group_grad_" + suffix).c_str(),
        [](uintptr_t x, int64_t rows, uintptr_t columns, int64_t count, int64_t depth, uintptr_t row_groups,
           uintptr_t column_groups, float scale, float shift, uintptr_t row_lse, uintptr_t row_factor,
           uintptr_t column_lse, uintptr_t column_factor, int shares, uintptr_t out_scale, uintptr_t out,
           uintptr_t partial, uintptr_t stream) {
          const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
          const GroupPairs<T> pairs{pointer<const T>(columns), count, rows, pointer<const int>(row_groups),
                                    pointer<const int>(column_groups)};
          const GroupTables tables{pointer<const float>(row_lse), pointer<const float>(row_factor),
                                   pointer<const float>(column_lse), pointer<const float>(column_factor), shift};
          const dim3 grid(blocks_of(rows, kPanel), shares, blocks_of(depth, kPiece<T>));
          launch(contrastive_group_grad_kernel<T>, grid, dim3(kTileThreads), sizeof(PanelMemory<T>), stream, job, pairs,
                 tables, pointer<const float>(out_scale), pointer<T>(out), pointer<float>(partial));
        });
}

}  // namespace
}  // namespace hpk::gpu

HPK_BIND_CUDA(contrastive_groups) {
  m.attr("group_panel") = hpk::gpu::kPanel;              // rows of a block of the gradient
  m.attr("group_piece_bytes") = hpk::gpu::kPieceBytes;  // of a row
  hpk::gpu::bind<hpk::gpu::bf16>(m, "bf16");
  hpk::gpu::bind<hpk::gpu::fp16>(m, "f16");
  hpk::gpu::bind<float>(m, "f32");
}
