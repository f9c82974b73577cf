// Nine-tap mixing on the token grid, and its gradients as gathers: every element has one owner.
#pragma once

#include "cuda/common/vector.cuh"
#include "cuda/local_mix/grid.cuh"

namespace hpk::gpu {

constexpr int kRun = 8;  // tokens of an image row that a thread mixes, its window of 3 x 3 chunks sliding along

template <class T>
struct MixJob {
  const T* code;         // (images, tokens, depth), rows of whole 16-byte chunks
  const float* weights;  // (images, tokens, 9)
  T* out;
  int64_t images;
  Grid grid;
  int chunks;  // of a row
};

// out_i = sum_n w_i[n] code[i + n] over the taps on the grid, in ascending n. Transposed, the gradient to the code: the
// neighbour at slot n sees this token at its slot 8 - n, out_i = sum_n w_{i + n}[8 - n] code[i + n].
template <class T, bool Transposed>
__global__ void __launch_bounds__(kWarpThreads) neighbor_mix_kernel(MixJob<T> job) {
  const Grid grid = job.grid;
  const int runs = (grid.width + kRun - 1) / kRun;
  int64_t rest = int64_t(blockIdx.x) * kWarpThreads + threadIdx.x;
  const int chunk = static_cast<int>(rest % job.chunks);
  rest /= job.chunks;
  const int y = static_cast<int>(rest % grid.height);  // neighbours in y share a block, and so their rows in the cache
  rest /= grid.height;
  const int first_x = static_cast<int>(rest % runs) * kRun;
  const int64_t image = rest / runs;
  if (image >= job.images) return;

  using Chunk = PackedOf<T, kVector<T>>;
  const int64_t image_row = (image * grid.height + y) * grid.width;  // token (y, 0)
  const auto load = [&](int dy, int x) {
    if (!grid.has(y + dy, x)) return Chunk{};
    const int64_t token = image_row + dy * grid.width + x;
    return load_packed<16>(job.code + (token * job.chunks + chunk) * kVector<T>);
  };
  Chunk window[3][3];  // [dy][dx]
#pragma unroll
  for (int dy = 0; dy < 3; ++dy)
    window[dy][0] = load(dy - 1, first_x - 1), window[dy][1] = load(dy - 1, first_x);
#pragma unroll
  for (int step = 0; step < kRun; ++step) {
    const int x = first_x + step;
    if (x >= grid.width) break;
#pragma unroll
    for (int dy = 0; dy < 3; ++dy)
      window[dy][2] = load(dy - 1, x + 1);
    const int64_t token = image_row + x;
    float sum[kVector<T>] = {};
#pragma unroll
    for (int n = 0; n < kTaps; ++n) {
      const int64_t slot = Transposed ? (token + grid.step_to(n)) * kTaps + kTaps - 1 - n : token * kTaps + n;
      const float w = grid.has_tap(y, x, n) ? job.weights[slot] : 0.0f;
      float v[kVector<T>];
      widen<T>(v, window[n / 3][n % 3]);
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e)
        sum[e] += w * v[e];
    }
    store_wide(job.out + (token * job.chunks + chunk) * kVector<T>, sum);
#pragma unroll
    for (int dy = 0; dy < 3; ++dy)
      window[dy][0] = window[dy][1], window[dy][1] = window[dy][2];
  }
}

// grad_weights_i[n] = <g_i, code[i + n]>, 0 off the grid; a warp, a token.
template <class T>
__global__ void __launch_bounds__(kWarpThreads)
    neighbor_mix_grad_weights_kernel(MixJob<T> job, const T* grad, float* grad_weights) {
  const int64_t token = int64_t(blockIdx.x) * (kWarpThreads / 32) + threadIdx.x / 32;
  const Grid grid = job.grid;
  const int lane = threadIdx.x % 32;
  if (token >= job.images * grid.tokens()) return;
  const int of_image = static_cast<int>(token % grid.tokens()), y = of_image / grid.width, x = of_image % grid.width;
  float dot[kTaps] = {};
  for (int chunk = lane; chunk < job.chunks; chunk += 32) {
    float g[kVector<T>];
    load_wide<T>(g, grad + (token * job.chunks + chunk) * kVector<T>);
#pragma unroll
    for (int n = 0; n < kTaps; ++n) {
      if (!grid.has_tap(y, x, n)) continue;
      float v[kVector<T>];
      load_wide<T>(v, job.code + ((token + grid.step_to(n)) * job.chunks + chunk) * kVector<T>);
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e)
        dot[n] += g[e] * v[e];
    }
  }
#pragma unroll
  for (int n = 0; n < kTaps; ++n) {
    const float sum = warp_sum(dot[n]);
    if (lane == n) grad_weights[token * kTaps + n] = sum;
  }
}

}  // namespace hpk::gpu
