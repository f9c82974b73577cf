// The largest product of each row with any key, for any screening engine S.
#pragma once

#include "cpu/similarity_search/search.h"

namespace hpk::HPK_ISA {

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

}  // namespace hpk::HPK_ISA
