"""`eval` against scikit-learn's confusion matrix and scipy's assignment, on painted and on real COCO-Stuff label maps.

The real ones are 21 photographs with their label pictures, img/{train,val}/*.jpg and label/{train,val}/*.png, in
../shared/data/cocostuff182_samples beside the checkout, or in the folder cocostuff182_samples of HPSEG_TEST_DATA.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import confusion_matrix
from tiny import SMALL, paint

import hpseg
from hpseg.data.sets.cocostuff import FINE_TO_COARSE
from hpseg.data.transforms import load_image
from hpseg.evaluation import evaluate as evaluation
from hpseg.evaluation.metrics import confusion, score
from hpseg.inference.segmenter import label_map

BESIDE = Path(__file__).resolve().parents[4] / "shared" / "data"
SAMPLES = Path(os.environ.get("HPSEG_TEST_DATA", BESIDE)) / "cocostuff182_samples"
SIZES = ((61, 43), (40, 97), (33, 32))  # (width, height), none of them whole patches


def oracle(counts: np.ndarray) -> dict:
    """Scores of counts (clusters, classes), one cell of the matched pairs at a time."""
    rows, columns = linear_sum_assignment(-counts)
    ious = dict.fromkeys(range(counts.shape[1]), 0.0)
    for row, column in zip(rows, columns, strict=True):
        union = counts[row].sum() + counts[:, column].sum() - counts[row, column]
        ious[column] = counts[row, column] / union if union else None
    for column in set(range(counts.shape[1])) - set(columns):
        ious[column] = 0.0 if counts[:, column].sum() else None
    matched = int(counts[rows, columns].sum())
    return {
        "matched": matched,
        "accuracy": 100 * matched / counts.sum(),
        "miou": 100 * float(np.mean([iou for iou in ious.values() if iou is not None])),
    }


def counted(truth: np.ndarray, predicted: np.ndarray, clusters: int, classes: int) -> np.ndarray:
    """scikit-learn's matrix with predictions in the rows; void pixels are dropped by hand."""
    kept = (truth >= 0) & (truth < classes)
    matrix = confusion_matrix(truth[kept], predicted[kept], labels=range(max(clusters, classes)))
    return matrix.T[:clusters, :classes]


@pytest.mark.parametrize("clusters, classes", [(27, 27), (40, 27), (5, 27), (3, 2)])
def test_random_maps_of_awkward_sizes(clusters, classes):
    rng = np.random.default_rng(clusters)
    total, pixels = np.zeros((clusters, classes), np.int64), []
    for width, height in (*SIZES, (1, 1), (7, 1)):
        truth = rng.integers(-1, classes + 3, (height, width))
        guess = rng.integers(0, clusters, truth.shape)
        predicted = np.where(rng.random(truth.shape) < 0.5, np.abs(truth) % clusters, guess)
        total += confusion(predicted.astype(np.uint8), truth, clusters, classes)
        pixels.append(np.stack([truth.ravel(), predicted.ravel()]))
    expected = counted(*np.concatenate(pixels, 1), clusters, classes)
    assert np.array_equal(total, expected)
    scores, known = score(total), oracle(expected)
    found = scores.cluster_of >= 0
    assert total[scores.cluster_of[found], found.nonzero()[0]].sum() == known["matched"]
    assert scores.accuracy == pytest.approx(known["accuracy"], abs=1e-9)
    assert scores.miou == pytest.approx(known["miou"], abs=1e-9)


def painted(root: Path) -> None:
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        blocks = np.append(rng.integers(0, 182, 15), 255).astype(np.uint8).reshape(4, 4)
        paint(width, height, number).save(root / "images" / "val2017" / f"{number}.jpg")
        Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(
            root / "annotations" / "val2017" / f"{number}.png"
        )


def sampled(root: Path) -> None:
    for photo in SAMPLES.glob("img/*/*.jpg"):
        (root / "images" / "val2017" / photo.name).symlink_to(photo)
        label = SAMPLES / "label" / photo.parent.name / f"{photo.stem}.png"
        (root / "annotations" / "val2017" / label.name).symlink_to(label)


@pytest.fixture(
    scope="module",
    params=[
        painted,
        pytest.param(sampled, marks=pytest.mark.skipif(not SAMPLES.is_dir(), reason="no COCO-Stuff sample folder")),
    ],
)
def tree_and_run(request, tmp_path_factory, vit_file):
    """A tree in COCO-Stuff's published layout, and a run of 27 clusters on its photographs."""
    root = tmp_path_factory.mktemp("coco")
    for part in ("images", "annotations"):
        (root / part / "val2017").mkdir(parents=True)
    request.param(root)
    hpseg.train(root / "images", root / "run", weights=vit_file, steps=3, **(SMALL | {"classes": 27}))
    return root, root / "run"


def shown(picture: Image.Image, protocol: str) -> Image.Image:
    """What is scored: all of it, or, of the picture brought to a short side of 320 by nearest neighbour, the middle."""
    if protocol == "default":
        return picture
    width, height = (int(320 * side / min(picture.size)) for side in picture.size)
    left, top = round((width - 320) / 2), round((height - 320) / 2)
    return picture.resize((width, height), Image.Resampling.NEAREST).crop((left, top, left + 320, top + 320))


@pytest.mark.parametrize("protocol", ("default", "stego"))
def test_eval_equals_the_oracle(tree_and_run, protocol, monkeypatch):
    root, run = tree_and_run
    matrices, report = [], evaluation.report
    monkeypatch.setattr(evaluation, "report", lambda counts, *rest: matrices.append(counts) or report(counts, *rest))
    [results] = evaluation.evaluate_runs([run], "cocostuff", root=root, protocol=protocol, device="cpu")

    segmenter, expected = hpseg.load(run, device="cpu"), np.zeros((27, 27), np.int64)
    coarse, pictures = np.array(FINE_TO_COARSE + [-1] * 74), sorted((root / "images" / "val2017").iterdir())
    for path in pictures:
        label = Image.open(root / "annotations" / "val2017" / f"{path.stem}.png")
        picture, truth = shown(load_image(path), protocol), coarse[np.asarray(shown(label, protocol))]
        if protocol == "default":
            predicted = segmenter.predict(picture)
        else:
            with torch.no_grad():
                predicted = label_map(segmenter.similarities(segmenter(segmenter.pixels(picture))), (320, 320))
        expected += counted(truth, predicted, 27, 27)
    known, [matrix] = oracle(expected), [counts["trained"] for counts in matrices]
    assert results["images"] == len(pictures) and np.count_nonzero(expected.sum(1)) > 1
    assert np.array_equal(matrix[:, :27], expected) and not matrix[:, 27:].any()
    assert matrix[results["trained"]["cluster_of"], range(27)].sum() == known["matched"]
    for name in ("accuracy", "miou"):
        assert results["trained"][name] == pytest.approx(known[name], abs=1e-9)
