// The instructions that plain CUDA C++ has no words for, and the launch. The only file with PTX. In the tests
// (HPK_CUDA_SHIM) the same names come from tests/cuda_shim/shim.h and run on the host.
#pragma once

#if defined(HPK_CUDA_SHIM)
#include "shim.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace hpk::gpu {

constexpr const char* kDeviceType = "cuda";
constexpr int kCudaVersion = CUDART_VERSION;

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char hpk_dynamic_shared[];
  return hpk_dynamic_shared;
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes without registers, or 16 zero bytes if not valid (`global` is then not read).
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when at most N of the thread's groups are under way.
template <int N>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 q + r gives the address of row r of matrix q.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// The same, each matrix transposed: an operand stored by depth, as b of mma_16816.
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// 2^x within 2 units in the last place; results below 2^-126 are 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The smaller, NaN if either is.
__device__ inline float least(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// The bits of a - b. A difference is 0 of equal numbers only, and NaN has no sign: the top bit is [a < b], but for
// zeros of two signs.
__device__ inline uint32_t difference_bits(float a, float b) { return __float_as_uint(a - b); }

__device__ inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float to_float(fp16 x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}
__device__ inline float to_float(float x) { return x; }

// Two adjacent elements, aligned to their size: rounded to nearest even, and read.
__device__ inline void store_two(bf16* to, float low, float high) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  *reinterpret_cast<uint32_t*>(to) = two;
}
__device__ inline void store_two(fp16* to, float low, float high) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  *reinterpret_cast<uint32_t*>(to) = two;
}
__device__ inline void store_two(float* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = make_float2(low, high);
}
__device__ inline float2 load_two(const bf16* from) {
  const uint32_t two = *reinterpret_cast<const uint32_t*>(from);
  return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
}
__device__ inline float2 load_two(const fp16* from) {
  const uint32_t two = *reinterpret_cast<const uint32_t*>(from);
  float2 value;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(value.x), "=f"(value.y)
      : "r"(two));
  return value;
}
__device__ inline float2 load_two(const float* from) { return *reinterpret_cast<const float2*>(from); }

// c += a b in fp32: a is 16 x 16, b 16 x 8, of T = bf16 or fp16.
template <class T>
__device__ inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma_16816<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void mma_16816<fp16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// The newest CUDA version that the driver serves, counted as kCudaVersion; 0 without a driver.
inline int newest_version_served() {
  int version = 0;
  check(cudaDriverGetVersion(&version));
  return version;
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...) on the current device. Throws std::runtime_error.
template <class... A, class... B>
void launch(void (*kernel)(A...), dim3 grid, dim3 block, size_t shared_bytes, uintptr_t stream, B... args) {
  if (shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError());
}

}  // namespace hpk::gpu

#endif
