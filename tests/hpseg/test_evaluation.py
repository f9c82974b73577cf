"""Scores against straightforward numpy, and `eval` on a small tree."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import paint

from hpseg.clustering import spherical_kmeans
from hpseg.config import UsageError
from hpseg.data.labelled import open_folder, read_ids
from hpseg.evaluation.evaluate import evaluate, format_table
from hpseg.evaluation.metrics import confusion, score


def brute_force(counts):
    """Best one-to-one match by trying all of them."""
    clusters, classes = counts.shape
    size = max(clusters, classes)
    padded = np.zeros((size, size), int)
    padded[:clusters, :classes] = counts
    best = max(itertools.permutations(range(size)), key=lambda p: sum(padded[p[c], c] for c in range(classes)))
    hits = [padded[best[c], c] for c in range(classes)]
    ious = [
        100 * hits[c] / (padded[best[c]].sum() + padded[:, c].sum() - hits[c])
        if padded[best[c]].sum() + padded[:, c].sum()
        else np.nan
        for c in range(classes)
    ]
    return 100 * sum(hits) / counts.sum(), np.nanmean(ious)


@pytest.mark.parametrize("clusters, classes", [(4, 4), (6, 4), (3, 5)])
def test_scores_equal_brute_force(clusters, classes):
    rng = np.random.default_rng(clusters)
    total = np.zeros((clusters, classes), np.int64)
    expected = np.zeros_like(total)
    for _ in range(3):
        predictions, labels = rng.integers(0, clusters, (9, 7)), rng.integers(-1, classes + 1, (9, 7))
        total += confusion(predictions.astype(np.uint8), labels, clusters, classes)
        for p, t in zip(predictions.flat, labels.flat, strict=True):
            if 0 <= t < classes:
                expected[p, t] += 1
    assert np.array_equal(total, expected) and total.dtype == np.int64
    scores = score(total)
    accuracy, miou = brute_force(total)
    assert scores.accuracy == pytest.approx(accuracy)
    assert scores.miou == pytest.approx(miou)
    matched = scores.cluster_of[scores.cluster_of >= 0]
    assert len(set(matched.tolist())) == len(matched) == min(clusters, classes)


def test_counts_beyond_32_bits():
    scores = score(np.array([[5 * 10**9, 10**9], [0, 5 * 10**9]]))
    assert scores.accuracy == pytest.approx(1000 / 11) and scores.iou.tolist() == pytest.approx([500 / 6] * 2)
    with pytest.raises(ValueError, match="expected the shape of labels"):
        confusion(np.zeros((2, 3)), np.zeros((3, 2)), 2, 2)


def test_kmeans_finds_separate_directions():
    rng = torch.Generator().manual_seed(0)
    centres = torch.eye(5, 16)
    rows = (centres.repeat_interleave(200, 0) + 0.05 * torch.randn(1000, 16, generator=rng)) * torch.rand(
        1000, 1, generator=rng
    )
    centroids, score = spherical_kmeans(rows, 5, seed=1)
    assert centroids.norm(dim=1).allclose(torch.ones(5)) and 0.9 < score <= 1
    assert sorted((centroids @ centres.T).argmax(1).tolist()) == list(range(5))
    assert torch.equal(centroids, spherical_kmeans(rows, 5, seed=1)[0])
    with pytest.raises(ValueError, match="at least k = 5 rows, got 3"):
        spherical_kmeans(rows[:3], 5)
    same, _ = spherical_kmeans(torch.ones(9, 4), 3)  # fewer different rows than clusters: no NaN
    assert same.isfinite().all()


@pytest.fixture
def tree(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / "data" / part / "sub").mkdir(parents=True)
    for i, name in enumerate(("a", "b", "sub/c")):
        paint(60, 40, i).save(tmp_path / "data" / "images" / f"{name}.jpg")
        labels = np.full((40, 60), 255, np.uint8)
        labels[:, :30], labels[:20, 30:] = 0, 3
        Image.fromarray(labels).save(tmp_path / "data" / "labels" / f"{name}.png")
    (tmp_path / "data" / "classes.json").write_text(json.dumps({"classes": ["sky", "sea", "sand", "rock"]}))
    return tmp_path / "data"


def test_eval(run, tree):
    results = evaluate(run, tree, rgb=True, device="cpu")
    assert (
        results["images"] == 3
        and results["pixels"] == 3 * (40 * 30 + 20 * 30)
        and results["classes"] == ["sky", "rock"]
    )
    for method in ("trained", "kmeans_features", "kmeans_rgb"):
        assert 0 <= results[method]["miou"] <= results[method]["accuracy"] <= 100
    assert results["trained"]["accuracy"] >= 100 / 3
    assert json.loads((run / "eval.json").read_text()) == results
    table = format_table(results)
    assert "trained head" in table and "k-means, frozen features" in table and "rock" in table
    (run / "eval.json").unlink()


def test_pairs_and_labels(tree, tmp_path):
    assert [image.name for image in open_folder(tree).images] == ["a.jpg", "b.jpg", "c.jpg"]
    (tree / "labels" / "b.png").unlink()
    assert len(open_folder(tree).pairs) == 2
    picture = Image.fromarray(np.array([[0, 2]], np.uint8))
    picture.putpalette([5, 5, 5, 6, 6, 6, 7, 7, 7])
    picture.save(tmp_path / "p.png")
    assert read_ids(tmp_path / "p.png").tolist() == [[0, 2]]
    paint(4, 4, 0).save(tmp_path / "rgb.png")
    with pytest.raises(UsageError, match="expected one channel of class ids"):
        read_ids(tmp_path / "rgb.png")
    with pytest.raises(UsageError, match="expected folders images/ and labels/"):
        open_folder(tmp_path)


def test_eval_refuses_labels_of_another_size(run, tree):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tree / "labels" / "a.png")
    with pytest.raises(UsageError, match="a.png is 4 x 4 pixels, its image 60 x 40"):
        evaluate(run, tree, device="cpu")


def test_runs_are_scored_as_they_predict(run, tree):
    import hpseg
    from hpseg.evaluation.evaluate import evaluate_runs

    segmenter, counts = hpseg.load(run, device="cpu"), np.zeros((3, 4), np.int64)
    for image, label in open_folder(tree).pairs:
        counts += confusion(segmenter.predict(image), read_ids(label), 3, 4)
    scores = score(counts[:, [0, 3]])
    both = evaluate_runs([run, run], tree, device="cpu")
    assert [results["trained"]["miou"] for results in both] == pytest.approx([scores.miou] * 2)
    assert both[0]["trained"]["iou"] == pytest.approx(scores.iou.tolist()) and both[1]["seed"] == 1


def test_stego_protocol_is_the_published_resize_and_crop():
    """Nearest neighbour to a short side of 320, then the central square, for picture and labels alike."""
    from hpseg.evaluation.protocols import stego

    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 27, (427, 601))
    picture = Image.fromarray(rng.integers(0, 256, (427, 601, 3), np.uint8))
    view = stego(picture, labels, 224, 8)
    long_side = int(320 * 601 / 427)
    rows, columns = (
        np.floor((np.arange(n) + 0.5) * full / n).astype(int) for n, full in ((320, 427), (long_side, 601))
    )
    left = round((long_side - 320) / 2)
    expected = labels[rows][:, columns][:, left : left + 320]
    assert np.array_equal(view.truth, expected)
    assert np.array_equal(np.asarray(view.shown), np.asarray(picture)[rows][:, columns][:, left : left + 320])
    assert view.shown is view.picture


def test_flip_and_crf(scored_run, tree):
    results = evaluate(scored_run, tree, protocol="stego", flip=True, crf=True, device="cpu")
    assert results["flip"] is True and results["protocol"] == "stego"
    assert 0 <= results["trained_crf"]["miou"] <= 100 and "trained head + CRF" in format_table(results)
    with pytest.raises(UsageError, match="protocol: expected one of default, stego"):
        evaluate(scored_run, tree, protocol="paper", device="cpu")


def test_codes_of_a_mirrored_description_are_averaged(run):
    import hpseg
    from hpseg.evaluation.evaluate import codes_of

    segmenter = hpseg.load(run, device="cpu")
    features, mirrored = torch.randn(2, 1, 3, 5, segmenter.backbone.channels).unbind(0)
    both = codes_of(segmenter, {"features": features, "mirrored": mirrored})
    one, other = (codes_of(segmenter, {"features": x}) for x in (features, mirrored.flip(2)))
    torch.testing.assert_close(both, (one + other) / 2)


def test_refined_marginals_start_from_cosines(run):
    """Without iterations the CRF gives back softmax(2 cos) of the codes at the picture's size."""
    import hpseg
    from hpseg import predict

    segmenter = hpseg.load(run, device="cpu")
    codes = torch.randn(1, segmenter.config.dim, 4, 5)
    picture = paint(40, 32, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "dense_crf", lambda image, probabilities: probabilities)
        found = segmenter.refined(picture, codes)
    full = torch.nn.functional.interpolate(codes, (32, 40), mode="bilinear", align_corners=False)
    centroids = torch.nn.functional.normalize(segmenter.clusters.centroids, dim=-1)
    cosines = torch.einsum("bdhw,kd->bkhw", torch.nn.functional.normalize(full, dim=1), centroids)
    torch.testing.assert_close(found, (2 * cosines).softmax(1), rtol=1e-4, atol=1e-5)
