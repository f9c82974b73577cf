// The search algorithms, for any screening engine S (screen_*.h): approximate products with a proven error band decide
// most pairs, and the canonical dot product decides the rest. Results never depend on S, the tile shapes or the thread
// count.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/runtime/thread_pool.h"
#include "cpu/similarity_search/screen.h"
#include "cpu/similarity_search/similarity_search.h"
#include "shared/bits.h"

namespace hpk::HPK_ISA {

constexpr int64_t kBlock = 192;    // rows and columns of a tile: a multiple of MR and NR of every engine and of 32
constexpr int64_t kTaskRows = 96;  // rows of a task of max and topk

// |screened - canonical| for a row and any column of a block; infinite where products might overflow.
template <class T>
inline T error_band(Bound<T> row, Bound<T> block) {
  using Limits = std::numeric_limits<T>;
  const T size = row.norm * block.norm;
  if (!(size < Limits::max() / 256)) return Limits::infinity();
  constexpr T slack = 1 + 64 * Limits::epsilon(),
              tiny = Limits::min() * 65536;  // rounding here; products flushed to zero
  return (row.norm * block.error + row.error * block.norm) * slack + size * 4 * Limits::epsilon() + tiny;
}

// All rows of one operand, packed for screening.
template <class S, bool kLeft>
class Panels {
 public:
  using T = typename S::Input;
  using Group = typename S::Group;
  static constexpr int P = kLeft ? S::MR : S::NR;

  Panels(const Rows<T>& rows, int threads)
      : groups_(S::groups(rows.depth)),
        data_(round(rows.count) * groups_),
        scale_(round(rows.count)),
        offset_(round(rows.count)),
        row_(round(rows.count)),
        block_((rows.count + kBlock - 1) / kBlock) {
    std::atomic<bool> finite{true};
    parallel_for(threads, (rows.count + kBlock - 1) / kBlock, [&](int64_t task, int) {
      const int64_t begin = task * kBlock, end = std::min(rows.count, begin + kBlock);
      Bound<T> largest{0, 0};
      for (int64_t i = begin; i < end; i += P) {
        const T* source[P];
        for (int r = 0; r < P; ++r)
          source[r] = i + r < end ? rows.row(i + r) : nullptr;
        if (!S::template pack<kLeft>(source, rows.depth, data_.get() + i * groups_, &scale_[i], &offset_[i], &row_[i]))
          finite = false;
        for (int64_t r = i; r < std::min(end, i + P); ++r) {
          largest.norm = std::max(largest.norm, row_[r].norm);
          largest.error = std::max(largest.error, row_[r].error);
        }
      }
      block_[task] = largest;
    });
    if (!finite) throw std::invalid_argument(std::string(rows.name) + ": expected finite numbers, got NaN or infinity");
  }

  int64_t groups() const { return groups_; }
  const Group* panel(int64_t first_row) const { return data_.get() + first_row * groups_; }
  const T* scale(int64_t first_row) const { return scale_.get() + first_row; }
  const int32_t* offset(int64_t first_row) const { return offset_.get() + first_row; }
  Bound<T> row(int64_t i) const { return row_[i]; }
  Bound<T> block(int64_t first_row) const { return block_[first_row / kBlock]; }

 private:
  static int64_t round(int64_t count) { return (count + P - 1) / P * P; }

  int64_t groups_;
  Scratch<Group> data_;
  Scratch<T> scale_;
  Scratch<int32_t> offset_;
  Scratch<Bound<T>> row_, block_;
};

// Screened products of MR rows from i with up to kBlock columns from j, both multiples of the panel sizes; rows of the
// strip are kBlock apart.
template <class S>
struct Strip {
  static constexpr int64_t kSize =
      S::MR * kBlock + 64 / sizeof(typename S::Input);  // a vector load may pass the last column

