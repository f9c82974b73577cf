"""hidden_positive_loss and masked_contrastive_loss: golden numbers, an independent oracle, gradients, edge cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

import hpkernels as hk

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_call(name: str, backend: str, device: torch.device, dtype=torch.float32, streams=("z", "z_local")):
    data = np.load(GOLDEN / f"{name}.npz")
    meta = json.loads(str(data["meta"]))
    tensors = {k: torch.from_numpy(data[k]).to(device) for k in data.files if data[k].ndim}
    z = {k: tensors[k].to(dtype).requires_grad_() for k in streams}
    weighting = "separate" if meta["loss_version"] == 2 else "pairs" if meta["reweight"] else "anchors"
    loss = hk.hidden_positive_loss(
        z["z"],
        tensors["backbone_features"],
        tensors["backbone_pool"],
        z_local=z.get("z_local"),
        head_features=tensors["head_features"],
        head_pool=tensors["head_pool"],
        head_weight=meta["head_weight"],
        tokens_per_image=meta["group_size"],
        temperature=meta["temperature"],
        base_temperature=meta["base_temperature"],
        negative_mask=tensors["negative_mask"],
        weighting=weighting,
        backend=backend,
    )
    loss.backward()
    return loss, z, data


@pytest.mark.parametrize("name", sorted(p.stem for p in GOLDEN.glob("hp_loss_v1_*.npz")))
def test_golden_version_1(name, backend, device):
    loss, streams, data = golden_call(name, backend, device)
    assert loss.item() == pytest.approx(float(data["loss"]), rel=1e-6)
    for key, z in streams.items():
        assert_tangential(z.grad, data[f"grad_{key}"], data[key], 1e-5)


def test_golden_version_2(backend, device):
    """The published loss_version 2 ignores the local stream (its known fault): "separate" with z alone."""
    loss, streams, data = golden_call("hp_loss_v2", backend, device, streams=("z",))
    assert loss.item() == pytest.approx(float(data["loss"]), rel=1e-6)
    assert_tangential(streams["z"].grad, data["grad_z"], data["z"], 1e-5)


def assert_tangential(grad, golden, z, rel):
    """Golden gradients are with respect to unit vectors; normalising inside leaves their tangential part."""
    z = z.astype(np.float64)
    expected = golden - (golden * z).sum(1, keepdims=True) * z
    assert np.abs(grad.cpu().numpy() - expected).max() <= rel * np.abs(expected).max()


def problem(n=96, c=12, d=16, m=7, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    centre = draw(6, c)
    features = centre[torch.arange(n, device=device) // 4 % 6] + 0.6 * draw(n, c)
    return {
        "z": draw(n, d), "z_local": draw(n, d), "features": features, "pool": draw(m, c) + centre[0],
        "head_features": draw(n, d) + 1.5 * draw(3, d)[torch.arange(n, device=device) % 3], "head_pool": draw(m, d),
    }  # fmt: skip


@pytest.mark.parametrize("weighting", ["pairs", "anchors", "separate"])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("mining", ["pool", "nearest"])
def test_equals_oracle(weighting, streams, rate, mining, backend, device):
    dtype = torch.float32 if backend == "triton" else torch.float64
    p = problem(device=device, dtype=dtype)
    tokens, weight = 24, 0.37
    pool = {"pool": p["pool"], "head_pool": p["head_pool"]} if mining == "pool" else {"positives_per_anchor": 3}
    loss = hk.hidden_positive_loss(
        p["z"], p["features"], z_local=p["z_local"] if streams == 2 else None, head_features=p["head_features"],
        head_weight=weight, tokens_per_image=tokens, negative_rate=rate, weighting=weighting, seed=11, backend=backend,
        **pool,
    )  # fmt: skip
    a = {k: v.double().cpu().numpy() for k, v in p.items()}
    if mining == "pool":
        P = oracle.positives(a["features"], a["pool"])
        Q = oracle.positives(a["head_features"], a["head_pool"])
    else:
        P, Q = oracle.nearest(a["features"], 3), oracle.nearest(a["head_features"], 3)
    M = hk.PairMask.random(rate, (tokens, 96), 11).to_dense().numpy()
    expected = oracle.loss([a["z"], a["z_local"]][:streams], P, Q, M, weight, tokens, weighting=weighting)
    assert loss.item() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("weighting", ["pairs", "anchors", "separate"])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 1.0])
def test_head_in_denominator(weighting, rate, backend, device):
    """E holds Q too; then no pair is more probable than 1, and no loss is below 0."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    p = problem(device=device, dtype=dtype)
    loss = hk.hidden_positive_loss(
        **p, head_weight=0.37, tokens_per_image=24, negative_rate=rate, weighting=weighting, head_in_denominator=True,
        seed=11, backend=backend,
    )  # fmt: skip
    a = {k: v.double().cpu().numpy() for k, v in p.items()}
    pairs = oracle.positives(a["features"], a["pool"]), oracle.positives(a["head_features"], a["head_pool"])
    M = hk.PairMask.random(rate, (24, 96), 11).to_dense().numpy()
    expected = oracle.loss([a["z"], a["z_local"]], *pairs, M, 0.37, 24, weighting=weighting, Q_in_E=True)
    assert loss.item() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 2e-6)
    assert expected > 0


