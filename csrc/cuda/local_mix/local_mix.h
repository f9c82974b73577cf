// Launches of the local_mix kernels.
#pragma once

#include "cuda/common/launches.h"

namespace hpk::gpu {

template <class T>
struct LocalMixLaunches {
  // access: the bytes that divide all addresses of rows, 16, 8 or those of one element.
  static void neighbor_weights(uintptr_t attention, int64_t images, int heads, int height, int width,
                               int64_t image_stride, int64_t head_stride, int64_t row_stride, int access, float sigma,
                               int low_rank, float low_fraction, int high_rank, float high_fraction, uintptr_t out,
                               uintptr_t stream);
  // out (images, tokens, stride): factor times the products of queries and keys (images, tokens, depth).
  static void mean_logits(uintptr_t queries, uintptr_t keys, int images, int tokens, int64_t depth, int64_t stride,
                          float factor, uintptr_t out, uintptr_t stream);
  static void neighbor_mix(uintptr_t code, uintptr_t weights, int64_t images, int height, int width, int depth,
                           bool transposed, uintptr_t out, uintptr_t stream);
  static void neighbor_mix_grad_weights(uintptr_t grad, uintptr_t code, int64_t images, int height, int width,
                                        int depth, uintptr_t grad_weights, uintptr_t stream);
};

}  // namespace hpk::gpu
