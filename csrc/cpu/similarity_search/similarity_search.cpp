#include "cpu/similarity_search/similarity_search.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/runtime/bindings.h"

namespace hpk {
namespace {

std::atomic<SearchScreen> asked_screen{SearchScreen::automatic};

void set_search_screen(const std::string& name) {
  constexpr const char* names[] = {"automatic", "int8", "bf16", "exact"};
  const auto* found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names))
    throw std::invalid_argument("expected automatic, int8, bf16 or exact, got '" + name + "'");
  asked_screen = static_cast<SearchScreen>(found - std::begin(names));
}

// Up to this depth int8 sums cannot overflow, and error_band allows for all bf16 products that are flushed to zero.
constexpr int64_t kMaxScreenDepth = 32768;

template <class T>
bool screens_narrow(const Rows<T>& rows) {
  return isa() >= Isa::avx512_bf16 && rows.depth <= kMaxScreenDepth;
}

#ifdef HPK_HAVE_AVX512_BF16
#define HPK_SEARCH(rows, ...)                                  \
  if constexpr (sizeof(T) == sizeof(float)) {                  \
    if (screens_narrow(rows)) return avx512_bf16::__VA_ARGS__; \
  }                                                            \
  HPK_DISPATCH(__VA_ARGS__)
#else
#define HPK_SEARCH(rows, ...) HPK_DISPATCH(__VA_ARGS__)
#endif

template <class T>
void bound_max_similarity(uintptr_t queries, int64_t n, uintptr_t keys, int64_t m, int64_t depth, uintptr_t values,
                          int threads) {
  const MaxArgs<T> args{{"queries", pointer<T>(queries), n, depth, nullptr},
                        {"keys", pointer<T>(keys), m, depth, nullptr},
                        pointer<T>(values),
                        threads};
  HPK_SEARCH(args.keys, max_similarity(args));
}

std::vector<int64_t> sorted_by_group(const int64_t* groups, int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [groups](int64_t x, int64_t y) { return groups[x] < groups[y]; });
  return order;
}

// The groups that have both queries and keys, as ranges of the sorted rows.
std::vector<SearchSegment> segments_of(const int64_t* query_groups, const std::vector<int64_t>& queries,
                                       const int64_t* key_groups, const std::vector<int64_t>& keys) {
  std::vector<SearchSegment> segments;
  const int64_t n = static_cast<int64_t>(queries.size()), m = static_cast<int64_t>(keys.size());
  for (int64_t i = 0, j = 0; i < n;) {
    const int64_t group = query_groups[queries[i]];
    const int64_t query_begin = i;
    while (i < n && query_groups[queries[i]] == group)
      ++i;
    while (j < m && key_groups[keys[j]] < group)
      ++j;
    const int64_t key_begin = j;
    while (j < m && key_groups[keys[j]] == group)
      ++j;
    if (j > key_begin) segments.push_back({query_begin, i, key_begin, j});
  }
  return segments;
}

template <class T>
void bound_topk_similarity(uintptr_t queries, int64_t n, uintptr_t keys, int64_t m, int64_t depth, int64_t k,
                           bool exclude_self, uintptr_t query_groups, uintptr_t key_groups, uintptr_t values,
                           uintptr_t indices, int threads) {
  TopkArgs<T> args{{"queries", pointer<T>(queries), n, depth, nullptr},
                   {"keys", pointer<T>(keys), m, depth, nullptr},
                   k,
                   exclude_self,
                   nullptr,
                   0,
                   pointer<T>(values),
                   pointer<int64_t>(indices),
                   threads};
  std::fill(args.values, args.values + n * k, -std::numeric_limits<T>::infinity());
  std::fill(args.indices, args.indices + n * k, int64_t{-1});
  std::vector<int64_t> query_order, key_order;
  std::vector<SearchSegment> segments{{0, n, 0, m}};
  if (query_groups) {
    query_order = sorted_by_group(pointer<int64_t>(query_groups), n);
    key_order = sorted_by_group(pointer<int64_t>(key_groups), m);
    segments = segments_of(pointer<int64_t>(query_groups), query_order, pointer<int64_t>(key_groups), key_order);
    args.queries.order = query_order.data();
    args.keys.order = key_order.data();
  }
  args.segments = segments.data();
  args.segment_count = static_cast<int64_t>(segments.size());
  HPK_SEARCH(args.keys, topk_similarity(args));
}

template <class T>
void bound_pairs_above(uintptr_t x, int64_t n, uintptr_t keys, int64_t m, int64_t depth, bool symmetric,
                       uintptr_t thresholds, uintptr_t key_thresholds, uintptr_t bits, int64_t words, int threads) {
  const PairsArgs<T> args{{"x", pointer<T>(x), n, depth, nullptr},
                          {"keys", pointer<T>(keys), m, depth, nullptr},
                          symmetric,
                          pointer<T>(thresholds),
                          pointer<T>(key_thresholds),
                          pointer<uint32_t>(bits),
                          words,
                          threads};
  HPK_SEARCH(args.keys, pairs_above(args));
}

}  // namespace

SearchScreen search_screen() { return asked_screen; }

HPK_BIND(similarity_search) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("set_search_screen", &set_search_screen, py::arg("name"),
        "Use one screening engine for fp32 search where several are there (tests and benchmarks); 'automatic' chooses "
        "again.");
  m.def("max_similarity_f32", &bound_max_similarity<float>, unlocked);
  m.def("max_similarity_f64", &bound_max_similarity<double>, unlocked);
  m.def("topk_similarity_f32", &bound_topk_similarity<float>, unlocked);
  m.def("topk_similarity_f64", &bound_topk_similarity<double>, unlocked);
  m.def("pairs_above_f32", &bound_pairs_above<float>, unlocked);
  m.def("pairs_above_f64", &bound_pairs_above<double>, unlocked);
}

}  // namespace hpk
