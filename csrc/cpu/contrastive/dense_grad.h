// The contrastive gradient for a dense denominator: tiles of coefficients G_ij + G_ji times rows of x.
//
// With all rows as anchors a tile of coefficients is computed once and serves its rows and its columns: panels of rows
// meet as in a tournament (tournament.h), so no two tiles write one panel at a time, and every panel is written in a
// fixed order. A range of anchors owns its panels, which pass all columns in order.
#pragma once

#include "cpu/contrastive/dense_masks.h"
#include "cpu/contrastive/tournament.h"

namespace hpk::HPK_ISA {
namespace {

template <class T, class Masks>
class DenseGrad {
 public:
  DenseGrad(const ContrastiveArgs<T>& args, const Masks& masks)
      : args_(args),
        masks_(masks),
        fixed_(fixed_shift(args)),
        scale_(static_cast<T>(1 / args.temperature)),
        panels_((args.rows + kTile - 1) / kTile),
        own_panels_((args.count + kTile - 1) / kTile),
        block_(kTile * E::round_cols(args.depth)),
        packed_(E::b_size(args.rows, args.depth)),
        packed_columns_(panels_ * block_),
        sums_(own_panels_ * block_),
        factors_(4 * panels_ * kTile) {}

  // One stream: rows of x, its gradients from index `at` of the (streams, rows) tables on.
  void run(const T* x, const ContrastiveGrads<T>& grads, int64_t at, T* out) {
    const int64_t stride = panels_ * kTile;
    denominator_ = factors_.get();
    positive_ = denominator_ + stride;
    extra_ = positive_ + stride;
    lse_ = extra_ + stride;
    std::fill(denominator_, denominator_ + 4 * stride, T(0));
    for (int64_t i = 0; i < args_.rows; ++i) {
      const RowFactors<T> f = row_factors(args_, grads, at + i);
      denominator_[i] = f.denominator * scale_;
      positive_[i] = f.positive * scale_;
      extra_[i] = f.extra * scale_;
      lse_[i] = f.lse;
    }
    parallel_for(args_.threads, panels_, [&](int64_t panel, int) {
      const T* rows = x + panel * kTile * args_.depth;
      const int64_t count = height(panel);
      pack_rows<E::NR>(rows, args_.depth, nullptr, count, args_.depth, packed_.get() + panel * kTile * args_.depth);
      pack_columns<E::NR>(rows, args_.depth, nullptr, count, args_.depth, packed_columns_.get() + panel * block_);
    });
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(args_.threads, panels_));
    const Scratch<T> scratch(workers * kTile * kTile);
    std::fill(scratch.get(), scratch.get() + workers * kTile * kTile, T(0));
    std::fill(sums_.get(), sums_.get() + own_panels_ * block_, T(0));
    const auto tile_of = [&](int worker) { return scratch.get() + worker * kTile * kTile; };
    if (args_.all_anchors()) {
      tournament(static_cast<int>(workers), panels_, [&](int64_t first, int64_t second, int worker) {
        add_to_rows(x, first, second, tile_of(worker));
        if (first != second) add_to_columns(first, second, tile_of(worker));
      });
    } else {
      parallel_for(args_.threads, own_panels_, [&](int64_t panel, int worker) {
        for (int64_t other = 0; other < panels_; ++other)
          if (masks_.any_in_columns(other * kTile)) add_to_rows(x, panel, other, tile_of(worker));
      });
    }
    parallel_for(args_.threads, own_panels_, [&](int64_t panel, int) {
      for (int64_t r = 0; r < own_height(panel); ++r) {
        const T* sum = sum_of(panel) + r * sum_stride();
        std::copy(sum, sum + args_.depth, out + (panel * kTile + r) * args_.depth);
      }
    });
  }

 private:
  using E = Engine<T>;
  static constexpr int kPieces = kWord / kLanes<T>;

  int64_t height(int64_t panel) const { return std::min(kTile, args_.rows - panel * kTile); }
  int64_t own_height(int64_t panel) const { return std::min(kTile, args_.count - panel * kTile); }
  int64_t sum_stride() const { return E::round_cols(args_.depth); }

  T* sum_of(int64_t panel) const { return sums_.get() + panel * block_; }

