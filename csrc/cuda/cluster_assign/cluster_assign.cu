// Launches of the assignment to clusters, and their Python functions.
#include "cuda/common/bindings.h"
#include "cuda/cluster_assign/cluster_assign.cuh"

namespace hpk::gpu {
namespace {

template <class T>
void bind(py::module_& m, const std::string& suffix) {
  // x (rows, depth) of whole 16-byte chunks; the others as in ClusterJob; labels and distances (rows,).
  m.def(("cluster_assign_" + suffix).c_str(),
        [](uintptr_t x, int64_t rows, int64_t depth, uintptr_t directions, uintptr_t bias, uintptr_t centroids,
           int tiles, uintptr_t labels, uintptr_t distances, uintptr_t stream) {
          const ClusterJob<T> job{pointer<const T>(x),
                                  pointer<const T>(directions),
                                  pointer<const float>(bias),
                                  pointer<const float>(centroids),
                                  rows,
                                  depth,
                                  tiles};
          launch(cluster_assign_kernel<T>, dim3(blocks_of(rows, ScorePlaces<T>::kRows)), dim3(kTileThreads),
                 kAssignBytes<T>, stream, job, pointer<int64_t>(labels), pointer<float>(distances));
        });
  // order, ordered (rows,) int64 and int32: the rows sorted by label; parts (ceil(rows / 128) + clusters - 1, depth).
  m.def(("cluster_sum_" + suffix).c_str(),
        [](uintptr_t x, int64_t rows, int64_t depth, uintptr_t order, uintptr_t ordered, uintptr_t parts,
           uintptr_t stream) {
          const dim3 grid(blocks_of(rows, kRun * (kWarpThreads / 32)), blocks_of(depth, 32 * kVector<T>));
          launch(cluster_sum_kernel<T>, grid, dim3(kWarpThreads), 0, stream, pointer<const T>(x), rows, depth,
                 pointer<const int64_t>(order), pointer<const int>(ordered), pointer<float>(parts));
        });
}

}  // namespace
}  // namespace hpk::gpu

HPK_BIND_CUDA(cluster_assign) {
  using namespace hpk::gpu;
  m.attr("cluster_directions") = ScorePlaces<float>::kColumns;  // of a tile
  m.attr("cluster_run") = kRun;
  // starts (clusters + 1,): the first place of each label in `ordered`; sums (clusters, depth) fp32.
  m.def("cluster_total", [](uintptr_t parts, uintptr_t starts, int64_t clusters, int64_t depth, uintptr_t sums,
                            uintptr_t stream) {
    const dim3 grid(static_cast<unsigned>(clusters), blocks_of(depth, 32));
    launch(cluster_total_kernel, grid, dim3(kWarpThreads), kWarpThreads * sizeof(double), stream,
           pointer<const float>(parts), pointer<const int64_t>(starts), depth, pointer<float>(sums));
  });
  bind<bf16>(m, "bf16");
  bind<fp16>(m, "f16");
  bind<float>(m, "f32");
}
