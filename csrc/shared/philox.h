// Counter-based random bits, the same on every backend.
//
// Philox4x32 with ten rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and
// on top a bit-sliced Bernoulli generator: 32 independent bits of probability q / 2^32 from the binary digits of q.
// Each digit takes one random plane, from the lowest set digit upwards: a set digit ORs the plane in, a clear one ANDs
// it, so every step maps the probability p to (p + digit) / 2 and the last one leaves exactly q / 2^32. Planes below
// the lowest set digit change nothing and are never drawn.
//
// Word w of row r draws its plane p from counter (w, r, p / 4, 0), lane p % 4, with the 64-bit seed as key.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define HPK_HOST_DEVICE __host__ __device__
#else
#define HPK_HOST_DEVICE
#endif

namespace hpk {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kBernoulliPlanes = 32;

// Index of the lowest set digit of the threshold q in [1, 2^32 - 1]: the first plane that is drawn.
static HPK_HOST_DEVICE inline int first_plane(uint64_t q) {
  int plane = 0;
  while (!((q >> plane) & 1))
    ++plane;
  return plane;
}

// Encrypts the counter in place.
static HPK_HOST_DEVICE inline void philox4x32(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * counter[0];
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * counter[2];
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1;
    counter[0] = next0;
    counter[1] = static_cast<uint32_t>(product1);
    counter[2] = next2;
    counter[3] = static_cast<uint32_t>(product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

// 32 Bernoulli(q / 2^32) bits for word `word` of row `row`; q in [1, 2^32 - 1].
static HPK_HOST_DEVICE inline uint32_t bernoulli_word(uint64_t seed, uint32_t row, uint32_t word, uint64_t q) {
  uint32_t bits = 0;
  const int first = first_plane(q);
  for (int group = first / 4; group < kBernoulliPlanes / 4; ++group) {
    uint32_t planes[4] = {word, row, static_cast<uint32_t>(group), 0};
    philox4x32(planes, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    for (int lane = 0; lane < 4; ++lane) {
      const int plane = 4 * group + lane;
      if (plane < first) continue;
      bits = (q >> plane) & 1 ? bits | planes[lane] : bits & planes[lane];
    }
  }
  return bits;
}

}  // namespace hpk
