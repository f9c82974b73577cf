"""Element offsets past 2^31: kernels launched directly, with strides, sizes or first rows that put their rows there.

The memory is mapped, not filled: pages become real when touched, which a short range of tiles does for few. A launch
with everything far apart must give the bits of the same launch with everything close together. The maps start 2^31
elements before the operand, so that an offset that wrapped around reads zeros instead of ending the process.
"""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from hpkernels.ops.common import triton as shared
from hpkernels.ops.contrastive.triton import dense, dense_grad, sparse, sparse_grad
from hpkernels.ops.local_mix import triton as local_mix
from hpkernels.ops.local_mix.weighting import Weighting
from hpkernels.ops.normalize import triton as normalize
from hpkernels.ops.pair_bits import triton as pair_bits
from hpkernels.ops.similarity_search.triton import pairs as search_pairs
from hpkernels.ops.similarity_search.triton import rows as search_rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps memory without reserving it, as Linux does")
_NO_RESERVE = 0x4000  # MAP_NORESERVE
_SPAN = 2**32  # elements from the first row to past the last: the upper half of the rows lies past 2^31
SMALL = dict(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, PRECISION="ieee")


class Spread:
    """Rows `stride` elements apart. `start`: a tensor of one element that is the address of the first, for launches.

    Tensors made of the memory keep it alive.
    """

    def __init__(self, rows: int, stride: int, dtype: torch.dtype):
        self.rows, self.stride, self.dtype = rows, stride, dtype
        size = dtype.itemsize * (2**31 + rows * stride + 2**16)
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        self.start = self.at(0, 1)

    def at(self, element: int, width: int) -> Tensor:
        offset = self.dtype.itemsize * (2**31 + element)
        return torch.frombuffer(self.memory, dtype=self.dtype, count=width, offset=offset)

    def read(self, width: int) -> Tensor:
        return torch.stack([self.at(r * self.stride, width) for r in range(self.rows)])


