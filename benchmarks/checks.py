"""Correctness gates: a contender's answer on a small input against plain torch in fp64, or it yields no figures.

Run by the benchmark before it measures, in processes of their own, and by tests/test_benchmarks.py. The function gated
is the one that is timed. Every contender is held to fp32 rounding. For a run in bf16 or fp16 the kernels (ours and
other libraries') are held to that dtype too, on inputs whose decisions no rounding can turn; plain torch is not, its
rounding there is its own. A contender that takes no fp32 is gated in the run's dtype alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import hpkernels
from benchmarks import cases, peers, plain, published
from benchmarks.cases import (
    KINDS,
    DensityInputs,
    KmeansInputs,
    MixInputs,
    SearchInputs,
    StepInputs,
)  # fmt: skip
from benchmarks.features import Batch, make_attention, make_batch, make_labels
from benchmarks.kinds import Contender
from benchmarks.label_losses import TEMPERATURE, InfonceInputs, SupconInputs
from benchmarks.plan import ITERATIONS, NEIGHBOURS, SCALES

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
GRID = (9, 11)
IMAGES = 3
GATE_RATE = 0.05  # of random columns, for a case with fewer: 15 a row at this size

Answer = dict[str, Tensor]


class GateFailed(AssertionError):
    """A contender's answer is not the oracle's."""


def gate(kind: str, peer: str, device: str, dtype: torch.dtype, rate: float = 0.02) -> dict:
    """{"state": "ok" | "skipped" | "red", "reason": ...} of one contender."""
    reason = _missing(kind) or peers.why_not(peer, device, dtype)
    if reason:
        return {"state": "skipped", "reason": reason}
    if kind not in GATES:
        return {"state": "ok"}
    dtypes = [torch.float32, dtype] if is_kernel(peer) and dtype != torch.float32 else [torch.float32]
    dtypes = [held for held in dtypes if peers.why_not(peer, device, held) is None] or [dtype]
    try:
        for held in dtypes:
            GATES[kind](KINDS[kind].contenders[peer], device, held, rate)
    except GateFailed as failure:
        return {"state": "red", "reason": str(failure)}
    return {"state": "ok"}


def is_kernel(peer: str) -> bool:
    return peer.startswith("hpkernels") or peer in peers.PACKAGES


def _missing(kind: str) -> str | None:
    if kind == "local_mix_qk" and not hasattr(hpkernels, "neighbor_weights_qk"):
        return "this version of hpkernels has no neighbor_weights_qk"
    return None


def check_step(contender: Contender, device: str, dtype: torch.dtype, rate: float) -> None:
    """The loss and both gradients against the published algorithm, on the columns a seed draws."""
    batch = _batch(dtype)
    rate = max(rate, GATE_RATE)
    if rate < 1:
        batch.seed = 11
        batch.mask = hpkernels.PairMask.random(rate, (batch.tokens, len(batch.z)), batch.seed).to_dense()
    exact = StepInputs(_converted(batch, "cpu", torch.float64), rate)
    loss = cases.step(exact, published.hidden_positive_loss, negative_mask=batch.mask)
    expected = _step_answer(exact.batch, loss)
    inputs = StepInputs(_converted(batch, device, dtype), rate)
    _compare(_step_answer(inputs.batch, contender(inputs)), expected, dtype)


def check_search(contender: Contender, device: str, dtype: torch.dtype, rate: float) -> None:
    """Every decision of the two searches that is not a matter of rounding. The torch.mm peer decides nothing."""
    batch = _converted(_batch(dtype), device, dtype)
    found = contender(SearchInputs(batch))
    if found is None:
        return
    spaces = ((batch.features, batch.pool), (batch.head_features, batch.head_pool))
    for name, mask, (x, pool) in zip(("features", "head_features"), found, spaces, strict=True):
        mask = mask.to_dense() if isinstance(mask, hpkernels.PairMask) else mask
        x, pool = F.normalize(x.double(), dim=1), F.normalize(pool.double(), dim=1)
        best = (x @ pool.T).amax(1)
        margin = x @ x.T - torch.minimum(best[:, None], best)
        clear = margin.abs() > TOLERANCE[dtype]
        expected = (margin > 0).fill_diagonal_(False)
        if not torch.equal(mask & clear, expected & clear):
            raise GateFailed(f"{name}: decisions differ from the similarity matrix")


def check_topk(contender: Contender, device: str, dtype: torch.dtype, rate: float) -> None:
    """The values, and that each index has its value. The torch.mm peer finds nothing: its products are checked."""
    queries, keys = (
        make_batch(IMAGES, GRID, channels=96, code=8, pool=1, seed=seed).features.to(device, dtype) for seed in range(2)
    )
    found = contender((queries, keys))
    similarity = queries.double() @ keys.double().T
    if isinstance(found, Tensor):
        _compare({"products": found}, {"products": similarity}, dtype)
        return
    best = torch.topk(similarity, NEIGHBOURS).values
    values, indices = found
    _compare(
        {"values": values, "indices": similarity.gather(1, indices.long())}, {"values": best, "indices": best}, dtype
    )


def check_local_mix(contender: Contender, device: str, dtype: torch.dtype, rate: float) -> None:
    _check_mix(contender, device, dtype, make_attention(2, GRID, heads=3))


def check_local_mix_qk(contender: Contender, device: str, dtype: torch.dtype, rate: float) -> None:
    generator = torch.Generator().manual_seed(9)
    _check_mix(contender, device, dtype, tuple(torch.randn(2, 3, 99, 16, generator=generator) for _ in range(2)))


def check_supcon(contender: Contender, device: str, dtype: torch.dtype, rate: float) -> None:
    """Khosla et al. 2020, their loss "out": the mean over anchors that have a positive."""
    z = _batch(torch.float32, code=256).z.detach().to(dtype)
    labels = make_labels(IMAGES, GRID)
    labels[0] = labels.max() + 1  # an anchor without a positive
    exact = SupconInputs(z.double().requires_grad_(), labels)
    x = F.normalize(exact.z, dim=1)
    logits = x @ x.T / TEMPERATURE
    diagonal = torch.eye(len(z), dtype=torch.bool)
    positives = (labels[:, None] == labels) & ~diagonal
    log_prob = logits - logits.masked_fill(diagonal, -torch.inf).logsumexp(1, keepdim=True)
    counts = positives.sum(1)
    kept = counts > 0
    loss = -((positives * log_prob).sum(1)[kept] / counts[kept]).mean()
    loss.backward()
    inputs = SupconInputs(z.clone().to(device).requires_grad_(), labels.to(device))
    answer = {"loss": contender(inputs), "gradient": _tangential(inputs.z.grad, inputs.z)}
    _compare(answer, {"loss": loss.detach(), "gradient": exact.z.grad}, dtype)


def check_infonce(contender: Contender, device: str, dtype: torch.dtype, rate: float) -> None:
    """Cross-entropy of row i against all keys, key i the right one; of siglip-kernel, its pairs' sigmoids."""
    batch = _batch(torch.float32, code=256)
    z, keys = (x.detach().to(dtype) for x in (batch.z, batch.z_local))
    exact = InfonceInputs(z.double().requires_grad_(), keys.double().requires_grad_())
    logits = F.normalize(exact.z, dim=1) @ F.normalize(exact.keys, dim=1).T / TEMPERATURE
    if contender is KINDS["infonce"].contenders["siglip-kernel"]:
        signs = 2.0 * torch.eye(len(z)) - 1.0
        loss = -F.logsigmoid(signs * (logits + peers.SIGLIP_BIAS)).sum() / len(z)
    else:
        loss = (logits.logsumexp(1) - logits.diagonal()).mean()
    loss.backward()
    inputs = InfonceInputs(*(x.clone().to(device).requires_grad_() for x in (z, keys)))
    answer = {"loss": contender(inputs)}
    expected = {"loss": loss.detach()}
    for side in ("z", "keys"):
        found, right = getattr(inputs, side), getattr(exact, side)
        answer[f"gradient of {side}"], expected[f"gradient of {side}"] = _tangential(found.grad, found), right.grad
    _compare(answer, expected, dtype)


