// Screening with 8-bit integers (vpdpbusd): four times the fp32 rate, and sums without rounding.
#pragma once

#include "cpu/similarity_search/screen.h"

namespace hpk::HPK_ISA {

struct ScreenInt8 {
  using Input = float;
  using Group = uint32_t;  // elements 4g .. 4g + 3
  static constexpr int MR = Engine<float>::MR, NV = Engine<float>::NV, NR = Engine<float>::NR;

  static int64_t groups(int64_t depth) { return (depth + 3) / 4; }

  // Row x becomes scale * q with integers |q| <= 127. The left operand stores q + 128 unsigned, as the instruction
  // wants; the right one knows 128 times its sum of q, with which the micro-kernel starts.
  template <bool kLeft>
  static bool pack(const float* const* rows, int64_t depth, uint32_t* out, float* scales, int32_t* offsets,
                   Bound<float>* bounds) {
    constexpr int P = kLeft ? MR : NR;
    constexpr float epsilon = std::numeric_limits<float>::epsilon();
    const int64_t count = groups(depth);
    bool finite = true;
    for (int r = 0; r < P; ++r) {
      scales[r] = 0;
      offsets[r] = 0;
      const float* x = rows[r];
      const float norm = x ? norm_bound(x, depth) : 0;
      bounds[r] = {norm, norm};
      finite = finite && norm == norm;
      if (!x || norm != norm) {  // what is not finite has no integers, and their sum would overflow
        for (int64_t g = 0; g < count; ++g)
          out[g * P + r] = 0;
        continue;
      }
      __m512 top = _mm512_setzero_ps();
      for (int64_t d = 0; d < depth; d += 16)
        top = _mm512_max_ps(top, _mm512_abs_ps((__m512)load_part(x + d, std::min<int64_t>(16, depth - d))));
      const float highest = _mm512_reduce_max_ps(top);
      const bool usable = highest > 1e-30f && highest < 1e30f;  // else q = 0 and the error is the row itself
      const float scale = usable ? highest / 127 : 0, inverse = usable ? 127 / highest : 0;
      const __m512 factor = _mm512_set1_ps(inverse), back = _mm512_set1_ps(scale);
      __m512 total = _mm512_setzero_ps();
      __m512i sum = _mm512_setzero_si512();
      for (int64_t d = 0; d < depth; d += 16) {
        const __m512 v = (__m512)load_part(x + d, std::min<int64_t>(16, depth - d));
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, factor));
        const __m512 difference = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(q), back, v);
        total = _mm512_fmadd_ps(difference, difference, total);
        sum = _mm512_add_epi32(sum, q);
        __m128i bytes = _mm512_cvtepi32_epi8(q);
        if (kLeft) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
        alignas(16) uint32_t quads[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(quads), bytes);
        for (int64_t g = 0; g < std::min<int64_t>(4, count - d / 4); ++g)
          out[(d / 4 + g) * P + r] = quads[g];
      }
      scales[r] = scale;
      offsets[r] = -128 * _mm512_reduce_add_epi32(sum);
      const float square = _mm512_reduce_add_ps(total);
      const float error =
          usable ? std::sqrt(square) * (1 + static_cast<float>(depth + 16) * epsilon) + highest * 1e-15f : norm;
      const float sums =
          norm * static_cast<float>(depth + 32) * epsilon;  // the canonical sum; scaling back is exact to a few
      bounds[r] = {norm + error, error + sums};
    }
    return finite;
  }

  __attribute__((noinline)) static void micro(int64_t groups, const uint32_t* a, const uint32_t* b,
                                              const float* a_scale, const float* b_scale, const int32_t* b_offset,
                                              float* out, int64_t ld) {
    Vec<int32_t> acc[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v)
        acc[r][v] = Vec<int32_t>{};
    for (int64_t g = 0; g < groups; ++g, a += MR, b += NR) {
      Vec<int32_t> col[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v)
        col[v] = load(reinterpret_cast<const int32_t*>(b) + v * 16);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const Vec<int32_t> row = splat(static_cast<int32_t>(a[r]));
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v)
          __asm__("vpdpbusd %2, %1, %0" : "+v"(acc[r][v]) : "v"(row), "v"(col[v]));
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const Vec<float> row = splat(a_scale[r]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const Vec<int32_t> sum = acc[r][v] + load(b_offset + v * 16);
        store(out + r * ld + v * 16, __builtin_convertvector(sum, Vec<float>) * (row * load(b_scale + v * 16)));
      }
    }
  }
};

}  // namespace hpk::HPK_ISA
