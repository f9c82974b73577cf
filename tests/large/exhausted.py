"""Address space that runs out in the middle of every CPU op, by RLIMIT_AS: python -m tests.large.exhausted [GROWTH].

Each call is given 1 MiB beyond its inputs; with a GROWTH then so many times as much, and so on until it comes through,
so that its allocations fail in turn: scratch, bits, results. Each time it must say so, and nothing else may follow from
it: with the limit lifted the same op gives on few rows what it gave before. The last line is the number of failures.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

import hpkernels as hk
from hpkernels import _cpu

MIB = 1 << 20
FEW, MANY = 320, 8000  # rows
CLEAR = re.compile(r"hpkernels: no memory for \d+ bytes|can't allocate memory: you tried to allocate \d+ bytes")
BY_MAP = 64 << 10  # allocations from this size on are taken from the system, and given back at once


def unit(*shape: int) -> Tensor:
    return normalize(torch.randn(*shape), dim=-1)


def cases(n: int) -> dict:
    """Calls on n rows, by name. Nothing but the call itself takes memory."""
    x, keys, groups, labels = unit(n, 64), unit(n, 64), torch.arange(n) % 5, torch.arange(n) % 9
    z, z_local, exact_z = (y.requires_grad_() for y in (unit(n, 64), unit(n, 64), unit(n, 64).double()))
    image_ids, bank, bank_labels = torch.arange(n) // 40, unit(n, 64), torch.arange(n) % 9
    pool, head, head_pool, half = unit(50, 64), unit(n, 24), unit(50, 24), x.bfloat16()
    limits, centroids = torch.full((n,), 0.9), x[: n // 4].clone()
    some = hk.PairMask.random(0.01, (n, n), 1)
    dense = some.to_dense()
    images, grid, tokens = n // 4, (4, 4), 16
    q, k = torch.randn(2, images, 2, tokens, 64)
    attention, code = torch.randn(2 * images, 2, tokens, tokens), torch.randn(images, tokens, 64).requires_grad_()
    weights, positions = torch.rand(images, tokens, 9).requires_grad_(), torch.rand(images, tokens, 2)

    def graded(function, *leaves: Tensor):
        """A call that goes forward and backward."""

        def call() -> Tensor:
            out = function()
            grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
            return torch.cat([t.flatten() for t in (out.detach(), *grads)])

        return call

    by_pool = dict(tokens_per_image=n // 4, seed=1)
    return {
        "max_similarity": lambda: hk.max_similarity(x, keys),
        "max_similarity, fp64": lambda: hk.max_similarity(exact_z.detach(), keys),
        "topk_similarity": lambda: hk.topk_similarity(x, x, 20, exclude_self=True)[1],
        "topk_similarity of bf16": lambda: hk.topk_similarity(half, half, 20)[1],
        "topk_similarity, many": lambda: hk.topk_similarity(x, keys, 300)[1],
        "topk_similarity in groups": lambda: hk.topk_similarity(x, keys, 9, query_groups=groups, key_groups=groups)[1],
        "pairs_above": lambda: hk.pairs_above(x, limits).bits,
        "pairs_above keys": lambda: hk.pairs_above(x, limits, keys=keys, key_thresholds=limits).bits,
        "hidden_positives": lambda: hk.hidden_positives(x, pool).bits,
        "hidden_positives by rank": lambda: hk.hidden_positives(x, positives_per_anchor=4).bits,
        "neighbor_density": lambda: hk.neighbor_density(x, keys, query_groups=groups, memory_groups=groups),
        "PairMask.from_dense": lambda: hk.PairMask.from_dense(dense).bits,
        "PairMask.from_labels": lambda: hk.PairMask.from_labels(labels).bits,
        "PairMask.random": lambda: hk.PairMask.random(0.3, (n, n), 0).bits,
        "PairMask.T": lambda: some.T.bits,
        "PairMask.to_dense": lambda: some.to_dense(),
        "PairMask, logical": lambda: (~some & some | some).sum(1),
        "hidden_positive_loss": graded(lambda: hk.hidden_positive_loss(z, x, positives_per_anchor=4, seed=1), z),
        "hidden_positive_loss, all of it": graded(
            lambda: hk.hidden_positive_loss(
                z, x, pool, z_local=z_local, head_features=head, head_pool=head_pool, head_weight=0.3, **by_pool
            ), z, z_local,
        ),
        "hidden_positive_loss, dense": graded(
            lambda: hk.hidden_positive_loss(z, x, pool, negative_rate=0.5, **by_pool), z
        ),
        "hidden_positive_loss, fp64": graded(lambda: hk.hidden_positive_loss(exact_z, x, pool, **by_pool), exact_z),
        "masked_contrastive_loss": graded(lambda: hk.masked_contrastive_loss(z, some), z),
        "supervised_contrastive_loss": graded(lambda: hk.supervised_contrastive_loss(z, labels), z),
        "supervised_contrastive_loss, per positive": graded(
            lambda: hk.supervised_contrastive_loss(z, labels, form="per_positive", image_ids=image_ids), z
        ),
        "supervised_contrastive_loss, bank": graded(
            lambda: hk.supervised_contrastive_loss(z, labels, keys=bank, key_labels=bank_labels), z
        ),
        "assign_clusters": lambda: hk.assign_clusters(x, centroids).sums,
        "kmeans": lambda: hk.kmeans(x, len(centroids), init=centroids, iterations=2).centroids,
        "kmeans, spherical mini-batches": lambda: hk.kmeans(
            x, 8, iterations=2, batch_size=99, spherical=True
        ).centroids,
        "outlier_distances": lambda: hk.outlier_distances(x, centroids),
        "neighbor_weights": lambda: hk.neighbor_weights(attention, grid),
        "neighbor_weights_qk": lambda: hk.neighbor_weights_qk(q, k, grid),
        "neighbor_mix": graded(lambda: hk.neighbor_mix(code, weights, grid), code, weights),
        "local_mix": graded(lambda: hk.local_mix(code, (q, k), grid), code),
        "neighbor_attention": lambda: hk.neighbor_attention(q, k, q, positions),
    }  # fmt: skip


def panels(calls: dict) -> dict:
    """The losses over pair bits by panels of 128 anchors."""

    def bounded(call):
        def by_panels() -> Tensor:
            os.environ["HPKERNELS_BITS_BYTES"] = "1"
            try:
                return call()
            finally:
                del os.environ["HPKERNELS_BITS_BYTES"]

        return by_panels

    losses = (name for name in calls if name.startswith("hidden_positive_loss"))
    return {f"{name}, by panels": bounded(calls[name]) for name in losses}


def size() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def failure(call, room: int) -> str | None:
    """What the call says in that much room; None if it comes through."""
    gc.collect()
    _cpu.release_memory()
    limit(size() + room)
    try:
        call()
        return None
    except (MemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        limit(resource.RLIM_INFINITY)


def exhaust(call, growth: float | None) -> Iterator[tuple[int, str]]:
    """The rooms in which a call fails, and what it says."""
    room = float(MIB)
    while said := failure(call, int(room)):
        yield int(room), said
        if growth is None:
            return
        room *= growth


def main(growth: float | None) -> None:
    ctypes.CDLL(None).mallopt(-3, BY_MAP)  # M_MMAP_THRESHOLD
    torch.set_num_threads(2)
    torch.manual_seed(0)
    few, many = ({**calls, **panels(calls)} for calls in map(cases, (FEW, MANY)))
    before = {name: call() for name, call in few.items()}
    torch.set_num_threads(8)  # threads of ours that are not there yet, and for which there is no room
    torch.ones(1 << 22).exp()  # torch's own must be: its OpenMP ends a process that has no room for a thread
    _cpu.release_memory()
    limit(size() + 7 * MIB)  # a thread's stack takes 8
    for name in ("max_similarity", "hidden_positive_loss"):  # without the threads
        assert torch.equal(few[name](), before[name]), name
    limit(resource.RLIM_INFINITY)
    failures = 0
    for name, call in many.items():
        last = 0
        for last, said in exhaust(call, growth):
            assert CLEAR.search(said), f"{name} in {last:,} bytes: {said}"
            assert torch.equal(few[name](), before[name]), f"{name} in {last:,} bytes"
            failures += 1
        assert last, f"{name} fits into {MIB:,} bytes: the case is too small"
        print(f"{name}: failed up to {last:,} bytes", flush=True)
    print(failures)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else None)
