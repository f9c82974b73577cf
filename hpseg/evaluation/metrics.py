"""Corpus-level scores: one integer confusion matrix over all pixels, one Hungarian match, then accuracy and IoU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.optimize import linear_sum_assignment


def confusion(predictions: np.ndarray, labels: np.ndarray, clusters: int, classes: int) -> np.ndarray:
    """Counts int64 (clusters, classes) of pixels by (prediction, label). Labels outside 0..classes-1 are void."""
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions: expected the shape of labels {labels.shape}, got {predictions.shape}")
    valid = (labels >= 0) & (labels < classes)
    pairs = predictions[valid].astype(np.int64) * classes + labels[valid]
    return np.bincount(pairs, minlength=clusters * classes).reshape(clusters, classes).astype(np.int64)


Sparse: TypeAlias = tuple[np.ndarray, np.ndarray]  # places in the flat matrix and the counts there


def sparse(counts: np.ndarray) -> Sparse:
    """What a confusion matrix holds beside zeros: a picture shows few classes, and a data set has many pictures."""
    places = np.flatnonzero(counts)
    return places, counts.ravel()[places]


def dense(counts: Sparse, shape: tuple[int, int]) -> np.ndarray:
    """The matrix that `sparse` was given, int64."""
    matrix = np.zeros(shape, np.int64)
    matrix.ravel()[counts[0]] = counts[1]
    return matrix


@dataclass(frozen=True)
class Scores:
    """accuracy and miou in percent; iou per class in percent (NaN where a class neither occurs nor is predicted);
    cluster_of: the cluster matched to each class, -1 for none."""

    accuracy: float
    miou: float
    iou: np.ndarray
    cluster_of: np.ndarray


def match(counts: np.ndarray) -> np.ndarray:
    """The cluster of each class, -1 for none: the one-to-one match of counts (clusters, classes) that agrees most."""
    rows, columns = linear_sum_assignment(counts, maximize=True)
    cluster_of = np.full(counts.shape[1], -1)
    cluster_of[columns] = rows
    return cluster_of


def score(counts: np.ndarray, cluster_of: np.ndarray | None = None) -> Scores:
    """Scores of a confusion matrix (clusters, classes); cluster_of: the row of each class, None for the best match.

    IoU_c = tp / (tp + fp + fn) over the whole corpus; classes without a pixel in label or prediction stay out of the
    mean.
    With more clusters than classes the pixels of unmatched clusters are errors; with fewer, some classes get IoU 0.
    """
    cluster_of = match(counts) if cluster_of is None else cluster_of
    matched = np.where(cluster_of[:, None] >= 0, counts[cluster_of], 0)
    hit, predicted, labelled = np.diag(matched), matched.sum(1), counts.sum(0)
    union = predicted + labelled - hit
    iou = np.divide(100 * hit, union, out=np.full(len(hit), np.nan), where=union > 0)
    total = counts.sum()
    return Scores(
        accuracy=float(100 * hit.sum() / total) if total else float("nan"),
        miou=float(np.nanmean(iou)) if (union > 0).any() else float("nan"),
        iou=iou,
        cluster_of=cluster_of,
    )
