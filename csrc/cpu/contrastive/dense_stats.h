// The contrastive statistics for a dense denominator: every tile of logits is computed, reduced and forgotten.
//
// With all rows as anchors only the upper triangle of tiles is taken: one exponential serves a pair in both directions.
// Each tile leaves one partial result per row and per column, and the partials of a row are added in the order of the
// tiles.
#pragma once

#include <limits>

#include "cpu/contrastive/dense_masks.h"

namespace hpk::HPK_ISA {
namespace {

constexpr int64_t kMaxTiles = 64;  // tiles per side, so that partial results stay below 64 numbers per row
constexpr int64_t kTilesPerTask = 8;

// What one tile adds to one row.
template <class T>
struct TileSums {
  T sum, pos, ext;
};

// Partial results of N rows: the sum of exponentials and its shift, and the sums over P and Q.
template <class T>
struct Partials {
  static constexpr int kFields = 4;
  T *sum, *shift, *pos, *ext;

  Partials(T* memory, int64_t rows)
      : sum(memory), shift(memory + rows), pos(memory + 2 * rows), ext(memory + 3 * rows) {}

  void start(int64_t first, int64_t end, T first_shift) const {
    for (T* field : {sum, pos, ext})
      std::fill(field + first, field + end, T(0));
    std::fill(shift + first, shift + end, first_shift);
  }
  void add(int64_t i, TileSums<T> part) const {
    sum[i] += part.sum;
    pos[i] += part.pos;
    ext[i] += part.ext;
  }
  void raise(int64_t i, T top) const {  // a larger shift
    if (!(top > shift[i])) return;
    sum[i] *= exp_of(shift[i] - top);
    shift[i] = top;
  }
};

// Sums over the columns j0 .. j0 + width - 1 of row i, with the row's dot products.
template <class T, class Masks>
TileSums<T> sums_of_row(const Masks& masks, int64_t i, int64_t j0, int64_t width, const T* dots, T scale, T shift) {
  Vec<T> all_sums{}, all_pos{}, all_ext{};
  for (int64_t w = 0; w * kWord < width; ++w) {
    const WordMasks m = masks.at(i, j0 / kWord + w);
    for (int64_t lane = 0; lane < kWord; lane += kLanes<T>) {
      const Vec<T> logit = load(dots + w * kWord + lane) * splat(scale);
      all_sums += keep(lanes_of<T>(m.e, lane), exp<T>(logit - splat(shift)));
      if (!(m.p | m.q)) continue;
      all_pos += keep(lanes_of<T>(m.p, lane), logit);
      all_ext += keep(lanes_of<T>(m.q, lane), logit);
    }
  }
  return {sum<T>(all_sums), sum<T>(all_pos), sum<T>(all_ext)};
}

// The largest logit in E of the same columns; -inf if there is none.
template <class T, class Masks>
T top_of_row(const Masks& masks, int64_t i, int64_t j0, int64_t width, const T* dots, T scale) {
  const Vec<T> none = splat(-std::numeric_limits<T>::infinity());
  Vec<T> top = none;
  for (int64_t w = 0; w * kWord < width; ++w) {
    const uint32_t e = masks.at(i, j0 / kWord + w).e;
    for (int64_t lane = 0; lane < kWord; lane += kLanes<T>)
      top = max(top, lanes_of<T>(e, lane) ? load(dots + w * kWord + lane) * splat(scale) : none);
  }
  return largest<T>(top);
}

// ---- all rows: each tile of the upper triangle once

template <class T, class Masks>
class DenseStats {
 public:
  DenseStats(const ContrastiveArgs<T>& args, const Masks& masks, const T* x)
      : args_(args),
        masks_(masks),
        x_(x),
        fixed_(fixed_shift(args)),
        scale_(static_cast<T>(1 / args.temperature)),
        edge_(kTile * std::max<int64_t>(1, (args.rows + kTile * kMaxTiles - 1) / (kTile * kMaxTiles))),
        tiles_((args.rows + edge_ - 1) / edge_),
        packed_(E::b_size(args.rows, args.depth)),
        partials_(tiles_ * Partials<T>::kFields * args.rows) {}

