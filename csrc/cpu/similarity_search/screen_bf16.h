// Screening with bf16 products accumulated in fp32 (vdpbf16ps): twice the fp32 rate.
#pragma once

#include "cpu/similarity_search/screen.h"

namespace hpk::HPK_ISA {

struct ScreenBf16 {
  using Input = float;
  using Group = uint32_t;  // elements 2g and 2g + 1
  static constexpr int MR = Engine<float>::MR, NV = Engine<float>::NV, NR = Engine<float>::NR;

  static int64_t groups(int64_t depth) { return (depth + 1) / 2; }

  template <bool kLeft>
  static bool pack(const float* const* rows, int64_t depth, uint32_t* out, float*, int32_t*, Bound<float>* bounds) {
    constexpr int P = kLeft ? MR : NR;
    const int64_t count = groups(depth);
    bool finite = true;
    for (int r = 0; r < P; ++r) {
      if (!rows[r]) {
        for (int64_t g = 0; g < count; ++g)
          out[g * P + r] = 0;
        continue;
      }
      const float norm = norm_bound(rows[r], depth);
      finite = finite && norm == norm;
      Vec<float> total{};
      for (int64_t d = 0; d < depth; d += 32) {
        const int64_t first = std::min<int64_t>(16, depth - d),
                      second = std::min<int64_t>(16, std::max<int64_t>(0, depth - d - 16));
        const Vec<float> x = load_part(rows[r] + d, first), y = load_part(rows[r] + d + first, second);
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
        alignas(64) uint32_t pairs[16];
        _mm512_store_si512(pairs, rounded);
        const Vec<float> dx = x - widen(_mm512_castsi512_si256(rounded)),
                         dy = y - widen(_mm512_extracti64x4_epi64(rounded, 1));
        total += dx * dx;
        total += dy * dy;
        for (int64_t g = 0; g < std::min<int64_t>(16, count - d / 2); ++g)
          out[(d / 2 + g) * P + r] = pairs[g];
      }
      // Rounding to nearest is off by at most 2^-8 |x|, or by all of x where that is a denormal number.
      const float square = sum<float>(total);
      const float measured = square > 1e-30f && square < 1e30f ? std::sqrt(square) : norm;
      constexpr float epsilon = std::numeric_limits<float>::epsilon();
      // Two roundings per product, each possibly a truncation, in the screen; one in the canonical sum.
      const float sums = norm * static_cast<float>(2 * depth + 32) * epsilon;
      bounds[r] = {norm * (1 + 1.0f / 128), measured * (1 + static_cast<float>(depth + 16) * epsilon) + sums};
    }
    return finite;
  }

  __attribute__((noinline)) static void micro(int64_t groups, const uint32_t* a, const uint32_t* b, const float*,
                                              const float*, const int32_t*, float* out, int64_t ld) {
    __m512 acc[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v)
        acc[r][v] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, a += MR, b += NR) {
      __m512i col[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v)
        col[v] = _mm512_loadu_si512(b + v * 16);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const __m512i row = _mm512_set1_epi32(static_cast<int>(a[r]));
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v)
          acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)row, (__m512bh)col[v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v)
        _mm512_storeu_ps(out + r * ld + v * 16, acc[r][v]);
  }

 private:
  static Vec<float> widen(__m256i bf16) { return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16); }
};

}  // namespace hpk::HPK_ISA
