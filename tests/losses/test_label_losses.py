"""supervised_contrastive_loss: an independent oracle, gradients, edge cases, memory, torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch

import hpkernels as hk
from hpkernels import nn
from hpkernels.ops.label_positives import blocked as label_positives

FORMS = ("supcon", "per_positive")


def expected_loss(
    z, labels, keys=None, key_labels=None, images=None, key_images=None, tau=0.2, ignore=-1, form="supcon"
):
    """From the definition, anchor by anchor, in fp64 numpy."""
    z, labels = oracle.unit(z), np.asarray(labels)
    itself = keys is None
    k, kl = (z, labels) if itself else (oracle.unit(keys), np.asarray(key_labels))
    ki = images if itself else key_images
    costs = []
    for i in range(len(z)):
        if labels[i] == ignore:
            continue
        usable = kl != ignore
        if itself:
            usable[i] = False
        P = usable & (kl == labels[i])
        if images is not None:
            P &= ki != images[i]
        N = usable & (kl != labels[i])
        if not P.any() or not N.any():
            continue
        s = k @ z[i] / tau
        if form == "supcon":
            costs.append(np.logaddexp.reduce(s[P | N]) - s[P].mean())
        else:
            costs.append(np.logaddexp(0, np.logaddexp.reduce(s[N]) - s[P]).mean())
    return np.mean(costs) if costs else 0.0


def problem(dtype=torch.float64, device="cpu", n=83, m=57, d=9, classes=6):
    generator = torch.Generator().manual_seed(3)

    def draw(rows):
        labels = torch.randint(classes, (rows,), generator=generator) * 11 - 7
        images = torch.randint(4, (rows,), generator=generator) - 2
        z = torch.randn(rows, d, generator=generator, dtype=torch.float64) + 0.3 * labels[:, None]
        labels[torch.rand(rows, generator=generator) < 0.15] = 255
        return z.to(device, dtype), labels.to(device), images.to(device)

    z, labels, images = draw(n)
    labels[0] = 1000  # no positive
    keys, key_labels, key_images = draw(m)
    return z, labels, images, keys, key_labels, key_images


def call(p, bank, by_image, form, backend, tau=0.2):
    z, labels, images, keys, key_labels, key_images = p
    options = {"temperature": tau, "ignore_index": 255, "form": form, "backend": backend}
    if bank:
        options |= {"keys": keys, "key_labels": key_labels}
    if by_image:
        options["image_ids"] = (images, key_images) if bank else images
    return hk.supervised_contrastive_loss(z, labels, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by_image", [False, True])
@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("tau", [0.01, 0.07, 0.2, 3.0])
def test_equals_the_definition(form, by_image, bank, tau, backend, device):
    dtype = torch.float32 if backend == "triton" else torch.float64
    p = problem(dtype, device)
    z, labels, images, keys, key_labels, key_images = (x.cpu().numpy() for x in p)
    expected = expected_loss(
        z, labels, *((keys, key_labels) if bank else (None, None)),
        *((images, key_images) if by_image else (None, None)), tau, 255, form,
    )  # fmt: skip
    loss = call(p, bank, by_image, form, backend, tau)
    assert loss.ndim == 0 and loss.dtype == dtype
    assert loss.item() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by_image", [False, True])
@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("tau", [0.02, 0.3])
def test_gradcheck(form, by_image, bank, tau, backend, device):
    if device.type == "cuda":
        pytest.skip("fp64 runs on reference and cpu only")
    p = problem(n=17, m=11, d=4, classes=3)
    z, keys = p[0].requires_grad_(), p[3].requires_grad_()
    inputs = (z, keys) if bank else (z,)
    assert torch.autograd.gradcheck(lambda *_: call(p, bank, by_image, form, backend, tau), inputs)


def test_many_tiles_agree_with_the_reference(device):
    """More rows than a tile of the kernels, in fp32, with a bank: within twice the error of plain torch."""
    for form in FORMS:
        for bank in (False, True):
            p = problem(n=500, m=450, d=24)

            def run(dtype, backend, p=p, bank=bank, form=form):
                z, keys = (p[i].to(dtype, copy=True).requires_grad_() for i in (0, 3))
                loss = call((z, *p[1:3], keys, *p[4:]), bank, True, form, backend, 0.1)
                loss.backward()
                return [loss.detach().double(), z.grad.double()] + ([keys.grad.double()] if bank else [])

            p = (p[0].float().double(), *p[1:3], p[3].float().double(), *p[4:])
            exact = run(torch.float64, "reference")
            fp64, ours, peer = run(torch.float64, "cpu"), run(torch.float32, "cpu"), run(torch.float32, "reference")
            for e, same, a, b in zip(exact, fp64, ours, peer, strict=True):
                assert (same - e).norm() <= 1e-12 * e.norm()
                assert (a - e).norm() <= 2 * (b - e).norm() + 4 * torch.finfo(torch.float32).eps * e.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_input(dtype, form, backend, device):
    p = problem(dtype, device)
    rounded = (p[0].double(), *p[1:3], p[3].double(), *p[4:])
    z = p[0].requires_grad_()
    loss = call((z, *p[1:]), False, True, form, backend)
    loss.backward()
    exact = call(rounded, False, True, form, "reference")
    assert loss.dtype == torch.float32 and z.grad.dtype == dtype
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5 if device.type == "cpu" else 1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_three_dimensions_and_mixed_dtypes(form, backend, device):
    z, labels, images, keys, key_labels, _ = problem(torch.float32, device, n=84)
    flat = hk.supervised_contrastive_loss(z, labels, image_ids=images, form=form, backend=backend)
    shaped = hk.supervised_contrastive_loss(
        z.view(4, 21, -1), labels.view(4, 21).int(), image_ids=images.view(4, 21), form=form, backend=backend
    )
    assert torch.equal(flat, shaped)
    mixed = hk.supervised_contrastive_loss(
        z, labels, keys=keys.bfloat16(), key_labels=key_labels, form=form, backend=backend
    )
    assert torch.isfinite(mixed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "labels",
    [[0, 1, 2, 3], [5, 5, 5, 5], [-1, -1, -1, -1], [-1, 2, 2, -1], []],
    ids=["alone", "one label", "ignored", "two", "none"],
)
def test_without_any_anchor_the_loss_is_zero(form, labels, backend, device):
    z = torch.randn(len(labels), 3, device=device).requires_grad_()
    loss = hk.supervised_contrastive_loss(
        z, torch.tensor(labels, device=device, dtype=torch.int64), form=form, backend=backend
    )
    loss.backward()
    assert loss.item() == 0.0 and not z.grad.any()
    bank = hk.supervised_contrastive_loss(
        z, torch.tensor(labels, device=device, dtype=torch.int64), keys=z[:0],
        key_labels=torch.tensor([], dtype=torch.int64, device=device), form=form, backend=backend,
    )  # fmt: skip
    assert bank.item() == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_zero_rows_and_ignored_rows_get_no_gradient(form, backend, device):
    z, labels, *_ = problem(torch.float32, device)
    z[5] = 0
    z.requires_grad_()
    hk.supervised_contrastive_loss(z, labels, ignore_index=255, form=form, backend=backend).backward()
    assert torch.isfinite(z.grad).all() and not z.grad[5].any() and not z.grad[labels == 255].any()
    assert z.grad[labels != 255].any()


def test_detached_keys_get_no_gradient(backend, device):
    z, labels, _, keys, key_labels, _ = problem(torch.float32, device)
    z.requires_grad_()
    hk.supervised_contrastive_loss(z, labels, keys=keys, key_labels=key_labels, backend=backend).backward()
    assert z.grad.any() and keys.grad is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bank", [False, True])
def test_repeatable_bit_for_bit(form, bank, backend, device):
    p = problem(torch.float32, device, n=700, m=600, d=32)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        z, keys = p[0].clone().requires_grad_(), p[3].clone().requires_grad_()
        loss = call((z, *p[1:3], keys, *p[4:]), bank, True, form, backend)
        loss.backward()
        torch.set_num_threads(before)
        return [loss.detach(), z.grad] + ([keys.grad] if bank else [])

    first = run(2)
    for threads in (2, 1, 3) if backend == "cpu" else (2,):
        assert all(torch.equal(a, b) for a, b in zip(first, run(threads), strict=True))


def test_masked_contrastive_loss_on_labels_is_the_same_loss(backend, device):
    z, labels, *_ = problem(torch.float32, device)
    kept = labels != 255
    z, labels = z[kept], labels[kept]
    by_bits = hk.masked_contrastive_loss(
        z, hk.PairMask.from_labels(labels), temperature=0.1, base_temperature=0.1, weighting="anchors", backend=backend
    )
    torch.testing.assert_close(hk.supervised_contrastive_loss(z, labels, temperature=0.1, backend=backend), by_bits)


def test_pytorch_metric_learning_agrees():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z = torch.randn(512, 32, requires_grad=True)
    labels = torch.arange(512) % 9
    loss = hk.supervised_contrastive_loss(z, labels, temperature=0.1)
    (grad,) = torch.autograd.grad(loss, z)
    theirs = losses.SupConLoss(temperature=0.1)(z, labels)
    (their_grad,) = torch.autograd.grad(theirs, z)
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, their_grad, rtol=1e-4, atol=1e-7)


MEMORY = """
import resource, sys, torch, hpkernels as hk
n, form = 20_000, sys.argv[1]
z, labels = torch.randn(n, 8, requires_grad=True), torch.arange(n) % 1000
hk.supervised_contrastive_loss(z[:500], labels[:500], form=form).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hk.supervised_contrastive_loss(z, labels, form=form).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("form", FORMS)
def test_linear_memory(form):
    """Neither logits (1.6 GB) nor bits (50 MB) of all pairs in forward and backward at N = 20,000."""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", MEMORY, form], capture_output=True, text=True, check=True)
    blocks = 6 * 4 * label_positives._BLOCK_PAIRS if form == "per_positive" else 0  # of a constant size
    assert int(done.stdout) < 20_000**2 / 8 + blocks


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bank", [False, True])
def test_compile_fullgraph(form, bank, backend, device):
    p = problem(torch.float32, device)

    def step(z, keys):
        return call((z, *p[1:3], keys, *p[4:]), bank, True, form, backend)

    torch._dynamo.reset()
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        z, keys = p[0].clone().requires_grad_(), p[3].clone().requires_grad_()
        run(z, keys).backward()
        results.append(z.grad)
    torch.testing.assert_close(results[1], results[0])