  // Computes the coefficients of a panel of anchors and a panel of columns, and adds them times X to the anchors' sums.
  void add_to_rows(const T* x, int64_t panel, int64_t other, T* tile) const {
    const int64_t i0 = args_.first + panel * kTile, rows = own_height(panel), columns = height(other);
    multiply<E>(rows, columns, args_.depth, rows_of(x + i0 * args_.depth, args_.depth),
                packed_.get() + other * kTile * args_.depth, tile, kTile);
    for (int64_t r = 0; r < rows; ++r) {
      if (fixed_) {
        coefficients<true>(i0 + r, other * kTile, columns, tile + r * kTile);
      } else {
        coefficients<false>(i0 + r, other * kTile, columns, tile + r * kTile);
      }
    }
    multiply<E>(rows, args_.depth, columns, rows_of<T>(tile, kTile), packed_columns_.get() + other * block_,
                sum_of(panel), sum_stride(), true);
  }

  // Adds the same coefficients, transposed, times X to the sums of the columns, which are anchors too.
  void add_to_columns(int64_t panel, int64_t other, const T* tile) const {
    multiply<E>(height(other), args_.depth, height(panel), columns_of(tile, kTile),
                packed_columns_.get() + panel * block_, sum_of(other), sum_stride(), true);
  }

  // Replaces the dot products of row i with columns j0 .. by (G_ij + G_ji) / temperature.
  template <bool kFixed>
  void coefficients(int64_t i, int64_t j0, int64_t columns, T* values) const {
    const int64_t words = (columns + kWord - 1) / kWord;
    const Vec<T> scale = splat(scale_), row_shift = splat(kFixed ? scale_ : lse_[i]);
    const Vec<T> row_denominator = splat(denominator_[i]), row_positive = splat(positive_[i]),
                 row_extra = splat(extra_[i]);
    RowMasks m;
    masks_.row(i, j0 / kWord, words, m);
    const auto replace = [&](int64_t v, auto&& in_e, auto&& in_e_t) {
      T* value = values + v * kLanes<T>;
      const int64_t j = j0 + v * kLanes<T>;
      const Vec<T> logit = load(value) * scale, e = exp<T>(logit - row_shift);
      const Vec<T> e_t = kFixed ? e : exp<T>(logit - load(lse_ + j));
      store(value, in_e(e * row_denominator) + in_e_t(e_t * load(denominator_ + j)));
    };
    if (m.full) {
      const auto all = [](Vec<T> e) { return e; };
      for (int64_t v = 0; v < words * kPieces; ++v)
        replace(v, all, all);
    } else {
      for (int64_t v = 0; v < words * kPieces; ++v) {
        const WordMasks& word = m.words[v / kPieces];
        const int64_t lane = v % kPieces * kLanes<T>;
        replace(
            v, [&](Vec<T> e) { return keep(lanes_of<T>(word.e, lane), e); },
            [&](Vec<T> e) { return keep(lanes_of<T>(word.e_t, lane), e); });
      }
    }
    for (int64_t w = 0; m.pairs && w < words; ++w) {
      if (!m.pairs_at(w)) continue;
      const WordMasks& word = m.words[w];
      for (int64_t lane = 0; lane < kWord; lane += kLanes<T>) {
        T* value = values + w * kWord + lane;
        const int64_t j = j0 + w * kWord + lane;
        Vec<T> total = load(value);
        total += keep(lanes_of<T>(word.p, lane), row_positive) + keep(lanes_of<T>(word.p_t, lane), load(positive_ + j));
        total += keep(lanes_of<T>(word.q, lane), row_extra) + keep(lanes_of<T>(word.q_t, lane), load(extra_ + j));
        store(value, total);
      }
    }
  }

  const ContrastiveArgs<T>& args_;
  const Masks& masks_;
  bool fixed_;
  T scale_;
  int64_t panels_, own_panels_, block_;
  Scratch<T> packed_, packed_columns_, sums_, factors_;
  T *denominator_ = nullptr, *positive_ = nullptr, *extra_ = nullptr, *lse_ = nullptr;
};

}  // namespace
}  // namespace hpk::HPK_ISA
