// The Python functions of csrc/cpu/similarity_search.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/runtime/bindings.h"
#include "cpu/similarity_search/similarity_search.h"

namespace hpk::similarity_search_bindings {

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
void max_similarity(uintptr_t queries, int64_t n, uintptr_t keys, int64_t m, int64_t depth, uintptr_t values,
                    int threads) {
  const MaxArgs<T> args{{"queries", pointer<T>(queries), n, depth, nullptr},
                        {"keys", pointer<T>(keys), m, depth, nullptr},
                        pointer<T>(values),
                        threads};
  HPK_SEARCH(args.keys, max_similarity(args));
}

template <class T>
void topk_similarity(uintptr_t queries, int64_t n, uintptr_t keys, int64_t m, int64_t depth, int64_t k,
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
void pairs_above(uintptr_t x, int64_t n, uintptr_t keys, int64_t m, int64_t depth, bool symmetric, uintptr_t thresholds,
                 uintptr_t key_thresholds, uintptr_t bits, int64_t words, int threads) {
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

inline void bind(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("set_search_screen", &set_search_screen, py::arg("name"),
        "Use one screening engine for fp32 search where several are there (tests and benchmarks); 'automatic' chooses "
        "again.");
  m.def("max_similarity_f32", &max_similarity<float>, unlocked);
  m.def("max_similarity_f64", &max_similarity<double>, unlocked);
  m.def("topk_similarity_f32", &topk_similarity<float>, unlocked);
  m.def("topk_similarity_f64", &topk_similarity<double>, unlocked);
  m.def("pairs_above_f32", &pairs_above<float>, unlocked);
  m.def("pairs_above_f64", &pairs_above<double>, unlocked);
}

}  // namespace hpk::similarity_search_bindings
