// The contrastive statistics and gradient for a sparse denominator: only the pairs that bits name are ever evaluated.
//
// Work comes in groups of up to eight rows that share a list of columns, with a byte per column that says for which of the
// rows the pair is set. Two kinds of groups cover everything:
//   positives   eight consecutive rows and the union of their columns (neighbouring patches have much the same positives)
//   negatives   eight rows with the same i mod R, which share one row of the negatives mask; pairs in P are left out
// A group owns its rows. The column side of the negatives' gradient is written by owners of column ranges, in a second phase,
// from coefficients that the first phase leaves in a bounded buffer; every sum has a fixed order.
#include <algorithm>
#include <limits>
#include <utility>

#include "cpu/contrastive.h"
#include "cpu/contrastive_lanes.h"
#include "cpu/pair_bits.h"
#include "cpu/thread_pool.h"

namespace hpk::HPK_ISA {
namespace {

constexpr int kGroup = 8;            // rows of a group: one bit each in the masks of a column
constexpr int64_t kChunk = 64;       // columns evaluated, and summed, at a time: long sums are sums of short ones
constexpr int64_t kMaxStreams = 2;
constexpr int kAccumulators = kVectorBytes == 64 ? 16 : 8;

// ---- eight rows against a list of columns

// Lane l of the result sums the pair of lanes that differ in bit H, of a where bit H of l is clear and of b where it is set.
template <class T, int H, int... l>
inline Vec<T> fold(Vec<T> a, Vec<T> b, std::integer_sequence<int, l...>) {
  constexpr int n = kLanes<T>;
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, ((l & H) ? n + l - H : l)...) + __builtin_shufflevector(a, b, ((l & H) ? n + l : l + H)...);
#else
  return __builtin_shuffle(a, b, Vec<IntegerOf<T>>{((l & H) ? n + l - H : l)...}) +
         __builtin_shuffle(a, b, Vec<IntegerOf<T>>{((l & H) ? n + l : l + H)...});
#endif
}

// v[0] becomes the vector whose lane l is the sum of v[l].
template <class T, int H = 1>
inline void sum_each(Vec<T>* v) {
  if constexpr (H < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T> / (2 * H); ++i)
      v[i] = fold<T, H>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kLanes<T>>());
    sum_each<T, 2 * H>(v);
  }
}

// dots[c * kGroup + r] = <rows[r], x[columns[c]]>, r < R; the other lanes of a group become zero.
template <int R, class T>
void products(const T* const* rows, const T* x, int64_t depth, const int32_t* columns, int64_t count, T* dots) {
  constexpr int C = kAccumulators / R, L = kLanes<T>;
  for (int64_t first = 0; first < count; first += C) {
    const T* column[C];
    for (int c = 0; c < C; ++c) column[c] = x + columns[std::min(first + c, count - 1)] * depth;
    Vec<T> acc[C * R] = {};
    for (int64_t d = 0; d < depth; d += L) {
      Vec<T> value[C];
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) value[c] = load(column[c] + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<T> row = load(rows[r] + d);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) acc[c * R + r] += row * value[c];
      }
    }
    T sums[C * R];
#pragma GCC unroll 8
    for (int a = 0; a < C * R; a += L) {
      sum_each<T>(acc + a);
      store(sums + a, acc[a]);
    }
    for (int c = 0; c < C && first + c < count; ++c)
      for (int r = 0; r < kGroup; ++r) dots[(first + c) * kGroup + r] = r < R ? sums[c * R + r] : T(0);
  }
}

