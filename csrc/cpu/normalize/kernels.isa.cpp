#include "cpu/normalize/normalize.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/runtime/thread_pool.h"

namespace hpk::HPK_ISA {
namespace {

constexpr int kParts = 16;  // partial results kept apart so that the loops vectorise, combined in fixed order
constexpr int64_t kElements = 1 << 15;  // per task

template <class T>
T combine_sum(const T (&part)[kParts]) {
  T sum = 0;
  for (int l = 0; l < kParts; ++l)
    sum += part[l];
  return sum;
}

// Largest |x| of the row; NaN or infinity if there is one.
template <class T>
T largest(const T* x, int64_t width) {
  T part[kParts] = {}, zero[kParts] = {};  // 0 * x is NaN exactly where x is not finite
  int64_t d = 0;
  for (; d + kParts <= width; d += kParts)
    for (int l = 0; l < kParts; ++l) {
      const T size = std::fabs(x[d + l]);
      part[l] = size > part[l] ? size : part[l];
      zero[l] += T(0) * x[d + l];
    }
  for (; d < width; ++d) {
    part[0] = std::max(part[0], std::fabs(x[d]));
    zero[0] += T(0) * x[d];
  }
  return *std::max_element(part, part + kParts) + combine_sum(zero);
}

// sum_d a_d b_d / (scale_a scale_b), each factor scaled before the product so that it neither overflows nor vanishes
template <class T>
T scaled_dot(const T* a, T scale_a, const T* b, T scale_b, int64_t width) {
  T part[kParts] = {};
  int64_t d = 0;
  for (; d + kParts <= width; d += kParts)
    for (int l = 0; l < kParts; ++l)
      part[l] += (a[d + l] / scale_a) * (b[d + l] / scale_b);
  for (; d < width; ++d)
    part[0] += (a[d] / scale_a) * (b[d] / scale_b);
  return combine_sum(part);
}

template <class T>
bool rows_forward(const T* x, int64_t rows, int64_t width, T* y, int threads) {
  std::atomic<bool> finite{true};
  const int64_t height = std::max<int64_t>(1, kElements / std::max<int64_t>(1, width));
  parallel_for(threads, (rows + height - 1) / height, [&](int64_t task, int) {
    for (int64_t i = task * height; i < std::min(rows, (task + 1) * height); ++i) {
      const T* in = x + i * width;
      T* out = y + i * width;
      const T scale = largest(in, width);
      if (!std::isfinite(scale)) finite.store(false, std::memory_order_relaxed);
      if (scale == 0) {
        std::fill(out, out + width, T(0));
        continue;
      }
      const T norm = std::sqrt(scaled_dot(in, scale, in, scale, width));  // in [1, sqrt(width)]
      for (int64_t d = 0; d < width; ++d)
        out[d] = in[d] / scale / norm;
    }
  });
  return finite;
}

template <class T>
void rows_backward(const T* g, const T* x, int64_t rows, int64_t width, T* grad_x, int threads) {
  const int64_t height = std::max<int64_t>(1, kElements / std::max<int64_t>(1, width));
  parallel_for(threads, (rows + height - 1) / height, [&](int64_t task, int) {
    for (int64_t i = task * height; i < std::min(rows, (task + 1) * height); ++i) {
      const T *in = x + i * width, *gi = g + i * width;
      T* out = grad_x + i * width;
      const T scale = largest(in, width);
      if (scale == 0) {
        std::fill(out, out + width, T(0));
        continue;
      }
      const T norm = std::sqrt(scaled_dot(in, scale, in, scale, width));
      const T along = scaled_dot(gi, T(1), in, scale, width) / norm;  // g . y
      for (int64_t d = 0; d < width; ++d)
        out[d] = (gi[d] - along * (in[d] / scale / norm)) / norm / scale;
    }
  });
}

}  // namespace

bool normalize_rows(const float* x, int64_t rows, int64_t width, float* y, int threads) {
  return rows_forward(x, rows, width, y, threads);
}
bool normalize_rows(const double* x, int64_t rows, int64_t width, double* y, int threads) {
  return rows_forward(x, rows, width, y, threads);
}
void normalize_rows_grad(const float* g, const float* x, int64_t rows, int64_t width, float* grad_x, int threads) {
  rows_backward(g, x, rows, width, grad_x, threads);
}
void normalize_rows_grad(const double* g, const double* x, int64_t rows, int64_t width, double* grad_x, int threads) {
  rows_backward(g, x, rows, width, grad_x, threads);
}

}  // namespace hpk::HPK_ISA
