"""Results have the same bits for any number of threads, with more rows than torch sums in one of them, and for callers
in several threads at once."""

import threading

import pytest
import torch

import hpkernels as hk
from hpkernels.common.sums import sum_all, sum_last
from hpkernels.losses.statistics import Statistics, loss_stats
from hpkernels.losses.statistics import average as weighted_average

ROWS = 40_000


@pytest.fixture
def same_for_all_threads():
    before = torch.get_num_threads()

    def check(function):
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(function())
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    yield check
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0,), (32_767,), (32_768,), (ROWS,), (2, 3, ROWS)])
def test_sums(shape, same_for_all_threads):
    x = torch.randn(shape)
    same_for_all_threads(lambda: (sum_last(x), sum_all(x)))
    torch.testing.assert_close(sum_last(x).double(), x.double().sum(-1), rtol=0, atol=1e-2)
    torch.testing.assert_close(sum_all(x).double(), x.double().sum(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("weighting", ["pairs", "anchors", "separate"])
@pytest.mark.parametrize("tokens", [1, ROWS])
def test_averages(weighting, tokens, same_for_all_threads):
    lse, pos, ext = torch.randn(3, 1, ROWS)
    n_pos, n_ext = torch.randint(0, 9, (2, ROWS)).float()

    def average():
        statistics = Statistics(lse, pos, ext, n_pos, n_ext)
        return weighted_average(statistics, 0.3, tokens, ROWS, weighting), *loss_stats(statistics, ROWS)

    same_for_all_threads(average)


@pytest.mark.parametrize("form", ["supcon", "per_positive"])
def test_losses_by_label(form, same_for_all_threads):
    z, labels, keys = torch.randn(ROWS, 3), torch.arange(ROWS) % 4, torch.randn(9, 3)

    def step():
        rows = z.clone().requires_grad_()
        loss = hk.supervised_contrastive_loss(rows, labels, keys=keys, key_labels=torch.arange(9) % 5, form=form)
        return loss.detach(), *torch.autograd.grad(loss, rows)

    same_for_all_threads(step)


@pytest.mark.parametrize("width", [1, 3])
def test_clusters(width, same_for_all_threads):
    x = torch.randn(ROWS, width)

    def clusters():
        found = hk.kmeans(x, 5, restarts=2, iterations=6, tolerance=1e-3)
        return found.centroids, found.labels, torch.tensor([found.inertia, found.iterations], dtype=torch.float64)

    same_for_all_threads(clusters)


def test_callers_in_several_threads_at_once():
    """Each with another number of threads of its own, and starting with another op."""
    x, z = torch.nn.functional.normalize(torch.randn(2, 300, 40), dim=2)
    q, k = torch.randn(2, 1, 2, 300, 20)
    labels = torch.arange(300) % 7

    def step(loss, **options):
        rows = z.clone().requires_grad_()
        value = loss(rows, **options)
        return value.detach(), *torch.autograd.grad(value, rows)

    calls = {
        "topk": lambda: hk.topk_similarity(x, z, 9),
        "pairs": lambda: (hk.pairs_above(x, torch.full((300,), 0.2)).T.bits,),
        "loss": lambda: step(hk.hidden_positive_loss, features=x, pool=x[:50], seed=3),
        "sampled": lambda: step(hk.hidden_positive_loss, features=x, pool=x[:50], negative_rate=0.5, seed=3),
        "labels": lambda: step(hk.supervised_contrastive_loss, labels=labels),
        "density": lambda: (hk.neighbor_density(x, z),),
        "kmeans": lambda: (hk.kmeans(x, 6, iterations=4).centroids,),
        "mixing": lambda: (hk.local_mix(z[None], (q, k), (15, 20)),),
    }
    expected = {name: call() for name, call in calls.items()}
    names, wrong = list(calls), []

    def caller(threads):
        torch.set_num_threads(threads)
        for name in names[threads:] + names[:threads]:
            try:
                if not all(map(torch.equal, calls[name](), expected[name])):
                    wrong.append((name, threads))
            except Exception as error:
                wrong.append((name, threads, error))

    callers = [threading.Thread(target=caller, args=(threads,)) for threads in (1, 2, 3, 5)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not wrong
