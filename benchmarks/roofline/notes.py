"""What machine code does not say: how often the loops of each kernel run, and what it moves from and to memory.

One note a kernel, a function of a launch's arguments by their names in the kernel and of the problem. A kernel without
one, or whose note does not fit, is an error; `python -m benchmarks.roofline` then lists all of them with their loops.
Turns follow the loops of the machine code in order (`Loop.shown` in the results): a number a loop, or (number, turns of
the loops within it). `products` are the operations of the matrix units in one program; the model checks that the turns
and the instructions amount to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

from benchmarks.dry import Launch, Operand

# Columns that any of so many consecutive rows has a positive in, P or Q: benchmarks.features.make_batch(64), every
# twelfth panel of 128 rows (python -m benchmarks.roofline --unions).
UNIONS = {1: 183, 8: 838, 16: 1472, 32: 2316, 64: 3089, 128: 4129}


@dataclass(frozen=True)
class Problem:
    """What the inputs are like, as far as data decide how much work there is."""

    rate: float = 0.02
    unions: dict[int, float] = field(default_factory=lambda: dict(UNIONS))

    def union(self, rows: int) -> float:
        """Columns in which any of `rows` consecutive rows has a positive; between those counted, by a power law."""
        low = max(size for size in self.unions if size <= rows)
        high = min((size for size in self.unions if size > low), default=low)
        if low == high:
            return self.unions[low]
        power = math.log(self.unions[high] / self.unions[low]) / math.log(high / low)
        return self.unions[low] * (rows / low) ** power


@dataclass(frozen=True)
class Note:
    part: str = ""  # of its stage
    turns: tuple = ()
    products: float = 0.0  # operations of a program's matrix instructions
    hbm: float = 0.0  # bytes from and to memory, of the launch
    reuse: float = 1.0  # lanes that share a word of a plain load, so that it comes from the second-level cache once
    copy_bytes: float = 0.0  # of one bulk copy (TMA)
    shared_work: bool = False  # programs take items from one queue, or evenly: turns are the mean of all programs
    programs: int = 1  # of the launch; `note` fills it in


Rule = Callable[[SimpleNamespace, Problem], Note]
RULES: dict[str, Rule] = {}  # by kernel


class Unfit(ValueError):
    """A kernel without a note, or with one that is of another kernel."""


def note(launch: Launch, problem: Problem, same: int = 1) -> Note:
    """Of a launch; `same`: launches of this kernel in the step."""
    if launch.name not in RULES:
        raise Unfit(f"{launch.name}: no note says how often its loops run")
    names = dict(zip(launch.function.arg_names, launch.arguments)) | launch.options
    given = SimpleNamespace(**names, grid=launch.grid, same=same, programs=math.prod(launch.grid))
    try:
        return replace(RULES[launch.name](given, problem), programs=given.programs)
    except (AttributeError, IndexError, TypeError, ZeroDivisionError) as error:
        raise Unfit(f"{launch.name}: its note is of another kernel ({error})") from error


def _of(*kernels: str) -> Callable[[Rule], Rule]:
    """Registers a rule."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(kernels, rule))
        return rule

    return register


