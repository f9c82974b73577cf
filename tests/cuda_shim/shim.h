// CUDA on the host, for the tests: one block at a time, its threads as fibres, so that the kernels of csrc/cuda run
// unchanged and their results can be checked without a GPU. Asynchronous copies are made at once; ldmatrix and mma
// follow the fragment layouts of the PTX manual. A block in which no thread can go on raises std::runtime_error, and so
// does a grid that CUDA would not launch.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace hpk::shim {

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  uint32_t words[32][8];  // what the lanes show each other
  const void* addresses[32];
};

struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  dim3 thread;
  bool done;
};

struct Block {
  dim3 index, grid, size;
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  Barrier barrier;
  ucontext_t scheduler;
  Fibre* running = nullptr;
  int live = 0;
  bool progress = false;
  std::function<void()> body;
};

inline Block& block() {
  static Block one;
  return one;
}

// How many blocks of each axis a launch runs, the last of them: those of the largest offsets, without the time of all.
inline unsigned& last_blocks() {
  static unsigned count = ~0u;
  return count;
}

inline unsigned first_block(unsigned blocks) { return blocks - std::min(blocks, last_blocks()); }

inline void wait(Barrier& barrier, int size) {
  Block& b = block();
  const int generation = barrier.generation;
  if (++barrier.arrived >= size) {
    barrier.arrived = 0;
    ++barrier.generation;
    b.progress = true;
    return;
  }
  Fibre* self = b.running;
  while (barrier.generation == generation)
    swapcontext(&self->context, &b.scheduler);
}

inline int lane() { return block().running->thread.x % 32; }
inline Warp& warp() { return block().warps[block().running->thread.x / 32]; }
inline void wait_warp() { wait(warp().barrier, 32); }

inline void fibre_main() {
  Block& b = block();
  b.body();
  b.running->done = true;
  b.progress = true;
  --b.live;
  swapcontext(&b.running->context, &b.scheduler);
}

inline void run_block() {
  Block& b = block();
  for (Fibre& f : b.fibres) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, fibre_main, 0);
    f.done = false;
  }
  b.live = static_cast<int>(b.fibres.size());
  b.barrier = Barrier{};
  for (Warp& w : b.warps)
    w.barrier = Barrier{};
  while (b.live) {
    b.progress = false;
    for (Fibre& f : b.fibres) {
      if (f.done) continue;
      b.running = &f;
      swapcontext(&b.scheduler, &f.context);
    }
    if (!b.progress) throw std::runtime_error("the threads of a block wait at different barriers");
  }
}

}  // namespace hpk::shim

#define threadIdx (::hpk::shim::block().running->thread)
#define blockIdx (::hpk::shim::block().index)
#define gridDim (::hpk::shim::block().grid)
#define blockDim (::hpk::shim::block().size)

inline void __syncthreads() { hpk::shim::wait(hpk::shim::block().barrier, hpk::shim::block().live); }
inline void __syncwarp() { hpk::shim::wait_warp(); }

template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  auto& warp = hpk::shim::warp();
  std::memcpy(warp.words[hpk::shim::lane()], &value, sizeof(T));
  hpk::shim::wait_warp();
  T other;
  std::memcpy(&other, warp.words[hpk::shim::lane() ^ mask], sizeof(T));
  hpk::shim::wait_warp();
  return other;
}

template <class T>
T __shfl_sync(uint32_t, T value, int from) {
  auto& warp = hpk::shim::warp();
  std::memcpy(warp.words[hpk::shim::lane()], &value, sizeof(T));
  hpk::shim::wait_warp();
  T other;
  std::memcpy(&other, warp.words[from % 32], sizeof(T));
  hpk::shim::wait_warp();
  return other;
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, int distance) {
  const int lane = hpk::shim::lane();
  return __shfl_sync(mask, value, lane < distance ? lane : lane - distance);
}

inline uint32_t __ballot_sync(uint32_t, bool vote) {
  auto& warp = hpk::shim::warp();
  warp.words[hpk::shim::lane()][0] = vote;
  hpk::shim::wait_warp();
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    votes |= warp.words[lane][0] << lane;
  hpk::shim::wait_warp();
  return votes;
}

inline int __popc(uint32_t word) { return __builtin_popcount(word); }
inline int __ffs(uint32_t word) { return __builtin_ffs(static_cast<int>(word)); }

