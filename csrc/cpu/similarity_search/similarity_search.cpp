#include "cpu/similarity_search/similarity_search.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <numeric>
#include <stdexcept>

namespace hpk {
namespace {

std::atomic<SearchScreen> asked_screen{SearchScreen::automatic};

}  // namespace

SearchScreen search_screen() { return asked_screen; }

void set_search_screen(const std::string& name) {
  constexpr const char* names[] = {"automatic", "int8", "bf16", "exact"};
  const auto* found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names))
    throw std::invalid_argument("expected automatic, int8, bf16 or exact, got '" + name + "'");
  asked_screen = static_cast<SearchScreen>(found - std::begin(names));
}

std::vector<int64_t> sorted_by_group(const int64_t* groups, int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [groups](int64_t x, int64_t y) { return groups[x] < groups[y]; });
  return order;
}

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

}  // namespace hpk
