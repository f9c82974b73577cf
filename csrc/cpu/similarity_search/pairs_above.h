// One bit for each pair whose product exceeds a threshold, for any screening engine S.
#pragma once

#include "cpu/similarity_search/search.h"

namespace hpk::HPK_ISA {

constexpr int kWords = kBlock / 32;

// The bits of one tile, and the pairs that screening leaves open.
struct PairsTile {
  uint32_t bits[kBlock][kWords], mirror[kBlock][kWords];
  uint8_t open_row[kBlock * kBlock], open_col[kBlock * kBlock];
};

// Bits [begin, end) of a tile's row, as the words of one row.
inline void range_bits(int64_t begin, int64_t end, uint32_t* words) {
  for (int w = 0; w < kWords; ++w) {
    const int64_t low = std::min<int64_t>(std::max<int64_t>(begin - w * 32, 0), 32);
    const int64_t high = std::min<int64_t>(std::max<int64_t>(end - w * 32, 0), 32);
    words[w] = static_cast<uint32_t>(((uint64_t{1} << high) - 1) & ~((uint64_t{1} << low) - 1));
  }
}

template <class S, class T = typename S::Input>
class PairsSearch {
 public:
  explicit PairsSearch(const PairsArgs<T>& args)
      : args_(args),
        a_(args.x, args.threads),
        b_(args.keys, args.threads),
        rows_(tiles(args.x.count)),
        cols_(tiles(args.keys.count)),
        key_thresholds_(cols_ * kBlock),
        scratch_(std::max(1, args.threads)),
        strips_(std::max(1, args.threads) * Strip<S>::kSize) {
    if (!args.key_thresholds) return;
    std::copy(args.key_thresholds, args.key_thresholds + args.keys.count, key_thresholds_.get());
    std::fill(key_thresholds_.get() + args.keys.count, key_thresholds_.get() + cols_ * kBlock, T(0));
  }

  void run() {
    const int64_t tasks = args_.symmetric ? rows_ * (rows_ + 1) / 2 : rows_ * cols_;
    parallel_for(args_.threads, tasks, [&](int64_t task, int worker) {
      if (!args_.symmetric) return tile(task / cols_, task % cols_, worker);
      const int64_t row = triangle_row(task);
      tile(row, row + task - triangle_start(row), worker);
    });
  }

 private:
  static int64_t tiles(int64_t count) { return (count + kBlock - 1) / kBlock; }
  int64_t triangle_start(int64_t row) const { return row * rows_ - row * (row - 1) / 2; }

  int64_t triangle_row(int64_t task) const {  // the last row that starts at or before the task
    int64_t low = 0, high = rows_ - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (triangle_start(middle) <= task)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }

  T threshold(int64_t i, int64_t j) const {
    const T mine = args_.thresholds[i];
    return args_.key_thresholds && key_thresholds_[j] < mine ? key_thresholds_[j] : mine;
  }

  void tile(int64_t tile_row, int64_t tile_col, int worker) {
    PairsTile& tile = scratch_[worker];
    T* strip = strips_.get() + worker * Strip<S>::kSize;
    const int64_t i0 = tile_row * kBlock, rows = std::min(kBlock, args_.x.count - i0);
    const int64_t j0 = tile_col * kBlock, cols = std::min(kBlock, args_.keys.count - j0);
    const bool diagonal = args_.symmetric && tile_row == tile_col;
    uint32_t usable[kWords];  // columns that exist and whose threshold is a number
    range_bits(0, cols, usable);
    for (int64_t c = 0; args_.key_thresholds && c < cols; ++c)
      if (key_thresholds_[j0 + c] != key_thresholds_[j0 + c]) usable[c / 32] &= ~(1u << c % 32);

    int64_t open = 0;
    for (int64_t r0 = 0; r0 < rows; r0 += S::MR) {
      Strip<S>::fill(a_, i0 + r0, b_, j0, cols, strip);
      for (int64_t r = r0; r < std::min<int64_t>(rows, r0 + S::MR); ++r) {
        uint32_t valid[kWords];
        if (diagonal) range_bits(r + 1, cols, valid);
        for (int w = 0; w < kWords; ++w)
          valid[w] = diagonal ? valid[w] & usable[w] : usable[w];
        open = screen_row(strip + (r - r0) * kBlock, i0 + r, j0, cols, valid, tile, r, open);
      }
    }
    for (int64_t n = 0; n < open; ++n) {
      const int64_t r = tile.open_row[n], c = tile.open_col[n];
      if (n + kAhead < open) prefetch_row(args_.keys.row(j0 + tile.open_col[n + kAhead]), args_.x.depth);
      const T value = canonical_dot(args_.x.row(i0 + r), args_.keys.row(j0 + c), args_.x.depth);
      if (value > threshold(i0 + r, j0 + c)) tile.bits[r][c / 32] |= 1u << c % 32;
    }
    if (args_.symmetric) {
      mirror(tile, rows, cols);
      if (!diagonal) write(tile.mirror, j0, cols, tile_row);
      for (int64_t r = 0; diagonal && r < rows; ++r)
        for (int w = 0; w < kWords; ++w)
          tile.bits[r][w] |= tile.mirror[r][w];
    }
    write(tile.bits, i0, rows, tile_col);
  }

