// Memory-bound kernels: 16-byte accesses widened to fp32, and sums over a warp.
#pragma once

#include <cstdint>

#include "cuda/common/primitives.h"

namespace hpk::gpu {

constexpr int kWarpThreads = 256;  // of a block whose warps work each on its own row
constexpr uint32_t kAllLanes = 0xffffffffu;

template <class T>
constexpr int kVector = static_cast<int>(16 / sizeof(T));  // elements of a 16-byte access

template <int Bytes>
struct alignas(Bytes) Packed {
  uint32_t word[Bytes / 4];
};

template <class T, int N>
using PackedOf = Packed<N* int(sizeof(T))>;

// One load, which the compiler does not split as it may that of a struct.
template <int Bytes>
__device__ inline Packed<Bytes> load_packed(const void* from) {
  if constexpr (Bytes == 16) {
    const uint4 words = *static_cast<const uint4*>(from);
    return {words.x, words.y, words.z, words.w};
  } else {
    static_assert(Bytes == 8);
    const uint2 words = *static_cast<const uint2*>(from);
    return {words.x, words.y};
  }
}

// v = N elements as they lie in memory.
template <class T, int N>
__device__ inline void widen(float (&v)[N], const PackedOf<T, N>& packed) {
#pragma unroll
  for (int e = 0; e < N; e += 2) {
    const float2 two = load_two(reinterpret_cast<const T*>(packed.word) + e);
    v[e] = two.x, v[e + 1] = two.y;
  }
}

// v = from[0, N) in one access; `from` is aligned to it.
template <class T, int N>
__device__ inline void load_wide(float (&v)[N], const T* from) {
  if constexpr (N == 1)
    v[0] = to_float(*from);
  else
    widen<T, N>(v, load_packed<N* int(sizeof(T))>(from));
}

template <class T, int N>
__device__ inline void store_wide(T* to, const float (&v)[N]) {
  PackedOf<T, N> packed;
#pragma unroll
  for (int e = 0; e < N; e += 2)
    store_two(reinterpret_cast<T*>(packed.word) + e, v[e], v[e + 1]);
  *reinterpret_cast<PackedOf<T, N>*>(to) = packed;
}

// Every lane gets the result: the same bits, since each step adds the same two numbers on both sides.
template <class T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2)
    value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}
__device__ inline float warp_max(float value) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, mask));
  return value;
}
__device__ inline float warp_min(float value) { return -warp_max(-value); }

// Blocks of `per_block` items.
inline unsigned blocks_of(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace hpk::gpu
