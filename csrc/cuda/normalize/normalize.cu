// Rows divided by their Euclidean norm, and the gradient: a warp a row, arithmetic in fp32. Rows are whole 16-byte
// chunks; later passes over a row find it in the cache.
#include <cmath>

#include "cuda/common/vector.cuh"
#include "cuda/normalize/normalize.h"

namespace hpk::gpu {
namespace {

// y = x / scale * inverse: two factors, since their product may overflow. Both make zero rows zero.
struct Norm {
  float scale, inverse;
  __device__ float unit(float x) const { return x / scale * inverse; }
};

// Dividing by the largest magnitude first keeps the squares of 1e30 and of 1e-30 in range. fmaxf passes over NaN, the
// sum of squares does not: NaN and infinity make their whole row NaN.
template <class T>
__device__ inline Norm norm_of(const T* x, int width, int lane) {
  float largest = 0.0f;
  for (int d = lane * kVector<T>; d < width; d += 32 * kVector<T>) {
    float v[kVector<T>];
    load_wide<T>(v, x + d);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e)
      largest = fmaxf(largest, fabsf(v[e]));
  }
  largest = warp_max(largest);
  const float scale = largest == 0.0f ? 1.0f : largest;
  float squares = 0.0f;
  for (int d = lane * kVector<T>; d < width; d += 32 * kVector<T>) {
    float v[kVector<T>];
    load_wide<T>(v, x + d);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e)
      squares += (v[e] / scale) * (v[e] / scale);
  }
  squares = warp_sum(squares);
  return {scale, squares == 0.0f ? 0.0f : 1.0f / sqrtf(squares)};
}

template <class T>
__global__ void __launch_bounds__(kWarpThreads) normalize_rows_kernel(const T* x, int64_t rows, int width, T* out) {
  const int64_t row = int64_t(blockIdx.x) * (kWarpThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  const Norm norm = norm_of(x + row * width, width, lane);
  for (int d = lane * kVector<T>; d < width; d += 32 * kVector<T>) {
    float v[kVector<T>];
    load_wide<T>(v, x + row * width + d);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e)
      v[e] = norm.unit(v[e]);
    store_wide(out + row * width + d, v);
  }
}

// out = (g - <g, y> y) / ||x||.
template <class T>
__global__ void __launch_bounds__(kWarpThreads)
    normalize_rows_grad_kernel(const T* grad, const T* x, int64_t rows, int width, T* out) {
  const int64_t row = int64_t(blockIdx.x) * (kWarpThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  const Norm norm = norm_of(x + row * width, width, lane);
  float along = 0.0f;
  for (int d = lane * kVector<T>; d < width; d += 32 * kVector<T>) {
    float g[kVector<T>], v[kVector<T>];
    load_wide<T>(g, grad + row * width + d);
    load_wide<T>(v, x + row * width + d);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e)
      along += g[e] * norm.unit(v[e]);
  }
  along = warp_sum(along);
  for (int d = lane * kVector<T>; d < width; d += 32 * kVector<T>) {
    float g[kVector<T>], v[kVector<T>];
    load_wide<T>(g, grad + row * width + d);
    load_wide<T>(v, x + row * width + d);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e)
      v[e] = (g[e] - along * norm.unit(v[e])) * norm.inverse / norm.scale;
    store_wide(out + row * width + d, v);
  }
}

}  // namespace

template <class T>
void NormalizeLaunches<T>::normalize_rows(uintptr_t x, int64_t rows, int width, uintptr_t out, uintptr_t stream) {
  launch(normalize_rows_kernel<T>, dim3(blocks_of(rows, kWarpThreads / 32)), dim3(kWarpThreads), 0, stream,
         pointer<const T>(x), rows, width, pointer<T>(out));
}

template <class T>
void NormalizeLaunches<T>::normalize_rows_grad(uintptr_t grad, uintptr_t x, int64_t rows, int width, uintptr_t out,
                                               uintptr_t stream) {
  launch(normalize_rows_grad_kernel<T>, dim3(blocks_of(rows, kWarpThreads / 32)), dim3(kWarpThreads), 0, stream,
         pointer<const T>(grad), pointer<const T>(x), rows, width, pointer<T>(out));
}

template struct NormalizeLaunches<bf16>;
template struct NormalizeLaunches<fp16>;
template struct NormalizeLaunches<float>;

}  // namespace hpk::gpu
