// Exact reductions of s_ij = <a_i, b_j> over all pairs: row maximum, k largest, bits of s_ij > threshold.
// The method is explained in hpkernels/ops/similarity_search/README.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/runtime/isa.h"

namespace hpk {

// A row-major matrix without gaps; T is float or double. `order` (or nullptr) permutes the rows.
template <class T>
struct Rows {
  const char* name;  // of the argument, for error messages
  const T* data;
  int64_t count, depth;
  const int64_t* order;

  const T* row(int64_t i) const { return data + (order ? order[i] : i) * depth; }
};

// The engine that screens fp32 rows on machines with bf16 and int8 products: normally chosen by a look at the data.
enum class SearchScreen { automatic, int8, bf16, exact };
SearchScreen search_screen();
void set_search_screen(const std::string& name);  // throws std::invalid_argument

// One set of queries searched in one range of keys, both as positions in the order of their Rows.
struct SearchSegment {
  int64_t query_begin, query_end, key_begin, key_end;
};

std::vector<int64_t> sorted_by_group(const int64_t* groups, int64_t count);
// The groups that have both queries and keys, as ranges of the sorted rows.
std::vector<SearchSegment> segments_of(const int64_t* query_groups, const std::vector<int64_t>& queries,
                                       const int64_t* key_groups, const std::vector<int64_t>& keys);

template <class T>
struct MaxArgs {
  Rows<T> queries, keys;
  T* values;  // (queries,)
  int threads;
};

template <class T>
struct TopkArgs {
  Rows<T> queries, keys;
  int64_t k;
  bool exclude_self;
  const SearchSegment* segments;
  int64_t segment_count;
  T* values;         // (queries, k), in original row order, filled with -inf
  int64_t* indices;  // (queries, k), original key rows, filled with -1
  int threads;
};

template <class T>
struct PairsArgs {
  Rows<T> x, keys;  // keys == x when symmetric
  bool symmetric;
  const T* thresholds;      // (x,)
  const T* key_thresholds;  // (keys,) or nullptr: only the row's threshold counts
  uint32_t* bits;           // (x, words)
  int64_t words;
  int threads;
};

}  // namespace hpk

#define HPK_SEARCH_FUNCTIONS(T)                  \
  void max_similarity(const MaxArgs<T>& args);   \
  void topk_similarity(const TopkArgs<T>& args); \
  void pairs_above(const PairsArgs<T>& args);

HPK_DECLARE(HPK_SEARCH_FUNCTIONS(float) HPK_SEARCH_FUNCTIONS(double))

#ifdef HPK_HAVE_AVX512_BF16
namespace hpk::avx512_bf16 {
HPK_SEARCH_FUNCTIONS(float)
}  // namespace hpk::avx512_bf16
#endif
