// Launches of the local_mix kernels. Sizes and strides count elements.
#include "cuda/local_mix/local_mix.h"
#include "cuda/local_mix/taps.cuh"
#include "cuda/local_mix/weights.cuh"

namespace hpk::gpu {
namespace {

constexpr int64_t kUsualShared = 48 << 10;  // warps of a block: as many as find room here, at least one

template <class T, int Width>
void launch_weights(const LogitRows<T>& rows, const WeightOptions& options, float* out, uintptr_t stream) {
  const int64_t tokens = int64_t(options.grid.height) * options.grid.width, warp_bytes = 4 * warp_words(tokens);
  int warps = kWarpThreads / 32;
  while (warps > 1 && warps * warp_bytes > kUsualShared)
    warps /= 2;
  launch(neighbor_weights_kernel<T, Width>, dim3(blocks_of(rows.images * tokens, warps)), dim3(32 * warps),
         warps * warp_bytes, stream, rows, options, out);
}

template <class T>
MixJob<T> mix_job(uintptr_t code, uintptr_t weights, int64_t images, int height, int width, int depth, uintptr_t out) {
  return {pointer<const T>(code), pointer<const float>(weights), pointer<T>(out), images, {height, width},
          depth / kVector<T>};
}

}  // namespace

template <class T>
void LocalMixLaunches<T>::neighbor_weights(uintptr_t attention, int64_t images, int heads, int height, int width,
                                           int64_t image_stride, int64_t head_stride, int64_t row_stride, int access,
                                           float sigma, int low_rank, float low_fraction, int high_rank,
                                           float high_fraction, uintptr_t out, uintptr_t stream) {
  const LogitRows<T> rows{pointer<const T>(attention), images, image_stride, head_stride, row_stride, heads};
  const WeightOptions options{{height, width}, {low_rank, low_fraction}, {high_rank, high_fraction}, sigma};
  if (access == 16)
    launch_weights<T, int(16 / sizeof(T))>(rows, options, pointer<float>(out), stream);
  else if (access == 8)
    launch_weights<T, int(8 / sizeof(T))>(rows, options, pointer<float>(out), stream);
  else
    launch_weights<T, 1>(rows, options, pointer<float>(out), stream);
}

template <class T>
void LocalMixLaunches<T>::mean_logits(uintptr_t queries, uintptr_t keys, int images, int tokens, int64_t depth,
                                      int64_t stride, float factor, uintptr_t out, uintptr_t stream) {
  const LogitProducts<T> job{pointer<const T>(queries), pointer<const T>(keys), tokens, depth, stride, factor,
                             pointer<float>(out)};
  const unsigned tiles = blocks_of(tokens, kTile);
  launch(mean_logits_kernel<T>, dim3(tiles, tiles, images), dim3(kTileThreads), kLogitStages * kStageBytes, stream,
         job);
}

template <class T>
void LocalMixLaunches<T>::neighbor_mix(uintptr_t code, uintptr_t weights, int64_t images, int height, int width,
                                       int depth, bool transposed, uintptr_t out, uintptr_t stream) {
  const auto job = mix_job<T>(code, weights, images, height, width, depth, out);
  const int64_t threads = images * blocks_of(width, kRun) * height * job.chunks;
  launch(transposed ? neighbor_mix_kernel<T, true> : neighbor_mix_kernel<T, false>,
         dim3(blocks_of(threads, kWarpThreads)), dim3(kWarpThreads), 0, stream, job);
}

template <class T>
void LocalMixLaunches<T>::neighbor_mix_grad_weights(uintptr_t grad, uintptr_t code, int64_t images, int height,
                                                    int width, int depth, uintptr_t grad_weights, uintptr_t stream) {
  const auto job = mix_job<T>(code, 0, images, height, width, depth, 0);
  launch(neighbor_mix_grad_weights_kernel<T>, dim3(blocks_of(images * height * width, kWarpThreads / 32)),
         dim3(kWarpThreads), 0, stream, job, pointer<const T>(grad), pointer<float>(grad_weights));
}

template struct LocalMixLaunches<bf16>;
template struct LocalMixLaunches<fp16>;
template struct LocalMixLaunches<float>;

}  // namespace hpk::gpu