def check_density(contender: Contender, device: str, dtype: torch.dtype, rate: float) -> None:
    """The mean over the scales of the mean of the largest cosines within the class, anchor by anchor."""
    features, memory = (
        make_batch(IMAGES, GRID, channels=96, code=8, pool=1, seed=seed).features.to(dtype) for seed in range(2)
    )
    groups, memory_groups = torch.arange(len(features)) % 3, torch.arange(len(memory)) * 7 % 3
    cosines = F.normalize(features.double(), dim=1) @ F.normalize(memory.double(), dim=1).T
    expected = []
    for row, group in zip(cosines, groups):
        best = row[memory_groups == group].sort(descending=True).values
        expected.append(sum(best[:k].mean() for k in SCALES) / len(SCALES))
    inputs = DensityInputs(*(x.to(device) for x in (features, memory, groups, memory_groups)))
    _compare({"density": contender(inputs)}, {"density": torch.stack(expected)}, dtype)


def check_kmeans(contender: Contender, device: str, dtype: torch.dtype, rate: float) -> None:
    """The centroids after the same iterations in fp64, of clusters so far apart that no rounding moves a row."""
    generator = torch.Generator().manual_seed(3)
    means = 3 * torch.randn(20, 48, generator=generator)
    x = (means[torch.arange(900) % 20] + 0.5 * torch.randn(900, 48, generator=generator)).to(dtype)
    rows = torch.arange(23)  # three clusters are shared, so that rows move
    centroids = x[rows].double()
    for _ in range(ITERATIONS):
        labels = torch.cdist(x.double(), centroids).argmin(1)
        one_hot = F.one_hot(labels, len(centroids)).double()
        centroids = one_hot.T @ x.double() / one_hot.sum(0)[:, None]
    inputs = KmeansInputs(x.to(device), rows.to(device))
    _compare({"centroids": contender(inputs)}, {"centroids": centroids}, dtype)


