// Launches of the kernels that normalise rows.
#pragma once

#include "cuda/common/launches.h"

namespace hpk::gpu {

template <class T>
struct NormalizeLaunches {
  static void normalize_rows(uintptr_t x, int64_t rows, int width, uintptr_t out, uintptr_t stream);
  static void normalize_rows_grad(uintptr_t grad, uintptr_t x, int64_t rows, int width, uintptr_t out,
                                  uintptr_t stream);
};

}  // namespace hpk::gpu
