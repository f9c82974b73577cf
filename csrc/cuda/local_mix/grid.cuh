// The token grid of an image. Slot n of a token's nine taps is the neighbour at (n / 3 - 1, n % 3 - 1) in (y, x).
#pragma once

#include "cuda/common/primitives.h"

namespace hpk::gpu {

constexpr int kTaps = 9;

struct Grid {
  int height, width;

  __device__ int tokens() const { return height * width; }
  __device__ bool has(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }
  __device__ bool has_tap(int y, int x, int n) const { return has(y + n / 3 - 1, x + n % 3 - 1); }
  __device__ int step_to(int n) const { return (n / 3 - 1) * width + n % 3 - 1; }  // in tokens
};

}  // namespace hpk::gpu
