// The contrastive statistics and gradient for a dense denominator: every tile of logits is computed, reduced and
// forgotten.
//
// Statistics take the upper triangle of tiles; one exponential serves a pair in both directions. Each tile leaves one
// partial result per row and per column, and the partials of a row are added in the order of the tiles. In the
// gradient, too, a tile of coefficients G_ij + G_ji is computed once and serves its rows and its columns: tiles are
// scheduled so that no two of them write one panel at a time, and every panel is written in a fixed order.
#include <algorithm>
#include <limits>

#include "cpu/contrastive.h"
#include "cpu/contrastive_lanes.h"
#include "cpu/pair_bits.h"
#include "cpu/thread_pool.h"
#include "cpu/tile.h"

namespace hpk::HPK_ISA {
namespace {

constexpr int64_t kTile = 192;     // rows and columns of a tile of the statistics: whole words, whole register blocks
constexpr int64_t kMaxTiles = 64;  // tiles per side, so that partial results stay below 64 numbers per row
constexpr int64_t kTilesPerTask = 8;
constexpr int kWord = 32;

// ---- masks word by word

// The bits of 32 pairs (i, j..j + 31): E, P, Q in the direction i -> j, and E_t, P_t, Q_t for j -> i.
struct WordMasks {
  uint32_t e, p, q, e_t, p_t, q_t;
};

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
        all_(all),
        negatives_t_words_(words_for(args.masks.negative_rows)),
        negatives_t_(masks_.negatives ? args.rows * negatives_t_words_ : 0) {
    if (masks_.negatives)
      transpose_bits(masks_.negatives, masks_.negative_rows, args.rows, negatives_t_.get(), args.threads);
  }

