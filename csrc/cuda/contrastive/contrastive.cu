// Launches of the contrastive kernels, and their Python functions. Sizes count rows, columns and elements.
#include "cuda/common/bindings.h"
#include "cuda/contrastive/columns.cuh"
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

template <class T>
void bind(py::module_& m, const std::string& suffix) {
  // x (streams, rows, depth); parts (4, shares, streams, anchors), see StatsParts.
  m.def(("contrastive_stats_" + suffix).c_str(),
        [](uintptr_t x, int64_t streams, int64_t rows, int64_t depth, const ContrastiveMasks& masks, float scale,
           float first_shift, float over_temperature, int shares, uintptr_t parts, uintptr_t stream) {
          const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
          const unsigned panels = tiles_between(masks.first_row, masks.first_row + masks.anchors, kTile);
          launch(contrastive_stats_kernel<T, BitWords>, dim3(panels, shares, static_cast<unsigned>(streams)), dim3(kTileThreads),
                 kDenseStatsBytes, stream, job, masks, first_shift,
                 StatsParts{pointer<float>(parts), over_temperature});
        });
  // x (rows, depth), tables (rows,), out (out_rows, out_width) for the rows from first_row on; see the kernel.
  m.def(("contrastive_weights_" + suffix).c_str(),
        [](uintptr_t x, int64_t rows, int64_t depth, const ContrastiveMasks& masks, float scale, float shift,
           const ContrastiveTables& tables, int64_t first_row, int64_t out_rows, int64_t out_width, uintptr_t out,
           uintptr_t stream) {
          const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
          const unsigned tiles = tiles_between(0, rows, kTile) * tiles_between(0, out_rows, kTile);
          launch(contrastive_weights_kernel<T>, dim3(tiles), dim3(kTileThreads), kWeightsBytes, stream, job, masks,
                 tables, shift, first_row, out_rows, out_width, pointer<T>(out));
        });
  // The same for a family of lists: part `part` of `shares`.
  m.def(("contrastive_listed_stats_" + suffix).c_str(),
        [](uintptr_t x, int64_t streams, int64_t rows, int64_t depth, const ContrastiveMasks& masks, Pairs pairs,
           float scale, float first_shift, float over_temperature, int part, int shares, uintptr_t parts,
           uintptr_t stream) {
          const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
          launch(contrastive_listed_stats_kernel<T>,
                 panels_of_lists(masks, pairs, static_cast<unsigned>(streams)), dim3(kTileThreads),
                 kListedStatsBytes, stream, job, masks, pairs, first_shift,
                 StatsParts{pointer<float>(parts), over_temperature}, part, shares);
        });
  // x (rows, depth), tables (rows,); out (anchors, depth), or partial (anchors, depth) fp32; see PanelTarget.
  m.def(("contrastive_listed_grad_" + suffix).c_str(),
        [](uintptr_t x, int64_t rows, int64_t depth, const ContrastiveMasks& masks, Pairs pairs, float scale,
           const ContrastiveTables& tables, uintptr_t out, uintptr_t partial, bool add, uintptr_t out_scale,
           uintptr_t slots, int64_t above, uintptr_t stream) {
          const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
          const PanelTarget<T> target{pointer<T>(out),   pointer<float>(partial),
                                      add,               pointer<const float>(out_scale),
                                      pointer<const int64_t>(slots), above};
          launch(contrastive_listed_grad_kernel<T>, panels_of_lists(masks, pairs, pieces<T>(depth)),
                 dim3(kTileThreads), sizeof(ListedPanelMemory<T>), stream, job, masks, tables, pairs, target);
        });
  m.def(("contrastive_column_side_" + suffix).c_str(),
        [](uintptr_t x, int64_t rows, int64_t depth, const ContrastiveMasks& masks, float scale,
           const ContrastiveTables& tables, const ColumnSlots& slots, int shares, uintptr_t workspace,
           uintptr_t stream) {
          const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
          const dim3 grid(static_cast<unsigned>(masks.period), shares, pieces<T>(depth));
          launch(contrastive_column_side_kernel<T>, grid, dim3(kTileThreads), sizeof(ListedPanelMemory<T>), stream, job,
                 masks, tables, slots, pointer<T>(workspace));
        });
  m.def(("contrastive_column_sum_" + suffix).c_str(),
        [](uintptr_t workspace, int64_t first_row, int64_t depth, const ColumnSlots& slots, int blocks,
           uintptr_t partial, uintptr_t out_scale, uintptr_t out, uintptr_t stream) {
          launch(contrastive_column_sum_kernel<T>, dim3(blocks), dim3(kTileThreads), 0, stream, first_row, depth, slots,
                 pointer<const T>(workspace), pointer<const float>(partial), pointer<const float>(out_scale),
                 pointer<T>(out));
        });
}

}  // namespace
}  // namespace hpk::gpu

HPK_BIND_CUDA(contrastive) {
  using namespace hpk::gpu;
  py::class_<ContrastiveMasks>(m, "ContrastiveMasks")
      .def(py::init([](uintptr_t positives, uintptr_t positives_t, uintptr_t extra, uintptr_t extra_t,
                       uintptr_t negatives, int64_t stride, int64_t period, int64_t first_row, int64_t anchors,
                       bool everything) {
        return ContrastiveMasks{pointer<const uint32_t>(positives), pointer<const uint32_t>(positives_t),
                                pointer<const uint32_t>(extra),     pointer<const uint32_t>(extra_t),
                                pointer<const uint32_t>(negatives), stride, period, first_row, anchors, everything};
      }));
  py::class_<ContrastiveTables>(m, "ContrastiveTables")
      .def(py::init([](uintptr_t lse, uintptr_t grad_lse, uintptr_t grad_pos, uintptr_t grad_ext) {
        return ContrastiveTables{pointer<const float>(lse), pointer<const float>(grad_lse),
                                 pointer<const float>(grad_pos), pointer<const float>(grad_ext)};
      }));
  py::class_<ColumnSlots>(m, "ColumnSlots")
      .def(py::init([](uintptr_t turned, int64_t words, uintptr_t starts, uintptr_t window, int64_t columns,
                       int64_t capacity) {
        return ColumnSlots{pointer<const uint32_t>(turned), words,   pointer<const int64_t>(starts),
                           pointer<const int>(window),      columns, capacity};
      }));
  py::enum_<Pairs>(m, "ContrastivePairs")
      .value("all", Pairs::kAll)
      .value("positives", Pairs::kPositives)
      .value("negatives", Pairs::kNegatives)
      .value("named_by_bits", Pairs::kNamedByBits);
  // turned (columns, words), counts (columns,) int32.
  m.def("contrastive_turn_negatives", [](const ContrastiveMasks& masks, int64_t columns, int64_t words,
                                         uintptr_t turned, uintptr_t counts, uintptr_t stream) {
    launch(contrastive_turn_negatives_kernel, dim3(tiles_between(0, columns, kTileThreads)), dim3(kTileThreads), 0,
           stream, masks, columns, words, pointer<uint32_t>(turned), pointer<int>(counts));
  });
  bind<bf16>(m, "bf16");
  bind<fp16>(m, "f16");
  bind<float>(m, "f32");
}
