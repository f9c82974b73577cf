// Vectors of the instruction set this file is compiled for. For *.isa.cpp and *.bf16.cpp alone.
//
// Vec<T> is a GCC/Clang vector of kLanes<T> floats or doubles: + - * / and comparisons work element by element, and a*b
// + c becomes one fused multiply-add where the machine has it. Masks of comparisons are integer vectors (all ones or
// zero). Use no std:: containers or algorithms in kernels beyond what inlines (std::min, std::max): scratch comes from
// Scratch<T>.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/runtime/memory.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef HPK_ISA
#error "simd.h belongs to sources that are compiled once per instruction set"
#endif

namespace hpk::HPK_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, so this is a plain broadcast
}

template <class T>
inline Vec<T> load_part(const T* p, int64_t count) {  // the first `count` lanes, zero in the others
#if defined(__AVX512F__)
  const uint32_t lanes = _bzhi_u32(~0u, static_cast<uint32_t>(count));
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes), p);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_loadu_epi64(static_cast<__mmask8>(lanes), p);
#endif
  Vec<T> v{};
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(T));
  return v;
}

// b where either is NaN. GCC makes a comparison and a blend of the conditional with AVX-512.
template <class V>
inline V max(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same<V, Vec<float>>::value) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same<V, Vec<double>>::value) return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#endif
  return a > b ? a : b;
}

template <class V>
inline V min(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same<V, Vec<float>>::value) return (V)_mm512_min_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same<V, Vec<double>>::value) return (V)_mm512_min_pd((__m512d)a, (__m512d)b);
#endif
  return a < b ? a : b;
}

// Folds a vector to one lane with f(low half, high half), the same order for every vector width.
template <class T, class F>
inline T fold(Vec<T> v, F&& f) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
#if defined(__AVX512F__)
    const __m512 wide = (__m512)v;
    const __m256 half = f(_mm512_castps512_ps256(wide), _mm512_extractf32x8_ps(wide, 1));
#else
    const __m256 half = (__m256)v;
#endif
    const __m128 quarter = f(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = f(quarter, _mm_movehl_ps(quarter, quarter));
    return f(pair, _mm_movehdup_ps(pair))[0];
  } else {
#if defined(__AVX512F__)
    const __m512d wide = (__m512d)v;
    const __m256d half = f(_mm512_castpd512_pd256(wide), _mm512_extractf64x4_pd(wide, 1));
#else
    const __m256d half = (__m256d)v;
#endif
    const __m128d pair = f(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
    return f(pair, _mm_unpackhi_pd(pair, pair))[0];
  }
#else
  T lane[kLanes<T>];
  store(lane, v);
  for (int half = kLanes<T> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i)
      lane[i] = f(lane[i], lane[i + half]);
  return lane[0];
#endif
}

template <class T>
inline T sum(Vec<T> v) {
  return fold<T>(v, [](auto low, auto high) { return low + high; });
}

template <class T>
inline T largest(Vec<T> v) {
  return fold<T>(v, [](auto low, auto high) { return low > high ? low : high; });
}

// Bit l of the result: a[l] > b[l]. False where either is NaN.
inline uint32_t bits_greater(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpgt_ps((__m128)a, (__m128)b)));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes<float>; ++l)
    bits |= static_cast<uint32_t>(a[l] > b[l]) << l;
  return bits;
#endif
}

inline uint32_t bits_greater(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_pd(_mm_cmpgt_pd((__m128d)a, (__m128d)b)));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes<double>; ++l)
    bits |= static_cast<uint32_t>(a[l] > b[l]) << l;
  return bits;
#endif
}

// Uninitialised, 64-byte aligned memory for `count` objects of a trivial type. Allocate outside of parallel_for, one
// slice per worker, with slices a multiple of 64 bytes so that threads share no cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_(static_cast<size_t>(count) * sizeof(T)), data_(take_memory(bytes_)) {
    static_assert(std::is_trivial<T>::value, "Scratch holds trivial types");
  }
  ~Scratch() { give_memory(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return static_cast<T*>(data_); }
  T& operator[](int64_t i) const { return get()[i]; }

 private:
  size_t bytes_;
  void* data_;
};

}  // namespace hpk::HPK_ISA
