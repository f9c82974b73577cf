// Neighbour weights from attention and 3 x 3 mixing. See hpkernels/ops/local_mix.
#pragma once

#include <cstdint>

#include "cpu/runtime/isa.h"

namespace hpk {

constexpr int kTaps = 9;  // slot n = 3 (dy + 1) + (dx + 1)

template <class T>
struct WeightsArgs {
  const T* attention;  // (batch, heads, tokens, tokens) logits
  T* weights;          // (batch, tokens, 9)
  int64_t batch, heads, height, width;
  double sigma, low_quantile, high_quantile;
  int threads;
};

// Rows of all heads of one token, side by side: the mean over the heads of their products is one product.
template <class T>
struct TokenRows {
  const T* data;  // (batch, tokens, depth), contiguous along depth
  int64_t image_stride, stride;
};

template <class T>
struct WeightsQkArgs {
  TokenRows<T> queries, keys;
  T* weights;  // (batch, tokens, 9)
  int64_t batch, depth, height, width;
  double scale;  // of the product
  double sigma, low_quantile, high_quantile;
  int threads;
};

template <class T>
struct MixArgs {
  const T *code, *weights;  // (batch, tokens, depth), (batch, tokens, 9)
  int64_t batch, height, width, depth;
  int threads;
};

}  // namespace hpk

HPK_DECLARE(void neighbor_weights(const WeightsArgs<float>& args);
            void neighbor_weights(const WeightsArgs<double>& args);
            // the same from logits scale <q_i, k_j>, a panel of rows at a time
            void neighbor_weights_qk(const WeightsQkArgs<float>& args);
            void neighbor_weights_qk(const WeightsQkArgs<double>& args);
            // out (batch, tokens, depth): out_i = sum_n w_i[n] code[i + n]
            void neighbor_mix(const MixArgs<float>& args, float* out);
            void neighbor_mix(const MixArgs<double>& args, double* out);
            // grad_code_j = sum_n w_{j-n}[n] g_{j-n};  grad_weights_i[n] = <g_i, code_{i+n}>; a null pointer skips that
            // gradient
            void neighbor_mix_grad(const MixArgs<float>& args, const float* g, float* grad_code, float* grad_weights);
            void neighbor_mix_grad(const MixArgs<double>& args, const double* g, double* grad_code,
                                   double* grad_weights);)
