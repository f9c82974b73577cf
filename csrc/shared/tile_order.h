// The order in which the blocks of a launch visit the tiles of a matrix, so that neighbours in time share operands in
// the cache. Integer-exact for every size that fits a grid.
#pragma once

#include <cmath>
#include <cstdint>

#include "shared/bits.h"

namespace hpk {

constexpr int64_t kTileGroup = 8;  // column (or row) tiles that stay in the cache while the others stream by

struct TilePlace {
  int64_t row, column;
};

// Tiles (r, c), r <= c, in the first `groups` column groups of the upper triangle.
HPK_HOST_DEVICE inline int64_t triangle_tiles(int64_t groups) {
  const int64_t corner = kTileGroup * (kTileGroup + 1) / 2;  // the small triangle where a group meets the diagonal
  return kTileGroup * kTileGroup * (groups * (groups - 1) / 2) + groups * corner;
}

// Block p -> tile (row <= column). Columns go in groups; within a group the row tiles are walked top down. The last
// group may reach past the matrix: the caller drops columns outside.
HPK_HOST_DEVICE inline TilePlace triangle_tile(int64_t p) {
  int64_t group = static_cast<int64_t>(std::sqrt(2.0 * static_cast<double>(p)) / kTileGroup);
  while (triangle_tiles(group) > p)
    --group;  // the root is a guess; these two lines make it exact
  while (triangle_tiles(group + 1) <= p)
    ++group;
  const int64_t q = p - triangle_tiles(group);
  const int64_t first_column = group * kTileGroup;
  if (q < first_column * kTileGroup) return {q / kTileGroup, first_column + q % kTileGroup};
  int64_t rest = q - first_column * kTileGroup, column = 0;
  while (rest > column)
    rest -= ++column;  // column c of the small triangle has c + 1 tiles
  return {first_column + rest, first_column + column};
}

// Block p -> tile of a rows x columns matrix, in bands of kTileGroup rows walked column by column.
HPK_HOST_DEVICE inline TilePlace rectangle_tile(int64_t p, int64_t rows, int64_t columns) {
  const int64_t first_row = p / (kTileGroup * columns) * kTileGroup;
  const int64_t height = rows - first_row < kTileGroup ? rows - first_row : kTileGroup;
  const int64_t q = p - first_row * columns;
  return {first_row + q % height, q / height};
}

}  // namespace hpk
