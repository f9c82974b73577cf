"""Element offsets past 2^31 in the kernels of csrc/cuda, on the host.

Launches have the sizes that put their last rows past 2^31 elements; only their last blocks run (run_last_blocks), on
memory of which only the last rows are real (mapped.py). They must give the bits of a launch on those rows alone.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hpkernels.common.bits import words
from hpkernels.ops.local_mix import reference
from hpkernels.ops.local_mix.weighting import Weighting
from hpkernels.ops.pair_bits import reference as pair_bits
from tests.large.mapped import Sparse

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps memory without reserving it, as Linux does")
FAR, EVERY_BLOCK = 1 << 31, 0xFFFFFFFF
TILE, DEPTH = 128, 128
MANY = FAR // DEPTH + TILE  # rows of DEPTH numbers, of which the last tile lies past 2^31
SHARES = MANY // TILE // 3  # of columns: the last one has the last three tiles


@pytest.fixture(autouse=True)
def _tally(record_property):
    record_property("tally", ("cases of offsets past 2^31 in CUDA kernels", 1))


@pytest.fixture
def zeros():
    """zeros(shape, dtype): a tensor of which only the pages written to are real, until the test ends."""
    kept = []

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        count = torch.Size(shape).numel()
        kept.append(Sparse(count, dtype))
        return kept[-1].at(0, count).view(shape)

    yield make
    for array in kept:
        array.close()


@pytest.fixture
def late(zeros):
    """late(rows, count): the rows as the last of `count`."""

    def make(rows: Tensor, count: int) -> Tensor:
        found = zeros(count, *rows.shape[1:], dtype=rows.dtype)
        found[-len(rows) :] = rows
        return found

    return make


@pytest.fixture
def run(shim):
    """run(function, arguments, last=n): a launch; the last n blocks of each axis run. Tensors go by address."""

    def call(name: str, *arguments: object, last: int = EVERY_BLOCK) -> None:
        shim.run_last_blocks(last)
        try:
            getattr(shim, name)(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments), 0)
        finally:
            shim.run_last_blocks(EVERY_BLOCK)

    return call


@pytest.fixture(params=["f32", pytest.param("bf16", marks=pytest.mark.slow)])
def operands(request, late):
    """Suffix of functions, two matrices, and the same as the last rows of many."""
    a, b = torch.randn(2, TILE, DEPTH).to(torch.float32 if request.param == "f32" else torch.bfloat16)
    return "_" + request.param, a, b, late(a, MANY), late(b, MANY)


def last_share(rows: Tensor) -> Tensor:
    """The last share of the columns: two tiles of zeros before the rows."""
    return torch.cat([torch.zeros(2 * TILE, rows.shape[1], dtype=rows.dtype), rows])


def random_words(*shape: int) -> Tensor:
    return torch.randint(-FAR, FAR, shape).int()


# ------------------------------------------------------------------ search


def test_max_similarity(operands, zeros, run):
    suffix, q, k, far_q, far_k = operands
    near, far, columns = torch.empty(1, TILE), zeros(SHARES, MANY), last_share(k)
    run("max_similarity" + suffix, q, TILE, columns, len(columns), DEPTH, 1, near)
    run("max_similarity" + suffix, far_q, MANY, far_k, MANY, DEPTH, SHARES, far, last=1)
    assert near.any() and torch.equal(far[-1, -TILE:], near[0])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("far_side", ["queries", "keys"])
def test_topk_similarity(operands, far_side, k, zeros, run):
    """Late keys have late indices, by which the lower half of their ordered keys falls."""
    suffix, q, keys, far_q, far_keys = operands
    columns, options, size = last_share(keys), (DEPTH, k, False, 0, 0, 0, 0), 256
    near, lists = torch.empty(TILE, k, dtype=torch.int64), torch.empty(TILE * size, dtype=torch.int64)
    run("topk_similarity" + suffix, q, TILE, columns, len(columns), *options, 1, size, lists, near)
    of_queries = far_side == "queries"
    rows, shares = (MANY, 1) if of_queries else (TILE, SHARES)
    far, lists = zeros(rows, shares, k, dtype=torch.int64), zeros(rows, shares, size, dtype=torch.int64)
    sides = (far_q, MANY, columns, len(columns)) if of_queries else (q, TILE, far_keys, MANY)
    run("topk_similarity" + suffix, *sides, *options, shares, size, lists, far, last=1)
    assert torch.equal(far[-TILE:, -1], near if of_queries else near - (MANY - len(columns)))


def test_ordered_keys(operands, zeros, run):
    suffix, q, k, far_q, far_k = operands
    near, far = torch.empty(TILE, TILE, dtype=torch.int64), zeros(2 * TILE, MANY, dtype=torch.int64)
    options = (DEPTH, False, 0, 0, 0, 0)
    run("ordered_keys" + suffix, q, 0, TILE, k, TILE, *options, near)
    run("ordered_keys" + suffix, far_q, MANY - 2 * TILE, MANY, far_k, MANY, *options, far, last=1)
    assert torch.equal(far[-TILE:, -TILE:], near - (MANY - TILE))


@pytest.mark.parametrize("far_side", ["rows", "columns"])
def test_pairs_above(operands, far_side, late, zeros, run):
    """Late rows have wide rows of bits as well."""
    suffix, x, keys, far_x, far_keys = operands
    near, theta = torch.empty(TILE, 4, dtype=torch.int32), 9 * torch.randn(TILE)
    run("pairs_above" + suffix, x, TILE, keys, TILE, DEPTH, False, theta, theta, near)
    rows, columns = (MANY, 1 << 13) if far_side == "rows" else (TILE, MANY)
    sides = (far_x, rows, late(keys, columns), columns) if far_side == "rows" else (x, rows, far_keys, columns)
    far = zeros(rows, words(columns), dtype=torch.int32)
    run("pairs_above" + suffix, *sides, DEPTH, False, late(theta, rows), late(theta, columns), far, last=1)
    assert near.any() and torch.equal(far[-TILE:, -4:], near)


# ------------------------------------------------------------------ rows and bits


def test_normalize(late, zeros, run):
    g, x = torch.randn(2, 8, DEPTH)
    near, far, far_x = torch.empty(8, DEPTH), zeros(MANY, DEPTH), late(x, MANY)
    run("normalize_rows_f32", x, 8, DEPTH, near)
    run("normalize_rows_f32", far_x, MANY, DEPTH, far, last=1)
    assert near.any() and torch.equal(far[-8:], near)
    run("normalize_rows_grad_f32", g, x, 8, DEPTH, near)
    run("normalize_rows_grad_f32", late(g, MANY), far_x, MANY, DEPTH, far, last=1)
    assert torch.equal(far[-8:], near)


def test_random_bits(zeros, run):
    """The last words of a row, with its padding."""
    rows, columns, seed, half = 66, FAR - 100, torch.tensor(5), 1 << 31
    far = zeros(rows, words(columns), dtype=torch.int32)
    run("random_bits", seed, rows, columns, half, far, last=1)
    word, counter = torch.arange(words(columns) - 1024, words(columns)), torch.zeros(1024, dtype=torch.int64)
    # Of the rate 1/2 only the highest digit is drawn: plane 31, lane 3 of group 7.
    drawn = pair_bits.philox((word, counter + rows - 1, counter + 7, counter), (int(seed), 0))[3]
    drawn &= (1 << (columns - 32 * word).clamp(0, 32)) - 1
    assert torch.equal(far[-1, -1024:].long() & 0xFFFFFFFF, drawn)


def test_count_bits(late, zeros, run):
    bits = random_words(8, DEPTH)
    counts = zeros(MANY, dtype=torch.int32)
    run("count_bits", late(bits, MANY), MANY, DEPTH, counts, last=1)
    assert torch.equal(counts[-8:], pair_bits.count_bits(bits)[0])


@pytest.mark.parametrize("function, options", [("transpose_bits", ()), ("join_transpose", (1000,))])
def test_transpose_bits(function, options, zeros, run):
    rows, columns = (1 << 20) + TILE, 1 << 17
    bits, near = random_words(2, TILE, 4)
    far_bits = zeros(rows, words(columns), dtype=torch.int32)
    far = zeros(columns, words(rows), dtype=torch.int32)
    far_bits[-TILE:, -4:], far[-TILE:, -4:] = bits, near
    run(function, bits, TILE, TILE, *options, near)
    run(function, far_bits, rows, columns, *options, far, last=1)
    assert torch.equal(far[-TILE:, -4:], near)


def test_set_pairs(late, zeros, run):
    rows, columns, k = (1 << 20) + 1, 1 << 17, 2052
    indices = torch.full((1, k), -1)
    indices[0, :50] = torch.randint(columns // 2, columns, (50,))
    far = zeros(rows, words(columns), dtype=torch.int32)
    run("set_pairs", late(indices, rows), rows, k, 0, columns, far, last=1)
    assert torch.equal(far[-1, -2048:], pair_bits.pairs_from_indices(indices, columns, False, 0, 1)[0, -2048:])


# ------------------------------------------------------------------ clusters


def test_cluster_assign(late, zeros, run):
    x, centroids = torch.randn(TILE, DEPTH), torch.randn(70, DEPTH)
    directions = torch.nn.functional.pad(centroids, (0, 0, 0, 58))
    bias = torch.nn.functional.pad(-centroids.square().sum(1) / 2, (0, 58), value=-torch.inf)
    near, distances = torch.empty(TILE, dtype=torch.int64), torch.empty(TILE)
    far, far_distances = zeros(MANY, dtype=torch.int64), zeros(MANY)
    run("cluster_assign_f32", x, TILE, DEPTH, directions, bias, centroids, 2, near, distances)
    run("cluster_assign_f32", late(x, MANY), MANY, DEPTH, directions, bias, centroids, 2, far, far_distances, last=1)
    assert near.any() and torch.equal(far[-TILE:], near) and torch.equal(far_distances[-TILE:], distances)


def test_cluster_sums_of_runs(late, zeros, run):
    """Late rows, and late labels, whose sums lie at place run + label. A block has eight runs."""
    x, clusters, count, found = torch.randn(TILE, DEPTH), 6, 8 * TILE, []
    order, ordered = torch.randint(TILE, (count,)), torch.randint(clusters, (count,)).sort()[0].int()
    for rows in (count, FAR // DEPTH + count):
        parts, of_rows = zeros(rows // TILE + rows - 1, DEPTH), late(order + rows - TILE, rows)
        of_labels = late(ordered + rows - clusters, rows)
        run("cluster_sum_f32", late(x, rows), rows, DEPTH, of_rows, of_labels, parts, last=1)
        found.append(parts[-(8 + clusters - 1) :])
    assert found[0].any(1).sum() > clusters and torch.equal(*found)


def test_cluster_totals(late, zeros, run):
    parts, starts = torch.randn(3, DEPTH), torch.tensor([0, 300])  # of three runs
    near, far = torch.empty(1, DEPTH), zeros(MANY, DEPTH)
    run("cluster_total", parts, starts, 1, DEPTH, near)
    run("cluster_total", late(parts, MANY + 2), late(starts, MANY + 1), MANY, DEPTH, far, last=1)
    assert near.any() and torch.equal(far[-1, -32:], near[0, -32:])


# ------------------------------------------------------------------ contrastive, and wide rows


NEAR, FEWER, WIDE = 256, (1 << 20) + 1024, 2052  # so that all words of a row of bits are soon read
WIDE_SHARES = FEWER // NEAR
LAST_PIECE = slice(2048, WIDE)  # the columns of the last block in z


class Pairs(NamedTuple):
    x: Tensor
    bits: list[Tensor]  # P, P transposed, Q, Q transposed, negatives
    tables: list[Tensor]

    def masks(self, shim) -> object:
        n = len(self.x)
        return shim.ContrastiveMasks(*(x.data_ptr() for x in self.bits), words(n), n, 0, n, False)

    def native_tables(self, shim) -> object:
        return shim.ContrastiveTables(*(x.data_ptr() for x in self.tables))


@pytest.fixture
def pairs(late, zeros) -> tuple[Pairs, Pairs]:
    """256 rows, and the same as the last of 2^20, with the bits of all pairs."""
    x, bits = torch.nn.functional.normalize(torch.randn(NEAR, WIDE), dim=1), random_words(5, NEAR, words(NEAR))
    near = Pairs(x, list(bits), list(torch.rand(4, NEAR)))
    far = [zeros(FEWER, words(FEWER), dtype=torch.int32) for _ in bits]
    for mask, corner in zip(far, bits):
        mask[-NEAR:, -words(NEAR) :] = corner
    return near, Pairs(late(x, FEWER), far, [late(table, FEWER) for table in near.tables])


@pytest.mark.slow
def test_pairs_above_of_a_triangle(pairs, late, zeros, run):
    """Two tiles of the corner, one with its mirror image."""
    (x, *_), (far_x, *_) = pairs
    near, far = zeros(NEAR, words(NEAR), dtype=torch.int32), zeros(FEWER, words(FEWER), dtype=torch.int32)
    theta = 0.02 * torch.randn(NEAR)
    far_theta = late(theta, FEWER)
    run("pairs_above_f32", x, NEAR, x, NEAR, WIDE, True, theta, theta, near)
    run("pairs_above_f32", far_x, FEWER, far_x, FEWER, WIDE, True, far_theta, far_theta, far, last=2)
    assert near[:TILE, 4:].any() and torch.equal(far[-NEAR:, -4:], near[:, 4:])
    assert torch.equal(far[-TILE:, -8:], near[TILE:])


@pytest.mark.slow
def test_contrastive_stats(pairs, shim, zeros, run):
    """Of the second of two streams."""
    near, far = pairs
    x = zeros(2, FEWER, WIDE)
    x[1, -NEAR:] = near.x
    parts, far_parts, scales = zeros(4, 1, 1, NEAR), zeros(4, WIDE_SHARES, 2, FEWER), (2.0, 2.0, 1.0)
    run("contrastive_stats_f32", near.x, 1, NEAR, WIDE, near.masks(shim), *scales, 1, parts, last=1)
    run("contrastive_stats_f32", x, 2, FEWER, WIDE, far.masks(shim), *scales, WIDE_SHARES, far_parts, last=1)
    assert parts[..., -TILE:].all() and torch.equal(far_parts[:, -1, -1, -TILE:], parts[:, 0, 0, -TILE:])


@pytest.mark.slow
def test_contrastive_weights(pairs, shim, zeros, run):
    """Rows of the workspace are far apart as well."""
    near, far = pairs
    out, far_out = zeros(TILE, NEAR), zeros(TILE, 1 << 25)
    for case, to in ((near, out), (far, far_out)):
        n = len(case.x)
        run("contrastive_weights_f32", case.x, n, WIDE, case.masks(shim), 2.0, 0.0, case.native_tables(shim),
            n - TILE, TILE, to.shape[1], to, last=2)  # fmt: skip
    assert out.any(1).all() and torch.equal(far_out[:, FEWER - NEAR : FEWER], out)


@pytest.mark.slow
@pytest.mark.parametrize("family, rows", [("positives", 64), ("negatives", 1)])
def test_contrastive_lists(pairs, family, rows, shim, zeros, run):
    """Statistics, and the gradient by either route, of the last list's rows."""
    kind, scales, one = getattr(shim.ContrastivePairs, family), (2.0, 2.0, 1.0), torch.ones(1)
    parts, grads, partials = [], [], []
    for case in pairs:
        n, masks, tables = len(case.x), case.masks(shim), case.native_tables(shim)
        parts.append(zeros(4, 1, 1, n))
        run("contrastive_listed_stats_f32", case.x, 1, n, WIDE, masks, kind, *scales, 0, 1, parts[-1], last=1)
        grads.append(zeros(n, WIDE))
        of_lists = ("contrastive_listed_grad_f32", case.x, n, WIDE, masks, kind, 2.0, tables)
        run(*of_lists, grads[-1], 0, False, one, 0, 0, last=1)
        partials.append(zeros(n, WIDE))
        partials[-1][-rows:] = 1
        run(*of_lists, 0, partials[-1], True, one, 0, 0, last=1)
    parts = [x[..., -rows:] for x in parts]
    assert parts[0][0].all() and torch.equal(*parts)
    for found in (grads, partials):
        found = [x[-rows:, LAST_PIECE] for x in found]
        assert found[0].all() and torch.equal(*found)


