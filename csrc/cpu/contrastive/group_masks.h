// The denominator by groups, as masks for the dense contrastive kernels: words of bits made where they are needed, from
// four bytes a row, so that no N x N / 8 bytes exist.
#pragma once

#include "cpu/contrastive/dense_masks.h"

namespace hpk::HPK_ISA {
namespace {

// Bit l of the result: p[l] == value, for 32 numbers.
inline uint32_t bits_equal(const int32_t* p, int32_t value) {
#if defined(__AVX512F__)
  const __m512i wanted = _mm512_set1_epi32(value);
  const uint32_t low = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), wanted);
  const uint32_t high = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p + 16), wanted);
  return low | high << 16;
#elif defined(__AVX2__)
  uint32_t bits = 0;
  for (int part = 0; part < 4; ++part) {
    const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8 * part));
    const __m256i same = _mm256_cmpeq_epi32(numbers, _mm256_set1_epi32(value));
    bits |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(same))) << 8 * part;
  }
  return bits;
#else
  uint32_t bits = 0;
  for (int l = 0; l < kWord; ++l)
    bits |= static_cast<uint32_t>(p[l] == value) << l;
  return bits;
#endif
}

template <class T>
class GroupMasks {
 public:
  GroupMasks(const ContrastiveArgs<T>& args, const ContrastiveGroups& groups)
      : same_(groups.query == groups.key),
        words_((args.rows + kTile - 1) / kTile * (kTile / kWord)),
        query_(args, groups.query, words_),
        key_(args, groups.key, same_ ? 0 : words_) {}

  // i an anchor, w a word that holds columns < rows
  WordMasks at(int64_t i, int64_t w) const {
    WordMasks m{};
    m.e = query_.others(keys(), i, w);
    m.e_t = same_ ? m.e : keys().others(query_, i, w);
    return m;
  }

  void row(int64_t i, int64_t first, int64_t count, RowMasks& out) const { read_row(*this, i, first, count, out); }

  // Whether any anchor can have a pair with one of the kTile columns from j0 on, in either direction.
  bool any_in_columns(int64_t j0) const {
    return (query_.in_anchors && keys().any(j0)) || (keys().in_anchors && query_.any(j0));
  }

 private:
  struct Part {
    Scratch<int32_t> numbers;  // -1 past the end
    Scratch<uint32_t> valid;   // bits [number >= 0]
    bool in_anchors;           // whether an anchor has a number >= 0

    Part(const ContrastiveArgs<T>& args, const int32_t* given, int64_t words)
        : numbers(words * kWord), valid(words), in_anchors(false) {
      for (int64_t w = 0; w < words; ++w) {
        uint32_t bits = 0;
        for (int l = 0; l < kWord; ++l) {
          const int64_t i = w * kWord + l;
          numbers[i] = i < args.rows ? given[i] : -1;
          bits |= static_cast<uint32_t>(numbers[i] >= 0) << l;
          in_anchors |= numbers[i] >= 0 && i >= args.first && i < args.first + args.count;
        }
        valid[w] = bits;
      }
    }

    // [number_i >= 0][theirs_j >= 0][number_i != theirs_j] for the columns j of word w
    uint32_t others(const Part& theirs, int64_t i, int64_t w) const {
      return numbers[i] < 0 ? 0u : theirs.valid[w] & ~bits_equal(theirs.numbers.get() + w * kWord, numbers[i]);
    }
    bool any(int64_t j0) const {
      uint32_t bits = 0;
      for (int64_t w = j0 / kWord; w < (j0 + kTile) / kWord; ++w)
        bits |= valid[w];
      return bits;
    }
  };

  const Part& keys() const { return same_ ? query_ : key_; }

  bool same_;
  int64_t words_;
  Part query_, key_;
};

}  // namespace
}  // namespace hpk::HPK_ISA
