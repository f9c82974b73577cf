// Launches of the search kernels. Sizes count rows, columns and elements.
#include "cuda/similarity_search/pairs.cuh"
#include "cuda/similarity_search/rows.cuh"
#include "cuda/similarity_search/similarity_search.h"

namespace hpk::gpu {
namespace {

unsigned tiles_of(int64_t rows) { return static_cast<unsigned>((rows + kTile - 1) / kTile); }

template <class T>
RowSearch<T> row_search(uintptr_t queries, int64_t rows, uintptr_t keys, int64_t columns, int64_t depth,
                        bool exclude_self, uintptr_t row_groups, uintptr_t key_groups, uintptr_t row_ids,
                        uintptr_t key_ids) {
  return {pointer<const T>(queries),
          pointer<const T>(keys),
          rows,
          columns,
          depth,
          exclude_self,
          pointer<const int64_t>(row_groups),
          pointer<const int64_t>(key_groups),
          pointer<const int64_t>(row_ids),
          pointer<const int64_t>(key_ids)};
}

}  // namespace

template <class T>
void SearchLaunches<T>::pairs_above(uintptr_t x, int64_t rows, uintptr_t keys, int64_t columns, int64_t depth,
                                    bool symmetric, uintptr_t thresholds, uintptr_t key_thresholds, uintptr_t bits,
                                    uintptr_t stream) {
  const PairSearch<T> job{pointer<const T>(x),
                          pointer<const T>(keys),
                          pointer<const float>(thresholds),
                          pointer<const float>(key_thresholds),
                          pointer<uint32_t>(bits),
                          rows,
                          columns,
                          depth,
                          symmetric};
  const int64_t column_tiles = tiles_of(columns);
  const int64_t blocks =
      symmetric ? triangle_tiles((column_tiles + kTileGroup - 1) / kTileGroup) : column_tiles * tiles_of(rows);
  launch(pairs_above_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kTileThreads), kPairStages * kStageBytes,
         stream, job);
}

template <class T>
void SearchLaunches<T>::max_similarity(uintptr_t queries, int64_t rows, uintptr_t keys, int64_t columns, int64_t depth,
                                       int splits, uintptr_t out, uintptr_t stream) {
  const auto job = row_search<T>(queries, rows, keys, columns, depth, false, 0, 0, 0, 0);
  launch(max_similarity_kernel<T>, dim3(tiles_of(rows), splits), dim3(kTileThreads), kRowStages * kStageBytes, stream,
         job, pointer<float>(out));
}

template <class T>
void SearchLaunches<T>::topk_similarity(uintptr_t queries, int64_t rows, uintptr_t keys, int64_t columns, int64_t depth,
                                        int k, bool exclude_self, uintptr_t row_groups, uintptr_t key_groups,
                                        uintptr_t row_ids, uintptr_t key_ids, int splits, int list, uintptr_t lists,
                                        uintptr_t out, uintptr_t stream) {
  const auto job =
      row_search<T>(queries, rows, keys, columns, depth, exclude_self, row_groups, key_groups, row_ids, key_ids);
  const dim3 grid(tiles_of(rows), splits), block(kTileThreads);
  if (k == 1)
    launch(best_key_kernel<T>, grid, block, kRowStages * kStageBytes, stream, job, pointer<int64_t>(out));
  else
    launch(topk_kernel<T>, grid, block, topk_shared_bytes(list), stream, job, k, list, pointer<int64_t>(lists),
           pointer<int64_t>(out));
}

template <class T>
void SearchLaunches<T>::ordered_keys(uintptr_t queries, int64_t first_row, int64_t rows, uintptr_t keys,
                                     int64_t columns, int64_t depth, bool exclude_self, uintptr_t row_groups,
                                     uintptr_t key_groups, uintptr_t row_ids, uintptr_t key_ids, uintptr_t out,
                                     uintptr_t stream) {
  const auto job =
      row_search<T>(queries, rows, keys, columns, depth, exclude_self, row_groups, key_groups, row_ids, key_ids);
  launch(ordered_keys_kernel<T>, dim3(tiles_of(columns), tiles_of(rows - first_row)), dim3(kTileThreads),
         kRowStages * kStageBytes, stream, job, first_row, pointer<int64_t>(out));
}

template struct SearchLaunches<bf16>;
template struct SearchLaunches<fp16>;
template struct SearchLaunches<float>;

}  // namespace hpk::gpu
