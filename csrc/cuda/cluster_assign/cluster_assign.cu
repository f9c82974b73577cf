// Launches of the assignment to clusters.
#include "cuda/cluster_assign/cluster_assign.cuh"
#include "cuda/cluster_assign/cluster_assign.h"

namespace hpk::gpu {

int cluster_directions() { return ScorePlaces<float>::kColumns; }

int cluster_run() { return kRun; }

void cluster_total(uintptr_t parts, uintptr_t starts, int64_t clusters, int64_t depth, uintptr_t sums,
                   uintptr_t stream) {
  const dim3 grid(static_cast<unsigned>(clusters), blocks_of(depth, 32));
  launch(cluster_total_kernel, grid, dim3(kWarpThreads), kWarpThreads * sizeof(double), stream,
         pointer<const float>(parts), pointer<const int64_t>(starts), depth, pointer<float>(sums));
}

template <class T>
void ClusterLaunches<T>::cluster_assign(uintptr_t x, int64_t rows, int64_t depth, uintptr_t directions, uintptr_t bias,
                                        uintptr_t centroids, int tiles, uintptr_t labels, uintptr_t distances,
                                        uintptr_t stream) {
  const ClusterJob<T> job{pointer<const T>(x),
                          pointer<const T>(directions),
                          pointer<const float>(bias),
                          pointer<const float>(centroids),
                          rows,
                          depth,
                          tiles};
  launch(cluster_assign_kernel<T>, dim3(blocks_of(rows, ScorePlaces<T>::kRows)), dim3(kTileThreads), kAssignBytes<T>,
         stream, job, pointer<int64_t>(labels), pointer<float>(distances));
}

template <class T>
void ClusterLaunches<T>::cluster_sum(uintptr_t x, int64_t rows, int64_t depth, uintptr_t order, uintptr_t ordered,
                                     uintptr_t parts, uintptr_t stream) {
  const dim3 grid(blocks_of(rows, kRun * (kWarpThreads / 32)), blocks_of(depth, 32 * kVector<T>));
  launch(cluster_sum_kernel<T>, grid, dim3(kWarpThreads), 0, stream, pointer<const T>(x), rows, depth,
         pointer<const int64_t>(order), pointer<const int>(ordered), pointer<float>(parts));
}

template struct ClusterLaunches<bf16>;
template struct ClusterLaunches<fp16>;
template struct ClusterLaunches<float>;

}  // namespace hpk::gpu
