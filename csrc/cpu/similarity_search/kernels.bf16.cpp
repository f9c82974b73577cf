#include "cpu/similarity_search/max_similarity.h"
#include "cpu/similarity_search/pairs_above.h"
#include "cpu/similarity_search/screen_bf16.h"
#include "cpu/similarity_search/screen_int8.h"
#include "cpu/similarity_search/topk_similarity.h"

namespace hpk::HPK_ISA {
namespace {

// Which screen is the fastest depends on how many pairs it leaves open, so a sample of pairs is looked at first. The
// choice affects time only. Costs are in units of one int8 product: screening takes 1, 2 or 4 per element (int8, bf16,
// fp32), and computing an open pair, whose rows must come from an outer cache, about 66 per element.
constexpr int kSample = 48;
constexpr float kOpenCost = 66;

template <class S>
class Sample {
 public:
  explicit Sample(const Rows<float>& rows) : count_(static_cast<int>(std::min<int64_t>(kSample, rows.count))) {
    constexpr int P = S::MR;
    Scratch<typename S::Group> panel(S::groups(rows.depth) * P);
    for (int r = 0; r < count_; r += P) {
      const float* source[P];
      float scales[P];
      int32_t offsets[P];
      for (int n = 0; n < P; ++n)
        source[n] = r + n < count_ ? rows.row((r + n) * rows.count / count_) : nullptr;
      S::template pack<true>(source, rows.depth, panel.get(), scales, offsets, bounds_ + r);
    }
  }
  Bound<float> operator[](int n) const { return bounds_[n]; }

 private:
  int count_;
  Bound<float> bounds_[kSample];
};

// `margin(s, count, out)` turns a sampled row of products into distances from its threshold, of which those below
// `width` bands count as open with the given weight.
template <class Margin>
SearchScreen cheapest_screen(const Rows<float>& a, const Rows<float>& b, float width, float weight, Margin&& margin) {
  const SearchScreen asked = search_screen();
  if (asked != SearchScreen::automatic) return asked;
  const int n = static_cast<int>(std::min<int64_t>(kSample, a.count)),
            m = static_cast<int>(std::min<int64_t>(kSample, b.count));
  if (a.count * b.count < 64 * kSample * kSample) return SearchScreen::int8;
  const Sample<ScreenInt8> a8(a), b8(b);
  const Sample<ScreenBf16> a16(a), b16(b);
  int open8 = 0, open16 = 0;
  for (int i = 0; i < n; ++i) {
    const int64_t row = i * a.count / n;
    float s[kSample];
    for (int j = 0; j < m; ++j)
      s[j] = canonical_dot(a.row(row), b.row(j * b.count / m), a.depth);
    margin(row, s, m);
    for (int j = 0; j < m; ++j) {
      open8 += !(std::fabs(s[j]) > width * error_band(a8[i], b8[j]));
      open16 += !(std::fabs(s[j]) > width * error_band(a16[i], b16[j]));
    }
  }
  const float per_pair = weight * kOpenCost / static_cast<float>(n * m);
  const float cost8 = 1 + per_pair * static_cast<float>(open8), cost16 = 2 + per_pair * static_cast<float>(open16);
  if (cost8 <= cost16 && cost8 < 4) return SearchScreen::int8;
  return cost16 < 4 ? SearchScreen::bf16 : SearchScreen::exact;
}

// For searches of the largest values: open are the keys less than two bands below the rank-th value. That value is
// higher among all keys than in the sample, and fewer keys are near it.
SearchScreen screen_for_largest(const Rows<float>& queries, const Rows<float>& keys, int64_t k) {
  return cheapest_screen(queries, keys, 2, 0.125f, [&](int64_t, float* s, int count) {
    const int64_t rank = std::min<int64_t>(count - 1, k * count / keys.count);
    float sorted[kSample];
    std::copy(s, s + count, sorted);
    std::nth_element(sorted, sorted + rank, sorted + count, [](float x, float y) { return x > y; });
    for (int j = 0; j < count; ++j)
      s[j] = sorted[rank] - s[j];
  });
}

SearchScreen screen_for_pairs(const PairsArgs<float>& args) {
  return cheapest_screen(args.x, args.keys, 1, 1, [&](int64_t row, float* s, int count) {
    for (int j = 0; j < count; ++j) {
      float limit = args.thresholds[row];
      if (args.key_thresholds) limit = std::min(limit, args.key_thresholds[j * args.keys.count / count]);
      s[j] -= limit;
    }
  });
}

}  // namespace

void max_similarity(const MaxArgs<float>& args) {
  switch (screen_for_largest(args.queries, args.keys, 1)) {
    case SearchScreen::bf16:
      return max_similarity_with<ScreenBf16>(args);
    case SearchScreen::exact:
      return avx512::max_similarity(args);
    default:
      return max_similarity_with<ScreenInt8>(args);
  }
}

void topk_similarity(const TopkArgs<float>& args) {
  switch (screen_for_largest(args.queries, args.keys, args.k)) {
    case SearchScreen::bf16:
      return topk_similarity_with<ScreenBf16>(args);
    case SearchScreen::exact:
      return avx512::topk_similarity(args);
    default:
      return topk_similarity_with<ScreenInt8>(args);
  }
}

void pairs_above(const PairsArgs<float>& args) {
  switch (screen_for_pairs(args)) {
    case SearchScreen::bf16:
      return PairsSearch<ScreenBf16>(args).run();
    case SearchScreen::exact:
      return avx512::pairs_above(args);
    default:
      return PairsSearch<ScreenInt8>(args).run();
  }
}

}  // namespace hpk::HPK_ISA