def spread(rows: Tensor) -> Spread:
    """The rows of a matrix over _SPAN elements."""
    result = Spread(len(rows), _SPAN // len(rows), rows.dtype)
    for r, row in enumerate(rows):
        result.at(r * result.stride, len(row)).copy_(row)
    return result


def empty(rows: int, dtype: torch.dtype) -> Spread:
    return Spread(rows, _SPAN // rows, dtype)


def test_an_offset_that_wraps_around_is_seen():
    """Of this file's own machinery: int32 offsets do go wrong here."""
    import triton
    import triton.language as tl

    @triton.jit
    def _first_of_rows_kernel(x_ptr, out_ptr, stride, WIDE: tl.constexpr):
        row = tl.arange(0, 8)
        at = row.to(tl.int64) * stride if WIDE else row * stride
        tl.store(out_ptr + row, tl.load(x_ptr + at))

    x = spread(torch.arange(1.0, 9.0)[:, None])
    for wide in (True, False):
        out = torch.zeros(8)
        _first_of_rows_kernel[(1,)](x.start, out, x.stride, WIDE=wide)
        assert torch.equal(out, torch.arange(1.0, 9.0)) == wide


@pytest.fixture
def pair():
    """Two compact matrices (8, 16) fp16 and the same spread."""
    a, b = torch.randn(2, 8, 16).half()
    return (a, b), (spread(a), spread(b))


def test_max_similarity(pair):
    (q, k), (far_q, far_k) = pair
    near, far = torch.empty(2, 1, 8)
    search_rows._max_similarity_panel_kernel[(1, 1)](q, k, None, None, near, 8, 8, 16, 16, 16, 1, **SMALL)
    search_rows._max_similarity_panel_kernel[(1, 1)](
        far_q.start, far_k.start, None, None, far, 8, 8, 16, far_q.stride, far_k.stride, 1, **SMALL
    )
    assert torch.equal(near, far)


@pytest.mark.parametrize("k", [1, 3])
def test_topk_similarity(pair, k):
    (q, keys), (far_q, far_k) = pair
    near, far = torch.empty(2, 8, k, dtype=torch.int64)
    kernel = search_rows._topk_similarity_best_kernel if k == 1 else search_rows._topk_similarity_panel_kernel
    tail, options = ((), {}) if k == 1 else ((k,), {"SLOTS": 16})
    options |= dict(HAS_GROUPS=False, EXCLUDE_SELF=True, **SMALL)
    kernel[(1, 1)](q, keys, q, keys, near, 8, 8, 16, 16, 16, 1, *tail, **options)
    far_arguments = (far_q.start, far_k.start, far_q.start, far_k.start, far, 8, 8, 16, far_q.stride, far_k.stride)
    kernel[(1, 1)](*far_arguments, 1, *tail, **options)
    assert torch.equal(near, far)


def test_topk_keys_of_many_columns(pair):
    (q, _), (far_q, _) = pair
    keys = torch.randn(32, 16).half()
    near, far = torch.empty(8, 32, dtype=torch.int64), empty(8, torch.int64)
    options = dict(HAS_GROUPS=False, EXCLUDE_SELF=False, **SMALL)
    search_rows._topk_similarity_keys_kernel[(1, 1)](q, keys, q, keys, near, 0, 8, 32, 16, 16, 16, **options)
    search_rows._topk_similarity_keys_kernel[(1, 1)](
        far_q.start, keys, far_q.start, keys, far.start, 0, 8, far.stride, 16, far_q.stride, 16, **options
    )
    assert torch.equal(near, far.read(32))


@pytest.mark.parametrize("triangle", [True, False])
def test_pairs_above(triangle):
    x, theta = torch.randn(32, 16).half(), torch.randn(32)
    far_x, options = spread(x), {**SMALL, "BLOCK_N": 128, "GROUP": 8}
    near, far = torch.empty(32, 4, dtype=torch.int32), empty(32, torch.int32)
    for start, stride, bits, width in ((x, 16, near, 4), (far_x.start, far_x.stride, far.start, far.stride)):
        if triangle:
            search_pairs._pairs_above_triangle_kernel[(4,)](
                start, None, None, theta, bits, 32, 16, stride, width, 4, **options
            )
        else:
            search_pairs._pairs_above_tile_kernel[(1,)](
                start, None, None, theta, start, theta, bits, 32, 32, 16, stride, stride, width, 1,
                HAS_KEY_THRESHOLDS=True, **options,
            )  # fmt: skip
    assert near.any() and torch.equal(near, far.read(4))


def test_transpose_bits():
    bits = torch.randint(-(2**31), 2**31, (32, 1)).to(torch.int32)
    far_bits, out = spread(bits), empty(32, torch.int32)
    shared._transpose_bits_kernel[(1, 1)](
        far_bits.start, out.start, 32, far_bits.stride, 32, out.stride, BLOCK_M=32, BLOCK_W=1
    )
    assert torch.equal(out.read(1), shared.transpose_bits(bits, 32)[:, :1])


def test_random_bits():
    rate, seed, out = 0.3, torch.tensor(7), empty(8, torch.int32)
    q = round(rate * 2**32)
    pair_bits._random_bits_kernel[(8, 1)](seed, out.start, out.stride, 2**31 - 1, q, 0, BLOCK_W=16)
    assert torch.equal(out.read(4), pair_bits.random_bits(seed, 8, 128, rate))


def test_normalize():
    x, g = torch.randn(2, 8, 16)
    far_x, far_g, out, grad = spread(x), spread(g), empty(8, torch.float32), empty(8, torch.float32)
    normalize._normalize_rows_kernel[(1,)](far_x.start, far_x.start, out.start, 8, far_x.stride, BLOCK_M=8, BLOCK_D=16)
    normalize._normalize_rows_grad_kernel[(1,)](
        far_g.start, far_x.start, far_x.start, grad.start, grad.start, 8, far_x.stride, BLOCK_M=8, BLOCK_D=16
    )
    assert torch.equal(out.read(16), normalize.normalize_rows(x, "x"))
    assert torch.equal(grad.read(16), normalize.normalize_rows_grad(g, x))


def test_neighbor_weights_of_far_rows_heads_and_images():
    attention = torch.randn(2, 3, 4, 4)
    strides = (2**32, 2**30, 2**27)  # image, head, row: head 2 starts at 2^31
    far = Spread(2, 2**32, torch.float32)
    for image in range(2):
        for head in range(3):
            for row in range(4):
                at = image * strides[0] + head * strides[1] + row * strides[2]
                far.at(at, 4).copy_(attention[image, head, row])
    out, how = torch.empty(2, 4, 9), Weighting(2, 2, 28.0, 0.1, 0.9)
    numbers = local_mix._row_numbers(3, how)
    local_mix._neighbor_weights_kernel[(8,)](far.start, out, 4, 0, 3, 4, 2, 2, *strides, *numbers, BLOCK_T=32)
    assert torch.equal(out, local_mix.neighbor_weights(attention, how))


def test_logits_of_far_queries_and_keys(pair):
    (q, k), (far_q, far_k) = pair
    far = empty(8, torch.float32)
    local_mix._neighbor_weights_logits_kernel[(1, 1, 1)](
        far_q.start, far_k.start, far.start, 8, 8, 16, 0, far_q.stride, 0, far_k.stride, far.stride, 0.5, **SMALL
    )
    torch.testing.assert_close(far.read(8), 0.5 * q.float() @ k.float().T)


def test_neighbor_mix_of_many_tokens(monkeypatch):
    """Five images of 2^24 x 4 tokens: the last one's code starts at 2^32, its weights at 2.4e9."""
    tokens, width, d, image = 2**26, 4, 16, 4
    code, g = torch.randn(2, 1, 40, d)
    weights = torch.randn(1, 40, 9)
    far_code, far_g, out = (Spread(5, tokens * d, torch.float32) for _ in range(3))
    far_weights, grad = (Spread(5, tokens * 9, torch.float32) for _ in range(2))
    far_code.at(image * tokens * d, 40 * d).copy_(code.flatten())
    far_g.at(image * tokens * d, 40 * d).copy_(g.flatten())
    far_weights.at(image * tokens * 9, 40 * 9).copy_(weights.flatten())
    sizes, blocks = (tokens, d, tokens // width, width), dict(BLOCK_T=32, BLOCK_D=16)
    near = [local_mix._mix(code, weights, 10, width, transposed) for transposed in (False, True)]
    near_grad = local_mix.neighbor_mix_grad(g, code, weights, 10, width, False, True)[1]
    start_at(image * tokens // 32, monkeypatch)
    for transposed in (False, True):
        local_mix._neighbor_mix_kernel[(1,)](
            far_code.start, far_weights.start, out.start, *sizes, TRANSPOSED=transposed, **blocks
        )
        assert torch.equal(out.at(image * tokens * d, 32 * d).view(32, d), near[transposed][0, :32])
    local_mix._neighbor_mix_grad_weights_kernel[(1,)](far_g.start, far_code.start, grad.start, *sizes, **blocks)
    torch.testing.assert_close(grad.at(image * tokens * 9, 32 * 9).view(32, 9), near_grad[0, :32])


@pytest.mark.parametrize("name", ["_neighbor_mix_kernel", "_neighbor_mix_grad_weights_kernel"])
def test_more_images_than_the_later_axes_of_a_grid_hold(name, monkeypatch):
    """65,536 images and one program: of the last one."""
    images, d = 2**16, 2
    code, g, weights = (torch.randn(images, 1, width) for width in (d, d, 9))
    kernel = getattr(local_mix, name)

    class LastProgram:
        def __getitem__(self, grid):
            assert all(side < 2**16 for side in grid[1:])
            start_at(grid[0] - 1, monkeypatch)
            return kernel[(1, *grid[1:])]

    monkeypatch.setattr(local_mix, name, LastProgram())
    if name == "_neighbor_mix_kernel":
        last = local_mix.neighbor_mix(code, weights, 1, 1)[-1]
        torch.testing.assert_close(last, weights[-1, :, 4:5] * code[-1])
    else:
        last = local_mix.neighbor_mix_grad(g, code, weights, 1, 1, False, True)[1][-1]
        torch.testing.assert_close(last[0, 4], (g[-1] * code[-1]).sum())


def start_at(program: int, monkeypatch) -> None:
    """The interpreter numbers the programs of a launch from there on along the first axis."""
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (program + x, y, z)))


def masks(far: bool) -> tuple[Tensor, int, Tensor]:
    """Positives of 32 rows and 32 columns in one word a row: the address, the stride, and the bits."""
    bits = torch.randint(-(2**31), 2**31, (32, 1), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    if not far:
        return bits, 1, bits
    rows = spread(bits)
    return rows.start, rows.stride, bits


def test_contrastive_stats_of_late_anchors_and_wide_masks():
    """32 anchors at the end of 2^28 rows, one tile of columns at their beginning."""
    n, d, total = 32, 16, 2**28
    rows, columns = torch.randn(2, n, d)
    x = Spread(total // n, n * d, torch.float32)
    x.at(0, n * d).copy_(columns.flatten())
    x.at((total - n) * d, n * d).copy_(rows.flatten())
    address, width, bits = masks(far=True)
    parts = torch.empty(4, 1, 1, n)
    dense._contrastive_stats_kernel[(1, 1, 1)](
        x.start, address, address, address, *parts, total - n, n, total, d, total, width, 1, 1.0, 0.0,
        ALL=False, HAS_EXTRA=True, HAS_NEGATIVES=False, FIXED_SHIFT=True, **SMALL,
    )  # fmt: skip
    z = rows.double() @ columns.double().T
    chosen = ((bits >> torch.arange(32)) & 1) != 0
    torch.testing.assert_close(
        parts[0, 0, 0].double(), torch.where(chosen, torch.exp2(z), 0).sum(1), rtol=1e-5, atol=1e-5
    )
    for part in parts[2:, 0, 0].double() / 0.6931471805599453:
        torch.testing.assert_close(part, torch.where(chosen, z, 0).sum(1), rtol=1e-5, atol=1e-5)


def test_contrastive_weights_of_wide_masks_and_workspace():
    x, vectors = torch.randn(32, 16) / 4, torch.rand(4, 32)
    near, far = torch.empty(32, 32), empty(32, torch.float32)
    for out, width_out, is_far in ((near, 32, False), (far.start, far.stride, True)):
        address, width, _ = masks(is_far)
        dense_grad._contrastive_weights_kernel[(1, 1)](
            x, *[address] * 5, *vectors, out, 0, 32, 0, 32, 32, 16, 32, width, width_out, 1.0, 0.0,
            ALL=False, SYMMETRIC_POSITIVES=False, HAS_EXTRA=True, SYMMETRIC_EXTRA=False, HAS_NEGATIVES=True,
            SHARED_EXPONENTIAL=False, **SMALL,
        )  # fmt: skip
    assert near.any() and torch.equal(near, far.read(32))


def test_contrastive_grad_of_wide_masks_and_rows():
    """Output rows apart as well."""
    x, vectors, one = torch.randn(32, 16) / 4, torch.rand(4, 32), torch.ones(1)
    near, far = torch.empty(32, 16), empty(32, torch.float32)
    for out, width_out, is_far in ((near, 16, False), (far.start, far.stride, True)):
        address, width, _ = masks(is_far)
        dense_grad._contrastive_grad_kernel[(1, 1, 1)](
            x, *[address] * 5, *vectors, one, out, 0, 32, 32, 16, width_out, 32, width, 1.0, 0.0,
            ALL=False, SYMMETRIC_POSITIVES=False, HAS_EXTRA=True, SYMMETRIC_EXTRA=False, HAS_NEGATIVES=True,
            SHARED_EXPONENTIAL=False, RESIDENT=True, BLOCK_D=16, **SMALL,
        )  # fmt: skip
    assert near.any() and torch.equal(near, far.read(16))


@pytest.mark.parametrize("negatives", [False, True])
def test_lists_that_start_late(negatives):
    """The list of columns begins 2^32 places into the array of lists; masks and, for the gradient, output are wide."""
    x, vectors, one = torch.randn(32, 16) / 4, torch.rand(4, 32), torch.ones(1)
    columns = Spread(1, 2**33, torch.int32)
    columns.at(2**32, 32).copy_(torch.arange(32))
    counts = torch.full((1,), 32, dtype=torch.int32)
    blocks = dict(BLOCK_C=32, BLOCK_R=32, BLOCK_K=16, PRECISION="ieee")
    flags = dict(NEGATIVES=negatives, HAS_EXTRA=True, HAS_NEGATIVES=True)
    stats = []
    far = empty(32, torch.float32)
    near = torch.empty(32, 16)
    for is_far, out, width_out in ((False, near, 16), (True, far.start, far.stride)):
        address, width, _ = masks(is_far)
        first = 2**32 if is_far else 0
        lists = (torch.tensor([first]), counts, columns.start if is_far else torch.arange(32, dtype=torch.int32))
        parts = torch.empty(4, 1, 32)
        sparse._contrastive_listed_stats_kernel[(1, 1, 1)](
            x, *[address] * 3, *lists, *parts, 0, 32, 32, 16, 1, width, 1.0, 0.0, FIXED_SHIFT=True, **flags, **blocks
        )
        stats.append(parts)
        sparse_grad._contrastive_listed_grad_kernel[(1, 1, 1)](
            x, *[address] * 5, *lists, *vectors, one, out, width_out, 0, 32, 32, 16, 1, width, 1.0, ADD=False,
            SYMMETRIC_POSITIVES=False, SYMMETRIC_EXTRA=False, RESIDENT=True, BLOCK_D=16, **flags, **blocks,
        )  # fmt: skip
    assert stats[0][0].any() and torch.equal(*stats)
    assert near.any() and torch.equal(near, far.read(16))