  void run(T* lse, T* pos, T* ext) {
    pack_tile_columns(args_, x_, packed_.get());
    const int64_t chunks = (tiles_ + kTilesPerTask - 1) / kTilesPerTask, tasks = tiles_ * chunks;
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(args_.threads, tasks));
    const Scratch<T> dots(workers * kTile * kTile);
    std::fill(dots.get(), dots.get() + workers * kTile * kTile, T(0));
    parallel_for(args_.threads, tasks, [&](int64_t task, int worker) {
      const int64_t row_tile = task / chunks, begin = std::max(row_tile, task % chunks * kTilesPerTask);
      const int64_t end = std::min(tiles_, (task % chunks + 1) * kTilesPerTask);
      if (begin < end) tile_row(row_tile, begin, end, dots.get() + worker * kTile * kTile);
    });
    reduce(lse, pos, ext);
  }

 private:
  using E = Engine<T>;
  static constexpr int kPieces = kWord / kLanes<T>;  // vectors per word of bits

  int64_t tile_end(int64_t tile) const { return std::min(args_.rows, (tile + 1) * edge_); }

  // Row i's result from column tile J lies in partials(J), column j's result from row tile I in partials(I).
  Partials<T> partials(int64_t tile) const {
    return {partials_.get() + tile * Partials<T>::kFields * args_.rows, args_.rows};
  }

  // The tiles (row_tile, begin .. end - 1) of the upper triangle.
  void tile_row(int64_t row_tile, int64_t begin, int64_t end, T* dots) const {
    const T shift = fixed_ ? scale_ : -std::numeric_limits<T>::infinity();
    for (int64_t tile = begin; tile < end; ++tile) {
      partials(tile).start(row_tile * edge_, tile_end(row_tile), shift);
      partials(row_tile).start(tile * edge_, tile_end(tile), shift);
    }
    for (int64_t i0 = row_tile * edge_; i0 < tile_end(row_tile); i0 += kTile) {
      const int64_t height = std::min(kTile, args_.rows - i0);
      const Left<T> a = rows_of(x_ + i0 * args_.depth, args_.depth);
      for (int64_t tile = begin; tile < end; ++tile)
        for (int64_t j0 = tile * edge_; j0 < tile_end(tile); j0 += kTile) {
          const int64_t width = std::min(kTile, args_.rows - j0);
          multiply<E>(height, width, args_.depth, a, packed_.get() + j0 * args_.depth, dots, kTile);
          absorb(i0, height, j0, width, dots, row_tile, tile);
        }
    }
  }

  void absorb(int64_t i0, int64_t height, int64_t j0, int64_t width, const T* dots, int64_t row_tile,
              int64_t tile) const {
    if (!fixed_) raise_shifts(i0, height, j0, width, dots, row_tile, tile);
    if (tile == row_tile) {  // tiles of the diagonal are computed in full: rows only
      const Partials<T> rows = partials(tile);
      for (int64_t r = 0; r < height; ++r)
        rows.add(i0 + r, sums_of_row<T>(masks_, i0 + r, j0, width, dots + r * kTile, scale_, rows.shift[i0 + r]));
    } else if (fixed_) {
      add_both<true>(i0, height, j0, width, dots, row_tile, tile);
    } else {
      add_both<false>(i0, height, j0, width, dots, row_tile, tile);
    }
  }

