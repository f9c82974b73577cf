"""csrc/shared/tile_order.h visits every tile exactly once, also where a floating-point root would be off."""

from __future__ import annotations

import subprocess
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
PROGRAM = """
#include <vector>
#include "shared/tile_order.h"
using namespace hpk;
int main() {
  for (int64_t tiles : {1, 7, 8, 9, 63, 392}) {
    std::vector<int> seen(tiles * tiles);
    for (int64_t p = 0; p < triangle_tiles((tiles + 7) / 8); ++p) {
      const TilePlace t = triangle_tile(p);
      if (t.row < 0 || t.row > t.column) return 1;
      if (t.column < tiles) ++seen[t.row * tiles + t.column];
    }
    for (int64_t r = 0; r < tiles; ++r)
      for (int64_t c = 0; c < tiles; ++c)
        if (seen[r * tiles + c] != (r <= c)) return 2;
  }
  for (int64_t group : {100, 1000, 8191})  // up to two billion blocks
    for (int64_t d = -3; d <= 3; ++d)
      if (triangle_tile(triangle_tiles(group) + d).column / kTileGroup != (d < 0 ? group - 1 : group)) return 3;
  for (int64_t rows : {1, 7, 8, 17})
    for (int64_t columns : {1, 5, 33}) {
      std::vector<int> seen(rows * columns);
      for (int64_t p = 0; p < rows * columns; ++p) {
        const TilePlace t = rectangle_tile(p, rows, columns);
        if (t.row >= rows || t.column >= columns || seen[t.row * columns + t.column]++) return 4;
      }
    }
}
"""


def test_every_tile_once(tmp_path):
    source = tmp_path / "tile_order.cpp"
    source.write_text(PROGRAM)
    program = tmp_path / "tile_order"
    subprocess.run(["g++", "-std=c++17", "-O1", f"-I{CSRC}", str(source), "-o", str(program)], check=True)
    assert subprocess.run([program]).returncode == 0