  // Sets the sure bits of a row and appends its open pairs.
  int64_t screen_row(const T* s, int64_t i, int64_t j0, int64_t cols, const uint32_t* valid, PairsTile& tile, int64_t r,
                     int64_t open) {
    constexpr int L = kLanes<T>;
    const T mine = args_.thresholds[i], band = error_band(a_.row(i), b_.block(j0));
    const bool use_keys = args_.key_thresholds != nullptr;
    const Vec<T> own = splat(mine), high = splat(band), low = splat(-band);
    for (int w = 0; w < kWords; ++w) {
      uint32_t sure = 0, out = ~0u;
      if (w * 32 < cols && mine == mine) {
        out = 0;
        for (int c = 0; c < 32; c += L) {
          const Vec<T> limit = use_keys ? min(own, load(key_thresholds_.get() + j0 + w * 32 + c)) : own;
          const Vec<T> margin = load(s + w * 32 + c) - limit;
          sure |= bits_greater(margin, high) << c;
          out |= bits_greater(low, margin) << c;
        }
      }
      tile.bits[r][w] = sure & valid[w];
      for (uint32_t left = valid[w] & ~(sure | out); left; left &= left - 1, ++open) {
        tile.open_row[open] = static_cast<uint8_t>(r);
        tile.open_col[open] = static_cast<uint8_t>(w * 32 + __builtin_ctz(left));
      }
    }
    return open;
  }

  static void mirror(PairsTile& tile, int64_t rows, int64_t cols) {
    for (int64_t r = 0; r < rows; r += 32) {
      for (int64_t c = 0; c < cols; c += 32) {
        uint32_t square[32];
        for (int n = 0; n < 32; ++n)
          square[n] = r + n < rows ? tile.bits[r + n][c / 32] : 0;
        transpose_32x32(square);
        for (int n = 0; n < 32; ++n)
          tile.mirror[c + n][r / 32] = square[n];
      }
    }
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t w = (rows + 31) / 32; w < kWords; ++w)
        tile.mirror[c][w] = 0;
  }

  // Stores rows of a tile; the last tile of a row also clears the row's padding.
  void write(const uint32_t (*bits)[kWords], int64_t first_row, int64_t rows, int64_t tile_col) {
    const int64_t begin = tile_col * kWords, count = std::min<int64_t>(kWords, args_.words - begin);
    const int64_t padding = tile_col == cols_ - 1 ? args_.words - begin - count : 0;
    for (int64_t r = 0; r < rows; ++r) {
      uint32_t* out = args_.bits + (first_row + r) * args_.words + begin;
      std::memcpy(out, bits[r], static_cast<size_t>(count) * sizeof(uint32_t));
      std::memset(out + count, 0, static_cast<size_t>(padding) * sizeof(uint32_t));
    }
  }

  const PairsArgs<T>& args_;
  const Panels<S, true> a_;
  const Panels<S, false> b_;
  const int64_t rows_, cols_;
  Scratch<T> key_thresholds_;
  Scratch<PairsTile> scratch_;
  Scratch<T> strips_;
};

}  // namespace hpk::HPK_ISA
