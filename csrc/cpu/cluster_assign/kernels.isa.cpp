// Assignment of rows to centroids in one pass: a tile of scores is reduced to labels while it is in cache, and its
// rows, still in cache, are added to the sums of their clusters.
//
// Rows are cut into parts by shapes alone. A part owns a table of sums in double; the tables are added in the order of
// the parts, so that neither timing nor the number of threads shows.
#include "cpu/cluster_assign/cluster_assign.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/runtime/thread_pool.h"
#include "cpu/vector/tile.h"

namespace hpk::HPK_ISA {
namespace {

constexpr int64_t kRows = 96, kCols = 192;  // of a tile of scores: whole register blocks
constexpr int64_t kMaxParts = 64;
constexpr int64_t kPartRows =
    2048;  // at least, so that clearing and adding a part's table is little beside its products
constexpr int64_t kTableBytes = int64_t(64) << 20;  // all tables of sums, unless one alone is larger
constexpr int kParts = 16;                          // of a sum along a row, kept apart so that its loop vectorises

// Adds a row to a sum of rows; its squared distance from a centroid.
template <class T>
T add_row(const T* row, const T* centroid, int64_t depth, double* total) {
  T part[kParts] = {};
  int64_t d = 0;
  for (; d + kParts <= depth; d += kParts)
    for (int l = 0; l < kParts; ++l) {
      const T difference = row[d + l] - centroid[d + l];
      part[l] += difference * difference;
      total[d + l] += row[d + l];
    }
  for (; d < depth; ++d) {
    part[0] += (row[d] - centroid[d]) * (row[d] - centroid[d]);
    total[d] += row[d];
  }
  T sum = 0;
  for (int l = 0; l < kParts; ++l)
    sum += part[l];
  return sum;
}

template <class T>
class Assignment {
 public:
  explicit Assignment(const ClusterArgs<T>& args)
      : args_(args),
        blocks_((args.rows + kRows - 1) / kRows),
        parts_(std::clamp<int64_t>(kTableBytes / std::max<int64_t>(1, 8 * args.clusters * args.depth), 1,
                                   std::clamp<int64_t>(args.rows / kPartRows, 1, kMaxParts))),
        columns_(E::round_cols(args.clusters)),
        directions_(E::b_size(args.clusters, args.depth)),
        bias_(columns_),
        sums_(parts_ * args.clusters * args.depth),
        counts_(parts_ * args.clusters) {}

  bool run() {
    pack_rows<E::NR>(args_.directions, args_.depth, nullptr, args_.clusters, args_.depth, directions_.get());
    std::copy(args_.bias, args_.bias + args_.clusters, bias_.get());
    std::fill(bias_.get() + args_.clusters, bias_.get() + columns_, -std::numeric_limits<T>::infinity());
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(args_.threads, parts_));
    const Scratch<T> scratch(workers * kRows * kCols);
    std::atomic<bool> finite{true};
    parallel_for(args_.threads, parts_, [&](int64_t part, int worker) {
      T* scores = scratch.get() + worker * kRows * kCols;
      double* sums = sums_.get() + part * args_.clusters * args_.depth;
      int64_t* counts = counts_.get() + part * args_.clusters;
      std::fill(sums, sums + args_.clusters * args_.depth, 0.0);
      std::fill(counts, counts + args_.clusters, int64_t(0));
      for (int64_t block = blocks_ * part / parts_; block < blocks_ * (part + 1) / parts_; ++block) {
        const int64_t first = block * kRows, height = std::min(kRows, args_.rows - first);
        find_labels(first, height, scores);
        if (!add(first, height, sums, counts)) finite.store(false, std::memory_order_relaxed);
      }
    });
    parallel_for(args_.threads, args_.clusters, [&](int64_t k, int) {
      for (int64_t part = 0; part < parts_; ++part) {
        args_.counts[k] += counts_[part * args_.clusters + k];
        const double* from = sums_.get() + (part * args_.clusters + k) * args_.depth;
        double* to = args_.sums + k * args_.depth;
        for (int64_t d = 0; d < args_.depth; ++d)
          to[d] += from[d];
      }
    });
    return finite;
  }

 private:
  using E = Engine<T>;

  void find_labels(int64_t first, int64_t height, T* scores) const {
    std::fill(args_.labels + first, args_.labels + first + height, int64_t(0));
    if (args_.clusters == 1) return;  // as in seeding, which asks for distances alone
    T best[kRows];
    std::fill(best, best + kRows, -std::numeric_limits<T>::infinity());
    const Left<T> rows = rows_of(args_.x + first * args_.depth, args_.depth);
    for (int64_t j0 = 0; j0 < args_.clusters; j0 += kCols) {
      const int64_t width = std::min(kCols, args_.clusters - j0);
      multiply<E>(height, width, args_.depth, rows, directions_.get() + j0 * args_.depth, scores, kCols);
      for (int64_t r = 0; r < height; ++r)
        improve(scores + r * kCols, j0, width, best[r], args_.labels[first + r]);
    }
  }

  // The largest score + bias of the columns from j0 on, if it is above `best`: ties stay with the lower column.
  void improve(const T* scores, int64_t j0, int64_t width, T& best, int64_t& label) const {
    constexpr int64_t lanes = kLanes<T>;
    Vec<T> top = splat(-std::numeric_limits<T>::infinity());
    for (int64_t c = 0; c < width; c += lanes)
      top = max(top, load(scores + c) + load(bias_.get() + j0 + c));
    const T value = largest<T>(top);
    if (!(value > best)) return;
    best = value;
    const Vec<T> below = splat(std::nextafter(value, -std::numeric_limits<T>::infinity()));
    for (int64_t c = 0; c < width; c += lanes)
      if (const uint32_t found = bits_greater(load(scores + c) + load(bias_.get() + j0 + c), below)) {
        label = j0 + c + __builtin_ctz(found);
        return;
      }
  }

  // Distances, sums and counts of rows whose labels are known. Whether all distances are finite.
  bool add(int64_t first, int64_t height, double* sums, int64_t* counts) const {
    bool finite = true;
    for (int64_t i = first; i < first + height; ++i) {
      const int64_t k = args_.labels[i];
      args_.distances[i] =
          add_row(args_.x + i * args_.depth, args_.centroids + k * args_.depth, args_.depth, sums + k * args_.depth);
      finite &= static_cast<bool>(std::isfinite(args_.distances[i]));
      ++counts[k];
    }
    return finite;
  }

  const ClusterArgs<T>& args_;
  int64_t blocks_, parts_, columns_;
  Scratch<T> directions_, bias_;
  Scratch<double> sums_;
  Scratch<int64_t> counts_;
};

}  // namespace

bool cluster_assign(const ClusterArgs<float>& args) { return Assignment<float>(args).run(); }
bool cluster_assign(const ClusterArgs<double>& args) { return Assignment<double>(args).run(); }

}  // namespace hpk::HPK_ISA