def test_three_dimensional_input_sets_tokens(backend, device):
    p = problem(device=device, dtype=torch.float32)
    flat = hk.hidden_positive_loss(p["z"], p["features"], p["pool"], tokens_per_image=24, seed=5, backend=backend)
    z, f = p["z"].view(4, 24, -1), p["features"].view(4, 24, -1)
    assert torch.equal(flat, hk.hidden_positive_loss(z, f, p["pool"], seed=5, backend=backend))


def test_explicit_mask_equals_its_random_draw(backend, device):
    p = problem(device=device, dtype=torch.float32)
    common = {"tokens_per_image": 24, "backend": backend}
    mask = hk.PairMask.random(0.05, (24, 96), 9, device=device).to_dense()
    drawn = hk.hidden_positive_loss(p["z"], p["features"], p["pool"], seed=9, negative_rate=0.05, **common)
    given = hk.hidden_positive_loss(p["z"], p["features"], p["pool"], negative_mask=mask, **common)
    full = hk.hidden_positive_loss(p["z"], p["features"], p["pool"], negative_mask=mask.repeat(4, 1), **common)
    if device.type == "cpu":  # where the density of a mask is looked at: the same columns, gathered as well
        assert torch.equal(drawn, given)
    torch.testing.assert_close(drawn, given, rtol=1e-6, atol=0)
    torch.testing.assert_close(full, given, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", ["pairs", "anchors", "separate"])
@pytest.mark.parametrize("rate, head_in_denominator", [(0.1, False), (1.0, False), (0.1, True)])
def test_gradcheck(weighting, rate, head_in_denominator, backend, device):
    if device.type == "cuda":
        pytest.skip("fp64 runs on reference and cpu only")
    p = problem(n=16, d=4)

    def loss(z, z_local, weight):
        return hk.hidden_positive_loss(
            z, p["features"], p["pool"], z_local=z_local, head_features=p["head_features"][:, :4],
            head_pool=p["head_pool"][:, :4], head_weight=weight, tokens_per_image=8, negative_rate=rate,
            weighting=weighting, head_in_denominator=head_in_denominator, seed=2, backend=backend,
        )  # fmt: skip

    head_weight = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    inputs = (p["z"].requires_grad_(), p["z_local"].requires_grad_(), head_weight)
    assert torch.autograd.gradcheck(loss, inputs)


def test_second_backward():
    p = problem(n=24, d=5)
    z = p["z"].requires_grad_()

    def gradient(backend):
        loss = hk.hidden_positive_loss(z, p["features"], p["pool"], tokens_per_image=8, seed=2, backend=backend)
        return torch.autograd.grad(loss, z, create_graph=True)[0]

    assert torch.isfinite(torch.autograd.grad(gradient("reference").square().sum(), z)[0]).all()
    with pytest.raises(RuntimeError, match='backend="reference"'):
        gradient("cpu").square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_within_twice_torch(dtype, backend, device):
    """Error budget: at most twice that of the same formula in plain torch arithmetic of this dtype."""
    p = problem(n=192, d=64, dtype=torch.float64, device=device)
    mask = hk.PairMask.random(0.1, (24, 192), 0).to_dense().to(device)
    P = hk.hidden_positives(p["features"].float(), p["pool"].float())

    def run(dtype, backend, direct=False):
        z = p["z"].detach().to(dtype, copy=True).requires_grad_()
        if direct:
            x = torch.nn.functional.normalize(z, dim=1)
            logits = x @ x.T / 0.8
            E = (P.to_dense() | mask.repeat(8, 1)) & ~torch.eye(192, dtype=torch.bool, device=device)
            cost = torch.where(E, logits, -torch.inf).logsumexp(1, keepdim=True) - logits
            weight = P.to_dense().to(dtype)
            per_image = (weight * cost).view(8, -1).sum(1) / weight.view(8, -1).sum(1)
            loss = per_image.mean() * (0.8 / 0.07)
        else:
            loss = hk.masked_contrastive_loss(
                z, P, negatives=hk.PairMask.from_dense(mask), tokens_per_image=24, backend=backend
            )
        loss.backward()
        return loss.double().item(), z.grad.double()

    # the oracle starts from the numbers the low-precision run is given
    p["z"] = p["z"].to(dtype).double()
    exact, exact_grad = run(torch.float64, "reference")
    ours, ours_grad = run(dtype, backend)
    peer, peer_grad = run(dtype, None, direct=True)
    ulp = torch.finfo(torch.float32).eps
    assert abs(ours - exact) <= 2 * abs(peer - exact) + 4 * ulp * abs(exact)
    assert (ours_grad - exact_grad).norm() <= 2 * (peer_grad - exact_grad).norm() + 4 * ulp * exact_grad.norm()


def test_mixed_dtypes_are_promoted(backend, device):
    p = problem(dtype=torch.float32, device=device)
    loss = hk.hidden_positive_loss(
        p["z"].bfloat16().requires_grad_(),
        p["features"],
        p["pool"].half(),
        z_local=p["z_local"],
        backend=backend,
        seed=1,
    )
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


def test_lambda_may_be_a_tensor_and_zero(backend, device):
    p = problem(dtype=torch.float32, device=device)
    head = {"head_features": p["head_features"], "head_pool": p["head_pool"], "seed": 3, "backend": backend}
    with_float = hk.hidden_positive_loss(p["z"], p["features"], p["pool"], head_weight=0.25, **head)
    weight = torch.tensor(0.25, device=device)
    assert torch.equal(
        with_float, hk.hidden_positive_loss(p["z"], p["features"], p["pool"], head_weight=weight, **head)
    )
    without = hk.hidden_positive_loss(p["z"], p["features"], p["pool"], seed=3, backend=backend)
    assert torch.equal(without, hk.hidden_positive_loss(p["z"], p["features"], p["pool"], head_weight=0.0, **head))


def test_no_positives_anywhere(backend, device):
    z = torch.randn(12, 5, device=device, requires_grad=True)
    features = torch.eye(12, device=device)
    loss = hk.hidden_positive_loss(z, features, features, negative_rate=0.0, backend=backend)
    loss.backward()
    assert loss.item() == 0.0 and not z.grad.any()


def test_rows_that_are_zero_or_alone(backend, device):
    """Zero rows get zero gradient; N = 1 and N = 0 have no pairs: loss 0."""
    p = problem(dtype=torch.float32, device=device)
    z = p["z"].clone()
    z[5] = 0
    z.requires_grad_()
    hk.hidden_positive_loss(z, p["features"], p["pool"], negative_rate=1.0, backend=backend).backward()
    assert torch.isfinite(z.grad).all() and not z.grad[5].any()
    for n in (0, 1):
        z = p["z"][:n].clone().requires_grad_()
        loss = hk.hidden_positive_loss(z, p["features"][:n], p["pool"], backend=backend)
        loss.backward()
        assert loss.item() == 0.0 and not z.grad.any()


def test_scale_of_the_inputs_does_not_matter(backend, device):
    p = problem(dtype=torch.float32, device=device)
    base = hk.hidden_positive_loss(p["z"], p["features"], p["pool"], seed=1, backend=backend)
    scaled = hk.hidden_positive_loss(
        p["z"] * 2.0**100, p["features"] * 2.0**-100, p["pool"] * 2.0**80, seed=1, backend=backend
    )
    torch.testing.assert_close(base, scaled, rtol=1e-6, atol=0)


def test_repeatable_bit_for_bit(backend, device):
    p = problem(n=192, d=48, dtype=torch.float32, device=device)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        z = p["z"].clone().requires_grad_()
        loss = hk.hidden_positive_loss(
            z, p["features"], p["pool"], tokens_per_image=24, negative_rate=0.05, seed=4, backend=backend
        )
        loss.backward()
        torch.set_num_threads(before)
        return loss.detach(), z.grad

    loss, grad = run(2)
    for threads in (2, 2, 1, 3) if backend == "cpu" else (2, 2):
        again, again_grad = run(threads)
        assert torch.equal(loss, again) and torch.equal(grad, again_grad)


def test_seed_none_follows_torch(device):
    p = problem(dtype=torch.float32, device=device)

    def run():
        return hk.hidden_positive_loss(p["z"], p["features"], p["pool"], tokens_per_image=24, negative_rate=0.3)

    torch.manual_seed(7)
    first, second = run(), run()
    torch.manual_seed(7)
    assert torch.equal(first, run()) and not torch.equal(first, second)
    seed = torch.tensor(5, device=device)
    by_tensor = hk.hidden_positive_loss(p["z"], p["features"], p["pool"], seed=seed)
    assert torch.equal(by_tensor, hk.hidden_positive_loss(p["z"], p["features"], p["pool"], seed=5))


def test_stats(backend, device):
    p = problem(dtype=torch.float32, device=device)
    P = hk.hidden_positives(p["features"], p["pool"], backend=backend).to_dense()
    _, stats = hk.hidden_positive_loss(p["z"], p["features"], p["pool"], return_stats=True, backend=backend)
    assert stats.positives_per_anchor.item() == pytest.approx(P.sum().item() / 96)
    assert stats.kept_fraction.item() == pytest.approx(P.any(1).float().mean().item())
    assert all(s.ndim == 0 and not s.requires_grad for s in stats)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("symmetric", [True, False, "positives"])
def test_masked_contrastive_loss(symmetric, extra, backend, device):
    """Pairs of the user's own, asymmetric ones too, with a diagonal that must not count."""
    p = problem(n=48, dtype=torch.float32 if backend == "triton" else torch.float64, device=device)
    P, Q = torch.rand(48, 48, device=device) < 0.1, torch.rand(48, 48, device=device) < 0.1
    P.fill_diagonal_(True)
    if symmetric:
        P = P | P.T
    if symmetric is True:
        Q = Q | Q.T
    M = torch.rand(12, 48, device=device) < 0.2
    z = p["z"].clone().requires_grad_()
    pack = hk.PairMask.from_dense
    loss = hk.masked_contrastive_loss(
        z, pack(P, symmetric=bool(symmetric)), extra_positives=pack(Q, symmetric=symmetric is True), extra_weight=0.5,
        negatives=pack(M), tokens_per_image=12, temperature=0.3, extra_in_denominator=extra, backend=backend,
    )  # fmt: skip
    args = (P.cpu().numpy(), Q.cpu().numpy(), M.cpu().numpy(), 0.5, 12, 0.3, 0.07, "pairs", extra)
    expected = oracle.loss([p["z"].double().cpu().numpy()], *args)
    assert loss.item() == pytest.approx(expected, rel=1e-12 if loss.dtype == torch.float64 else 2e-6)
    loss.backward()
    direction = torch.randn_like(z)
    step = 1e-4
    ahead, behind = (oracle.loss([(p["z"] + s * direction).double().cpu().numpy()], *args) for s in (step, -step))
    assert (z.grad * direction).sum().item() == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)