def test_second_backward():
    z, labels, *_ = problem(n=20)
    z.requires_grad_()

    def gradient(backend):
        loss = hk.supervised_contrastive_loss(z, labels, temperature=0.2, backend=backend)
        return torch.autograd.grad(loss, z, create_graph=True)[0]

    assert torch.isfinite(torch.autograd.grad(gradient("reference").square().sum(), z)[0]).all()
    with pytest.raises(RuntimeError, match='backend="reference"'):
        gradient("cpu").square().sum().backward()


def test_module(device):
    z, labels, *_ = problem(torch.float32, device)
    module = nn.SupervisedContrastiveLoss(temperature=0.2, form="per_positive")
    assert torch.equal(
        module(z, labels), hk.supervised_contrastive_loss(z, labels, temperature=0.2, form="per_positive")
    )
    assert "form='per_positive'" in repr(module)


Z, LABELS = torch.randn(12, 6), torch.arange(12) % 3
ERRORS = [
    ({"z": "text"}, TypeError, "z: expected a torch.Tensor, got str"),
    ({"z": Z[0]}, ValueError, "z: expected 2 or 3 dimensions"),
    ({"labels": Z[:, 0]}, TypeError, "labels: expected an integer tensor"),
    ({"labels": LABELS[:5]}, ValueError, r"labels: expected shape \(12,\) on cpu"),
    ({"keys": Z}, ValueError, "key_labels: expected together with keys, got None"),
    ({"key_labels": LABELS}, ValueError, "keys: expected together with key_labels, got None"),
    ({"keys": Z[:, :3], "key_labels": LABELS}, ValueError, "keys: expected vectors of length 6 as in z"),
    ({"keys": Z, "key_labels": LABELS[:4]}, ValueError, r"key_labels: expected shape \(12,\)"),
    ({"keys": Z, "key_labels": LABELS, "image_ids": LABELS}, TypeError, "image_ids: expected with keys a pair"),
    ({"image_ids": LABELS[:4]}, ValueError, "image_ids: expected shape"),
    ({"image_ids": Z}, TypeError, "image_ids: expected an integer tensor"),
    ({"temperature": 0}, ValueError, "temperature: expected a finite number > 0, got 0"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got 1.5"),
    ({"form": "info_nce"}, ValueError, "form: expected one of 'supcon', 'per_positive', got 'info_nce'"),
    ({"backend": "metal"}, ValueError, "backend: 'metal' cannot be used here"),
    ({"z": Z / 0}, ValueError, "z: expected finite"),
    ({"keys": Z * torch.nan, "key_labels": LABELS}, ValueError, "keys: expected finite"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        hk.supervised_contrastive_loss(**({"z": Z, "labels": LABELS} | change))
