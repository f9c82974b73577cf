"""Scores of auxiliary labels against a count of all pairs one by one, and on cases worked out by hand."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from hpseg.methods.lookbeyond.pair_quality import PairQuality, describe


def brute_force(auxiliary, truth, images):
    """(positive precision, recall, negative precision) over all pairs, and over those across images."""
    found, everywhere = [], 0
    for only_across in (False, True):
        counts = dict.fromkeys(itertools.product((True, False), repeat=2), 0)
        kept = [t for t in zip(auxiliary, truth, images, strict=True) if t[0] >= 0 and t[1] >= 0]
        for (a, y, m), (b, z, n) in itertools.combinations(kept, 2):
            if not only_across or m != n:
                counts[a == b, y == z] += 1
        positives, negatives = (counts[same, True] + counts[same, False] for same in (True, False))
        one_class = counts[True, True] + counts[False, True]
        found += [counts[True, True] / positives, counts[True, True] / one_class, counts[False, False] / negatives]
        everywhere = everywhere or positives
    return [*found, positives / everywhere]


def scores_of(auxiliary, truth, clusters, classes):
    quality = PairQuality(clusters, classes)
    for maps in zip(auxiliary, truth, strict=True):
        quality.add(*maps)
    return quality.scores()


def flat(scores):
    names = ("positive_precision", "positive_recall", "negative_precision")
    both = [scores[name] for name in names] + [scores["across_images"][name] for name in names]
    return [*both, scores["positives_across_images"]]


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_all_pairs(seed):
    random = np.random.default_rng(seed)
    truth = random.integers(-1, 4, (5, 24))
    noise, near = random.integers(-1, 6, (5, 24)), truth + random.integers(0, 3, (5, 24))
    auxiliary = np.where(random.random((5, 24)) < 0.6, near, noise)
    scores = scores_of(auxiliary, truth, 6, 4)
    images = np.repeat(np.arange(5), 24)
    assert flat(scores) == pytest.approx(brute_force(auxiliary.ravel(), truth.ravel(), images), rel=1e-15)
    both = (auxiliary >= 0) & (truth >= 0)
    assert scores["pixels"] == both.sum() and scores["coverage"] == both.sum() / (truth >= 0).sum()
    shares = np.bincount(auxiliary[both]) / both.sum()
    assert scores["label_entropy"] == pytest.approx(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


def test_true_labels_are_perfect_and_one_label_for_everything_is_not():
    truth = [np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2])]
    perfect = scores_of(truth, truth, 3, 3)
    assert flat(perfect)[:6] == [1.0] * 6
    assert perfect["positives_across_images"] == 6 / 9  # pairs of class 0: 3, 2 across; of class 1: 6, 4 across
    one = scores_of([np.zeros(4, int)] * 2, truth, 1, 3)
    assert one["positive_precision"] == 9 / 28 and one["positive_recall"] == 1 and one["negative_precision"] is None
    assert json.loads(json.dumps(one)) == one and "none" in describe(one)


def test_counts_are_exact_beyond_what_floats_and_64_bits_hold():
    quality = PairQuality(2, 2)
    big = 2**33 + 1
    quality.table[:] = [[big, 0], [0, big]]
    quality.table[0, 1] = 1
    scores, n = quality.scores(), big
    right = n * (n - 1) // 2 * 2
    assert scores["positive_precision"] == right / (right + n)  # n pairs of the one pixel with the others of its label
    assert scores["negative_precision"] == n * n / (n * n + n)


def test_bad_labels_are_named():
    quality = PairQuality(2, 2)
    with pytest.raises(ValueError, match="auxiliary: expected labels below 2, got 2"):
        quality.add(np.array([2]), np.array([0]))
    with pytest.raises(ValueError, match="equal sizes"):
        quality.add(np.zeros(3, int), np.zeros(4, int))
    assert quality.scores()["positive_precision"] is None and quality.scores()["label_entropy"] is None
