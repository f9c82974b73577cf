// The k largest products of each row, for any screening engine S.
#pragma once

#include "cpu/similarity_search/search.h"

namespace hpk::HPK_ISA {

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

}  // namespace hpk::HPK_ISA
