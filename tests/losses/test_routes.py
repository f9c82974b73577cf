"""What is not worth doing is not done: full sweeps for sparse masks, searches for pairs of weight 0."""

from __future__ import annotations

import pytest
import torch

import hpkernels as hk
from hpkernels.losses import hidden_positive, masked, routes, statistics

N, TOKENS = 96, 24


def problem() -> dict[str, torch.Tensor]:
    centres = torch.randn(5, 12)[torch.arange(N) % 5]
    drawn = {name: centres + 0.7 * torch.randn(N, 12) for name in ("z", "features", "head_features")}
    return drawn | {"pool": torch.randn(9, 12), "head_pool": torch.randn(9, 12)}


@pytest.fixture
def forms(monkeypatch):
    """The forms of the denominators of all calls."""
    found = []

    class Recorded(statistics.Denominator):
        def calls(self, *bits):
            found.append(self.form)
            return super().calls(*bits)

    for module in (hidden_positive, masked):
        monkeypatch.setattr(module, "Denominator", Recorded)
    return found


# Rows that are shared by four images, or by none.
@pytest.mark.parametrize("rows, rate, form", [
    (N, 0.02, "sparse"), (N, 0.15, "dense"), (TOKENS, 0.15, "sparse"), (TOKENS, 0.5, "dense"),
    (N, 0.0, "sparse"), (TOKENS, 1.0, "dense"),
])  # fmt: skip
def test_density_decides_whoever_made_the_mask(forms, rows, rate, form):
    p, mask = problem(), hk.PairMask.random(rate, (rows, N), 3)
    hk.hidden_positive_loss(p["z"], p["features"], p["pool"], tokens_per_image=TOKENS, negative_mask=mask.to_dense())
    sparse = hk.PairMask.random(0.01, (N, N), 4)
    hk.masked_contrastive_loss(p["z"], sparse, negatives=mask, tokens_per_image=TOKENS)
    assert forms == [form, form]


def test_many_positives_are_swept(forms):
    """In the sparse form they are gathered one by one."""
    z, negatives = problem()["z"], hk.PairMask.random(0.02, (TOKENS, N), 3)
    of_classes = hk.PairMask.from_labels(torch.arange(N) % 2)
    few = hk.PairMask.random(0.01, (N, N), 4)
    for positives, extra in ((of_classes, few), (few, of_classes), (few, few)):
        hk.masked_contrastive_loss(z, positives, extra_positives=extra, extra_weight=0.5, negatives=negatives)
    assert forms == ["dense", "dense", "sparse"]


def test_nobody_looks_in_a_compiled_step_or_on_a_gpu():
    negatives = hk.PairMask.random(0.02, (N, N), 3).bits
    assert routes.form_of_masks(negatives.to("meta"), N, N, "reference") == "dense"
    step = torch.compile(
        lambda z, bits: z + (routes.form_of_masks(bits, N, N, "cpu") == "dense"), fullgraph=True, backend="eager"
    )
    assert step(torch.zeros(()), negatives) == 1


def test_a_panel_smaller_than_an_image_counts_as_one():
    assert routes.form_of_rate(0.02, 0, torch.device("cpu")) == routes.form_of_rate(0.02, 1, torch.device("cpu"))


@pytest.fixture
def searches(monkeypatch):
    """The features whose positives were searched for."""
    found, find_rule = [], hidden_positive.find_rule

    def recorded(graph, *rest):
        found.append(graph.name)
        return find_rule(graph, *rest)

    monkeypatch.setattr(hidden_positive, "find_rule", recorded)
    return found


@pytest.mark.parametrize("weighting", ["pairs", "anchors", "separate"])
@pytest.mark.parametrize("in_panels", [False, True])
def test_head_weight_zero_is_no_search(searches, weighting, in_panels, backend, monkeypatch):
    """The same loss, statistics and gradient, to rounding: beside Q the kernels add the terms of P in another order."""
    if in_panels:
        monkeypatch.setenv("HPKERNELS_BITS_BYTES", "1")

    def run(weight, **options):
        p = {name: x.double() for name, x in problem().items()}
        z = p.pop("z").requires_grad_()
        loss, stats = hk.hidden_positive_loss(
            z, p.pop("features"), **p, head_weight=weight, tokens_per_image=TOKENS, negative_rate=0.1, seed=1,
            weighting=weighting, return_stats=True, backend=backend, **options,
        )  # fmt: skip
        loss.backward()
        return torch.cat([loss.detach()[None], torch.stack(stats), z.grad.flatten()])

    with torch.random.fork_rng():
        torch.manual_seed(1)
        with_search = run(torch.tensor(0.0))
        assert searches == ["features", "head_features"]
        for zero in (0.0, 0):
            searches.clear()
            torch.manual_seed(1)
            torch.testing.assert_close(run(zero), with_search, rtol=1e-11, atol=1e-12)
            assert searches == ["features"]
        searches.clear()
        run(0.0, head_in_denominator=True)
        assert searches == ["features", "head_features"]


@pytest.mark.parametrize("name", ["head_features", "head_pool"])
def test_what_is_not_searched_is_checked_all_the_same(searches, name, backend):
    p = problem()
    p[name][3, 5] = torch.nan
    with pytest.raises(ValueError, match=f"^{name}: expected finite numbers"):
        hk.hidden_positive_loss(**p, head_weight=0.0, backend=backend)
    assert hk.hidden_positive_loss(**p | {name: p[name].nan_to_num()}, head_weight=0.0, backend=backend).isfinite()
    assert searches == ["features"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["head_features", "head_pool", None])
def test_witnesses_of_what_is_not_searched(name, bad, monkeypatch):
    """On a GPU, where nobody looks, they make the loss NaN."""
    from hpkernels.common.checks import extremes, poison

    p = problem()
    if name:
        p[name][3, 5] = bad
    found = [extremes(p[each]) for each in ("head_features", "head_pool")]
    assert poison(*found).isnan() == (name is not None)
    assert extremes(torch.zeros(0, 3)).numel() == extremes(torch.zeros(3, 0)).numel() == 0
    assert poison(extremes(torch.full((2, 3), 3e38))) == 0


def test_extra_weight_zero_counts_no_extra_pairs(backend):
    z, positives = problem()["z"], hk.PairMask.random(0.1, (N, N), 4)
    extra = hk.PairMask.random(0.5, (N, N), 5)
    for options in ({}, {"extra_in_denominator": True}):
        by_number, by_tensor = (
            hk.masked_contrastive_loss(
                z,
                positives,
                extra_positives=extra,
                extra_weight=weight,
                negatives=positives,
                backend=backend,
                **options,
            )
            for weight in (0.0, torch.tensor(0.0))
        )
        torch.testing.assert_close(by_number, by_tensor, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="^extra_positives: expected a PairMask"):
        hk.masked_contrastive_loss(z, positives, extra_positives=hk.PairMask.random(0.5, (3, 3), 5))
