"""Every op and both losses on both GPU backends: right, bitwise repeatable, capturable, never synchronising.

Answers are held to the fp64 reference on the CPU, on inputs whose decisions no rounding can turn (patches of a few
classes, a pool between them), in every dtype. Everything goes through the public functions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hpkernels as hk
from hpkernels import dispatch, tuning

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = torch.device("cuda")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative, of the norm
REPEATS = 30
IMAGES, GRID = 5, (11, 13)  # no multiple of any tile
TOKENS = GRID[0] * GRID[1]
CLASSES = 13
GIB = 1 << 30

Answer = dict[str, Tensor]


@dataclass
class Inputs:
    """Of every call; all on one device, vectors in one dtype."""

    features: Tensor
    pool: Tensor
    head_features: Tensor
    head_pool: Tensor
    z: Tensor
    z_local: Tensor
    thresholds: Tensor
    key_thresholds: Tensor
    attention: Tensor
    code: Tensor
    grad_code: Tensor
    head_weight: Tensor
    labels: Tensor
    seed: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        placed = {}
        for name in (field.name for field in fields(self)):
            x = getattr(self, name)
            placed[name] = x.to(device, dtype, copy=True) if x.is_floating_point() else x.to(device, copy=True)
        return Inputs(**placed)

    def copy_(self, other: Inputs) -> None:
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


@functools.cache
def make(dtype: torch.dtype, seed: int = 0, width: int = 72) -> Inputs:
    """fp64 inputs on the CPU that hold numbers of `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    n = IMAGES * TOKENS
    labels = torch.randint(CLASSES, (n,), generator=generator)

    def space(columns: int) -> tuple[Tensor, Tensor]:
        classes = torch.linalg.qr(normal(columns, CLASSES)).Q.T
        between = torch.stack([torch.randperm(CLASSES, generator=generator)[:2] for _ in range(150)])
        rows = F.normalize(classes[labels] + 0.1 * normal(n, columns) / columns**0.5, dim=1)
        return rows, F.normalize(classes[between].sum(1), dim=1)

    (features, pool), (head_features, head_pool) = space(96), space(64)
    inputs = Inputs(
        features=features, pool=pool, head_features=head_features, head_pool=head_pool,
        z=normal(n, width), z_local=normal(n, width),
        thresholds=torch.full((n,), 0.6), key_thresholds=torch.full((len(pool),), 0.55),
        attention=normal(IMAGES, 3, TOKENS, TOKENS), code=normal(IMAGES, TOKENS, 40),
        grad_code=normal(IMAGES, TOKENS, 40),
        head_weight=torch.tensor(0.5), labels=labels, seed=torch.tensor(11 + seed),
    )  # fmt: skip
    return inputs.to(torch.device("cpu"), dtype).to(torch.device("cpu"), torch.float64)


def _search(function: Callable[..., tuple[Tensor, ...] | Tensor]) -> Callable[[Inputs, str | None], Answer]:
    def call(inputs: Inputs, backend: str | None) -> Answer:
        found = function(inputs, backend)
        return {str(i): x for i, x in enumerate(found if isinstance(found, tuple) else (found,))}

    return call


def _loss(**options) -> Callable[[Inputs, str | None], Answer]:
    def call(inputs: Inputs, backend: str | None) -> Answer:
        z, z_local = (x.detach().requires_grad_() for x in (inputs.z, inputs.z_local))
        loss = hk.hidden_positive_loss(
            z, inputs.features, inputs.pool, z_local=z_local, head_features=inputs.head_features,
            head_pool=inputs.head_pool, head_weight=inputs.head_weight, tokens_per_image=TOKENS, seed=inputs.seed,
            backend=backend, **options,
        )  # fmt: skip
        return dict(
            zip(("loss", "gradient", "local gradient"), (loss.detach(), *torch.autograd.grad(loss, (z, z_local))))
        )

    return call


def _supcon(inputs: Inputs, backend: str | None) -> Answer:
    z = inputs.z.detach().requires_grad_()
    pairs = hk.PairMask.from_labels(inputs.labels)
    loss = hk.masked_contrastive_loss(
        z, pairs, temperature=0.1, base_temperature=0.1, weighting="anchors", backend=backend
    )
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, z)[0]}


def _by_label(form: str, bank: bool) -> Callable[[Inputs, str | None], Answer]:
    """Other images only; against itself, or against a bank whose rows get a gradient, too."""

    def call(inputs: Inputs, backend: str | None) -> Answer:
        z, keys = (x.detach().requires_grad_() for x in (inputs.z, inputs.z_local))
        images = torch.arange(len(z), device=z.device) // TOKENS
        options = {"image_ids": images}
        if bank:
            options = {"keys": keys, "key_labels": inputs.labels, "image_ids": (images, images)}
        loss = hk.supervised_contrastive_loss(
            z, inputs.labels, temperature=0.1, ignore_index=3, form=form, backend=backend, **options
        )
        gradients = torch.autograd.grad(loss, (z, keys) if bank else (z,))
        return {"loss": loss.detach()} | dict(zip(("gradient", "of keys"), gradients))

    return call


def _density(inputs: Inputs, backend: str | None) -> Tensor:
    groups = torch.arange(len(inputs.pool), device=inputs.pool.device) % 3
    return hk.neighbor_density(
        inputs.features, inputs.pool, query_groups=inputs.labels % 3, memory_groups=groups, backend=backend
    )


def _given_pairs(inputs: Inputs, backend: str | None) -> Answer:
    """Positives that are not symmetric, with columns of the caller's."""
    z = inputs.z.detach().requires_grad_()
    n = len(z)
    positives, extra = (hk.PairMask.random(rate, (n, n), inputs.seed + 1, backend=backend) for rate in (0.02, 0.01))
    loss = hk.masked_contrastive_loss(
        z, positives, extra_positives=extra, extra_weight=inputs.head_weight, tokens_per_image=TOKENS, backend=backend,
        negatives=hk.PairMask.random(0.3, (TOKENS, n), inputs.seed, backend=backend),
    )  # fmt: skip
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, z)[0]}


def _neighbor_mix(inputs: Inputs, backend: str | None) -> Answer:
    code = inputs.code.detach().requires_grad_()
    weights = hk.neighbor_weights(inputs.attention, GRID, backend=backend).detach().requires_grad_()
    mixed = hk.neighbor_mix(code, weights, GRID, backend=backend)
    gradients = torch.autograd.grad(mixed, (code, weights), inputs.grad_code)
    return {"weights": weights.detach(), "mixed": mixed.detach(), "of code": gradients[0], "of weights": gradients[1]}


def _bits(inputs: Inputs, backend: str | None) -> Answer:
    n = len(inputs.z)
    mask = hk.PairMask.random(0.3, (TOKENS, n), inputs.seed, backend=backend)
    return {"random": mask.bits, "transposed": mask.T.bits, "counted": mask.sum(1), "by column": mask.sum(0)}


CALLS: dict[str, Callable[[Inputs, str | None], Answer]] = {
    "max_similarity": _search(lambda i, b: hk.max_similarity(i.features, i.pool, backend=b)),
    "topk_1": _search(lambda i, b: hk.topk_similarity(i.z, i.z_local, 1, backend=b)),
    "topk_16": _search(lambda i, b: hk.topk_similarity(i.z, i.z, 16, exclude_self=True, backend=b)),
    "topk_200": _search(lambda i, b: hk.topk_similarity(i.z, i.z_local, 200, backend=b)),
    "topk_groups": _search(
        lambda i, b: hk.topk_similarity(i.z, i.z, 8, query_groups=i.labels, key_groups=i.labels, backend=b)
    ),
    "pairs_above": _search(lambda i, b: hk.pairs_above(i.features, i.thresholds, backend=b).bits),
    "pairs_above_keys": _search(
        lambda i, b: hk.pairs_above(
            i.features, i.thresholds, keys=i.pool, key_thresholds=i.key_thresholds, backend=b
        ).bits
    ),
    "hidden_positives": _search(lambda i, b: hk.hidden_positives(i.features, i.pool, backend=b).bits),
    "loss_sparse": _loss(negative_rate=0.05),
    "loss_dense": _loss(negative_rate=0.5),
    "loss_all": _loss(negative_rate=1.0),
    "loss_separate": _loss(negative_rate=0.05, weighting="separate"),
    "supcon": _supcon,
    "by_label_supcon": _by_label("supcon", False),
    "by_label_supcon_bank": _by_label("supcon", True),
    "by_label_per_positive": _by_label("per_positive", False),
    "by_label_per_positive_bank": _by_label("per_positive", True),
    "neighbor_density": _search(_density),
    "assign_clusters": _search(lambda i, b: tuple(hk.assign_clusters(i.features, i.features[:20], backend=b))),
    "assign_clusters_many": _search(lambda i, b: tuple(hk.assign_clusters(i.features, i.features[:150], backend=b))),
    "assign_clusters_one": _search(
        lambda i, b: tuple(hk.assign_clusters(i.z, i.z_local[:1], spherical=True, backend=b))
    ),
    "given_pairs": _given_pairs,
    "neighbor_mix": _neighbor_mix,
    "local_mix": _search(lambda i, b: hk.local_mix(i.code, i.attention, GRID, backend=b)),
    "bits": _bits,
}  # fmt: skip


@pytest.fixture(params=["triton", "cuda"])
def on(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU backend, also for what has no `backend` argument."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = dispatch.why_not(request.param, CUDA)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setenv("HPKERNELS_BACKEND", request.param)
    return request.param


@functools.cache
def expected(name: str, dtype: torch.dtype, width: int = 72) -> Answer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPKERNELS_BACKEND", "reference")
        return CALLS[name](make(dtype, width=width), "reference")


def check(answer: Answer, oracle: Answer, dtype: torch.dtype) -> None:
    """Numbers to the budget; bits and counts exactly. Near ties of top-k may be told apart either way."""
    for what, right in oracle.items():
        found = answer[what].cpu()
        if right.is_floating_point():
            error = float((found.double() - right).norm() / right.norm().clamp_min(1e-30))
            assert error <= BUDGET[dtype], f"{what}: relative error {error:.2e}"
        elif right.dtype == torch.int64 and right.ndim == 2:
            assert (found != right).float().mean() <= 2e-3, f"{what}: indices"
        else:
            assert torch.equal(found, right), what


def same(first: Answer, second: Answer) -> bool:
    """Bit for bit."""

    def raw(x: Tensor) -> Tensor:
        return x.contiguous().reshape(-1).view(torch.uint8)

    return all(torch.equal(raw(first[what]), raw(second[what])) for what in first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_the_calls_agree_without_a_gpu(name: str, dtype: str) -> None:
    """The same calls and checks by this machine's default backend, so that they are right before a GPU runs them."""
    as_dtype, cpu = DTYPES[dtype], torch.device("cpu")
    inputs = make(as_dtype).to(cpu, as_dtype)
    answer = CALLS[name](inputs, None)
    check(answer, expected(name, as_dtype), as_dtype)
    assert same(answer, CALLS[name](inputs, None))
    assert not same(answer, CALLS[name](make(as_dtype, 1).to(cpu, as_dtype), None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_fp64(name: str, on: str, dtype: str) -> None:
    as_dtype = DTYPES[dtype]
    check(CALLS[name](make(as_dtype).to(CUDA, as_dtype), on), expected(name, as_dtype), as_dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CALLS)
def test_repeats_bit_for_bit(name: str, on: str, dtype: str) -> None:
    inputs = make(DTYPES[dtype]).to(CUDA, DTYPES[dtype])
    first = CALLS[name](inputs, on)
    assert all(same(first, CALLS[name](inputs, on)) for _ in range(REPEATS - 1))


def shipped() -> list:
    """Every entry of the tables of hpkernels.tuning."""
    tables = sorted(tuning.FOLDER.glob("*.json"))
    return [
        pytest.param(table.stem, entry, id=f"{table.stem}-{entry['op']}-{entry['dtype']}-{entry['d']}-{place}")
        for table in tables for place, entry in enumerate(tuning.entries(table))
    ]  # fmt: skip


@needs_gpu
@pytest.mark.parametrize(("family", "entry"), shipped())
def test_every_shipped_configuration(family: str, entry: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right and repeatable at the widest rows the entry serves, whatever route the shape would take by itself."""
    if family not in ("default", tuning.family(CUDA)):
        pytest.skip(f"a table for other GPUs: {family}")
    if reason := dispatch.why_not("triton", CUDA):
        pytest.skip(reason)
    monkeypatch.setenv("HPKERNELS_BACKEND", "triton")
    dtype = torch.bfloat16 if entry["dtype"] == "half" else torch.float32
    width = entry["d"] or 640
    with contextlib.ExitStack() as stack:
        stack.enter_context(tuning.forced(entry["op"], entry["config"]))
        for route in ("fused", "workspace"):
            if entry["op"].endswith(route):
                stack.enter_context(tuning.forced("contrastive_grad", {"route": route}))
        name = "loss_sparse" if entry["op"].endswith("sparse") else "loss_dense"
        inputs = make(dtype, width=width).to(CUDA, dtype)
        first = CALLS[name](inputs, "triton")
        check(first, expected(name, dtype, width), dtype)
        assert all(same(first, CALLS[name](inputs, "triton")) for _ in range(REPEATS - 1))


@pytest.mark.parametrize("name", CALLS)
def test_captured_graph_replays_on_new_inputs(name: str, on: str) -> None:
    first, second = (make(torch.bfloat16, seed).to(CUDA, torch.bfloat16) for seed in (0, 1))
    right = CALLS[name](second, on)
    static = make(torch.bfloat16).to(CUDA, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        CALLS[name](static, on)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = CALLS[name](static, on)
    static.copy_(second)
    graph.replay()
    assert same(captured, right)
    static.copy_(first)
    graph.replay()
    assert same(captured, CALLS[name](first, on))


@pytest.mark.parametrize("name", CALLS)
def test_never_synchronises(name: str, on: str) -> None:
    inputs = make(torch.bfloat16).to(CUDA, torch.bfloat16)
    CALLS[name](inputs, on)  # compiled and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[name](inputs, on)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CALLS)
def test_runs_on_the_callers_stream(name: str, on: str) -> None:
    """The inputs arrive late on a stream of the caller's; a launch on any other would not see them."""
    right_inputs = make(torch.bfloat16).to(CUDA, torch.bfloat16)
    right = CALLS[name](right_inputs, on)
    static = make(torch.bfloat16, 1).to(CUDA, torch.bfloat16)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        static.copy_(right_inputs)
        answer = CALLS[name](static, on)
    stream.synchronize()
    assert same(answer, right)


@pytest.mark.parametrize("name", CALLS)
def test_runs_on_the_device_of_its_inputs(name: str, on: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    other = torch.device("cuda", 1)
    answer = CALLS[name](make(torch.float32).to(other, torch.float32), on)
    assert all(x.device == other for x in answer.values())
    check(answer, expected(name, torch.float32), torch.float32)


# ------------------------------------------------------------------ more than 2^31 elements, in real memory


def _needs(gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free // GIB} are free")


def test_search_over_rows_beyond_int32_offsets(on: str) -> None:
    """2^31 and more numbers in the queries: the last rows have the answers of the first, which they repeat."""
    _needs(24)
    base = F.normalize(torch.randn(1 << 10, 512, device=CUDA), dim=1).bfloat16()
    queries = base.repeat((1 << 12) + 8, 1)
    assert queries.numel() > 1 << 31
    keys = F.normalize(torch.randn(300, 512, device=CUDA), dim=1).bfloat16()
    best = hk.max_similarity(queries, keys, backend=on).view(-1, len(base))
    assert torch.equal(best, best[:1].expand_as(best))
    torch.testing.assert_close(best[0], (base.float() @ keys.float().T).amax(1), rtol=1e-4, atol=1e-5)
    values, indices = hk.topk_similarity(queries, keys, 4, backend=on)
    for table in (values, indices):
        table = table.view(-1, *table[: len(base)].shape)
        assert torch.equal(table, table[:1].expand_as(table))


def test_bits_beyond_int32_offsets(on: str) -> None:
    """2^31 words of bits: the last rows hold the pairs of the first, which they repeat."""
    _needs(24)
    base = F.normalize(torch.randn(1 << 10, 64, device=CUDA), dim=1).bfloat16()
    x = base.repeat((1 << 12) + 1, 1)
    keys = F.normalize(torch.randn(1 << 14, 64, device=CUDA), dim=1).bfloat16()
    thresholds = torch.full((len(x),), 0.3, device=CUDA)
    bits = hk.pairs_above(x, thresholds, keys=keys, backend=on).bits
    assert bits.numel() > 1 << 31
    for rows in bits.split(1 << 10):
        assert torch.equal(rows, bits[: 1 << 10])
    assert bits[: 1 << 10].any()


def test_loss_with_bits_beyond_int32_offsets(on: str) -> None:
    """262,144 anchors, each with its twin as its one positive and its whole denominator: loss and gradient are 0."""
    _needs(48)
    half = (1 << 17) + 64
    twins = F.normalize(torch.randn(half, 256, device=CUDA), dim=1)
    noise = F.normalize(torch.randn(half, 256, device=CUDA), dim=1)
    pool = F.normalize(0.95 * twins + 0.31 * noise, dim=1).bfloat16()
    features = twins.bfloat16().repeat(2, 1)
    z = torch.randn(2 * half, 16, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    loss, stats = hk.hidden_positive_loss(z, features, pool, negative_rate=0.0, return_stats=True, backend=on)
    loss.backward()
    assert float(stats.positives_per_anchor) == 1.0 and float(stats.kept_fraction) == 1.0
    assert abs(float(loss)) < 1e-4 and float(z.grad.float().abs().max()) < 1e-6
