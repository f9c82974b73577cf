// A task makes some rows of the product, a tile at a time: each tile is a sum over pieces of the depth, in order.
#include "cpu/products/products.h"

#include <algorithm>

#include "cpu/runtime/thread_pool.h"
#include "cpu/vector/tile.h"

namespace hpk::HPK_ISA {
namespace {

constexpr int64_t kRows = 96, kCols = 192;  // of a tile: whole register blocks
constexpr int64_t kDepth = 256;             // of a piece: the tile is a sum of short sums

template <class T>
void multiply_matrices(const ProductArgs<T>& args) {
  using E = Engine<T>;
  const Factor<T> a = args.a, b = args.b;
  const int64_t depth = args.depth, panels = (args.columns + E::NR - 1) / E::NR;
  const Scratch<T> packed(panels * E::NR * depth);
  parallel_for(args.threads, panels, [&](int64_t panel, int) {
    const int64_t j = panel * E::NR, count = std::min<int64_t>(E::NR, args.columns - j);
    T* out = packed.get() + j * depth;
    if (b.turned)
      pack_rows<E::NR>(b.data + j * b.stride, b.stride, nullptr, count, depth, out);
    else
      pack_columns<E::NR>(b.data + j, b.stride, nullptr, depth, count, out);
  });
  const int64_t tasks = (args.rows + kRows - 1) / kRows;
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(args.threads, tasks));
  const int64_t left_size = kRows * kDepth, size = left_size + kRows * kCols;
  const Scratch<T> scratch(workers * size);
  parallel_for(args.threads, tasks, [&](int64_t task, int worker) {
    T *left = scratch.get() + worker * size, *tile = left + left_size;
    const int64_t i = task * kRows, rows = std::min(kRows, args.rows - i);
    for (int64_t j = 0; j < args.columns; j += kCols) {
      const int64_t columns = std::min(kCols, args.columns - j);
      if (depth == 0) std::fill(tile, tile + kRows * kCols, T(0));
      for (int64_t d = 0; d < depth; d += kDepth) {
        const int64_t piece = std::min(kDepth, depth - d);
        if (a.turned)
          pack_columns<E::MR>(a.data + d * a.stride + i, a.stride, nullptr, piece, rows, left);
        else
          pack_rows<E::MR>(a.data + i * a.stride + d, a.stride, nullptr, rows, piece, left);
        for (int64_t c = 0; c < columns; c += E::NR)
          for (int64_t r = 0; r < rows; r += E::MR)
            E::micro(piece, left + r * piece, packed.get() + (j + c) * depth + d * E::NR, tile + r * kCols + c, kCols,
                     d > 0);
      }
      for (int64_t r = 0; r < rows; ++r)
        std::copy(tile + r * kCols, tile + r * kCols + columns, args.out + (i + r) * args.columns + j);
    }
  });
}

}  // namespace

void product(const ProductArgs<float>& args) { multiply_matrices(args); }
void product(const ProductArgs<double>& args) { multiply_matrices(args); }

}  // namespace hpk::HPK_ISA
