// The nearest centroid of each row, and the sums and counts of each cluster. See hpkernels/ops/cluster_assign.
#pragma once

#include <cstdint>

#include "cpu/runtime/isa.h"

namespace hpk {

template <class T>
struct ClusterArgs {
  const T* x;  // (rows, depth)
  int64_t rows, depth;
  const T *centroids, *directions;  // (clusters, depth)
  const T* bias;                    // (clusters)
  int64_t clusters;
  int64_t* labels;  // (rows): the lowest k of the largest <x_i, directions_k> + bias_k
  T* distances;     // (rows): |x_i - centroids_label|^2
  double* sums;     // (clusters, depth), added to
  int64_t* counts;  // (clusters), added to
  int threads;
};

// Returns whether all distances are finite.
#define HPK_CLUSTER_ASSIGN(T) bool cluster_assign(const ClusterArgs<T>& args);

}  // namespace hpk

HPK_DECLARE(HPK_CLUSTER_ASSIGN(float) HPK_CLUSTER_ASSIGN(double))
