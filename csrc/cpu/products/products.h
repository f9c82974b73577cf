// Products of two matrices, every element summed in one fixed order: the same for any number of threads.
#pragma once

#include <cstdint>

#include "cpu/runtime/isa.h"

namespace hpk {

// Row-major, its rows `stride` elements apart; or, turned, the transpose of such a matrix.
template <class T>
struct Factor {
  const T* data;
  int64_t stride;
  bool turned;
};

template <class T>
struct ProductArgs {
  Factor<T> a, b;  // (rows, depth) and (depth, columns)
  int64_t rows, columns, depth;
  T* out;  // (rows, columns)
  int threads;
};

}  // namespace hpk

HPK_DECLARE(void product(const ProductArgs<float>& args); void product(const ProductArgs<double>& args);)
