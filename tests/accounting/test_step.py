"""What the paper's training step takes: memory, launches, torch calls; and no function of ours waits for the device.

64 images of 784 patches, features of 384 and codes of 512 numbers in bf16, two streams, P and Q.
"""

import functools

import pytest
import torch

pytest.importorskip("triton")
import hpkernels as hk
from benchmarks import dry

GIB = 1 << 30
STEP = functools.cache(dry.loss_step)


@pytest.mark.parametrize("rate, gib, launches, calls", [(0.02, 1.0, 40, 60), (1.0, 1.0, 63, 108)])
def test_triton_stays_within_its_bounds(rate, gib, launches, calls):
    step = STEP(rate, "triton")
    found = step.peak_bytes / GIB, len(step.launches), step.torch_calls()
    assert all(a <= b for a, b in zip(found, (gib, launches, calls))), "\n".join(dry.lines(step))


@pytest.mark.parametrize("rate", [0.02, 1.0])
@pytest.mark.parametrize("gpu_backend", ["triton", "cuda"])
def test_around_the_ops(gpu_backend, rate):
    """What the losses themselves add to the kernels of the ops, with what autograd makes of it."""
    step = STEP(rate, gpu_backend)
    calls = sum(call.kind == "work" for call in step.calls if not call.op)
    assert calls <= (6 if gpu_backend == "triton" else 33), "\n".join(dry.lines(step))
    assert len(step.ops) <= 16


@pytest.mark.parametrize("rate", [0.02, 1.0])
def test_cuda_memory(rate):
    assert STEP(rate, "cuda").peak_bytes <= 1.15 * GIB


def test_panels_of_anchors_take_no_more_memory(monkeypatch):
    """Bits of a sixteenth of the anchors at a time."""
    monkeypatch.setenv("HPKERNELS_BITS_BYTES", str(40 << 20))
    step = dry.loss_step(1.0)
    assert step.peak_bytes < STEP(1.0, "triton").peak_bytes


def _rows(n=3136, width=384):
    return dry.like_gpu(n, width)


def _code():
    return dry.like_gpu(3136, 512, requires_grad=True)


def _labels(n=3136):
    return dry.like_gpu(n, dtype=torch.int64)


def _with_neighbors(backend):
    options = dict(positives_per_anchor=16, tokens_per_image=784, seed=1, backend=backend, return_stats=True)
    return hk.hidden_positive_loss(_code(), _rows(), **options)[0]


def _masked(backend):
    bits = [hk.PairMask(dry.like_gpu(3136, 100, dtype=torch.int32), 3136) for _ in range(2)]
    return hk.masked_contrastive_loss(_code(), bits[0], extra_positives=bits[1], extra_weight=0.3, backend=backend)


def _by_label(backend, form):
    keys = dict(keys=_rows(width=512), key_labels=_labels())
    return hk.supervised_contrastive_loss(_code(), _labels(), **keys, form=form, backend=backend)


def _local_mix(backend):
    heads = dry.like_gpu(4, 6, 784, 64)
    weights = hk.neighbor_weights_qk(heads, heads, (28, 28), backend=backend)
    return hk.neighbor_mix(dry.like_gpu(4, 784, 512, requires_grad=True), weights, (28, 28), backend=backend).sum()


LOSSES = {
    "nearest neighbours": _with_neighbors,
    "masked": _masked,
    "supcon": functools.partial(_by_label, form="supcon"),
    "per positive": functools.partial(_by_label, form="per_positive"),
    "local mix": _local_mix,
}
OTHERS = {
    "density": lambda backend: hk.neighbor_density(_rows(), _rows(500), backend=backend),
    "topk": lambda backend: hk.topk_similarity(_rows(), _rows(), 300, backend=backend),
    "random mask": lambda backend: hk.PairMask.random(0.1, (10, 300), 1, device=dry.GPU, backend=backend),
    "hidden positives": lambda backend: hk.hidden_positives(_rows(), _rows(5), backend=backend).sum(),
}


@pytest.mark.parametrize("gpu_backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_wait(name, gpu_backend):
    step = dry.follow(lambda: dry.backward(LOSSES[name](gpu_backend)))
    assert step.launches


@pytest.mark.parametrize("gpu_backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", OTHERS)
def test_functions_do_not_wait(name, gpu_backend):
    assert dry.follow(lambda: OTHERS[name](gpu_backend)).launches
