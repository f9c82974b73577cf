// Launches of the search kernels.
#pragma once

#include "cuda/common/launches.h"

namespace hpk::gpu {

template <class T>
struct SearchLaunches {
  // bits (rows, 4 ceil(columns / 128)); key_thresholds may be 0; symmetric: keys is x, key_thresholds its thresholds.
  static void pairs_above(uintptr_t x, int64_t rows, uintptr_t keys, int64_t columns, int64_t depth, bool symmetric,
                          uintptr_t thresholds, uintptr_t key_thresholds, uintptr_t bits, uintptr_t stream);
  // out (splits, rows): the maximum over each share of the keys.
  static void max_similarity(uintptr_t queries, int64_t rows, uintptr_t keys, int64_t columns, int64_t depth,
                             int splits, uintptr_t out, uintptr_t stream);
  // out (rows, splits, k) ordered keys. list, lists: see topk_kernel; unused (0) for k = 1.
  static void topk_similarity(uintptr_t queries, int64_t rows, uintptr_t keys, int64_t columns, int64_t depth, int k,
                              bool exclude_self, uintptr_t row_groups, uintptr_t key_groups, uintptr_t row_ids,
                              uintptr_t key_ids, int splits, int list, uintptr_t lists, uintptr_t out,
                              uintptr_t stream);
  // out (rows - first_row, columns): the ordered keys of rows [first_row, rows).
  static void ordered_keys(uintptr_t queries, int64_t first_row, int64_t rows, uintptr_t keys, int64_t columns,
                           int64_t depth, bool exclude_self, uintptr_t row_groups, uintptr_t key_groups,
                           uintptr_t row_ids, uintptr_t key_ids, uintptr_t out, uintptr_t stream);
};

}  // namespace hpk::gpu