  // Adds a tile to its rows and to its columns. kFixed: one exponential serves both directions.
  template <bool kFixed>
  void add_both(int64_t i0, int64_t height, int64_t j0, int64_t width, const T* dots, int64_t row_tile,
                int64_t tile) const {
    constexpr int kVectors = kTile / kLanes<T>;
    const Partials<T> rows = partials(tile), columns = partials(row_tile);
    const int64_t words = (width + kWord - 1) / kWord;
    const Vec<T> scale = splat(scale_);
    Vec<T> column_shift[kVectors], column_sum[kVectors] = {}, column_pos[kVectors] = {}, column_ext[kVectors] = {};
    for (int64_t v = 0; v < words * kPieces; ++v) {
      const int64_t j = v * kLanes<T>, left = std::clamp<int64_t>(width - j, 0, kLanes<T>);
      column_shift[v] = kFixed ? scale : load_part(columns.shift + j0 + j, left);
    }
    RowMasks m;
    for (int64_t r = 0; r < height; ++r, dots += kTile) {
      masks_.row(i0 + r, j0 / kWord, words, m);
      const Vec<T> row_shift = splat(rows.shift[i0 + r]);
      Vec<T> row_sum{};
      const auto exponentials = [&](int64_t v, auto&& in_e, auto&& in_e_t) {
        const Vec<T> logit = load(dots + v * kLanes<T>) * scale, e = exp<T>(logit - row_shift);
        row_sum += in_e(e);
        column_sum[v] += in_e_t(kFixed ? e : exp<T>(logit - column_shift[v]));
      };
      if (m.full) {
        const auto all = [](Vec<T> e) { return e; };
        for (int64_t v = 0; v < words * kPieces; ++v)
          exponentials(v, all, all);
      } else {
        for (int64_t v = 0; v < words * kPieces; ++v) {
          const WordMasks& word = m.words[v / kPieces];
          const int64_t lane = v % kPieces * kLanes<T>;
          exponentials(
              v, [&](Vec<T> e) { return keep(lanes_of<T>(word.e, lane), e); },
              [&](Vec<T> e) { return keep(lanes_of<T>(word.e_t, lane), e); });
        }
      }
      TileSums<T> part{sum<T>(row_sum), 0, 0};
      if (m.pairs) {
        Vec<T> row_pos{}, row_ext{};
        for (int64_t w = 0; w < words; ++w) {
          if (!m.pairs_at(w)) continue;
          for (int64_t v = w * kPieces; v < (w + 1) * kPieces; ++v) {
            const WordMasks& word = m.words[w];
            const int64_t lane = v % kPieces * kLanes<T>;
            const Vec<T> logit = load(dots + v * kLanes<T>) * scale;
            row_pos += keep(lanes_of<T>(word.p, lane), logit);
            row_ext += keep(lanes_of<T>(word.q, lane), logit);
            column_pos[v] += keep(lanes_of<T>(word.p_t, lane), logit);
            column_ext[v] += keep(lanes_of<T>(word.q_t, lane), logit);
          }
        }
        part.pos = sum<T>(row_pos);
        part.ext = sum<T>(row_ext);
      }
      rows.add(i0 + r, part);
    }
    for (int64_t c = 0; c < width; ++c) {
      const int64_t v = c / kLanes<T>, lane = c % kLanes<T>;
      columns.add(j0 + c, {column_sum[v][lane], column_pos[v][lane], column_ext[v][lane]});
    }
  }

  // Without a fixed shift: raises the shifts of the tile's rows and columns to their largest logits in E.
  void raise_shifts(int64_t i0, int64_t height, int64_t j0, int64_t width, const T* dots, int64_t row_tile,
                    int64_t tile) const {
    const bool both = tile != row_tile;
    const Partials<T> rows = partials(tile), columns = partials(row_tile);
    const int64_t words = (width + kWord - 1) / kWord;
    const Vec<T> scale = splat(scale_), none = splat(-std::numeric_limits<T>::infinity());
    Vec<T> column_top[kTile / kLanes<T>];
    std::fill(column_top, column_top + kTile / kLanes<T>, none);
    for (int64_t r = 0; r < height; ++r) {
      Vec<T> row_top = none;
      for (int64_t w = 0; w < words; ++w) {
        const WordMasks m = masks_.at(i0 + r, j0 / kWord + w);
        for (int piece = 0; piece < kPieces; ++piece) {
          const int64_t v = w * kPieces + piece, lane = piece * kLanes<T>;
          const Vec<T> logit = load(dots + r * kTile + v * kLanes<T>) * scale;
          row_top = max(row_top, lanes_of<T>(m.e, lane) ? logit : none);
          column_top[v] = max(column_top[v], lanes_of<T>(m.e_t, lane) ? logit : none);
        }
      }
      rows.raise(i0 + r, largest<T>(row_top));
    }
    for (int64_t c = 0; both && c < width; ++c)
      columns.raise(j0 + c, column_top[c / kLanes<T>][c % kLanes<T>]);
  }