  // 0 <= i < rows, w a word that holds columns < rows
  WordMasks at(int64_t i, int64_t w) const {
    const int64_t k = i * masks_.words + w;
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

 private:
  uint32_t valid_bits(int64_t i, int64_t w) const {
    const int64_t left = rows_ - w * kWord;
    const uint32_t inside = left >= kWord ? ~0u : (1u << left) - 1;
    return i >> 5 == w ? inside & ~(1u << (i & 31)) : inside;
  }

  const ContrastiveMasks& masks_;
  int64_t rows_;
  bool all_;
  int64_t negatives_t_words_;
  Scratch<uint32_t> negatives_t_;
};

template <class T>
inline LaneMask<T> lanes_of(uint32_t word, int64_t lane) {  // lanes lane .. lane + kLanes - 1 of a word
  return expand<T>((word >> lane) & ((1u << kLanes<T>)-1));
}

// ---- statistics

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
  void raise(int64_t i, T top) const {  // a larger shift
    if (!(top > shift[i])) return;
    sum[i] *= exp_of(shift[i] - top);
    shift[i] = top;
  }
};

template <class T>
class DenseStats {
 public:
  DenseStats(const ContrastiveArgs<T>& args, const DenseMasks<T>& masks, const T* x)
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
    pack();
    const int64_t chunks = (tiles_ + kTilesPerTask - 1) / kTilesPerTask, tasks = tiles_ * chunks;
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(args_.threads, tasks));
    const int64_t a_size = (E::a_size(kTile, args_.depth) + 15) / 16 * 16;
    const Scratch<T> a(workers * a_size), dots(workers * kTile * kTile);
    std::fill(dots.get(), dots.get() + workers * kTile * kTile, T(0));
    parallel_for(args_.threads, tasks, [&](int64_t task, int worker) {
      const int64_t row_tile = task / chunks, begin = std::max(row_tile, task % chunks * kTilesPerTask);
      const int64_t end = std::min(tiles_, (task % chunks + 1) * kTilesPerTask);
      if (begin < end) tile_row(row_tile, begin, end, a.get() + worker * a_size, dots.get() + worker * kTile * kTile);
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

  void pack() {
    parallel_for(args_.threads, (args_.rows + kTile - 1) / kTile, [&](int64_t panel, int) {
      const int64_t first = panel * kTile, count = std::min(kTile, args_.rows - first);
      pack_rows<E::NR>(x_ + first * args_.depth, args_.depth, nullptr, count, args_.depth,
                       packed_.get() + first * args_.depth);
    });
  }

  // The tiles (row_tile, begin .. end - 1) of the upper triangle.
  void tile_row(int64_t row_tile, int64_t begin, int64_t end, T* a, T* dots) const {
    const T shift = fixed_ ? scale_ : -std::numeric_limits<T>::infinity();
    for (int64_t tile = begin; tile < end; ++tile) {
      partials(tile).start(row_tile * edge_, tile_end(row_tile), shift);
      partials(row_tile).start(tile * edge_, tile_end(tile), shift);
    }
    for (int64_t i0 = row_tile * edge_; i0 < tile_end(row_tile); i0 += kTile) {
      const int64_t height = std::min(kTile, args_.rows - i0);
      pack_rows<E::MR>(x_ + i0 * args_.depth, args_.depth, nullptr, height, args_.depth, a);
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
    const bool both = tile != row_tile;  // tiles of the diagonal are computed in full: rows only
    const Partials<T> rows = partials(tile), columns = partials(row_tile);
    const int64_t words = (width + kWord - 1) / kWord;
    const Vec<T> scale = splat(scale_);
    Vec<T> column_shift[kTile / kLanes<T>], column_sum[kTile / kLanes<T>] = {}, column_pos[kTile / kLanes<T>] = {},
                                                               column_ext[kTile / kLanes<T>] = {};
    for (int64_t v = 0; v < words * kPieces; ++v) {
      const int64_t j = v * kLanes<T>, left = std::clamp<int64_t>(width - j, 0, kLanes<T>);
      column_shift[v] = both && !fixed_ ? load_part(columns.shift + j0 + j, left) : scale;
    }
    for (int64_t r = 0; r < height; ++r) {
      const int64_t i = i0 + r;
      const Vec<T> row_shift = splat(rows.shift[i]);
      Vec<T> row_sum{}, row_pos{}, row_ext{};
      for (int64_t w = 0; w < words; ++w) {
        const WordMasks m = masks_.at(i, j0 / kWord + w);
        const bool pairs = m.p | m.q | m.p_t | m.q_t;
        for (int piece = 0; piece < kPieces; ++piece) {
          const int64_t v = w * kPieces + piece, lane = piece * kLanes<T>;
          const Vec<T> logit = load(dots + r * kTile + v * kLanes<T>) * scale;
          const Vec<T> e = exp<T>(logit - row_shift);
          row_sum += keep(lanes_of<T>(m.e, lane), e);
          if (both) column_sum[v] += keep(lanes_of<T>(m.e_t, lane), fixed_ ? e : exp<T>(logit - column_shift[v]));
          if (!pairs) continue;
          row_pos += keep(lanes_of<T>(m.p, lane), logit);
          row_ext += keep(lanes_of<T>(m.q, lane), logit);
          if (!both) continue;
          column_pos[v] += keep(lanes_of<T>(m.p_t, lane), logit);
          column_ext[v] += keep(lanes_of<T>(m.q_t, lane), logit);
        }
      }
      rows.sum[i] += sum<T>(row_sum);
      rows.pos[i] += sum<T>(row_pos);
      rows.ext[i] += sum<T>(row_ext);
    }
    if (!both) return;
    for (int64_t c = 0; c < width; ++c) {
      const int64_t v = c / kLanes<T>, lane = c % kLanes<T>;
      columns.sum[j0 + c] += column_sum[v][lane];
      columns.pos[j0 + c] += column_pos[v][lane];
      columns.ext[j0 + c] += column_ext[v][lane];
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
  const DenseMasks<T>& masks_;
  const T* x_;
  bool fixed_;
  T scale_;
  int64_t edge_, tiles_;
  Scratch<T> packed_, partials_;
};

// ---- gradient

template <class T>
class DenseGrad {
 public:
  DenseGrad(const ContrastiveArgs<T>& args, const DenseMasks<T>& masks)
      : args_(args),
        masks_(masks),
        fixed_(fixed_shift(args)),
        scale_(static_cast<T>(1 / args.temperature)),
        panels_((args.rows + kTile - 1) / kTile),
        block_(kTile * E::round_cols(args.depth)),
        packed_(E::b_size(args.rows, args.depth)),
        packed_columns_(panels_ * block_),
        sums_(panels_ * block_),
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
      denominator_[i] = f.denominator;
      positive_[i] = f.positive;
      extra_[i] = f.extra;
      lse_[i] = f.lse;
    }
    parallel_for(args_.threads, panels_, [&](int64_t panel, int) {
      const T* rows = x + panel * kTile * args_.depth;
      const int64_t count = height(panel);
      pack_rows<E::NR>(rows, args_.depth, nullptr, count, args_.depth, packed_.get() + panel * kTile * args_.depth);
      pack_columns<E::NR>(rows, args_.depth, nullptr, count, args_.depth, packed_columns_.get() + panel * block_);
    });
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(args_.threads, panels_));
    const Scratch<T> scratch(workers * scratch_size());
    std::fill(scratch.get(), scratch.get() + workers * scratch_size(), T(0));
    parallel_for(args_.threads, panels_, [&](int64_t panel, int worker) {
      std::fill(sum_of(panel), sum_of(panel) + block_, T(0));
      tile_pair(x, panel, panel, scratch.get() + worker * scratch_size());
    });
    // Every two panels meet once, as in a tournament: in a round no panel plays twice, so a tile may add to both of its
    // panels, and each panel meets the others in a fixed order.
    const int64_t players = panels_ + panels_ % 2;
    for (int64_t round = 0; round < players - 1; ++round)
      parallel_for(args_.threads, players / 2, [&](int64_t game, int worker) {
        const int64_t first = game == 0 ? players - 1 : (round + game) % (players - 1);
        const int64_t second = (round + players - 1 - game) % (players - 1);
        if (std::max(first, second) >= panels_) return;  // the odd panel out
        tile_pair(x, first, second, scratch.get() + worker * scratch_size());
      });
    parallel_for(args_.threads, panels_, [&](int64_t panel, int) {
      for (int64_t r = 0; r < height(panel); ++r) {
        const T* sum = sum_of(panel) + r * sum_stride();
        std::copy(sum, sum + args_.depth, out + (panel * kTile + r) * args_.depth);
      }
    });
  }

 private:
  using E = Engine<T>;
  static constexpr int kPieces = kWord / kLanes<T>;

  int64_t height(int64_t panel) const { return std::min(kTile, args_.rows - panel * kTile); }
  int64_t sum_stride() const { return E::round_cols(args_.depth); }

  T* sum_of(int64_t panel) const { return sums_.get() + panel * block_; }
  // per worker: rows of a panel packed, a tile, a packed tile
  int64_t scratch_size() const { return E::a_size(kTile, args_.depth) + 2 * kTile * kTile; }

  // Adds the tile's coefficients times X to its rows' panel, and to its columns' panel unless that is the same.
  void tile_pair(const T* x, int64_t panel, int64_t other, T* a) const {
    const int64_t rows = height(panel), columns = height(other);
    T *const tile = a + E::a_size(kTile, args_.depth), *const packed_tile = tile + kTile * kTile;
    pack_rows<E::MR>(x + panel * kTile * args_.depth, args_.depth, nullptr, rows, args_.depth, a);
    multiply<E>(rows, columns, args_.depth, a, packed_.get() + other * kTile * args_.depth, tile, kTile);
    for (int64_t r = 0; r < rows; ++r)
      coefficients(panel * kTile + r, other * kTile, columns, tile + r * kTile);
    pack_rows<E::MR>(tile, kTile, nullptr, rows, columns, packed_tile);
    multiply<E>(rows, args_.depth, columns, packed_tile, packed_columns_.get() + other * block_, sum_of(panel),
                sum_stride(), true);
    if (other == panel) return;
    pack_columns<E::MR>(tile, kTile, nullptr, rows, columns, packed_tile);
    multiply<E>(columns, args_.depth, rows, packed_tile, packed_columns_.get() + panel * block_, sum_of(other),
                sum_stride(), true);
  }

  // Replaces the dot products of row i with columns j0 .. by (G_ij + G_ji) / temperature.
  void coefficients(int64_t i, int64_t j0, int64_t columns, T* values) const {
    const Vec<T> scale = splat(scale_), row_shift = splat(fixed_ ? scale_ : lse_[i]),
                 row_denominator = splat(denominator_[i]);
    const Vec<T> row_positive = splat(positive_[i]), row_extra = splat(extra_[i]);
    for (int64_t w = 0; w * kWord < columns; ++w) {
      const WordMasks m = masks_.at(i, j0 / kWord + w);
      const bool pairs = m.p | m.q | m.p_t | m.q_t;
      for (int piece = 0; piece < kPieces; ++piece) {
        const int64_t lane = piece * kLanes<T>, c = w * kWord + lane, j = j0 + c;
        const Vec<T> logit = load(values + c) * scale;
        const Vec<T> e = exp<T>(logit - row_shift), e_t = fixed_ ? e : exp<T>(logit - load(lse_ + j));
        Vec<T> total = keep(lanes_of<T>(m.e, lane), e * row_denominator) +
                       keep(lanes_of<T>(m.e_t, lane), e_t * load(denominator_ + j));
        if (pairs) {
          total += keep(lanes_of<T>(m.p, lane), row_positive) + keep(lanes_of<T>(m.p_t, lane), load(positive_ + j));
          total += keep(lanes_of<T>(m.q, lane), row_extra) + keep(lanes_of<T>(m.q_t, lane), load(extra_ + j));
        }
        store(values + c, total * scale);
      }
    }
  }

  const ContrastiveArgs<T>& args_;
  const DenseMasks<T>& masks_;
  bool fixed_;
  T scale_;
  int64_t panels_, block_;
  Scratch<T> packed_, packed_columns_, sums_, factors_;
  T *denominator_ = nullptr, *positive_ = nullptr, *extra_ = nullptr, *lse_ = nullptr;
};

template <class T>
void dense_stats(const ContrastiveArgs<T>& args, bool all, const ContrastiveStats<T>& out) {
  const DenseMasks<T> masks(args, all);
  for (int64_t s = 0; s < args.streams; ++s) {
    const int64_t at = s * args.rows;
    DenseStats<T>(args, masks, args.x + at * args.depth).run(out.lse + at, out.pos + at, out.ext + at);
  }
}

template <class T>
void dense_grad(const ContrastiveArgs<T>& args, bool all, const ContrastiveGrads<T>& grads) {
  const DenseMasks<T> masks(args, all);
  DenseGrad<T> grad(args, masks);
  for (int64_t s = 0; s < args.streams; ++s) {
    const int64_t at = s * args.rows;
    grad.run(args.x + at * args.depth, grads, at, grads.grad_x + at * args.depth);
  }
}

}  // namespace

void contrastive_dense_stats(const ContrastiveArgs<float>& args, bool all, const ContrastiveStats<float>& out) {
  dense_stats(args, all, out);
}
void contrastive_dense_stats(const ContrastiveArgs<double>& args, bool all, const ContrastiveStats<double>& out) {
  dense_stats(args, all, out);
}
void contrastive_dense_grad(const ContrastiveArgs<float>& args, bool all, const ContrastiveGrads<float>& grads) {
  dense_grad(args, all, grads);
}
void contrastive_dense_grad(const ContrastiveArgs<double>& args, bool all, const ContrastiveGrads<double>& grads) {
  dense_grad(args, all, grads);
}

}  // namespace hpk::HPK_ISA
