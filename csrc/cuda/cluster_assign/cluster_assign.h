// Launches of the assignment to clusters.
#pragma once

#include "cuda/common/launches.h"

namespace hpk::gpu {

int cluster_directions();  // of a tile
int cluster_run();
// starts (clusters + 1,): the first place of each label in `ordered`; sums (clusters, depth) fp32.
void cluster_total(uintptr_t parts, uintptr_t starts, int64_t clusters, int64_t depth, uintptr_t sums,
                   uintptr_t stream);

template <class T>
struct ClusterLaunches {
  // x (rows, depth) of whole 16-byte chunks; the others as in ClusterJob; labels and distances (rows,).
  static void cluster_assign(uintptr_t x, int64_t rows, int64_t depth, uintptr_t directions, uintptr_t bias,
                             uintptr_t centroids, int tiles, uintptr_t labels, uintptr_t distances, uintptr_t stream);
  // order, ordered (rows,) int64 and int32: the rows sorted by label; parts (ceil(rows / 128) + clusters - 1, depth).
  static void cluster_sum(uintptr_t x, int64_t rows, int64_t depth, uintptr_t order, uintptr_t ordered, uintptr_t parts,
                          uintptr_t stream);
};

}  // namespace hpk::gpu
