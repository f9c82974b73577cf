"""Clusters of features that are read in passes: sampling, memory, and the same result as from one tensor."""

from __future__ import annotations

import pytest
import torch

import hpkernels
from hpseg.features.clustering import FeatureStream, assign_features, cluster_features, sample_rows
from hpseg.run.errors import UsageError


def groups(n=300, d=8, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=generator) * 5
    return centres[torch.arange(n) % k] + torch.randn(n, d, generator=generator)


def counted(x, sizes, calls):
    parts = x.split(sizes)

    def make(first):
        calls.append(first)
        yield from parts[first:]

    return make


def test_a_stream_is_encoded_once_where_it_fits_and_no_more_is_held_than_allowed():
    x, calls = groups(90), []
    stream = FeatureStream(counted(x, 30, calls))
    assert all(torch.equal(torch.cat(list(stream)), x) for _ in range(3)) and calls == [0]
    stream = FeatureStream(counted(x, 30, calls), hold=30 * 8 * 4 + 100)
    calls.clear()
    assert all(torch.equal(torch.cat(list(stream)), x) for _ in range(3)) and calls == [0, 1, 1]
    assert len(stream.held) == 1
    next(iter(stream := FeatureStream(counted(x, 30, calls))))  # a pass that ends early ...
    assert torch.equal(torch.cat(list(stream)), x)  # ... is not taken for a whole one


def test_a_sample_of_everything_keeps_the_order_and_a_smaller_one_is_even():
    x = torch.arange(1000.0)[:, None]
    rows, complete = sample_rows(x.split(64), 1000, 0)
    assert complete and torch.equal(rows, x)
    hits = torch.zeros(1000)
    for seed in range(400):
        rows, complete = sample_rows(x.split(64), 100, seed)
        assert not complete and rows.shape == (100, 1) and len(rows.unique()) == 100
        hits[rows[:, 0].long()] += 1
    # 40 expected a row, deviation 6; of ten parts of the stream 4,000, deviation 60
    assert (hits.view(10, 100).sum(1) - 4000).abs().max() < 300 and (hits - 40).abs().max() < 30


@pytest.mark.parametrize("spherical", (True, False))
def test_clusters_are_those_of_kmeans_where_all_rows_fit(spherical):
    x = groups()
    found = cluster_features(x.split(70), 4, seed=3, spherical=spherical)
    expected = hpkernels.kmeans(x, 4, spherical=spherical, iterations=50, tolerance=0, seed=3)
    assert torch.equal(found, expected.centroids)
    labels = torch.cat(list(assign_features(x.split(70), found, spherical=spherical)))
    assert torch.equal(labels, expected.labels)


def test_passes_over_everything_reach_the_clusters_that_a_sample_starts():
    x = groups()
    found = cluster_features(FeatureStream(counted(x, 70, []), hold=0), 4, rows=40, passes=20, spherical=False)
    expected = hpkernels.kmeans(x, 4, init=found, tolerance=0)  # nothing moves any more
    torch.testing.assert_close(found, expected.centroids)
    mini = cluster_features(x.split(70), 4, rows=40, passes=3, minibatch=25, spherical=False)
    start = cluster_features(x.split(70), 4, rows=40, spherical=False)
    by_hand = hpkernels.kmeans(list(x.split(70)), 4, init=start, iterations=3, tolerance=0, batch_size=25).centroids
    assert torch.equal(mini, by_hand) and not torch.equal(mini, start)


def test_rows_beyond_the_threshold_have_no_label():
    x = groups()
    centroids = cluster_features(x.split(70), 4)
    thresholds = hpkernels.outlier_distances(x, centroids, fraction=0.05, spherical=True)
    labels = torch.cat(list(assign_features(x.split(70), centroids, thresholds=thresholds)))
    assert (labels == -1).sum() == 12  # three of 75 in each of the four clusters
    assert torch.equal(labels[labels >= 0], torch.cat(list(assign_features([x], centroids)))[labels >= 0])


def test_fewer_rows_than_clusters_is_an_error():
    with pytest.raises(UsageError, match="each of 4, got 3 rows"):
        cluster_features([torch.randn(3, 2)], 4)
    with pytest.raises(UsageError, match="at least one row"):
        cluster_features([], 4)
