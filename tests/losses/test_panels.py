"""Beyond one batch: the loss by panels of anchors equals the loss with all bits at once, in the memory of a panel."""

from __future__ import annotations

import pytest
import torch

import hpkernels as hk
from hpkernels import mining
from hpkernels.losses import panels
from hpkernels.ops.contrastive.op import contrastive_stats_rows
from hpkernels.pairs import PairMask

TOKENS = 20


@pytest.fixture
def bounded(monkeypatch):
    """Panels of 64 anchors for what is computed afterwards."""
    monkeypatch.setattr(panels, "PANEL_MULTIPLE", 64)
    return lambda: monkeypatch.setenv("HPKERNELS_BITS_BYTES", "1")


def problem(n=260, dtype=torch.float64, device="cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def clustered(width):
        return 0.7 * draw(n, width) + draw(5, width)[torch.arange(n, device=device) // 7 % 5]

    return {"z": clustered(12), "z_local": draw(n, 12), "features": clustered(9), "head": clustered(7),
            "pool": draw(4, 9), "head_pool": draw(4, 7)}  # fmt: skip


def run(p, backend, *, k=None, streams=2, head=True, **options):
    leaves = {name: p[name].clone().requires_grad_() for name in ("z", "z_local")[:streams]}
    arguments = leaves | {"features": p["features"], "tokens_per_image": TOKENS, "seed": 1, "backend": backend}
    arguments["return_stats"] = True
    if k is None:
        arguments |= {"pool": p["pool"]} | ({"head_pool": p["head_pool"]} if head else {})
    else:
        arguments |= {"positives_per_anchor": k}
    if head:
        arguments |= {"head_features": p["head"], "head_weight": 0.4}
    loss, stats = hk.hidden_positive_loss(**arguments, **options)
    loss.backward()
    return [loss.detach(), torch.stack(stats), *(x.grad for x in leaves.values())]


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("weighting", ["pairs", "anchors", "separate"])
def test_panels_equal_all_bits_at_once(weighting, rate, k, backend, device, bounded):
    dtype = torch.float32 if backend == "triton" else torch.float64
    p = problem(dtype=dtype, device=device)
    options = {"k": k, "negative_rate": rate, "weighting": weighting}
    expected = run(p, backend, **options)
    bounded()
    rel = 1e-5 if dtype == torch.float32 else 1e-10
    for ours, theirs in zip(run(p, backend, **options), expected):
        assert (ours - theirs).abs().max() <= rel * theirs.abs().max() and theirs.any()


@pytest.mark.parametrize("options", [
    {"streams": 1, "head": False}, {"temperature": 0.01}, {"negative_mask": "tokens"}, {"negative_mask": "square"},
    {"head_in_denominator": True}, {"head_in_denominator": True, "negative_rate": 0.5, "k": 3},
])  # fmt: skip
def test_more_panels_in_single_precision(options, backend, device, bounded):
    p = problem(dtype=torch.float32, device=device)
    if "negative_mask" in options:
        rows = TOKENS if options["negative_mask"] == "tokens" else 260
        options = {"negative_mask": torch.rand(rows, 260, device=device) < 0.1}
    expected = run(p, backend, **options)
    bounded()
    for ours, theirs in zip(run(p, backend, **options), expected):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("n", [65, 300])
def test_rows_of_a_rule_are_rows_of_its_mask(n, backend, device):
    p = problem(n, dtype=torch.float32, device=device)
    for graph in (("features", p["features"], "pool", p["pool"], None), ("features", p["features"], "pool", None, 6)):
        rule = mining.find_rule(mining.Graph(*graph), backend)
        whole = rule.mask().bits
        assert whole.any()
        for first, end in ((0, n), (0, 0), (1, 64), (33, n), (n - 1, n)):
            assert torch.equal(rule.rows(first, end - first), whole[first:end])


def test_bitwise_repeatable_for_any_thread_count(bounded):
    p = problem(dtype=torch.float32)
    bounded()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(run(p, "cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_gradcheck(bounded):
    p = problem(n=70)
    bounded()

    def loss(z, weight):
        return hk.hidden_positive_loss(
            z, p["features"], p["pool"], head_features=p["head"], head_pool=p["head_pool"], head_weight=weight,
            tokens_per_image=10, negative_rate=0.1, seed=2,
        )  # fmt: skip

    weight = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (p["z"][:, :3].clone().requires_grad_(), weight))


def test_second_backward_says_what_supports_it(backend, bounded):
    p = problem()
    bounded()
    z = p["z"].requires_grad_()
    loss = hk.hidden_positive_loss(z, p["features"], p["pool"], tokens_per_image=TOKENS, seed=2, backend=backend)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="a second backward .* the bits of all pairs at once"):
        gradient.square().sum().backward()


def test_compile(bounded):
    p = problem(dtype=torch.float32)

    def step(z):
        return hk.hidden_positive_loss(z, p["features"], p["pool"], tokens_per_image=TOKENS, seed=1)

    bounded()
    torch._dynamo.reset()
    grads = []
    for call in (step, torch.compile(step, backend="aot_eager")):
        z = p["z"].clone().requires_grad_()
        call(z).backward()
        grads.append(z.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_bits_are_bounded_and_mined_twice(bounded, monkeypatch):
    """A panel at a time in the forward pass, and again in the backward pass."""
    p, shapes, rows_of = problem(), [], mining.PairsAbove.rows

    def recorded(self, first_row, rows):
        shapes.append((first_row, rows))
        return rows_of(self, first_row, rows)

    monkeypatch.setattr(mining.PairsAbove, "rows", recorded)
    bounded()
    z = p["z"].requires_grad_()
    hk.hidden_positive_loss(z, p["features"], p["pool"], tokens_per_image=TOKENS, seed=1).backward()
    assert shapes == 2 * [(0, 64), (64, 64), (128, 64), (192, 64), (256, 4)]


def test_how_many_anchors_at_a_time(monkeypatch):
    """All that fit, else a multiple of 128, by shapes and the bound alone."""
    cpu = torch.device("cpu")
    row = 2 * PairMask.random(0.0, (1, 50_176), 0).nbytes
    assert panels.panel_rows(50_176, 50_176, 2, cpu) == 50_176  # the paper's batch: 0.6 GB
    assert 0 < panels.panel_rows(200_000, 200_000, 2, cpu) < 50_000
    for bound, rows in ((row * 1000, 1000), (row * 1000 - 1, 896), (row * 128, 128), (1, 128)):
        monkeypatch.setenv("HPKERNELS_BITS_BYTES", str(bound))
        assert panels.panel_rows(1000, 50_176, 2, cpu) == rows
    assert panels.panel_rows(100, 50_176, 2, cpu) == 100
    for wrong in ("0", "-5", "2 GiB", ""):
        monkeypatch.setenv("HPKERNELS_BITS_BYTES", wrong)
        with pytest.raises(ValueError, match="HPKERNELS_BITS_BYTES: expected a number of bytes > 0, got"):
            hk.hidden_positive_loss(torch.randn(8, 4), torch.randn(8, 4), positives_per_anchor=2)


def test_statistics_of_a_range_are_not_differentiated_alone(backend):
    x = torch.nn.functional.normalize(torch.randn(1, 40, 8), dim=2).requires_grad_()
    P = PairMask.from_labels(torch.arange(40) % 3)
    lse, _, _ = contrastive_stats_rows(x, P.bits[8:20], None, None, None, None, "all", 8, 0.5, backend)
    with pytest.raises(RuntimeError, match="statistics of a range of anchors"):
        lse.sum().backward()