def size(*tensors: Operand) -> int:
    """Bytes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in tensors)


def cdiv(a: float, b: float) -> int:
    return -(-int(a) // int(b))


# ------------------------------------------------------------------ rows and bits


@_of("_normalize_rows_kernel", "_normalize_rows_grad_kernel")
def _(a, problem):
    tables, streams = 3 if hasattr(a, "grad_ptr") else 2, a.grid[1] if len(a.grid) > 1 else 1
    return Note(hbm=tables * streams * size(getattr(a, "first_ptr", None) or a.x_ptr))


@_of("_pair_average_kernel")
def _(a, problem):
    # Streams go four at a time, then the rest.
    return Note("average", turns=((cdiv(a.tokens, a.BLOCK), a.streams // 4, a.streams % 4),))


@_of("_pair_average_grad_kernel")
def _(a, problem):
    return Note("average", turns=(a.streams // 4, a.streams % 4))


@_of("_random_bits_kernel")
def _(a, problem):
    return Note(turns=(8 - a.first_group,), hbm=size(a.out_ptr))


@_of("_count_bits_kernel")
def _(a, problem):
    return Note(turns=(cdiv(a.W, a.BLOCK_W),), hbm=size(a.first_ptr) * a.grid[1])


@_of("_transpose_bits_kernel")
def _(a, problem):
    return Note("lists", hbm=size(a.bits_ptr, a.out_ptr))


@_of("_merge_parts_kernel")
def _(a, problem):
    parts = [] if a.ONE_SHIFT else [a.parts]
    parts += [a.parts, a.pos_parts, a.ext_parts] if a.HAS_SUMS else [a.parts]
    return Note("parts put together", turns=tuple(turns for n in parts if n > 1 for turns in (n // 4, n % 4)))


# ------------------------------------------------------------------ search


@_of("_max_similarity_panel_kernel")
def _(a, problem):
    tiles, steps = a.tiles_per_split, a.C // a.BLOCK_K  # one loop over both
    return Note(
        turns=((tiles * steps, 1 / steps),),
        products=tiles * 2 * a.BLOCK_M * a.BLOCK_N * a.C,
        hbm=size(a.q_ptr, a.k_ptr, a.out_ptr),
        reuse=8,
        copy_bytes=(a.BLOCK_M + a.BLOCK_N) / 2 * a.BLOCK_K * a.q_ptr.dtype.itemsize,
    )


@_of("_pairs_above_triangle_kernel")
def _(a, problem):
    tiles, steps = a.count / a.programs, a.C // a.BLOCK_K  # one loop over both; a tile's first and last step do more
    return Note(
        turns=((tiles * steps, 1 / steps, 1 / steps),),
        products=tiles * 2 * a.BLOCK_M * a.BLOCK_N * a.C,
        hbm=size(a.x_ptr, a.bits_ptr),
        reuse=32,
        copy_bytes=(a.BLOCK_M + a.BLOCK_N) / 2 * a.BLOCK_K * a.x_ptr.dtype.itemsize,
        shared_work=True,
    )


@_of("_topk_similarity_panel_kernel")
def _(a, problem):
    tiles = a.tiles_per_split
    # Of a tile's BLOCK_N keys, those that enter a list of k after t tiles: BLOCK_N k / (BLOCK_N t) of them, and the
    # panel takes as many turns as its busiest row.
    turns = sum(_largest(min(a.BLOCK_N, a.k / max(t, 0.25)), a.BLOCK_M) for t in range(tiles)) / tiles
    return Note(
        turns=((tiles, a.C // a.BLOCK_K, turns),),
        products=tiles * 2 * a.BLOCK_M * a.BLOCK_N * a.C,
        hbm=size(a.q_ptr, a.k_ptr, a.out_ptr),
        reuse=8,
    )


def _largest(mean: float, count: int) -> float:
    """Expected largest of `count` Poisson numbers."""
    total, below, term, n = 0.0, 0.0, math.exp(-mean), 0
    while below < 1 - 1e-9 and n < 1000:
        below += term
        total += 1 - below**count
        n += 1
        term *= mean / n
    return total


# ------------------------------------------------------------------ every pair of the loss


@_of("_contrastive_triangle_stats_kernel")
def _(a, problem):
    sides = [min(a.SIDE, a.N - first) for first in range(0, a.N, a.SIDE)]  # of a region
    panels, columns = [cdiv(side, a.BLOCK_M) for side in sides], [cdiv(side, a.BLOCK_N) for side in sides]
    tiles = sum(panels[r] * columns[c] for r in range(len(sides)) for c in range(r, len(sides)))
    tiles, steps = tiles / a.grid[0], a.D // a.BLOCK_K  # some programs have no region
    return Note(
        turns=((tiles * steps, 1 / steps),),
        products=tiles * 2 * a.BLOCK_M * a.BLOCK_N * a.D,
        hbm=size(a.x_ptr, a.parts_ptr) + (2 if a.HAS_EXTRA else 1) * size(a.positives_ptr) * a.grid[1],
        reuse=8,
        shared_work=True,
    )


@_of("_contrastive_weights_kernel")
def _(a, problem):
    rows = a.block_rows
    bits = (2 if a.HAS_EXTRA else 1) * rows * a.W * 4
    return Note(
        "weights",
        turns=(a.D // a.BLOCK_K,),
        products=2 * a.BLOCK_M * a.BLOCK_N * a.D,
        hbm=size(a.x_ptr) + bits + rows * a.W_out * a.x_ptr.dtype.itemsize,
        reuse=8,
    )


# ------------------------------------------------------------------ listed pairs of the loss


def _listed(a, problem) -> tuple[float, float]:
    """Tiles of a list, and bytes of the masks that are looked at."""
    if a.NEGATIVES:
        return problem.rate * a.N / a.BLOCK_C + 0.5, size(a.negatives_ptr)
    return problem.union(a.BLOCK_R) / a.BLOCK_C + 0.5, (2 if a.HAS_EXTRA else 1) * size(a.positives_ptr)


@_of("_contrastive_listed_stats_kernel")
def _(a, problem):
    tiles, bits = _listed(a, problem)
    return Note(
        "random columns" if a.NEGATIVES else "pairs of P and Q",
        turns=((tiles, a.D // a.BLOCK_K),),
        products=tiles * 2 * a.BLOCK_C * a.BLOCK_R * a.D,
        hbm=size(a.x_ptr) + bits,
        reuse=8 if a.NEGATIVES else 2,
    )


@_of("_contrastive_listed_grad_kernel")
def _(a, problem):
    tiles, bits = _listed(a, problem)
    return Note(
        "random columns, row side" if a.NEGATIVES else "pairs of P and Q",
        turns=(tiles if a.RESIDENT else (tiles, a.D // a.BLOCK_K),),
        products=tiles * 2 * a.BLOCK_C * a.BLOCK_R * (_copies(a) * a.D + a.BLOCK_D),
        hbm=size(a.x_ptr) + bits + size(a.out_ptr) * (2 if a.ADD else 1),
        reuse=8 if a.NEGATIVES else 2,
    )


def _copies(a) -> int:
    """How often logits are made: with x_i resident all warps take them as a tile of 64, which four warps can make."""
    return a.num_warps // 4 if a.RESIDENT else 1


def _windows(a, problem) -> float:
    """Windows of columns that hold the column side's partial sums."""
    return problem.rate * a.N * a.R * a.x_ptr.dtype.itemsize * a.D / size(a.workspace_ptr)


