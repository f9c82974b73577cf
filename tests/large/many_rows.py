"""200,000 rows on a CPU, where N^2 bits would be 5 GB and N^2 numbers 160: python -m tests.large.many_rows NAME [ROWS].

Each case is one call on that many rows. It prints, as JSON, the memory that the call took beyond its inputs at its
peak, the bound that this must keep, and the time; the result is compared with fp64: where all of it can be had from the
way the rows were made in full, else for rows drawn at random.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

import hpkernels as hk

ROWS, WIDTH = 200_000, 32
EPS = torch.finfo(torch.float32).eps
ROUNDING = 4 * EPS * WIDTH**0.5  # of a product of unit rows, as two backends may differ
PANEL_BYTES = 128 << 20  # of pair bits at a time
SAMPLE = 64
Case = tuple[Callable[[], object], Callable[[object], None]]


def unit(*shape: int) -> Tensor:
    return normalize(torch.randn(*shape), dim=-1)


def sample(n: int) -> Tensor:
    return torch.randperm(n)[:SAMPLE]


def exact(queries: Tensor, keys: Tensor) -> Tensor:
    return queries.double() @ keys.double().T


# ------------------------------------------------------------------ search


def max_similarity(n: int) -> Case:
    q, k = unit(n, WIDTH), unit(n, WIDTH)

    def check(values: Tensor) -> None:
        rows = sample(n)
        assert (values[rows] - exact(q[rows], k).amax(1)).abs().max() <= ROUNDING

    return lambda: hk.max_similarity(q, k), check


def topk_similarity(n: int) -> Case:
    x, k = unit(n, WIDTH), 16

    def check(found: tuple[Tensor, Tensor]) -> None:
        values, indices = found
        rows = sample(n)
        s = exact(x[rows], x)
        s[torch.arange(SAMPLE), rows] = -torch.inf
        assert (values[rows] - s.topk(k).values).abs().max() <= ROUNDING
        assert (values[rows] - s.gather(1, indices[rows])).abs().max() <= ROUNDING
        assert (indices[rows].sort(1).values.diff(dim=1) > 0).all()

    return lambda: hk.topk_similarity(x, x, k, exclude_self=True), check


def pairs_above(n: int) -> Case:
    """The number of pairs of each row, a panel of rows at a time."""
    x, theta = unit(n, WIDTH), torch.full((n,), 0.6) + 0.05 * torch.randn(n)

    def run() -> Tensor:
        step = PANEL_BYTES // (n // 8)
        panels = (slice(first, first + step) for first in range(0, n, step))
        return torch.cat([hk.pairs_above(x[own], theta[own], keys=x, key_thresholds=theta).sum(1) for own in panels])

    def check(counts: Tensor) -> None:
        rows = sample(n)
        over = exact(x[rows], x) - torch.minimum(theta[rows, None], theta).double()
        low, high = ((over > margin).sum(1) for margin in (ROUNDING, -ROUNDING))
        assert ((low <= counts[rows]) & (counts[rows] <= high)).all() and low.sum() > 0

    return run, check


def neighbor_density(n: int) -> Case:
    x, memory, scales = torch.randn(n, WIDTH), torch.randn(n, WIDTH), (8, 16, 32)

    def check(density: Tensor) -> None:
        rows = sample(n)
        best = exact(normalize(x[rows].double()), normalize(memory.double())).topk(max(scales)).values
        expected = sum(best[:, :k].mean(1) for k in scales) / len(scales)
        assert (density[rows] - expected).abs().max() <= ROUNDING

    return lambda: hk.neighbor_density(x, memory, scales=scales), check


# ------------------------------------------------------------------ clusters


def clustered(n: int, k: int) -> Tensor:
    return torch.randn(k, WIDTH)[torch.randint(k, (n,))] + 0.5 * torch.randn(n, WIDTH)


def check_assignment(x: Tensor, centroids: Tensor, labels: Tensor, counts: Tensor, inertia: float) -> None:
    """All rows: near ties may go to either cluster."""
    total = 0.0
    for rows, own in zip(x.split(1 << 14), labels.split(1 << 14)):
        distances = torch.cdist(rows.double(), centroids.double()).square()
        nearest, chosen = distances.amin(1), distances.gather(1, own[:, None])[:, 0]
        assert ((chosen - nearest) <= 8 * EPS * WIDTH**0.5 * rows.double().square().sum(1)).all()
        total += float(chosen.sum())
    assert torch.equal(counts, torch.bincount(labels, minlength=len(centroids)))
    assert abs(inertia - total) <= 1e-6 * total


def assign_clusters(n: int) -> Case:
    k = 1000
    x, centroids = clustered(n, k), torch.randn(k, WIDTH)

    def check(found: hk.Assignment) -> None:
        check_assignment(x, centroids, found.labels, found.counts, float(found.inertia))
        sums = torch.zeros(k, WIDTH, dtype=torch.float64).index_add_(0, found.labels, x.double())
        torch.testing.assert_close(found.sums.double(), sums, rtol=1e-5, atol=1e-3)

    return lambda: hk.assign_clusters(x, centroids), check


def kmeans(n: int) -> Case:
    k = 256
    x = clustered(n, k)

    def check(found: hk.Clustering) -> None:
        check_assignment(x, found.centroids, found.labels, found.counts, found.inertia)
        spread = float((x.double() - x.double().mean(0)).square().sum())
        assert found.iterations == 5 and found.inertia < 0.5 * spread

    return lambda: hk.kmeans(x, k, init="random", iterations=5), check


# ------------------------------------------------------------------ losses


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


def hidden_positives_by_pool(n: int) -> Case:
    return hidden_positive_loss(n, by_pool=True)


def hidden_positives_by_rank(n: int) -> Case:
    return hidden_positive_loss(n, by_pool=False)


def hidden_positive_loss(n: int, by_pool: bool) -> Case:
    """Loss and gradient. Ten rows lie around each of n / 10 centres, so that the positives are known."""
    size, tokens, rate, tau, tau_b = 10, 500, 0.002, 0.8, 0.07
    groups = n // size
    centres = unit(groups, WIDTH)
    features = normalize(centres.repeat(size, 1) + 0.005 * torch.randn(n, WIDTH), dim=1)
    aside = torch.randn(groups, WIDTH)
    aside = normalize(aside - (aside * centres).sum(1, keepdim=True) * centres, dim=1)
    pool = 0.95 * centres + (1 - 0.95**2) ** 0.5 * aside
    rule = {"pool": pool} if by_pool else {"positives_per_anchor": size - 1}
    z = torch.randn(n, WIDTH, requires_grad=True)

    def run() -> tuple[Tensor, hk.LossStats]:
        loss, stats = hk.hidden_positive_loss(
            z, features, tokens_per_image=tokens, negative_rate=rate, seed=1, return_stats=True, **rule
        )
        loss.backward()
        return loss.detach(), stats

    def check(found: tuple[Tensor, hk.LossStats]) -> None:
        loss, stats = found
        assert float(stats.positives_per_anchor) == size - 1 and float(stats.kept_fraction) == 1.0
        exact_z = z.detach().double()
        x, grad, total = normalize(exact_z, dim=1), torch.zeros(n, WIDTH, dtype=torch.float64), 0.0
        scale = tau / tau_b / (n * (size - 1))  # of a row's n_i LSE_i - sum_j W_ij l_ij
        drawn = hk.PairMask.random(rate, (tokens, n), 1).to_dense()
        for token in range(tokens):
            rows = torch.arange(token, n, tokens)
            of_group = rows[:, None] % groups + groups * torch.arange(size)  # the same for all rows of a group
            columns = drawn[token].nonzero()[:, 0]
            l_group = torch.einsum("rd,rgd->rg", x[rows], x[of_group]) / tau
            l_group[of_group == rows[:, None]] = -torch.inf
            l_drawn = x[rows] @ x[columns].T / tau
            l_drawn[rows[:, None] % groups == columns % groups] = -torch.inf  # positives, and the row itself
            lse = torch.cat([l_group, l_drawn], 1).logsumexp(1, keepdim=True)
            positive = l_group > -torch.inf
            total += float(((size - 1) * lse[:, 0] - l_group.where(positive, torch.zeros(())).sum(1)).sum())
            g_group = scale / tau * ((size - 1) * (l_group - lse).exp() - positive.double())
            g_drawn = scale / tau * (size - 1) * (l_drawn - lse).exp()
            grad[rows] += torch.einsum("rg,rgd->rd", g_group, x[of_group]) + g_drawn @ x[columns]
            grad.index_add_(0, of_group.flatten(), (g_group[..., None] * x[rows][:, None]).flatten(0, 1))
            grad.index_add_(0, columns, g_drawn.T @ x[rows])
        grad = (grad - (grad * x).sum(1, keepdim=True) * x) / exact_z.norm(dim=1, keepdim=True)
        assert abs(float(loss) - scale * total) <= 2e-6 * scale * total
        assert relative(z.grad, grad) <= 1e-5

    return run, check


def supervised_contrastive_loss(n: int) -> Case:
    return by_labels(n, "supcon")


def per_positive_loss(n: int) -> Case:
    return by_labels(n, "per_positive")


def by_labels(n: int, form: str) -> Case:
    """Loss and gradient. The rows are 1,000 different ones, each many times, which the formulas take as one."""
    different, classes, tau = 1000, 500, 0.1
    times, distinct = n // different, torch.randn(different, WIDTH)
    which = torch.randperm(n) % different
    z = distinct[which].requires_grad_()
    labels = which % classes

    def run() -> Tensor:
        loss = hk.supervised_contrastive_loss(z, labels, temperature=tau, form=form)
        loss.backward()
        return loss.detach()

    def check(loss: Tensor) -> None:
        rows = distinct.double().requires_grad_()
        x = normalize(rows, dim=1)
        s, positives = x @ x.T / tau, times * different // classes - 1
        own = s.diagonal()  # a row meets its copies, and not itself
        same = torch.arange(different)[:, None] % classes == torch.arange(different) % classes
        if form == "supcon":
            lse = (times * s.exp().sum(1) - own.exp()).log()
            of_row = lse - (times * s.where(same, torch.zeros(())).sum(1) - own) / positives
        else:
            lse = (math.log(times) + s.masked_fill(same, -torch.inf)).logsumexp(1, keepdim=True)
            each = softplus(lse - s)
            of_row = (times * each.where(same, torch.zeros(())).sum(1) - each.diagonal()) / positives
        of_row.mean().backward()
        assert abs(float(loss) - float(of_row.mean())) <= 2e-6 * float(of_row.mean())
        assert relative(z.grad, (rows.grad / times)[which]) <= 1e-5

    return run, check


# ------------------------------------------------------------------ what is measured

# Bytes that a call may take: so many for each row, and 32 MiB, and a panel of bits where there are bits.
CASES = {
    max_similarity: 300, topk_similarity: 600, pairs_above: 400, neighbor_density: 900, assign_clusters: 100,
    kmeans: 300, hidden_positives_by_pool: 800, hidden_positives_by_rank: 1000, supervised_contrastive_loss: 1500,
    per_positive_loss: 2000,
}  # fmt: skip
WITH_BITS = (pairs_above, hidden_positives_by_pool, hidden_positives_by_rank)


def bound(case: Callable[[int], Case], n: int) -> int:
    return CASES[case] * n + (32 << 20) + (PANEL_BYTES if case in WITH_BITS else 0)


def resident(name: str) -> int:
    """VmRSS, or VmHWM, the most there ever was of it, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def main(name: str, n: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    os.environ["HPKERNELS_BITS_BYTES"] = str(PANEL_BYTES)
    case = {function.__name__: function for function in CASES}[name]
    run, check = case(4000)
    run()  # what the first call loads does not count
    run, check = case(n)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts again
    before, wall, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    result = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    extra = resident("VmHWM") - before
    torch.set_num_threads(1)  # the checks are many small steps
    check(result)
    print(json.dumps({"case": name, "rows": n, "bytes": extra, "bound": bound(case, n), "wall_s": wall, "cpu_s": cpu}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else ROWS)
