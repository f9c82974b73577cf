// exp of a vector, for kernels compiled once per instruction set.
//
// exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2 in two parts (Cody and Waite), |r| <= ln 2 / 2, and exp(r)
// by its Taylor polynomial: degree 7 leaves 5e-9 relative in fp32, degree 13 leaves 4e-18 in fp64, so the error is a
// rounding or two.
#pragma once

#include "cpu/vector/simd.h"

namespace hpk::HPK_ISA {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Integer = int32_t;
  static constexpr int kDegree = 7, kMantissaBits = 23;
  static constexpr float kLowest = -87.0f, kHighest = 88.0f;  // results below exp(kLowest) become zero
  static constexpr float kRound = 12582912.0f;                // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
};

template <>
struct ExpConstants<double> {
  using Integer = int64_t;
  static constexpr int kDegree = 13, kMantissaBits = 52;
  static constexpr double kLowest = -708.0, kHighest = 709.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
};

template <class T>
inline Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  using Bits = Vec<typename C::Integer>;
  constexpr double kInverseFactorial[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
  const Vec<T> clamped = min(max(x, splat(C::kLowest)), splat(C::kHighest));
  const Vec<T> shifted = clamped * splat(T(1.4426950408889634)) + splat(C::kRound);
  const Vec<T> n = shifted - splat(C::kRound);
  Vec<T> r = clamped - n * splat(C::kLn2High);
  r = r - n * splat(C::kLn2Low);
  Vec<T> p = splat(T(kInverseFactorial[C::kDegree]));
#pragma GCC unroll 16
  for (int k = C::kDegree - 1; k >= 0; --k)
    p = p * r + splat(T(kInverseFactorial[k]));
  Bits scaled, whole;  // the low bits of `shifted` hold n: move them into the exponent
  std::memcpy(&scaled, &p, sizeof p);
  std::memcpy(&whole, &shifted, sizeof shifted);
  scaled += whole << C::kMantissaBits;
  std::memcpy(&p, &scaled, sizeof p);
  return x < splat(C::kLowest) ? Vec<T>{} : p;
}

}  // namespace hpk::HPK_ISA
