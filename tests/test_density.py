"""neighbor_density: golden numbers of the published code, an independent oracle, groups, edge cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

import hpkernels as hk
from hpkernels import density

GOLDEN = sorted((Path(__file__).parent / "golden").glob("dgcl_density_*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, backend, device):
    data = np.load(path)
    features, memory = (torch.from_numpy(data[name]).to(device) for name in ("features", "memory"))
    rho = hk.neighbor_density(features, memory, backend=backend)
    assert rho.dtype == torch.float32 and rho.shape == (len(features),)
    assert np.abs(rho.cpu().numpy() - data["density"]).max() <= 3e-7


def by_definition(features, memory, scales, groups=None, memory_groups=None):
    s = oracle.unit(features) @ oracle.unit(memory).T
    result = []
    for i, row in enumerate(s):
        own = np.sort(row if groups is None else row[memory_groups == groups[i]])[::-1]
        result.append(np.mean([own[:k].mean() for k in scales]) if len(own) else 0.0)
    return np.array(result)


def clustered(rows, seed, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    x = centres[torch.randint(7, (rows,), generator=generator)] + 0.7 * torch.randn(rows, 20, generator=generator)
    return (x * torch.rand(rows, 1, generator=generator) * 100).to(device, dtype)


@pytest.mark.parametrize("scales", [(8, 16, 32), (1,), (3, 3), (40, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_the_definition(scales, dtype, backend, device):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("it computes in fp32")
    features, memory = clustered(90, 1, device, dtype), clustered(211, 2, device, dtype)
    rho = hk.neighbor_density(features, memory, scales=scales, backend=backend)
    expected = by_definition(features.double().cpu().numpy(), memory.double().cpu().numpy(), scales)
    rounding = 1e-6 if device.type == "cpu" or dtype == torch.float32 else 1e-2
    assert np.abs(rho.cpu().numpy() - expected).max() <= rounding


def test_ragged_groups_in_one_search(backend, device):
    """Groups with more rows than the largest scale, with fewer, with one, and without any."""
    features, memory = clustered(80, 3, device), clustered(150, 4, device)
    groups = torch.arange(80, device=device) % 5
    memory_groups = torch.tensor([0] * 100 + [1] * 33 + [2] * 16 + [3], device=device)
    rho = hk.neighbor_density(features, memory, query_groups=groups, memory_groups=memory_groups, backend=backend)
    of_rows, of_groups = ([t.cpu().numpy() for t in pair] for pair in ((features, memory), (groups, memory_groups)))
    arrays = (*of_rows, (8, 16, 32), *of_groups)
    assert np.abs(rho.cpu().numpy() - by_definition(*arrays)).max() <= 5e-7
    assert not rho[groups == 4].any()


def test_a_part_of_the_rows_at_a_time(monkeypatch, backend, device):
    features, memory, groups = clustered(70, 8, device), clustered(90, 9, device), torch.arange(90, device=device) % 2
    whole = hk.neighbor_density(features, memory, query_groups=groups[:70], memory_groups=groups, backend=backend)
    monkeypatch.setattr(density, "_CPU_ROWS", 32)
    parts = hk.neighbor_density(features, memory, query_groups=groups[:70], memory_groups=groups, backend=backend)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)


def test_edges(backend, device):
    features = clustered(6, 5, device)
    assert not hk.neighbor_density(features, features[:0], backend=backend).any()
    assert hk.neighbor_density(features[:0], features, backend=backend).shape == (0,)
    few = hk.neighbor_density(features, features[:3], backend=backend)  # fewer rows than any scale
    expected = by_definition(features.cpu().numpy(), features[:3].cpu().numpy(), (8, 16, 32))
    assert np.abs(few.cpu().numpy() - expected).max() <= 5e-7
    zero = torch.zeros_like(features)
    assert not hk.neighbor_density(zero, features, backend=backend).any()
    same = hk.neighbor_density(features, features[:1].expand(50, -1), backend=backend)  # equal rows
    by_one = by_definition(features.cpu().numpy(), features[:1].cpu().numpy(), (1,))
    assert np.abs(same.cpu().numpy() - by_one).max() <= 5e-7
    assert not hk.neighbor_density(features.requires_grad_(), features, backend=backend).requires_grad


def test_compile_fullgraph(backend, device):
    features, memory = clustered(30, 6, device), clustered(70, 7, device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda f, m: hk.neighbor_density(f, m, backend=backend), fullgraph=True, backend="eager")
    assert torch.equal(compiled(features, memory), hk.neighbor_density(features, memory, backend=backend))


F, GROUPS = torch.randn(12, 6), torch.zeros(12, dtype=torch.int64)
ERRORS = [
    ({"features": 3}, TypeError, "features: expected a torch.Tensor, got int"),
    ({"memory": F[:, :2]}, ValueError, "memory: expected vectors of length 6 as in features"),
    ({"memory": F.long()}, TypeError, "memory: expected float16"),
    ({"scales": 8}, TypeError, "scales: expected a tuple of ints, got 8"),
    ({"scales": (8, 1.5)}, TypeError, "scales: expected a tuple of ints"),
    ({"scales": ()}, ValueError, "scales: expected at least one number"),
    ({"scales": (0, 8)}, ValueError, r"each >= 1, got \(0, 8\)"),
    ({"query_groups": GROUPS}, ValueError, "memory_groups: expected with the other groups argument"),
    ({"query_groups": GROUPS.int(), "memory_groups": GROUPS}, TypeError, "query_groups: expected an int64 tensor"),
    ({"query_groups": GROUPS, "memory_groups": GROUPS[:3]}, ValueError, r"memory_groups: expected shape \(12,\)"),
    ({"features": F / 0}, ValueError, "features: expected finite"),
    ({"memory": F * torch.nan}, ValueError, "memory: expected finite"),
    ({"backend": "metal"}, ValueError, "backend: 'metal' cannot be used here"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        hk.neighbor_density(**({"features": F, "memory": F} | change))


def test_the_default_dtype_does_not_show():
    """fp32, as documented, and the same bits."""
    features, memory = torch.randn(9, 5), torch.randn(12, 5)
    expected = hk.neighbor_density(features, memory, scales=(2, 3))
    torch.set_default_dtype(torch.float64)
    try:
        found = [hk.neighbor_density(features, memory, scales=(2, 3)), hk.neighbor_density(features, memory[:0])]
    finally:
        torch.set_default_dtype(torch.float32)
    assert [x.dtype for x in found] == [torch.float32] * 2 and torch.equal(found[0], expected)