  static void fill(const Panels<S, true>& a, int64_t i, const Panels<S, false>& b, int64_t j, int64_t cols,
                   typename S::Input* out) {
    for (int64_t c = 0; c < cols; c += S::NR) {
      S::micro(a.groups(), a.panel(i), b.panel(j + c), a.scale(i), b.scale(j + c), b.offset(j + c), out + c, kBlock);
    }
  }
};

// The largest of count <= kBlock numbers; three running maxima, as one would wait for itself.
template <class T>
inline T largest_of(const T* s, int64_t count) {
  constexpr int L = kLanes<T>;
  const Vec<T> lowest = splat(-std::numeric_limits<T>::infinity());
  Vec<T> m[3] = {lowest, lowest, lowest};
  int64_t c = 0;
  for (; c + 3 * L <= count; c += 3 * L)
    for (int v = 0; v < 3; ++v)
      m[v] = max(m[v], load(s + c + v * L));
  T value = largest<T>(max(max(m[0], m[1]), m[2]));
  for (; c < count; ++c)
    value = std::max(value, s[c]);
  return value;
}

// Calls f(c, s[c]) for every c in [begin, count) for which s[c] < bar is false.
template <class T, class F>
inline void for_each_candidate(const T* s, int64_t begin, int64_t count, T bar, F&& f) {
  constexpr int L = kLanes<T>;
  for (int64_t c = begin; c < count; c += L) {
    const int64_t lanes = std::min<int64_t>(L, count - c);
    uint32_t bits = ~bits_greater(splat(bar), load(s + c)) & ((1u << lanes) - 1);
    for (; bits; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      f(c + lane, s[c + lane]);
    }
  }
}

// Rows to be verified lie far apart: asking for one this many dot products ahead hides the way to the outer caches.
constexpr int64_t kAhead = 6;

template <class T>
inline void prefetch_row(const T* x, int64_t depth) {
  for (int64_t d = 0; d < depth; d += 64 / sizeof(T))
    __builtin_prefetch(x + d);
}

// ---- max_similarity
// --------------------------------------------------------------------------------------------------

// The keys that may hold a row's maximum: upper bounds of s, and a value that the maximum reaches.
template <class T>
struct MaxRow {
  static constexpr int kCapacity = 32;
  T floor, best;
  int count;
  T upper[kCapacity];
  int64_t key[kCapacity];

  void drop_beaten() {
    int kept = 0;
    for (int n = 0; n < count; ++n) {
      if (upper[n] < floor) continue;
      upper[kept] = upper[n];
      key[kept++] = key[n];
    }
    count = kept;
  }