  void reduce(T* lse, T* pos, T* ext) const {
    for (int64_t i = 0; i < args_.rows; ++i) {
      T top = partials(0).shift[i], total = 0;
      pos[i] = ext[i] = 0;
      for (int64_t tile = 1; tile < tiles_; ++tile)
        top = std::max(top, partials(tile).shift[i]);
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        const Partials<T> part = partials(tile);
        if (part.sum[i] != 0) total += fixed_ ? part.sum[i] : part.sum[i] * exp_of(part.shift[i] - top);
        pos[i] += part.pos[i];
        ext[i] += part.ext[i];
      }
      lse[i] = total == 0 ? T(0) : static_cast<T>(static_cast<double>(top) + std::log(static_cast<double>(total)));
    }
  }

  const ContrastiveArgs<T>& args_;
  const Masks& masks_;
  const T* x_;
  bool fixed_;
  T scale_;
  int64_t edge_, tiles_;
  Scratch<T> packed_, partials_;
};

// ---- a range of the rows: each task owns kTile anchors and passes all columns

template <class T, class Masks>
class RangeStats {
 public:
  RangeStats(const ContrastiveArgs<T>& args, const Masks& masks, const T* x)
      : args_(args),
        masks_(masks),
        x_(x),
        fixed_(fixed_shift(args)),
        scale_(static_cast<T>(1 / args.temperature)),
        packed_(E::b_size(args.rows, args.depth)) {}

  void run(T* lse, T* pos, T* ext) {
    pack_tile_columns(args_, x_, packed_.get());
    const int64_t panels = (args_.count + kTile - 1) / kTile;
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(args_.threads, panels));
    const Scratch<T> scratch(workers * kTile * kTile);
    std::fill(scratch.get(), scratch.get() + workers * kTile * kTile, T(0));
    parallel_for(args_.threads, panels, [&](int64_t panel, int worker) {
      const int64_t first = panel * kTile, height = std::min(kTile, args_.count - first);
      RowSums rows[kTile];
      sweep(args_.first + first, height, scratch.get() + worker * kTile * kTile, rows);
      for (int64_t r = 0; r < height; ++r) {
        lse[first + r] = rows[r].sum == 0 ? T(0) : static_cast<T>(rows[r].shift + std::log(rows[r].sum));
        pos[first + r] = static_cast<T>(rows[r].pos);
        ext[first + r] = static_cast<T>(rows[r].ext);
      }
    });
  }

 private:
  using E = Engine<T>;
  struct RowSums {
    double sum = 0, pos = 0, ext = 0;  // of tiles: of few terms, so that double costs nothing
    T shift;
  };

  void sweep(int64_t i0, int64_t height, T* dots, RowSums* rows) const {
    for (int64_t r = 0; r < height; ++r)
      rows[r].shift = fixed_ ? scale_ : -std::numeric_limits<T>::infinity();
    const Left<T> a = rows_of(x_ + i0 * args_.depth, args_.depth);
    for (int64_t j0 = 0; j0 < args_.rows; j0 += kTile) {
      if (!masks_.any_in_columns(j0)) continue;
      const int64_t width = std::min(kTile, args_.rows - j0);
      multiply<E>(height, width, args_.depth, a, packed_.get() + j0 * args_.depth, dots, kTile);
      for (int64_t r = 0; r < height; ++r) {
        if (!fixed_) raise(rows[r], top_of_row<T>(masks_, i0 + r, j0, width, dots + r * kTile, scale_));
        const TileSums<T> part = sums_of_row<T>(masks_, i0 + r, j0, width, dots + r * kTile, scale_, rows[r].shift);
        rows[r].sum += part.sum;
        rows[r].pos += part.pos;
        rows[r].ext += part.ext;
      }
    }
  }

  static void raise(RowSums& row, T top) {
    if (!(top > row.shift)) return;
    row.sum *= exp_of(row.shift - top);
    row.shift = top;
  }

  const ContrastiveArgs<T>& args_;
  const Masks& masks_;
  const T* x_;
  bool fixed_;
  T scale_;
  Scratch<T> packed_;
};

}  // namespace
}  // namespace hpk::HPK_ISA
