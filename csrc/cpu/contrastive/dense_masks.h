// The masks of the dense contrastive kernels, word by word, and how all rows are packed for tiles of logits.
#pragma once

#include <algorithm>

#include "cpu/contrastive/contrastive.h"
#include "cpu/contrastive/lanes.h"
#include "cpu/pair_bits/pair_bits.h"
#include "cpu/runtime/thread_pool.h"
#include "cpu/vector/tile.h"

namespace hpk::HPK_ISA {
namespace {

constexpr int64_t kTile = 192;  // rows and columns of a tile: whole words, whole register blocks
constexpr int kWord = 32;

// ---- masks word by word

// The bits of 32 pairs (i, j..j + 31): E, P, Q in the direction i -> j, and E_t, P_t, Q_t for j -> i.
struct WordMasks {
  uint32_t e, p, q, e_t, p_t, q_t;
};

// The words of a row of a tile. Where they have no news the kernels need not look at them: `full` says that E and E_t
// are all ones, `pairs` that there is a bit in P, Q or their transposes. A full row without pairs has no words.
struct RowMasks {
  bool full, pairs;
  WordMasks words[kTile / kWord];

  bool pairs_at(int64_t w) const { return words[w].p | words[w].q | words[w].p_t | words[w].q_t; }
};

// The words first .. first + count - 1 of row i.
template <class Masks>
void read_row(const Masks& masks, int64_t i, int64_t first, int64_t count, RowMasks& row) {
  row.full = row.pairs = false;
  uint32_t everywhere = ~0u;
  for (int64_t w = 0; w < count; ++w) {
    row.words[w] = masks.at(i, first + w);
    everywhere &= row.words[w].e & row.words[w].e_t;
    row.pairs |= row.pairs_at(w);
  }
  row.full = everywhere == ~0u;
}

// 32 bits from position `start` on of a row of `period` bits that repeats for ever.
uint32_t repeated_word(const uint32_t* row, int64_t period, int64_t start) {
  uint32_t out = 0;
  int64_t position = start % period;
  for (int64_t filled = 0; filled < kWord;) {
    const int64_t take = std::min({kWord - filled, period - position, kWord - (position & 31)});
    const uint32_t bits = (row[position >> 5] >> (position & 31)) & (take == kWord ? ~0u : (1u << take) - 1);
    out |= bits << filled;
    filled += take;
    position += take;
    if (position == period) position = 0;
  }
  return out;
}

template <class T>
class DenseMasks {
 public:
  DenseMasks(const ContrastiveArgs<T>& args, bool all)
      : masks_(args.masks),
        rows_(args.rows),
        first_(args.first),
        all_(all),
        negatives_t_words_(words_for(args.masks.negative_rows)),
        negatives_t_(masks_.negatives ? args.rows * negatives_t_words_ : 0) {
    if (masks_.negatives)
      transpose_bits(masks_.negatives, masks_.negative_rows, args.rows, negatives_t_.get(), args.threads);
  }

  // i an anchor, w a word that holds columns < rows
  WordMasks at(int64_t i, int64_t w) const {
    const int64_t k = (i - first_) * masks_.words + w;
    const uint32_t valid = valid_bits(i, w);
    WordMasks m{};
    m.p = masks_.positives[k] & valid;
    m.p_t = masks_.positives_t[k] & valid;
    if (masks_.extra) {
      m.q = masks_.extra[k] & valid;
      m.q_t = masks_.extra_t[k] & valid;
    }
    if (all_) {
      m.e = m.e_t = valid;
    } else {
      m.e = m.p;
      m.e_t = m.p_t;
      if (masks_.negatives) {
        m.e |= masks_.negatives[i % masks_.negative_rows * masks_.words + w] & valid;
        m.e_t |= repeated_word(negatives_t_.get() + i * negatives_t_words_, masks_.negative_rows, w * kWord) & valid;
      }
    }
    return m;
  }

  // The words first .. first + count - 1 of row i.
  void row(int64_t i, int64_t first, int64_t count, RowMasks& out) const {
    const bool inside = (first + count) * kWord <= rows_ && (i >> 5 < first || i >> 5 >= first + count);
    if (all_ && inside && !any_pair(i, first, count)) {
      out.full = true;
      out.pairs = false;
    } else {
      read_row(*this, i, first, count, out);
    }
  }

  // Whether any anchor has a pair with one of the kTile columns from j0 on: here nobody looks, and all are visited.
  bool any_in_columns(int64_t) const { return true; }

 private:
  bool any_pair(int64_t i, int64_t first, int64_t count) const {
    const int64_t k = (i - first_) * masks_.words + first;
    uint32_t bits = 0;
    for (int64_t w = k; w < k + count; ++w)
      bits |= masks_.positives[w] | masks_.positives_t[w];
    if (masks_.extra)
      for (int64_t w = k; w < k + count; ++w)
        bits |= masks_.extra[w] | masks_.extra_t[w];
    return bits;
  }

  uint32_t valid_bits(int64_t i, int64_t w) const {
    const int64_t left = rows_ - w * kWord;
    const uint32_t inside = left >= kWord ? ~0u : (1u << left) - 1;
    return i >> 5 == w ? inside & ~(1u << (i & 31)) : inside;
  }

  const ContrastiveMasks& masks_;
  int64_t rows_, first_;
  bool all_;
  int64_t negatives_t_words_;
  Scratch<uint32_t> negatives_t_;
};

template <class T>
inline LaneMask<T> lanes_of(uint32_t word, int64_t lane) {  // lanes lane .. lane + kLanes - 1 of a word
  return expand<T>((word >> lane) & ((1u << kLanes<T>)-1));
}

// All rows as the columns of tiles: the panel of columns from j0 on starts at packed + j0 * depth, j0 a multiple of
// kTile.
template <class T>
void pack_tile_columns(const ContrastiveArgs<T>& args, const T* x, T* packed) {
  parallel_for(args.threads, (args.rows + kTile - 1) / kTile, [&](int64_t panel, int) {
    const int64_t first = panel * kTile, count = std::min(kTile, args.rows - first);
    pack_rows<Engine<T>::NR>(x + first * args.depth, args.depth, nullptr, count, args.depth,
                             packed + first * args.depth);
  });
}

}  // namespace
}  // namespace hpk::HPK_ISA
