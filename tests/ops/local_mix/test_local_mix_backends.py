"""What single backends do on the way to the neighbours' weights: routes, workspaces, the longest rows."""

from __future__ import annotations

import pytest
import torch

from hpkernels.ops.local_mix import reference
from hpkernels.ops.local_mix.weighting import Weighting
from tests.ops.local_mix import dense
from tests.ops.local_mix.dense import check_weights

OP = "local_mix"
SLOW = [pytest.param(grid, marks=pytest.mark.slow) for grid in ((3, 21), (3, 43), (14, 14), (28, 28))]


@pytest.mark.only("host-cuda")
def test_long_rows(kernels):
    """1,296 tokens: a block has as many warps as find room for their rows, here four."""
    attention = torch.randn(1, 1, 1296).half().expand(1, 1296, 1296).contiguous()
    check_weights(kernels.neighbor_weights(attention, Weighting(36, 36, 28.0, 0.1, 0.9)), attention, (36, 36))


@pytest.mark.only("host-cuda")
def test_more_tokens_than_a_row_holds_is_an_error(kernels):
    attention = torch.zeros(1).expand(1, 16512, 16512)
    with pytest.raises(ValueError, match="^attention: .* at most 16384 tokens an image, got 16512"):
        kernels.neighbor_weights(attention, Weighting(128, 129, 28.0, 0.1, 0.9))


@pytest.mark.only("interpreter")
def test_rows_too_long_for_the_registers_are_refused(kernels):
    tokens = kernels._LONGEST_ROW + 1
    with pytest.raises(ValueError, match="queries: the triton backend takes at most 32768 tokens"):
        kernels.neighbor_weights_qk(*torch.empty(2, 1, 1, tokens, 1), 1.0, Weighting(1, tokens, 28.0, 0.1, 0.9))


@pytest.mark.only("host-cuda")
@pytest.mark.parametrize(
    "dtypes", [torch.bfloat16, torch.float16, torch.float32, (torch.float16, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("grid, heads, depth", [((1, 1), 1, 8), ((3, 5), 3, 7), ((12, 11), 2, 64)], ids=str)
def test_a_workspace_for_one_image(kernels, monkeypatch, grid, heads, depth, dtypes):
    """Also for queries and keys of two dtypes."""
    monkeypatch.setattr(kernels, "_WORKSPACE_BYTES", 1)
    tokens = grid[0] * grid[1]
    qkv = torch.randn(2, tokens, 2, heads, depth).permute(2, 0, 3, 1, 4)
    queries, keys = (x.to(dtypes[i] if isinstance(dtypes, tuple) else dtypes) for i, x in enumerate(qkv))
    ours = kernels.neighbor_weights_qk(queries, keys, 0.3, Weighting(*grid, 28.0, 0.1, 0.9))
    check_weights(ours, 0.3 * (queries.double() @ keys.double().transpose(2, 3)), grid, bound=1)


@pytest.mark.only("interpreter")
@pytest.mark.parametrize("grid", [(1, 2), (5, 13), *SLOW], ids=str)
@pytest.mark.parametrize("workspace", ["images", "rows"])
def test_workspace_of_images_or_of_rows_of_one(kernels, grid, workspace, dtype, monkeypatch):
    tokens = grid[0] * grid[1]
    if workspace == "rows":
        monkeypatch.setattr(kernels, "_WORKSPACE_BYTES", 4 * tokens * max(1, tokens * 2 // 5))
    queries, keys, _ = torch.randn(2, tokens + 1, 3, 3, 20).to(dtype).permute(2, 0, 3, 1, 4)[:, :, :, 1:]
    ours = kernels.neighbor_weights_qk(queries, keys, 0.25, Weighting(*grid, 28.0, 0.1, 0.9))
    check_weights(ours, 0.25 * (queries.double() @ keys.double().transpose(2, 3)), grid, bound=2e-5)


@pytest.mark.only("interpreter")
def test_a_launch_has_no_more_images_than_a_grid(kernels, monkeypatch):
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(kernels, "_neighbor_weights_logits_kernel", Recorded())
    monkeypatch.setattr(kernels, "_neighbor_weights_kernel", Recorded())
    queries = torch.zeros(65537, 1, 1, 1)
    kernels.neighbor_weights_qk(queries, queries, 1.0, Weighting(1, 1, 28.0, 0.1, 0.9))
    assert [grid[-1] for grid in grids if len(grid) == 3] == [65535, 2]


@pytest.mark.only("interpreter")
def test_not_a_number_in_queries_or_keys_stays(kernels):
    queries, keys = torch.randn(2, 1, 2, 12, 16)
    queries[0, 1, 7, 3] = torch.inf
    ours = kernels.neighbor_weights_qk(queries, keys, 0.25, Weighting(3, 4, 28.0, 0.1, 0.9))
    inside = dense.neighbors(3, 4)[1]
    assert ours[0, 7][inside[7]].isnan().all() and ours[0, :7].isfinite().all() and ours[0, 8:].isfinite().all()
    keys[0, 0, 2, 5] = torch.nan
    assert kernels.neighbor_weights_qk(queries, keys, 0.25, Weighting(3, 4, 28.0, 0.1, 0.9))[0][inside].isnan().all()


@pytest.mark.only("triton")
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.5, 0.5), (0.0, 0.0), (0.25, 0.31)])
def test_decisions_are_those_of_the_reference(kernels, low, high):
    """Rows of few values, for which either may be right: both compare logits with the row's log-sum-exp in fp32."""
    attention = torch.randint(-3, 4, (2, 30, 30)).float() + 0.25 * torch.randn(2, 30, 1)
    attention[:, 4] = -attention[:, 4].abs()
    ours = kernels.neighbor_weights(attention, Weighting(5, 6, 28.0, low, high))
    torch.testing.assert_close(
        ours, reference.neighbor_weights(attention, Weighting(5, 6, 28.0, low, high)), rtol=1e-5, atol=1e-6
    )
