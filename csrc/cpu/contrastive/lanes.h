// What the sparse and the dense contrastive kernels share: logits, shifts and masks lane by lane.
#pragma once

#include "cpu/contrastive/contrastive.h"
#include "cpu/vector/exp.h"
#include "cpu/vector/simd.h"

namespace hpk::HPK_ISA {

template <class T>
using IntegerOf = typename ExpConstants<T>::Integer;

template <class T>
using LaneMask = Vec<IntegerOf<T>>;

template <class T>
inline Vec<IntegerOf<T>> lane_bits() {  // 1 << lane
  Vec<IntegerOf<T>> bits;
  for (int l = 0; l < kLanes<T>; ++l)
    bits[l] = IntegerOf<T>(1) << l;
  return bits;
}

// Lane l of the result is all ones where bit l of `bits` is set.
template <class T>
inline LaneMask<T> expand(uint32_t bits) {
  const Vec<IntegerOf<T>> every = splat(static_cast<IntegerOf<T>>(bits));
  return (every & lane_bits<T>()) != Vec<IntegerOf<T>>{};
}

template <class Mask, class V>
inline V keep(Mask mask, V value) {
  return mask ? value : V{};
}

template <class T>
inline bool fixed_shift(const ContrastiveArgs<T>& args) {
  return args.temperature >= kFixedShiftTemperature;
}

// exp of one number by the vector code, so that scalars and lanes round alike
template <class T>
inline T exp_of(T x) {
  return exp<T>(splat(x))[0];
}

// What one row contributes to the coefficients: G_ij = P_ij (denominator e + positive) + Q_ij extra, or without P for
// pairs of the negatives. With a fixed shift c, e = exp(l - c) is shared by both rows of a pair and `denominator`
// carries exp(c - lse) as well; otherwise e = exp(l - lse).
template <class T>
struct RowFactors {
  T denominator, positive, extra, lse;
};

template <class T>
inline RowFactors<T> row_factors(const ContrastiveArgs<T>& args, const ContrastiveGrads<T>& grads, int64_t index) {
  const T lse = grads.lse[index];
  const T scale =
      fixed_shift(args) ? static_cast<T>(std::exp(1.0 / args.temperature - static_cast<double>(lse))) : T(1);
  return {grads.grad_lse[index] * scale, grads.grad_pos[index], grads.grad_ext[index], lse};
}

inline bool any_nonzero(const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] != 0) return true;
  return false;
}
inline bool any_nonzero(const double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] != 0) return true;
  return false;
}

}  // namespace hpk::HPK_ISA
