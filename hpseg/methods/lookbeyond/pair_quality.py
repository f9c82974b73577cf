"""How good auxiliary labels are for contrast: scores of the pairs they make, against true labels, before training.

Contrast by auxiliary labels pulls together pairs of equal label (positives) and pushes apart others (negatives). The
scores are the shares of these pairs that are right, over all pairs of pixels, from counts alone. They stand in for the
metric of "Looking Beyond Single Images for Contrastive Semantic Segmentation Learning" (NeurIPS 2021), whose formula
could not be had.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class PairQuality:
    """Counts of (auxiliary, true) label over pictures, and from them the shares of right pairs.

    With n_ay the pixels of auxiliary label a and true label y, n_a and n_y its sums and pairs(n) = n (n - 1) / 2:

        positive precision   sum_ay pairs(n_ay) / sum_a pairs(n_a)
        positive recall      sum_ay pairs(n_ay) / sum_y pairs(n_y)
        negative precision   pairs that differ in both labels / pairs that differ in the auxiliary label

    Of pairs across pictures: the same sums less those within each picture. Exact: integers of any size until
    the one division.
    """

    def __init__(self, clusters: int, classes: int):
        self.shape = (clusters, classes)
        self.table = np.zeros(self.shape, np.int64)
        self.within = np.zeros(4, object)  # pairs within pictures: of equal auxiliary label, true label, both; all
        self.images = self.labelled = 0  # pictures; pixels with a true label

    def add(self, auxiliary: np.ndarray, truth: np.ndarray) -> None:
        """One picture: labels of one shape, below `clusters` and `classes`; a pixel with a negative one is left out."""
        auxiliary, truth = np.asarray(auxiliary).ravel(), np.asarray(truth).ravel()
        if auxiliary.shape != truth.shape:
            raise ValueError(f"auxiliary, truth: expected equal sizes, got {auxiliary.size} and {truth.size}")
        for name, values, count in zip(("auxiliary", "truth"), (auxiliary, truth), self.shape, strict=True):
            if values.size and values.max() >= count:
                raise ValueError(f"{name}: expected labels below {count}, got {values.max()}")
        kept = (auxiliary >= 0) & (truth >= 0)
        cells = auxiliary[kept].astype(np.int64) * self.shape[1] + truth[kept]
        table = np.bincount(cells, minlength=self.table.size).reshape(self.shape)
        self.table += table
        self.within += _pair_counts(table)
        self.images += 1
        self.labelled += int((truth >= 0).sum())

    def scores(self) -> dict[str, Any]:
        """Shares in [0, 1], None where there is no such pair; entropy in nats."""
        total = _pair_counts(self.table)
        across = total - self.within
        used = self.table.sum(1)
        shares = used[used > 0] / max(1, used.sum())
        return {
            "images": self.images,
            "pixels": int(used.sum()),
            "coverage": _ratio(int(used.sum()), self.labelled),  # the others are outliers
            **_scores(total),
            "across_images": _scores(across),
            "positives_across_images": _ratio(across[0], total[0]),
            "labels_used": len(shares),
            "label_entropy": float(-(shares * np.log(shares)).sum()) if len(shares) else None,
            "label_entropy_at_most": math.log(self.shape[0]),
        }


def describe(scores: dict[str, Any]) -> str:
    """One line."""

    def percent(value: float | None) -> str:
        return "none" if value is None else f"{100 * value:.1f} %"

    across = scores["across_images"]
    names = {
        "positive_precision": "positives that are right",
        "positive_recall": "pairs of one class that are positives",
        "negative_precision": "negatives that are right",
    }
    shares = (f"{text} {percent(scores[name])} ({percent(across[name])})" for name, text in names.items())
    return (
        f"auxiliary labels on {scores['images']} labelled pictures (across pictures): {', '.join(shares)}; "
        f"{scores['labels_used']} labels on {percent(scores['coverage'])} of the pixels"
    )


def _pair_counts(table: np.ndarray) -> np.ndarray:
    """Pairs of pixels of a table, as Python integers: of equal auxiliary label, of equal true label, of both, all."""
    parts = (table.sum(1), table.sum(0), table.ravel(), table.sum(keepdims=True).ravel())
    return np.array([sum(n * (n - 1) // 2 for n in part[part > 1].tolist()) for part in parts], object)


def _scores(pairs: np.ndarray) -> dict[str, float | None]:
    positives, same, right, every = pairs
    return {
        "positive_precision": _ratio(right, positives),
        "positive_recall": _ratio(right, same),
        "negative_precision": _ratio(every - positives - same + right, every - positives),
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