def test_contrastive_columns_of_negatives(shim, zeros, run):
    """2^27 columns of 1,024 rows of negatives, turned."""
    period, columns = 1024, (1 << 27) + 256
    bits = random_words(period, 8)
    negatives, counts = zeros(period, words(columns), dtype=torch.int32), zeros(columns, dtype=torch.int32)
    negatives[:, -8:] = bits
    masks = shim.ContrastiveMasks(0, 0, 0, 0, negatives.data_ptr(), words(columns), period, 0, columns, False)
    turned = zeros(columns, period // 32, dtype=torch.int32)
    run("contrastive_turn_negatives", masks, columns, period // 32, turned, counts, last=1)
    expected = pair_bits.transpose_bits(bits, 256)
    assert torch.equal(turned[-256:], expected) and torch.equal(counts[-256:], pair_bits.count_bits(expected)[0])


@pytest.mark.slow
def test_contrastive_column_side(pairs, shim, zeros, run):
    """The sums of the last row of negatives lie late in the workspace."""
    before, turned, found = 1 << 20, pair_bits.transpose_bits(pairs[0].bits[4], NEAR), []
    ends = pair_bits.count_bits(turned)[0].long().cumsum(0)
    for case, skipped in zip(pairs, (0, before)):
        n = len(case.x)
        of_columns = zeros(n, words(n), dtype=torch.int32)
        of_columns[-NEAR:, -words(NEAR) :] = turned
        starts, window = zeros(n + 1, dtype=torch.int64), torch.tensor([0, n], dtype=torch.int32)
        starts[-NEAR:] = skipped + ends
        starts[n - NEAR] = skipped
        slots = shim.ColumnSlots(of_columns.data_ptr(), words(n), starts.data_ptr(), window.data_ptr(), n, 1 << 40)
        sums = zeros(skipped + int(ends[-1]), WIDE)
        run("contrastive_column_side_f32", case.x, n, WIDE, case.masks(shim), 2.0, case.native_tables(shim), slots, 1,
            sums, last=1)  # fmt: skip
        found.append(sums[skipped:, LAST_PIECE])
    own = ends[turned[:, -1] < 0] - 1  # each the last of its column
    assert found[0][own].any(1).sum() >= len(own) - 1  # a row does not meet itself
    assert torch.equal(found[1][own], found[0][own])


@pytest.mark.slow
def test_contrastive_column_sum(shim, late, zeros, run):
    """Of the last column, whose three sums lie late in the workspace."""
    sums, partial, one, columns, found = torch.randn(3, WIDE), torch.randn(1, WIDE), torch.ones(1), FEWER, []
    for n, skipped in ((1, 0), (columns, columns)):
        starts, window = zeros(n + 1, dtype=torch.int64), torch.tensor([0, n], dtype=torch.int32)
        starts[-2], starts[-1] = skipped, skipped + 3
        slots = shim.ColumnSlots(0, 0, starts.data_ptr(), window.data_ptr(), n, 1 << 40)
        out = zeros(n, WIDE)
        of_sums, of_partial = late(sums, skipped + 3), late(partial, n)
        run("contrastive_column_sum_f32", of_sums, 0, WIDE, slots, n, of_partial, one, out, last=1)
        found.append(out[-1])
    torch.testing.assert_close(found[0], partial[0] + sums.sum(0))
    assert torch.equal(*found)


@pytest.mark.slow
def test_group_lse(pairs, late, zeros, run):
    groups, scales, found = torch.randint(-1, 5, (NEAR,)).int(), (2.0, 2.0), []
    for (x, *_), shares in zip(pairs, (1, WIDE_SHARES)):
        n, of_rows, parts = len(x), late(groups, len(x)), zeros(2, shares, len(x))
        run("contrastive_group_lse_f32", x, n, x, n, WIDE, of_rows, of_rows, *scales, shares, parts, last=1)
        found.append(parts[:, -1, -TILE:])
    assert found[0].any(1).all() and torch.equal(*found)


@pytest.mark.slow
def test_group_lse_grad(pairs, late, zeros, run):
    """Into the parts of the shares, and into the gradient itself, whose only share the columns are."""
    groups, tables, one, found = torch.randint(-1, 5, (NEAR,)).int(), torch.rand(2, NEAR), torch.ones(1), []
    (near, *_), (far, *_) = pairs
    for x, columns, shares in ((near, near, 1), (far, far, WIDE_SHARES), (far, near, 1)):
        sides = [(late(groups, len(side)), *(late(table, len(side)) for table in tables)) for side in (x, columns)]
        out = zeros(shares, len(x), WIDE)
        run("contrastive_group_grad_f32", x, len(x), columns, len(columns), WIDE, sides[0][0], sides[1][0], 2.0, 0.0,
            *sides[0][1:], *sides[1][1:], shares, one, *((0, out) if shares > 1 else (out, 0)), last=1)  # fmt: skip
        found.append(out[-1, -64:, LAST_PIECE])
    assert found[0].any() and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# ------------------------------------------------------------------ local mixing


def test_neighbor_weights(late, zeros, run):
    """Of many images; then of heads and rows that are far apart."""
    attention, options = torch.randn(2, 3, 4, 4), (16, 28.0, 1.3863, 0, 0.3, 2, 0.7)
    near, far = torch.empty(2, 4, 9), zeros(1 << 26, 4, 9)
    run("neighbor_weights_f32", attention, 2, 3, 2, 2, *attention.stride()[:3], *options, near)
    assert near.any()
    of_many = late(attention, len(far))
    run("neighbor_weights_f32", of_many, len(far), 3, 2, 2, *of_many.stride()[:3], *options, far, last=1)
    assert torch.equal(far[-2:], near)
    apart, out = zeros(2, 3, 4, 1 << 28)[..., :4], torch.empty(2, 4, 9)
    apart.copy_(attention)
    run("neighbor_weights_f32", apart, 2, 3, 2, 2, *apart.stride()[:3], *options, out)
    assert torch.equal(out, near)


def test_mean_logits(late, zeros, run):
    images, tokens, depth, stride = (1 << 14) + 1, TILE, 1024, 2048
    q, k = torch.randn(2, 1, tokens, depth)
    near, far = torch.empty(1, tokens, tokens), zeros(images, tokens, stride)
    run("mean_logits_f32", q, k, 1, tokens, depth, tokens, 0.5, near)
    run("mean_logits_f32", late(q, images), late(k, images), images, tokens, depth, stride, 0.5, far, last=1)
    assert near.any() and torch.equal(far[-1, :, :tokens], near[0])


def test_neighbor_mix(late, zeros, run):
    """A block has the last 16 images of 4 x 4 tokens, or the last 8 tokens."""
    images, depth = (1 << 24) + 16, 16
    code, g, weights = torch.randn(16, 16, depth), torch.randn(16, 16, depth), torch.randn(16, 16, 9)
    far_code, far_g, far_weights = (late(x, images) for x in (code, g, weights))
    near, far = torch.empty(16, 16, depth), zeros(images, 16, depth)
    for transposed in (False, True):
        run("neighbor_mix_f32", code, weights, 16, 4, 4, depth, transposed, near)
        run("neighbor_mix_f32", far_code, far_weights, images, 4, 4, depth, transposed, far, last=1)
        assert near.any() and torch.equal(far[-16:], near)
    near, far = torch.empty(16, 16, 9), zeros(images, 16, 9)
    run("neighbor_mix_grad_weights_f32", g, code, 16, 4, 4, depth, near)
    run("neighbor_mix_grad_weights_f32", far_g, far_code, images, 4, 4, depth, far, last=1)
    assert near.any() and torch.equal(far[-1, -8:], near[-1, -8:])


def test_more_images_than_a_grid_has_in_z(shim, local_mix):
    """The last image of many: of the last launch, and right."""
    q, k = torch.randn(2, 65537, 1, 4, 4)
    options = (0.5, Weighting(2, 2, 28.0, 0.1, 0.9))
    shim.run_last_blocks(1)
    try:
        found = local_mix.neighbor_weights_qk(q, k, *options)
    finally:
        shim.run_last_blocks(EVERY_BLOCK)
    torch.testing.assert_close(found[-1:], reference.neighbor_weights_qk(q[-1:], k[-1:], *options))