@_of("_contrastive_union_kernel")
def _(a, problem):
    masks = (a.a_ptr, a.b_ptr, a.c_ptr, a.d_ptr)[: a.MASKS]
    return Note("lists", hbm=size(*masks, a.out_ptr))


@_of("_contrastive_fill_lists_kernel")
def _(a, problem):
    words = cdiv(a.W, 128)
    bits = problem.rate * 32 if a.bits_ptr.shape[0] * 16 < a.N else problem.union(16) / a.W  # of a word
    most = _largest(bits, 128)  # taken four at a time, then the rest; first comes the loop of lists without room
    return Note("lists", turns=(0, (words, most // 4, most % 4)), hbm=size(a.bits_ptr))


@_of("_contrastive_rank_kernel")
def _(a, problem):
    return Note("lists", turns=(cdiv(a.W, a.BLOCK_W),), hbm=size(a.turned_ptr, a.ranks_ptr))


@_of("_contrastive_column_side_kernel")
def _(a, problem):
    # A loop over items: waits, sums of 16 columns at a time over their slots, waits, products of a window's columns.
    slots = problem.rate * a.R  # of a column
    windows = slots * a.blocks * a.N / a.quota
    of_products = a.R * a.blocks * (a.D // a.BLOCK_D)
    items = (windows + 1) * (of_products + a.sum_items)
    product, summing = windows * of_products / items, windows * a.sum_items / items
    tiles = problem.rate * a.N / windows / a.BLOCK_C + 0.5
    groups = a.N / windows / a.SUM_COLUMNS / a.sum_items
    of_items = (
        items / a.programs,
        summing,
        (summing * groups, _largest(slots, a.SUM_COLUMNS)),
        product,
        product * tiles,
    )
    return Note(
        "random columns, column side",
        turns=(of_items,),
        products=items / a.programs * product * tiles * 2 * a.BLOCK_C * a.BLOCK_R * (_copies(a) * a.D + a.BLOCK_D),
        hbm=size(a.x_ptr, a.partial_ptr, a.out_ptr),
        reuse=4,
        shared_work=True,
    )


# ------------------------------------------------------------------ local mixing


@_of("_neighbor_weights_kernel")
def _(a, problem):
    # Heads of the taps four at a time; 7.5 pivots are the mean of rows of normal logits (ops/local_mix/README.md).
    turns = (a.heads // 4, a.heads % 4, a.heads, (1, 7.5))
    return Note("weights", turns=turns, hbm=size(a.attention_ptr, a.out_ptr))


@_of("_neighbor_mix_kernel")
def _(a, problem):
    return Note("mixing", hbm=size(a.code_ptr, a.weights_ptr, a.out_ptr))
