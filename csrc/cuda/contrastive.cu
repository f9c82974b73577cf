// Launches of the contrastive kernels, and their Python functions. Sizes count rows, columns and elements.
#include "bindings.h"
#include "contrastive_dense.cuh"

namespace hpk::gpu {
namespace {

// Tiles of `size` rows that cover rows [first, end), the first of them starting at a multiple of `size`.
unsigned tiles_between(int64_t first, int64_t end, int64_t size) {
  return static_cast<unsigned>((end + size - 1) / size - first / size);
}

template <class T>
void bind(py::module_& m, const std::string& suffix) {
  // x (streams, rows, depth); parts (4, shares, streams, anchors), see StatsParts.
  m.def(("contrastive_stats_" + suffix).c_str(),
        [](uintptr_t x, int64_t streams, int64_t rows, int64_t depth, const ContrastiveMasks& masks, float scale,
           float first_shift, float over_temperature, int shares, uintptr_t parts, uintptr_t stream) {
          const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
          const unsigned panels = tiles_between(masks.first_row, masks.first_row + masks.anchors, kTile);
          launch(contrastive_stats_kernel<T>, dim3(panels, shares, static_cast<unsigned>(streams)), dim3(kTileThreads),
                 kDenseStatsBytes, stream, job, masks, first_shift,
                 StatsParts{pointer<float>(parts), over_temperature});
        });
  // x (rows, depth), tables (rows,), out (out_rows, out_width) for the rows from first_row on; see the kernel.
  m.def(("contrastive_weights_" + suffix).c_str(),
        [](uintptr_t x, int64_t rows, int64_t depth, const ContrastiveMasks& masks, float scale, float shift,
           const ContrastiveTables& tables, int64_t first_row, int64_t out_rows, int64_t out_width, uintptr_t out,
           uintptr_t stream) {
          const ContrastiveRows<T> job{pointer<const T>(x), rows, depth, scale};
          const dim3 grid(tiles_between(0, rows, kTile), tiles_between(0, out_rows, kTile));
          launch(contrastive_weights_kernel<T>, grid, dim3(kTileThreads), kWeightsBytes, stream, job, masks,
                 tables, shift, first_row, out_rows, out_width, pointer<T>(out));
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
  bind<bf16>(m, "bf16");
  bind<fp16>(m, "f16");
  bind<float>(m, "f32");
}