// out[r][:] += sum_c weights[c * kGroup + r] x[columns[c]][:], V vectors of the depth at a time, from `from` on
template <int R, int V, class T>
int64_t mix_vectors(const T* weights, const T* x, int64_t depth, const int32_t* columns, int64_t count, T* const* out, int64_t from) {
  constexpr int L = kLanes<T>;
  for (; from + V * L <= depth; from += V * L) {
    Vec<T> acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
    for (int64_t c = 0; c < count; ++c) {
      const T* column = x + columns[c] * depth + from;
      Vec<T> value[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) value[v] = load(column + v * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<T> weight = splat(weights[c * kGroup + r]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] += weight * value[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(out[r] + from + v * L, load(out[r] + from + v * L) + acc[r][v]);
  }
  return from;
}

template <int R, class T>
void mix_columns(const T* weights, const T* x, int64_t depth, const int32_t* columns, int64_t count, T* const* out) {
  constexpr int V = std::min(8, (kVectorBytes == 64 ? 24 : 8) / R);
  const int64_t done = mix_vectors<R, V>(weights, x, depth, columns, count, out, 0);
  mix_vectors<R, 1>(weights, x, depth, columns, count, out, done);
}

// grad[columns[c]][:] += sum_r weights[c * kGroup + r] rows[r][:]
template <int R, class T>
void scatter_rows(const T* weights, const T* const* rows, int64_t depth, const int32_t* columns, int64_t count, T* grad) {
  for (int64_t c = 0; c < count; ++c) {
    T* out = grad + columns[c] * depth;
    Vec<T> weight[R];
    for (int r = 0; r < R; ++r) weight[r] = splat(weights[c * kGroup + r]);
#pragma GCC unroll 4
    for (int64_t d = 0; d < depth; d += kLanes<T>) {
      Vec<T> total = weight[0] * load(rows[0] + d);
#pragma GCC unroll 8
      for (int r = 1; r < R; ++r) total += weight[r] * load(rows[r] + d);
      store(out + d, load(out + d) + total);
    }
  }
}

// f(R) with R = 1, 2, 4 or 8 as a compile-time constant, the smallest one >= rows
template <class F>
void with_row_count(int rows, F&& f) {
  if (rows > 4) return f(std::integral_constant<int, 8>());
  if (rows > 2) return f(std::integral_constant<int, 4>());
  if (rows > 1) return f(std::integral_constant<int, 2>());
  f(std::integral_constant<int, 1>());
}

// ---- rows and columns of a group

struct Group {
  int count;
  int64_t row[kGroup];
};

template <class T>
struct RowPointers {
  T* row[kGroup];

  RowPointers(T* base, const Group& group, int64_t depth) {  // rows past the end repeat the last one
    for (int r = 0; r < kGroup; ++r) row[r] = base + group.row[std::min(r, group.count - 1)] * depth;
  }
};

// Walks the bits of a group column by column: word(m, r, w) is word w of mask m for row r. Columns go to `index`, and one byte
// per mask (bit r: set for row r) to masks[m]; flush(count) is called whenever `capacity` columns have gathered, and at the end.
template <int kMasks, class Any, class Word, class Flush>
void walk(int64_t words, int rows, int64_t capacity, int32_t* index, uint8_t* const* masks, Any&& any, Word&& word,
          Flush&& flush) {
  int64_t count = 0;
  uint32_t row_words[kMasks][kGroup] = {};
  for (int64_t w = 0; w < words; ++w) {
    if (!any(w)) continue;
    uint32_t remaining = 0;
    for (int m = 0; m < kMasks; ++m)
      for (int r = 0; r < rows; ++r) remaining |= row_words[m][r] = word(m, r, w);
    for (; remaining; remaining &= remaining - 1) {
      const int k = __builtin_ctz(remaining);
      index[count] = static_cast<int32_t>(32 * w + k);
      for (int m = 0; m < kMasks; ++m) {
        uint32_t byte = 0;
        for (int r = 0; r < kGroup; ++r) byte |= ((row_words[m][r] >> k) & 1) << r;
        masks[m][count] = static_cast<uint8_t>(byte);
      }
      if (++count == capacity) {
        flush(count);
        count = 0;
      }
    }
  }
  if (count) flush(count);
}

inline uint32_t without_diagonal(uint32_t word, int64_t row, int64_t w) {
  return row >> 5 == w ? word & ~(1u << (row & 31)) : word;
}

// The bits of lanes f .. f + kLanes - 1 of a table with kGroup lanes per column, given a byte per column.
template <class T>
inline LaneMask<T> group_mask(const uint8_t* bytes, int64_t f) {
  if constexpr (kLanes<T> == 2 * kGroup) {
    uint16_t two;
    std::memcpy(&two, bytes + f / kGroup, sizeof two);
    return expand<T>(two);
  } else {
    return expand<T>((static_cast<uint32_t>(bytes[f / kGroup]) >> (f % kGroup)) & ((1u << kLanes<T>) - 1));
  }
}

constexpr int64_t kByteSlack = 2;  // group_mask reads a byte past an odd number of columns

// ---- statistics

// Eight rows' values, repeated to fill kPieces vectors that line up with the lanes of a group's table.
template <class T>
struct GroupLanes {
  static constexpr int kWidth = std::max(kGroup, kLanes<T>), kPieces = kWidth / kLanes<T>;
  Vec<T> piece[kPieces];

  explicit GroupLanes(T value = 0) {
    for (auto& p : piece) p = splat(value);
  }
  static GroupLanes repeat(const T (&value)[kGroup]) {
    GroupLanes lanes;
    T wide[kWidth];
    for (int l = 0; l < kWidth; ++l) wide[l] = value[l % kGroup];
    for (int p = 0; p < kPieces; ++p) lanes.piece[p] = load(wide + p * kLanes<T>);
    return lanes;
  }
  template <class Combine>
  void reduce(T (&value)[kGroup], Combine&& combine) const {
    T wide[kWidth];
    for (int p = 0; p < kPieces; ++p) store(wide + p * kLanes<T>, piece[p]);
    for (int r = 0; r < kGroup; ++r) {
      value[r] = wide[r];
      for (int l = r + kGroup; l < kWidth; l += kGroup) value[r] = combine(value[r], wide[l]);
    }
  }
};

template <class T>
struct GroupStats {
  T shift[kGroup], sum[kGroup] = {}, pos[kGroup] = {}, ext[kGroup] = {};

  explicit GroupStats(const ContrastiveArgs<T>& args) {
    std::fill(shift, shift + kGroup, fixed_shift(args) ? static_cast<T>(1 / args.temperature) : -std::numeric_limits<T>::infinity());
  }

  // Adds `count` columns: dots as from products(), masks E, P and Q as bytes (P and Q together, or neither).
  void add(const ContrastiveArgs<T>& args, const T* dots, int64_t count, const uint8_t* e, const uint8_t* p, const uint8_t* q) {
    using Lanes = GroupLanes<T>;
    const Vec<T> scale = splat(static_cast<T>(1 / args.temperature));
    const int64_t end = count * kGroup;
    if (!fixed_shift(args)) raise_shift(dots, end, scale, e);
    const Lanes minus = Lanes::repeat(shift);
    Lanes sums, positives, extras;
    for (int64_t f = 0; f < end; f += Lanes::kWidth) {
      for (int i = 0; i < Lanes::kPieces; ++i) {
        const int64_t at = f + i * kLanes<T>;
        const Vec<T> logit = load(dots + at) * scale;
        sums.piece[i] += keep(group_mask<T>(e, at), exp<T>(logit - minus.piece[i]));
        if (p) positives.piece[i] += keep(group_mask<T>(p, at), logit);
        if (q) extras.piece[i] += keep(group_mask<T>(q, at), logit);
      }
    }
    const auto plus = [](T a, T b) { return a + b; };
    T part[kGroup];
    sums.reduce(part, plus);
    for (int r = 0; r < kGroup; ++r) sum[r] += part[r];
    positives.reduce(part, plus);
    for (int r = 0; r < kGroup; ++r) pos[r] += part[r];
    extras.reduce(part, plus);
    for (int r = 0; r < kGroup; ++r) ext[r] += part[r];
  }

 private:
  void raise_shift(const T* dots, int64_t end, Vec<T> scale, const uint8_t* e) {
    using Lanes = GroupLanes<T>;
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    Lanes highest(kNone);
    for (int64_t f = 0; f < end; f += Lanes::kWidth)
      for (int i = 0; i < Lanes::kPieces; ++i) {
        const int64_t at = f + i * kLanes<T>;
        highest.piece[i] = max(highest.piece[i], group_mask<T>(e, at) ? load(dots + at) * scale : splat(kNone));
      }
    T top[kGroup];
    highest.reduce(top, [](T a, T b) { return std::max(a, b); });
    for (int r = 0; r < kGroup; ++r) {
      if (!(top[r] > shift[r])) continue;
      sum[r] *= exp_of(shift[r] - top[r]);
      shift[r] = top[r];
    }
  }
};

// ---- a problem with its rows padded to whole vectors

template <class T>
struct Problem {
  const ContrastiveArgs<T>& args;
  int64_t depth;
  Scratch<T> padded;
  const T* x;

  explicit Problem(const ContrastiveArgs<T>& a)
      : args(a), depth((a.depth + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
        padded(depth == a.depth ? 0 : a.streams * a.rows * depth), x(depth == a.depth ? a.x : padded.get()) {
    if (depth == a.depth) return;
    for (int64_t i = 0; i < a.streams * a.rows; ++i) {
      std::copy(a.x + i * a.depth, a.x + (i + 1) * a.depth, padded.get() + i * depth);
      std::fill(padded.get() + i * depth + a.depth, padded.get() + (i + 1) * depth, T(0));
    }
  }

  const T* stream(int64_t s) const { return x + s * args.rows * depth; }
  int64_t images() const { return args.rows / args.masks.negative_rows; }
  int64_t groups_per_position() const { return (images() + kGroup - 1) / kGroup; }
};

// Workers' scratch: columns and their masks, and the dot products of a chunk.
template <class T>
struct ChunkScratch {
  Scratch<int32_t> index;
  Scratch<uint8_t> bytes;
  Scratch<T> dots, weights;
  static constexpr int64_t kBytes = kChunk + 64;

  explicit ChunkScratch(int64_t workers)
      : index(workers * kChunk), bytes(workers * 4 * kBytes), dots(workers * kChunk * kGroup), weights(workers * kChunk * kGroup) {}
  int32_t* index_of(int worker) const { return index.get() + worker * kChunk; }
  uint8_t* bytes_of(int worker, int mask) const { return bytes.get() + (worker * 4 + mask) * kBytes; }
  T* dots_of(int worker) const { return dots.get() + worker * kChunk * kGroup; }
  T* weights_of(int worker) const { return weights.get() + worker * kChunk * kGroup; }
};

int64_t worker_count(int threads, int64_t tasks) { return std::max<int64_t>(1, std::min<int64_t>(threads, tasks)); }

// dots[c * kGroup + r] = <x_row, x_column> of stream s, for the group's rows and `count` columns
template <class T>
void group_products(const Problem<T>& problem, int64_t s, const Group& group, const int32_t* columns, int64_t count, T* dots) {
  const RowPointers<const T> rows(problem.stream(s), group, problem.depth);
  with_row_count(group.count, [&](auto r) {
    products<r()>(rows.row, problem.stream(s), problem.depth, columns, count, dots);
  });
  // an odd number of columns leaves half a vector: it must hold numbers
  std::fill(dots + count * kGroup, dots + (count + count % 2) * kGroup, T(0));
}

Group consecutive_rows(int64_t first, int64_t rows) {
  Group group{};
  for (; group.count < kGroup && first + group.count < rows; ++group.count) group.row[group.count] = first + group.count;
  return group;
}

// The columns of one row of the negatives that enter the denominators of the group's rows through it: not P, not themselves.
template <class Flush>
void walk_negatives(const ContrastiveMasks& masks, int64_t position, const Group& group, int64_t capacity, int32_t* index,
                    uint8_t* bytes, Flush&& flush) {
  const uint32_t* shared = masks.negatives + position * masks.words;
  uint8_t* const out[1] = {bytes};
  walk<1>(masks.words, group.count, capacity, index, out, [&](int64_t w) { return shared[w] != 0; },
       [&](int, int r, int64_t w) {
         return without_diagonal(shared[w] & ~masks.positives[group.row[r] * masks.words + w], group.row[r], w);
       }, flush);
}

// P, Q and their transposes; null where a mask is missing, or where a symmetric one needs no transpose.
struct PairMasks {
  const uint32_t* mask[4];
};

// Walks the columns of the given masks for consecutive rows: flush(count, bytes) with null bytes for null masks.
template <class T, class Flush>
void walk_positives(const ContrastiveMasks& masks, const PairMasks& used, const Group& group, const ChunkScratch<T>& scratch,
                    int worker, Flush&& flush) {
  const uint32_t* given[4] = {};
  uint8_t *bytes[4] = {}, *given_bytes[4] = {};
  int given_count = 0;
  for (int m = 0; m < 4; ++m) {
    if (!used.mask[m]) continue;
    bytes[m] = given_bytes[given_count] = scratch.bytes_of(worker, m);
    given[given_count++] = used.mask[m];
  }
  const auto any = [](int64_t) { return true; };
  const auto word = [&](int m, int r, int64_t w) {
    return without_diagonal(given[m][group.row[r] * masks.words + w], group.row[r], w);
  };
  const auto flush_all = [&](int64_t count) {
    for (int m = 0; m < given_count; ++m) given_bytes[m][count] = 0;
    flush(count, bytes);
  };
  int32_t* index = scratch.index_of(worker);
  if (given_count == 1) return walk<1>(masks.words, group.count, kChunk, index, given_bytes, any, word, flush_all);
  if (given_count == 2) return walk<2>(masks.words, group.count, kChunk, index, given_bytes, any, word, flush_all);
  walk<4>(masks.words, group.count, kChunk, index, given_bytes, any, word, flush_all);
}

// Sums over the negatives without P: shift and sum (streams, rows) of every row.
template <class T>
void negative_stats(const Problem<T>& problem, T* shift, T* sum) {
  const ContrastiveArgs<T>& args = problem.args;
  const int64_t per_position = problem.groups_per_position(), tasks = args.masks.negative_rows * per_position;
  const ChunkScratch<T> scratch(worker_count(args.threads, tasks));
  parallel_for(args.threads, tasks, [&](int64_t task, int worker) {
    const int64_t position = task / per_position, first = task % per_position * kGroup;
    Group group{};
    for (; group.count < kGroup && first + group.count < problem.images(); ++group.count)
      group.row[group.count] = (first + group.count) * args.masks.negative_rows + position;
    GroupStats<T> stats[kMaxStreams] = {GroupStats<T>(args), GroupStats<T>(args)};
    T* dots = scratch.dots_of(worker);
    uint8_t* bytes = scratch.bytes_of(worker, 0);
    walk_negatives(args.masks, position, group, kChunk, scratch.index_of(worker), bytes, [&](int64_t count) {
      bytes[count] = 0;
      for (int64_t s = 0; s < args.streams; ++s) {
        group_products(problem, s, group, scratch.index_of(worker), count, dots);
        stats[s].add(args, dots, count, bytes, nullptr, nullptr);
      }
    });
    for (int64_t s = 0; s < args.streams; ++s)
      for (int r = 0; r < group.count; ++r) {
        shift[s * args.rows + group.row[r]] = stats[s].shift[r];
        sum[s * args.rows + group.row[r]] = stats[s].sum[r];
      }
  });
}

template <class T>
T log_of_two_sums(T shift, T sum, T other_shift, T other_sum) {
  if (sum == 0 && other_sum == 0) return T(0);
  const T top = sum == 0 ? other_shift : other_sum == 0 ? shift : std::max(shift, other_shift);
  const T total = (sum == 0 ? T(0) : sum * exp_of(shift - top)) + (other_sum == 0 ? T(0) : other_sum * exp_of(other_shift - top));
  return static_cast<T>(static_cast<double>(top) + std::log(static_cast<double>(total)));
}

// Adds the positives to the negatives' sums, and writes all three statistics.
template <class T>
void positive_stats(const Problem<T>& problem, const T* shift, const T* sum, const ContrastiveStats<T>& out) {
  const ContrastiveArgs<T>& args = problem.args;
  const ContrastiveMasks& masks = args.masks;
  const int64_t tasks = (args.rows + kGroup - 1) / kGroup;
  const ChunkScratch<T> scratch(worker_count(args.threads, tasks));
  parallel_for(args.threads, tasks, [&](int64_t task, int worker) {
    const Group group = consecutive_rows(task * kGroup, args.rows);
    GroupStats<T> stats[kMaxStreams] = {GroupStats<T>(args), GroupStats<T>(args)};
    T* dots = scratch.dots_of(worker);
    walk_positives(masks, {{masks.positives, masks.extra}}, group, scratch, worker, [&](int64_t count, const uint8_t* const* bytes) {
      for (int64_t s = 0; s < args.streams; ++s) {
        group_products(problem, s, group, scratch.index_of(worker), count, dots);
        stats[s].add(args, dots, count, bytes[0], bytes[0], bytes[1]);
      }
    });
    for (int64_t s = 0; s < args.streams; ++s)
      for (int r = 0; r < group.count; ++r) {
        const int64_t i = s * args.rows + group.row[r];
        out.lse[i] = log_of_two_sums(stats[s].shift[r], stats[s].sum[r], shift ? shift[i] : T(0), sum ? sum[i] : T(0));
        out.pos[i] = stats[s].pos[r];
        out.ext[i] = stats[s].ext[r];
      }
  });
}

// ---- gradient

// Values of the columns of a group's table, each repeated for the eight rows.
template <class T>
inline Vec<T> column_lanes(const RowFactors<T>* factors, T RowFactors<T>::*member, const int32_t* columns, int64_t count, int64_t f) {
  const int64_t c = f / kGroup;
  const Vec<T> first = splat(factors[columns[c]].*member);
  if constexpr (kLanes<T> == 2 * kGroup) {
    const Vec<T> second = splat(factors[columns[std::min(c + 1, count - 1)]].*member);
    return expand<T>((1u << kGroup) - 1) ? first : second;
  } else {
    return first;
  }
}

// The coefficients G_ij + G_ji of one chunk of a group, divided by the temperature.
template <class T>
class Coefficients {
 public:
  Coefficients(const ContrastiveArgs<T>& args, const RowFactors<T>* factors, const Group& group)
      : fixed_(fixed_shift(args)), inverse_temperature_(static_cast<T>(1 / args.temperature)), factors_(factors),
        denominator_(rows(group, &RowFactors<T>::denominator)), positive_(rows(group, &RowFactors<T>::positive)),
        extra_(rows(group, &RowFactors<T>::extra)), lse_(rows(group, &RowFactors<T>::lse)) {}

  // Pairs of the negatives: G_ij alone, from a byte of set rows per column.
  void negatives(const T* dots, int64_t count, const uint8_t* e, T* weights) const {
    const Vec<T> scale = splat(inverse_temperature_);
    for_each_piece(count, [&](int64_t at, int i) {
      const Vec<T> p = exp<T>(load(dots + at) * scale - (fixed_ ? scale : lse_.piece[i]));
      store(weights + at, keep(group_mask<T>(e, at), p * denominator_.piece[i] * scale));
    });
  }

  // Pairs of P and Q, with bytes for P_ij, Q_ij, P_ji, Q_ji; without Q where its pointers are null.
  void positives(const T* dots, const int32_t* columns, int64_t count, const uint8_t* p, const uint8_t* q, const uint8_t* p_t,
                 const uint8_t* q_t, T* weights) const {
    const Vec<T> scale = splat(inverse_temperature_);
    for_each_piece(count, [&](int64_t at, int i) {
      const auto column = [&](T RowFactors<T>::*member) { return column_lanes(factors_, member, columns, count, at); };
      const Vec<T> logit = load(dots + at) * scale;
      const Vec<T> row_exp = exp<T>(logit - (fixed_ ? scale : lse_.piece[i]));
      const Vec<T> column_exp = fixed_ ? row_exp : exp<T>(logit - column(&RowFactors<T>::lse));
      Vec<T> total = keep(group_mask<T>(p, at), row_exp * denominator_.piece[i] + positive_.piece[i]);
      total += keep(group_mask<T>(p_t, at), column_exp * column(&RowFactors<T>::denominator) + column(&RowFactors<T>::positive));
      if (q) {
        total += keep(group_mask<T>(q, at), extra_.piece[i]);
        total += keep(group_mask<T>(q_t, at), column(&RowFactors<T>::extra));
      }
      store(weights + at, total * scale);
    });
  }

 private:
  GroupLanes<T> rows(const Group& group, T RowFactors<T>::*member) const {
    T value[kGroup] = {};
    for (int r = 0; r < group.count; ++r) value[r] = factors_[group.row[r]].*member;
    return GroupLanes<T>::repeat(value);
  }

  template <class F>
  static void for_each_piece(int64_t count, F&& f) {
    for (int64_t at = 0; at < count * kGroup; at += GroupLanes<T>::kWidth)
      for (int i = 0; i < GroupLanes<T>::kPieces; ++i) f(at + i * kLanes<T>, i);
  }

  bool fixed_;
  T inverse_temperature_;
  const RowFactors<T>* factors_;
  GroupLanes<T> denominator_, positive_, extra_, lse_;
};

// The rows a group writes; what belongs to no row goes to `spare`.
template <class T>
RowPointers<T> output_rows(T* base, const Group& group, int64_t depth, T* spare) {
  RowPointers<T> rows(base, group, depth);
  for (int r = group.count; r < kGroup; ++r) rows.row[r] = spare;
  return rows;
}

// out (streams, rows, depth) = the part of the gradient that comes from P and Q.
template <class T>
void positive_grad(const Problem<T>& problem, const RowFactors<T>* factors, bool use_extra, T* out) {
  const ContrastiveArgs<T>& args = problem.args;
  const ContrastiveMasks& masks = args.masks;
  const bool symmetric = masks.positives == masks.positives_t && (!use_extra || masks.extra == masks.extra_t);
  const int64_t tasks = (args.rows + kGroup - 1) / kGroup, workers = worker_count(args.threads, tasks);
  const ChunkScratch<T> scratch(workers);
  const Scratch<T> spare(workers * problem.depth);
  std::fill(spare.get(), spare.get() + workers * problem.depth, T(0));
  const PairMasks used = {{masks.positives, use_extra ? masks.extra : nullptr, symmetric ? nullptr : masks.positives_t,
                           symmetric || !use_extra ? nullptr : masks.extra_t}};
  parallel_for(args.threads, tasks, [&](int64_t task, int worker) {
    const Group group = consecutive_rows(task * kGroup, args.rows);
    T *dots = scratch.dots_of(worker), *weights = scratch.weights_of(worker);
    const int32_t* columns = scratch.index_of(worker);
    for (int64_t s = 0; s < args.streams; ++s)
      for (int r = 0; r < group.count; ++r) {
        T* row = out + (s * args.rows + group.row[r]) * problem.depth;
        std::fill(row, row + problem.depth, T(0));
      }
    walk_positives(masks, used, group, scratch, worker, [&](int64_t count, const uint8_t* const* bytes) {
      const uint8_t *p = bytes[0], *q = bytes[1], *p_t = symmetric ? p : bytes[2], *q_t = symmetric ? q : bytes[3];
      for (int64_t s = 0; s < args.streams; ++s) {
        group_products(problem, s, group, columns, count, dots);
        Coefficients<T>(args, factors + s * args.rows, group).positives(dots, columns, count, p, q, p_t, q_t, weights);
        const RowPointers<T> rows = output_rows(out + s * args.rows * problem.depth, group, problem.depth, spare.get() + worker * problem.depth);
        mix_columns<kGroup>(weights, problem.stream(s), problem.depth, columns, count, rows.row);
      }
    });
  });
}

// One group of the negatives in the buffer that the two phases share.
struct NegativeTask {
  Group group;
  int64_t position, part;      // the row of the negatives; which eight of its rows
  int64_t first, count;        // its columns in the buffer
};

// Adds the part of the gradient that comes from the negatives to out (streams, rows, depth).
template <class T>
class NegativeGrad {
 public:
  NegativeGrad(const Problem<T>& problem, const RowFactors<T>* factors, T* out)
      : problem_(problem), args_(problem.args), factors_(factors), out_(out),
        tasks_(args_.masks.negative_rows * problem.groups_per_position()), workers_(worker_count(args_.threads, tasks_)),
        chunk_(workers_), bytes_(workers_ * bytes_per_worker()), spare_(workers_ * problem.depth), list_(tasks_) {
    std::fill(spare_.get(), spare_.get() + workers_ * problem.depth, T(0));
    const Scratch<int32_t> counts(args_.masks.negative_rows);
    count_bits(args_.masks.negatives, args_.masks.negative_rows, args_.masks.words, counts.get(), args_.threads);
    for (int64_t begin = 0; begin < tasks_;) begin = run(begin, counts.get());
  }

 private:
  static constexpr int64_t kBufferPairs = 1 << 21;  // coefficients kept between the two phases

  int64_t bytes_per_worker() const { return (args_.rows + kByteSlack + 63) / 64 * 64; }

  // Runs the tasks from `begin` on whose columns fit into the buffer; returns the first one left.
  int64_t run(int64_t begin, const int32_t* counts) {
    const int64_t per_position = problem_.groups_per_position();
    int64_t end = begin, columns = 0;
    for (; end < tasks_; ++end) {
      NegativeTask& task = list_[end];
      task.position = end / per_position;
      task.part = end % per_position;
      const int64_t room = counts[task.position] + counts[task.position] % 2;
      if (end > begin && (columns + room) * kGroup * args_.streams > kBufferPairs) break;
      task.first = columns;
      columns += room;
    }
    const Scratch<int32_t> index(columns);
    const Scratch<T> weights(columns * kGroup * args_.streams);
    parallel_for(args_.threads, end - begin, [&](int64_t n, int worker) {
      own_rows(list_[begin + n], worker, index.get(), weights.get(), columns);
    });
    const int64_t ranges = std::clamp<int64_t>(args_.rows / kRangeColumns, 1, 64), width = (args_.rows + ranges - 1) / ranges;
    parallel_for(args_.threads, ranges, [&](int64_t range, int) {
      for (int64_t n = begin; n < end; ++n) own_columns(list_[n], range * width, (range + 1) * width, index.get(), weights.get(), columns);
    });
    return end;
  }

  // First phase: coefficients of a group, and the sum over its columns.
  void own_rows(NegativeTask& task, int worker, int32_t* index, T* weights, int64_t columns) {
    task.count = 0;
    task.group = active_rows(task);
    if (task.group.count == 0) return;
    int32_t* const own = index + task.first;
    uint8_t* bytes = bytes_.get() + worker * bytes_per_worker();
    walk_negatives(args_.masks, task.position, task.group, args_.rows + 1, own, bytes, [&](int64_t count) { task.count = count; });
    bytes[task.count] = 0;
    T* dots = chunk_.dots_of(worker);
    for (int64_t s = 0; s < args_.streams; ++s) {
      const Coefficients<T> coefficients(args_, factors_ + s * args_.rows, task.group);
      const RowPointers<T> rows = output_rows(out_stream(s), task.group, problem_.depth, spare_.get() + worker * problem_.depth);
      T* const all_weights = weights + (s * columns + task.first) * kGroup;
      for (int64_t from = 0; from < task.count; from += kChunk) {
        const int64_t count = std::min(kChunk, task.count - from);
        T* part = all_weights + from * kGroup;
        group_products(problem_, s, task.group, own + from, count, dots);
        coefficients.negatives(dots, count, bytes + from, part);
        with_row_count(task.group.count, [&](auto r) {
          mix_columns<r()>(part, problem_.stream(s), problem_.depth, own + from, count, rows.row);
        });
      }
    }
  }

  // Second phase: what the group's rows add to the columns in [low, high).
  void own_columns(const NegativeTask& task, int64_t low, int64_t high, const int32_t* index, const T* weights, int64_t columns) {
    const int32_t* const own = index + task.first;
    const int64_t from = lower_bound(own, task.count, low), to = lower_bound(own, task.count, high);
    if (from == to) return;
    for (int64_t s = 0; s < args_.streams; ++s) {
      const RowPointers<const T> rows(problem_.stream(s), task.group, problem_.depth);
      with_row_count(task.group.count, [&](auto r) {
        scatter_rows<r()>(weights + (s * columns + task.first + from) * kGroup, rows.row, problem_.depth, own + from, to - from, out_stream(s));
      });
    }
  }

  // Rows with a gradient of their denominator in some stream; the others have no coefficients.
  Group active_rows(const NegativeTask& task) const {
    Group group{};
    int64_t skip = task.part * kGroup;
    for (int64_t image = 0; image < problem_.images() && group.count < kGroup; ++image) {
      const int64_t row = image * args_.masks.negative_rows + task.position;
      bool active = false;
      for (int64_t s = 0; s < args_.streams; ++s) active |= factors_[s * args_.rows + row].denominator != 0;
      if (active && skip-- <= 0) group.row[group.count++] = row;
    }
    return group;
  }

  static int64_t lower_bound(const int32_t* sorted, int64_t count, int64_t value) {
    int64_t low = 0;
    while (count > 0) {
      const int64_t half = count / 2;
      if (sorted[low + half] < value) {
        low += half + 1;
        count -= half + 1;
      } else {
        count = half;
      }
    }
    return low;
  }

  T* out_stream(int64_t s) const { return out_ + s * args_.rows * problem_.depth; }

  static constexpr int64_t kRangeColumns = 392;  // columns a second-phase task owns: their gradients fit the second-level cache
  const Problem<T>& problem_;
  const ContrastiveArgs<T>& args_;
  const RowFactors<T>* factors_;
  T* out_;
  int64_t tasks_, workers_;
  ChunkScratch<T> chunk_;
  Scratch<uint8_t> bytes_;
  Scratch<T> spare_;
  Scratch<NegativeTask> list_;
};

// ---- up to kMaxStreams streams at a time share the walks over the masks

template <class T>
ContrastiveArgs<T> some_streams(const ContrastiveArgs<T>& args, int64_t first) {
  ContrastiveArgs<T> part = args;
  part.x += first * args.rows * args.depth;
  part.streams = std::min(kMaxStreams, args.streams - first);
  return part;
}

template <class T>
void sparse_stats(const ContrastiveArgs<T>& args, const ContrastiveStats<T>& out) {
  const Problem<T> problem(args);
  if (!args.masks.negatives) return positive_stats<T>(problem, nullptr, nullptr, out);
  const Scratch<T> shift(args.streams * args.rows), sum(args.streams * args.rows);
  negative_stats(problem, shift.get(), sum.get());
  positive_stats<T>(problem, shift.get(), sum.get(), out);
}

template <class T>
void sparse_grad(const ContrastiveArgs<T>& args, const ContrastiveGrads<T>& grads) {
  const Problem<T> problem(args);
  const int64_t count = args.streams * args.rows;
  const Scratch<RowFactors<T>> factors(count);
  for (int64_t i = 0; i < count; ++i) factors[i] = row_factors(args, grads, i);
  const bool padded = problem.depth != args.depth;
  const Scratch<T> wide(padded ? count * problem.depth : 0);
  T* out = padded ? wide.get() : grads.grad_x;
  positive_grad(problem, factors.get(), args.masks.extra && any_nonzero(grads.grad_ext, count), out);
  if (args.masks.negatives) NegativeGrad<T>(problem, factors.get(), out);
  if (!padded) return;
  for (int64_t i = 0; i < count; ++i) std::copy(out + i * problem.depth, out + i * problem.depth + args.depth, grads.grad_x + i * args.depth);
}

template <class T>
void all_stats(const ContrastiveArgs<T>& args, const ContrastiveStats<T>& out) {
  for (int64_t s = 0; s < args.streams; s += kMaxStreams) {
    const int64_t at = s * args.rows;
    sparse_stats<T>(some_streams(args, s), {out.lse + at, out.pos + at, out.ext + at});
  }
}

template <class T>
void all_grad(const ContrastiveArgs<T>& args, const ContrastiveGrads<T>& g) {
  for (int64_t s = 0; s < args.streams; s += kMaxStreams) {
    const int64_t at = s * args.rows;
    sparse_grad<T>(some_streams(args, s), {g.lse + at, g.grad_lse + at, g.grad_pos + at, g.grad_ext + at, g.grad_x + at * args.depth});
  }
}

}  // namespace

void contrastive_sparse_stats(const ContrastiveArgs<float>& args, const ContrastiveStats<float>& out) { all_stats(args, out); }
void contrastive_sparse_stats(const ContrastiveArgs<double>& args, const ContrastiveStats<double>& out) { all_stats(args, out); }
void contrastive_sparse_grad(const ContrastiveArgs<float>& args, const ContrastiveGrads<float>& grads) { all_grad(args, grads); }
void contrastive_sparse_grad(const ContrastiveArgs<double>& args, const ContrastiveGrads<double>& grads) { all_grad(args, grads); }

}  // namespace hpk::HPK_ISA
