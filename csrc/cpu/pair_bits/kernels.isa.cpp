#include "cpu/pair_bits/pair_bits.h"

#include <algorithm>
#include <cstring>

#include "cpu/runtime/thread_pool.h"
#include "shared/philox.h"

namespace hpk::HPK_ISA {
namespace {

constexpr int kLanes = 64;  // words computed side by side by random_bits: plain loops over them are vectorised

// planes[lane][l] of counter (word + l, row, group, 0), for kLanes words at a time; see philox4x32.
void philox_planes(uint64_t seed, uint32_t row, uint32_t word, uint32_t group, uint32_t (&planes)[4][kLanes]) {
  uint32_t (&a)[kLanes] = planes[0], (&b)[kLanes] = planes[1], (&c)[kLanes] = planes[2], (&d)[kLanes] = planes[3];
  for (int l = 0; l < kLanes; ++l) {
    a[l] = word + static_cast<uint32_t>(l);
    b[l] = row;
    c[l] = group;
    d[l] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * a[l];
      const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c[l];
      const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ b[l] ^ key0;
      const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ d[l] ^ key1;
      a[l] = next0;
      b[l] = static_cast<uint32_t>(product1);
      c[l] = next2;
      d[l] = static_cast<uint32_t>(product0);
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

void random_row(uint64_t seed, uint32_t row, int64_t used_words, uint64_t q, uint32_t* out) {
  const int first = first_plane(q);
  uint32_t planes[4][kLanes], bits[kLanes];
  for (int64_t word = 0; word < used_words; word += kLanes) {
    std::fill(bits, bits + kLanes, 0u);
    for (int group = first / 4; group < kBernoulliPlanes / 4; ++group) {
      philox_planes(seed, row, static_cast<uint32_t>(word), static_cast<uint32_t>(group), planes);
      for (int plane = std::max(first, 4 * group); plane < 4 * group + 4; ++plane) {
        const uint32_t* drawn = planes[plane % 4];
        if ((q >> plane) & 1) {
          for (int l = 0; l < kLanes; ++l)
            bits[l] |= drawn[l];
        } else {
          for (int l = 0; l < kLanes; ++l)
            bits[l] &= drawn[l];
        }
      }
    }
    std::memcpy(out + word, bits, sizeof(uint32_t) * std::min<int64_t>(kLanes, used_words - word));
  }
}

// Transposes `kBlock` 32 x 32 bit blocks that lie side by side: a[r][l] is row r of block l. The butterfly swaps
// halves, then quarters, ... of every block; the loop over blocks is vectorised.
constexpr int kBlock = 16;
void transpose_blocks(uint32_t (&a)[32][kBlock]) {
  uint32_t mask = 0x0000FFFFu;
  for (int half = 16; half; half >>= 1, mask ^= mask << half) {
    for (int r = 0; r < 32; r = (r + half + 1) & ~half) {
      for (int l = 0; l < kBlock; ++l) {
        const uint32_t swap = ((a[r][l] >> half) ^ a[r + half][l]) & mask;
        a[r + half][l] ^= swap;
        a[r][l] ^= swap << half;
      }
    }
  }
}

}  // namespace

void random_bits(uint64_t seed, int64_t rows, int64_t columns, uint64_t q, uint32_t* bits, int threads) {
  constexpr int64_t kRows = 8;
  const int64_t words = words_for(columns), used = (columns + 31) / 32;
  const uint32_t last = columns % 32 ? (1u << (columns % 32)) - 1 : ~0u;
  parallel_for(threads, (rows + kRows - 1) / kRows, [&](int64_t task, int) {
    for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row) {
      uint32_t* out = bits + row * words;
      if (q == 0 || q >> 32) {
        std::fill(out, out + used, q ? ~0u : 0u);
      } else {
        random_row(seed, static_cast<uint32_t>(row), used, q, out);
      }
      out[used - 1] &= last;
      std::fill(out + used, out + words, 0u);
    }
  });
}

void count_bits(const uint32_t* bits, int64_t rows, int64_t words, int32_t* counts, int threads) {
  constexpr int64_t kRows = 64;
  parallel_for(threads, (rows + kRows - 1) / kRows, [&](int64_t task, int) {
    for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row) {
      int64_t count = 0;
      for (int64_t w = 0; w < words; w += 2) {  // a row is a multiple of four words
        uint64_t pair;
        std::memcpy(&pair, bits + row * words + w, sizeof pair);
        count += __builtin_popcountll(pair);
      }
      counts[row] = static_cast<int32_t>(count);
    }
  });
}

void transpose_bits(const uint32_t* bits, int64_t rows, int64_t columns, uint32_t* out, int threads) {
  const int64_t words = words_for(columns), out_words = words_for(rows), used = (columns + 31) / 32;
  // A task owns 32 * kBlock rows of the result and fills them from left to right.
  parallel_for(threads, (used + kBlock - 1) / kBlock, [&](int64_t task, int) {
    const int64_t word = task * kBlock, blocks = std::min<int64_t>(kBlock, used - word);
    uint32_t a[32][kBlock];
    for (int64_t out_word = 0; out_word < out_words; ++out_word) {
      const int64_t height = std::clamp<int64_t>(rows - out_word * 32, 0, 32);
      std::memset(a, 0, sizeof a);
      for (int64_t r = 0; r < height; ++r)
        std::memcpy(a[r], bits + (out_word * 32 + r) * words + word, sizeof(uint32_t) * blocks);
      if (height) transpose_blocks(a);
      for (int64_t l = 0; l < blocks; ++l)
        for (int64_t r = 0; r < std::min<int64_t>(32, columns - (word + l) * 32); ++r)
          out[((word + l) * 32 + r) * out_words + out_word] = a[r][l];
    }
  });
}

}  // namespace hpk::HPK_ISA