  void settle(const T* query, const Rows<T>& keys) {
    drop_beaten();
    for (int n = 0; n < std::min<int>(count, kAhead); ++n)
      prefetch_row(keys.row(key[n]), keys.depth);
    for (int n = 0; n < count; ++n) {
      if (n + kAhead < count) prefetch_row(keys.row(key[n + kAhead]), keys.depth);
      best = std::max(best, canonical_dot(query, keys.row(key[n]), keys.depth));
    }
    floor = std::max(floor, best);
    count = 0;
  }
};

template <class S, class T = typename S::Input>
void max_similarity_with(const MaxArgs<T>& args) {
  const int64_t n = args.queries.count, m = args.keys.count;
  const Panels<S, true> a(args.queries, args.threads);
  const Panels<S, false> b(args.keys, args.threads);
  const int workers = std::max(1, args.threads);
  Scratch<MaxRow<T>> all_rows(workers * kTaskRows);
  Scratch<T> strips(workers * Strip<S>::kSize);
  parallel_for(args.threads, (n + kTaskRows - 1) / kTaskRows, [&](int64_t task, int worker) {
    const int64_t begin = task * kTaskRows, end = std::min(n, begin + kTaskRows);
    MaxRow<T>* rows = all_rows.get() + worker * kTaskRows;
    T* strip = strips.get() + worker * Strip<S>::kSize;
    for (int64_t i = begin; i < end; ++i) {
      rows[i - begin].floor = rows[i - begin].best = -std::numeric_limits<T>::infinity();
      rows[i - begin].count = 0;
    }
    for (int64_t j = 0; j < m; j += kBlock) {
      const int64_t cols = std::min(kBlock, m - j);
      for (int64_t i0 = begin; i0 < end; i0 += S::MR) {
        Strip<S>::fill(a, i0, b, j, cols, strip);
        for (int64_t i = i0; i < std::min<int64_t>(end, i0 + S::MR); ++i) {
          MaxRow<T>& row = rows[i - begin];
          const T* s = strip + (i - i0) * kBlock;
          const T band = error_band(a.row(i), b.block(j)), top = largest_of(s, cols);
          row.floor = std::max(row.floor, top - band);
          const T bar = row.floor - band;
          if (top < bar) continue;
          for_each_candidate(s, 0, cols, bar, [&](int64_t c, T value) {
            if (row.count == MaxRow<T>::kCapacity) row.drop_beaten();
            if (row.count == MaxRow<T>::kCapacity) row.settle(args.queries.row(i), args.keys);
            row.upper[row.count] = value + band;
            row.key[row.count++] = j + c;
          });
        }
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      rows[i - begin].settle(args.queries.row(i), args.keys);
      args.values[i] = rows[i - begin].best;
    }
  });
}

// ---- topk_similarity
// -------------------------------------------------------------------------------------------------

// s is in [lower, upper]; both are the canonical value once it has been computed.
template <class T>
struct TopkEntry {
  T lower, upper;
  int64_t key;
};

template <class T>
struct TopkRow {
  TopkEntry<T>* entries;
  int64_t count, capacity, k;
  T bar;  // at least k keys reach it
  const T* query;

  void add(T value, T band, int64_t key, const Rows<T>& keys) {
    const bool bounded = band <= std::numeric_limits<T>::max();
    const T lower = bounded ? value - band : -std::numeric_limits<T>::infinity();
    const T upper = bounded ? value + band : std::numeric_limits<T>::infinity();
    if (upper < bar) return;
    if (count == capacity) {
      raise_bar();
      if (count > (k + capacity) / 2) finish(keys);
      if (upper < bar) return;
    }
    entries[count++] = {lower, upper, key};
  }

  // The bar becomes the k-th largest lower bound; entries below it go.
  void raise_bar() {
    if (count < k) return;
    std::nth_element(entries, entries + k - 1, entries + count,
                     [](const TopkEntry<T>& x, const TopkEntry<T>& y) { return x.lower > y.lower; });
    bar = std::max(bar, entries[k - 1].lower);
    int64_t kept = 0;
    for (int64_t n = 0; n < count; ++n)
      if (!(entries[n].upper < bar)) entries[kept++] = entries[n];
    count = kept;
  }

  // Leaves the k largest, with canonical values, in order.
  void finish(const Rows<T>& keys) {
    raise_bar();
    for (int64_t n = 0; n < count; ++n) {
      TopkEntry<T>& entry = entries[n];
      if (n + kAhead < count && entries[n + kAhead].lower != entries[n + kAhead].upper)
        prefetch_row(keys.row(entries[n + kAhead].key), keys.depth);
      if (entry.lower == entry.upper) continue;
      const T value = canonical_dot(query, keys.row(entry.key), keys.depth);
      entry.lower = entry.upper =
          value == value ? value : -std::numeric_limits<T>::infinity();  // inf - inf: keep an order
    }
    std::sort(entries, entries + count, [](const TopkEntry<T>& x, const TopkEntry<T>& y) {
      return x.lower > y.lower || (x.lower == y.lower && x.key < y.key);
    });
    count = std::min(count, k);
    if (count == k) bar = std::max(bar, entries[k - 1].lower);
  }
};

template <class S, class T = typename S::Input>
void topk_similarity_with(const TopkArgs<T>& args) {
  const Panels<S, true> a(args.queries, args.threads);
  const Panels<S, false> b(args.keys, args.threads);
  const auto original = [](const Rows<T>& rows, int64_t i) { return rows.order ? rows.order[i] : i; };

  int64_t tasks = 0;  // kTaskRows queries of one segment each
  for (int64_t g = 0; g < args.segment_count; ++g)
    tasks += (args.segments[g].query_end - args.segments[g].query_begin + kTaskRows - 1) / kTaskRows;
  Scratch<SearchSegment> list(tasks);
  for (int64_t g = 0, t = 0; g < args.segment_count; ++g) {
    SearchSegment part = args.segments[g];
    for (int64_t i = part.query_begin; i < args.segments[g].query_end; i += kTaskRows) {
      part.query_begin = i;
      part.query_end = std::min(i + kTaskRows, args.segments[g].query_end);
      list[t++] = part;
    }
  }

  const int workers = std::max(1, args.threads);
  const int64_t capacity = args.k + std::max<int64_t>(args.k, 48);
  Scratch<TopkEntry<T>> entries(workers * kTaskRows * capacity);
  Scratch<TopkRow<T>> all_rows(workers * kTaskRows);
  Scratch<T> strips(workers * Strip<S>::kSize);
  parallel_for(args.threads, tasks, [&](int64_t t, int worker) {
    const SearchSegment task = list[t];
    T* strip = strips.get() + worker * Strip<S>::kSize;
    TopkRow<T>* rows = all_rows.get() + worker * kTaskRows;
    for (int64_t i = task.query_begin, r = 0; i < task.query_end; ++i, ++r) {
      TopkEntry<T>* mine = entries.get() + (worker * kTaskRows + r) * capacity;
      rows[r] = {mine, 0, capacity, args.k, -std::numeric_limits<T>::infinity(), args.queries.row(i)};
    }
    // Starts at the keys in the same relative place as the queries: where both are one set, or patches of the same
    // images, the largest values are found there, and few later keys reach the bar.
    const int64_t begin_block = task.key_begin / kBlock, blocks = (task.key_end + kBlock - 1) / kBlock - begin_block;
    const int64_t place = task.query_begin * args.keys.count / args.queries.count;
    const int64_t start = std::min(std::max(place, task.key_begin), task.key_end - 1) / kBlock - begin_block;
    for (int64_t n = 0; n < blocks; ++n) {
      const int64_t j = (begin_block + (start + n) % blocks) * kBlock;
      const int64_t first = std::max<int64_t>(0, task.key_begin - j), cols = std::min(kBlock, task.key_end - j);
      for (int64_t i0 = task.query_begin / S::MR * S::MR; i0 < task.query_end; i0 += S::MR) {
        Strip<S>::fill(a, i0, b, j, cols, strip);
        for (int64_t i = std::max(i0, task.query_begin); i < std::min<int64_t>(task.query_end, i0 + S::MR); ++i) {
          TopkRow<T>& row = rows[i - task.query_begin];
          const T* s = strip + (i - i0) * kBlock;
          const T band = error_band(a.row(i), b.block(j)), bar = row.bar - band;
          if (largest_of(s, cols) < bar) continue;
          const int64_t self = args.exclude_self ? original(args.queries, i) : -1;
          for_each_candidate(s, first, cols, bar, [&](int64_t c, T value) {
            if (self < 0 || original(args.keys, j + c) != self) row.add(value, band, j + c, args.keys);
          });
        }
      }
    }
    for (int64_t i = task.query_begin; i < task.query_end; ++i) {
      TopkRow<T>& row = rows[i - task.query_begin];
      row.finish(args.keys);
      const int64_t out = original(args.queries, i) * args.k;
      for (int64_t n = 0; n < row.count; ++n) {
        args.values[out + n] = row.entries[n].lower;
        args.indices[out + n] = original(args.keys, row.entries[n].key);
      }
    }
  });
}

// ---- pairs_above
// -----------------------------------------------------------------------------------------------------

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