struct float2 {
  float x, y;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

inline uint32_t atomicOr(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  *address |= value;
  return before;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

namespace hpk::gpu {

constexpr const char* kDeviceType = "cpu";
constexpr int kCudaVersion = 0;
inline int newest_version_served() { return 0; }

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(float x) { return x; }

inline float to_float(fp16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(float(fraction), -24)
                                     : std::ldexp(float(fraction + 1024), exponent - 25);
  return x.bits >> 15 ? -size : size;
}

inline unsigned char* dynamic_shared() { return shim::block().shared.data(); }

inline void cp_async_16(void* shared, const void* global, bool valid) {
  if (valid)
    std::memcpy(shared, global, 16);
  else
    std::memset(shared, 0, 16);
}
inline void cp_async_commit() {}
template <int N>
void cp_async_wait() {}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  auto& warp = shim::warp();
  const int lane = shim::lane();
  warp.addresses[lane] = shared_row;
  shim::wait_warp();
  for (int q = 0; q < 4; ++q)
    std::memcpy(&r[q], static_cast<const char*>(warp.addresses[8 * q + lane / 4]) + lane % 4 * 4, 4);
  shim::wait_warp();
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  auto& warp = shim::warp();
  const int lane = shim::lane();
  warp.addresses[lane] = shared_row;
  shim::wait_warp();
  for (int q = 0; q < 4; ++q)
    for (int half = 0; half < 2; ++half)  // rows 2 (lane % 4) + half, column lane / 4
      std::memcpy(reinterpret_cast<char*>(&r[q]) + 2 * half,
                  static_cast<const char*>(warp.addresses[8 * q + lane % 4 * 2 + half]) + lane / 4 * 2, 2);
  shim::wait_warp();
}

inline float least(float a, float b) { return a < b || a != a ? a : b; }

inline uint32_t difference_bits(float a, float b) {
  const float difference = a - b;
  return difference != difference ? 0x7fffffffu : __float_as_uint(difference);
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline uint16_t rounded(float x, bf16) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline uint16_t rounded(float x, fp16) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = -24;
  if (size > 0) std::frexp(size, &exponent);  // [0.5, 1) 2^exponent: a unit in the last place is 2^(exponent - 11)
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -unit)));
  return sign | static_cast<uint16_t>(units + ((unit + 24) << 10));  // 2048 units carry into the exponent
}

template <class T>
void store_two(T* to, float low, float high) {
  to[0].bits = rounded(low, T{}), to[1].bits = rounded(high, T{});
}
inline void store_two(float* to, float low, float high) { to[0] = low, to[1] = high; }
template <class T>
float2 load_two(const T* from) {
  return {to_float(from[0]), to_float(from[1])};
}
inline float2 load_two(const float* from) { return {from[0], from[1]}; }

// c += a b: a is 16 x 16 (register q: rows + 8 (q % 2), depth + 8 (q / 2)), b 16 x 8 (register q: depth + 8 q).
template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  auto& warp = shim::warp();
  const int lane = shim::lane();
  std::memcpy(warp.words[lane], a, 16);
  std::memcpy(warp.words[lane] + 4, b, 8);
  shim::wait_warp();
  const auto element = [&](int of_lane, int of_register, int half) {
    return to_float(T{static_cast<uint16_t>(warp.words[of_lane][of_register] >> 16 * half)});
  };
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4, column = lane % 4 * 2 + e % 2;  // of the upper (e < 2) or lower 8 rows
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2;
      c[e] += element(row * 4 + pair, e / 2 + k / 8 * 2, k % 2) * element(column * 4 + pair, 4 + k / 8, k % 2);
    }
  }
  shim::wait_warp();
}

template <class... A, class... B>
void launch(void (*kernel)(A...), dim3 grid, dim3 block, size_t shared_bytes, uintptr_t, B... args) {
  constexpr unsigned kLargestX = 0x7fffffff, kLargest = 65535;
  if (grid.x - 1 >= kLargestX || grid.y - 1 >= kLargest || grid.z - 1 >= kLargest)
    throw std::runtime_error("CUDA: invalid configuration argument");
  auto& b = shim::block();
  b.grid = grid, b.size = block;
  b.fibres.resize(block.x);
  b.warps.resize((block.x + 31) / 32);
  for (unsigned t = 0; t < block.x; ++t) {
    b.fibres[t].thread = dim3(t);
    b.fibres[t].stack.resize(64 << 10);
  }
  b.body = [=] { kernel(args...); };
  for (unsigned z = shim::first_block(grid.z); z < grid.z; ++z)
    for (unsigned y = shim::first_block(grid.y); y < grid.y; ++y)
      for (unsigned x = shim::first_block(grid.x); x < grid.x; ++x) {
        b.index = dim3(x, y, z);
        b.shared.assign(shared_bytes, 0xff);  // unset shared memory reads as NaN
        shim::run_block();
      }
}

}  // namespace hpk::gpu