GATES: dict[str, Callable[[Contender, str, torch.dtype, float], None]] = {
    "step": check_step,
    "search": check_search,
    "topk": check_topk,
    "local_mix": check_local_mix,
    "local_mix_qk": check_local_mix_qk,
    "supcon": check_supcon,
    "infonce": check_infonce,
    "density": check_density,
    "kmeans": check_kmeans,
}


def _batch(dtype: torch.dtype, code: int = 80) -> Batch:
    """A small batch on the CPU, the same for every device. For 16-bit dtypes: classes, so that no decision is close."""
    batch = make_batch(IMAGES, GRID, channels=96, code=code, pool=300, density=0.01)
    if dtype == torch.float32:
        return batch
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(13, (len(batch.z),), generator=generator)
    between = torch.stack([torch.randperm(13, generator=generator)[:2] for _ in range(len(batch.pool))])

    def space(width: int) -> tuple[Tensor, Tensor]:
        classes = torch.linalg.qr(torch.randn(width, 13, generator=generator)).Q.T
        noise = torch.randn(len(labels), width, generator=generator) / width**0.5
        return F.normalize(classes[labels] + 0.1 * noise, dim=1), F.normalize(classes[between].sum(1), dim=1)

    batch.features, batch.pool = space(96)
    batch.head_features, batch.head_pool = space(code)
    return batch


def _converted(batch: Batch, device: str, dtype: torch.dtype) -> Batch:
    def place(x: Tensor) -> Tensor:
        return x.detach().to(device, dtype)

    names = ("features", "pool", "head_features", "head_pool")
    mask = None if batch.mask is None else batch.mask.to(device)
    streams = {name: place(getattr(batch, name)).clone().requires_grad_() for name in ("z", "z_local")}
    return Batch(
        **{name: place(getattr(batch, name)) for name in names},
        **streams,
        tokens=batch.tokens,
        mask=mask,
        seed=batch.seed,
    )


def _step_answer(batch: Batch, loss: Tensor) -> Answer:
    return {
        "loss": loss,
        "gradient of z": _tangential(batch.z.grad, batch.z),
        "gradient of z_local": _tangential(batch.z_local.grad, batch.z_local),
    }


def _check_mix(contender: Contender, device: str, dtype: torch.dtype, attention) -> None:
    generator = torch.Generator().manual_seed(3)
    code, grad = (torch.randn(2, 99, 40, generator=generator) for _ in range(2))

    def inputs(place: Callable[[Tensor], Tensor]) -> MixInputs:
        placed = place(attention) if isinstance(attention, Tensor) else tuple(map(place, attention))
        return MixInputs(place(code).requires_grad_(), placed, place(grad), GRID)

    exact, given = inputs(lambda x: x.to(dtype).double()), inputs(lambda x: x.to(device, dtype, copy=True))
    expected = cases._mix(lambda m: plain.local_mix(m.code, m.logits, m.grid))(exact)
    answer = {"mixed code": contender(given), "gradient of code": given.code.grad}
    _compare(answer, {"mixed code": expected, "gradient of code": exact.code.grad}, dtype)


def _tangential(grad: Tensor, unit: Tensor) -> Tensor:
    """Every loss normalises inside; removing the radial part again takes away what rounding left of it."""
    grad, unit = grad.double(), unit.detach().double()
    return grad - (grad * unit).sum(1, keepdim=True) / (unit * unit).sum(1, keepdim=True) * unit


def _compare(answer: Answer, expected: Answer, dtype: torch.dtype) -> None:
    for what, oracle in expected.items():
        ours = answer[what].double().cpu()
        error = float((ours - oracle.cpu()).norm() / oracle.norm())
        if not error <= TOLERANCE[dtype]:
            raise GateFailed(f"{what}: relative difference {error:.2e}, allowed {TOLERANCE[dtype]:.0e}")