def test_labels_and_every_negative_are_supcon(backend, device):
    p = problem(n=40, dtype=torch.float32, device=device)
    labels = torch.arange(40, device=device) % 5
    loss = hk.masked_contrastive_loss(
        p["z"],
        hk.PairMask.from_labels(labels),
        temperature=0.1,
        base_temperature=0.1,
        weighting="anchors",
        backend=backend,
    )
    same = (labels[:, None] == labels).cpu().numpy()
    expected = oracle.loss([p["z"].double().cpu().numpy()], same, None, None, 0.0, 40, 0.1, 0.1, "anchors")
    assert loss.item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.05, 10.0])
def test_extreme_temperatures(temperature, backend, device):
    p = problem(dtype=torch.float32, device=device)
    z = p["z"].requires_grad_()
    loss = hk.hidden_positive_loss(
        z,
        p["features"],
        p["pool"],
        temperature=temperature,
        tokens_per_image=24,
        negative_rate=0.1,
        seed=6,
        backend=backend,
    )
    loss.backward()
    P = oracle.positives(p["features"].double().cpu().numpy(), p["pool"].double().cpu().numpy())
    M = hk.PairMask.random(0.1, (24, 96), 6).to_dense().numpy()
    expected = oracle.loss([p["z"].detach().double().cpu().numpy()], P, None, M, 0.0, 24, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and torch.isfinite(z.grad).all()


def test_modules(device):
    p = problem(dtype=torch.float32, device=device)
    module = hk.nn.HiddenPositiveLoss(temperature=0.6, negative_rate=0.1)
    expected = hk.hidden_positive_loss(p["z"], p["features"], p["pool"], temperature=0.6, negative_rate=0.1, seed=1)
    assert torch.equal(module(p["z"], p["features"], p["pool"], seed=1), expected)
    masked = hk.nn.MaskedContrastiveLoss(temperature=0.6)
    P = hk.hidden_positives(p["features"], p["pool"])
    assert torch.equal(masked(p["z"], P), hk.masked_contrastive_loss(p["z"], P, temperature=0.6))
    assert "temperature=0.6" in repr(module)
