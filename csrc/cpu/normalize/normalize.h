// L2 normalisation of rows and its gradient. See hpkernels/ops/normalize.
#pragma once

#include <cstdint>

#include "cpu/runtime/isa.h"

HPK_DECLARE(
    // y = x / ||x||, zero rows stay zero. Returns whether every input is finite.
    bool normalize_rows(const float* x, int64_t rows, int64_t width, float* y, int threads);
    bool normalize_rows(const double* x, int64_t rows, int64_t width, double* y, int threads);
    // grad_x = (g - (g . y) y) / ||x||, zero for zero rows.
    void normalize_rows_grad(const float* g, const float* x, int64_t rows, int64_t width, float* grad_x, int threads);
    void normalize_rows_grad(const double* g, const double* x, int64_t rows, int64_t width, double* grad_x,
                             int threads);)
