"""Scores against straightforward numpy, and `eval` on a small tree."""

import itertools
import json
import shutil
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import paint
from torch.nn import functional as F

from hpseg.data.datasets import open_folder, read_ids
from hpseg.data.transforms import load_image
from hpseg.evaluation.evaluate import evaluate, format_table
from hpseg.evaluation.metrics import confusion, score
from hpseg.evaluation.probes import probe
from hpseg.evaluation.seeds import evaluate_seeds
from hpseg.inference.crf import dense_crf
from hpseg.inference.segmenter import load
from hpseg.run.errors import UsageError


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


def test_eval(scored_run, tree):
    results = evaluate(scored_run, tree, rgb=True, device="cpu")
    assert (
        results["images"] == 3
        and results["pixels"] == 3 * (40 * 30 + 20 * 30)
        and results["classes"] == ["sky", "rock"]
    )
    for method in ("trained", "kmeans_features", "kmeans_rgb"):
        assert 0 <= results[method]["miou"] <= results[method]["accuracy"] <= 100
    assert results["trained"]["accuracy"] >= 100 / 3
    assert json.loads((scored_run / "eval.json").read_text()) == results
    table = format_table(results)
    assert "trained head" in table and "k-means, frozen features" in table and "rock" in table


def test_eval_writes_confusion_matrices_and_the_scores_of_each_picture(scored_run, tree):
    """What a report draws. Counts are those of the maps that predict writes; the match is that of the whole set."""
    import hpseg

    (tree / "images" / "d.png").write_bytes(b"no picture")
    Image.fromarray(np.full((40, 60), 255, np.uint8)).save(tree / "labels" / "b.png")
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tree / "labels" / "d.png")
    probe(scored_run, tree, score_on=tree, steps=2, device="cpu")
    results = evaluate(scored_run, tree, linear=True, device="cpu")
    written = json.loads((scored_run / "eval.json").read_text())
    assert written == results

    class_ids, cluster_of = results["class_ids"], results["trained"]["cluster_of"]
    segmenter, total = hpseg.load(scored_run, device="cpu"), np.zeros((3, 2), int)
    pairs = [pair for pair in open_folder(tree).pairs if pair[0].name != "d.png"]
    assert class_ids == [0, 3] and [one["image"] for one in results["pictures"]] == [str(image) for image, _ in pairs]
    for one, (image, label) in zip(results["pictures"], pairs, strict=True):
        predicted, truth = segmenter.predict(image), read_ids(label)
        counts = np.array([[((predicted == k) & (truth == c)).sum() for c in class_ids] for k in range(3)])
        total += counts
        assert one["labels"] == str(label)
        if image.name == "b.jpg":
            assert one["accuracy"] is None and one["miou"] is None
            continue
        hits = np.array([counts[k, c] if k >= 0 else 0 for c, k in enumerate(cluster_of)])
        predicted_as = np.array([counts[k].sum() if k >= 0 else 0 for k in cluster_of])
        assert one["accuracy"] == pytest.approx(100 * hits.sum() / counts.sum())
        assert one["miou"] == pytest.approx(np.mean(100 * hits / (predicted_as + counts.sum(0) - hits)))
    assert results["trained"]["confusion"] == total.tolist()
    assert np.sum(results["kmeans_features"]["confusion"]) == results["pixels"] == total.sum()
    assert np.shape(results["linear"]["confusion"]) == (4, 2)  # rows are classes 0 to 3
    assert np.sum(results["linear"]["confusion"]) == results["pixels"]


def test_eval_names_the_clusters_for_prediction(scored_run, tree):
    """The class ids that predict writes after an evaluation score as the evaluation did, without another match."""
    import hpseg

    accuracy = evaluate(scored_run, tree, device="cpu")["trained"]["accuracy"]
    segmenter, hits, pixels = hpseg.load(scored_run, device="cpu"), 0, 0
    for image, label in open_folder(tree).pairs:
        labels, truth = segmenter.predict(image, as_classes=True), read_ids(label)
        hits, pixels = hits + (labels == truth)[truth != 255].sum(), pixels + (truth != 255).sum()
    assert 100 * hits / pixels == pytest.approx(accuracy)
    assert {"sky", "rock"} < {*segmenter.key().names.values()}  # the third cluster has no class


def test_eval_shows_a_long_picture_in_windows_as_predict_does(scored_run, tmp_path, monkeypatch):
    import hpseg
    from hpseg.evaluation import protocols
    from hpseg.inference import windows

    monkeypatch.setattr(windows, "MAX_TOKENS", 100)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    paint(48 * 12, 48, 1).save(tmp_path / "images" / "long.png")
    truth = np.arange(48 * 12)[None].repeat(48, 0) % 3
    Image.fromarray(truth.astype(np.uint8)).save(tmp_path / "labels" / "long.png")
    segmenter = hpseg.load(scored_run, device="cpu")
    labels = segmenter.predict(tmp_path / "images" / "long.png")
    assert (labels != segmenter.predict(tmp_path / "images" / "long.png", window=48 * 12)).any()
    results = evaluate(scored_run, tmp_path, fit_on=tmp_path / "images", crf=True, device="cpu")
    assert results["trained"]["accuracy"] == pytest.approx(score(confusion(labels, truth, 3, 3)).accuracy)
    assert protocols.stego(paint(400, 330, 0), np.zeros((330, 400)), 320, 4).window == 320  # as published: whole


def test_an_imported_run_has_no_baselines_without_photographs(scored_run, tree):
    config = json.loads((scored_run / "config.json").read_text())
    (scored_run / "config.json").write_text(json.dumps({**config, "images": ""}))
    results = evaluate(scored_run, tree, device="cpu")
    assert "trained" in results and "kmeans_features" not in results and "trained head" in format_table(results)
    assert "kmeans_features" in evaluate(scored_run, tree, fit_on=tree / "images", device="cpu")


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


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("labels/a.png", b"no picture", "labels: expected a label map, cannot read .*a.png: cannot identify"),
        ("labels/a.png", "cut", "labels: expected a label map, cannot read .*a.png: .*truncated"),
        ("labels/a.png", "16 bits", "labels: .*a.png has the id 300, expected at most 255; --void"),
        ("classes.json", b"{sky, sea}", "data: .*classes.json is not JSON"),
        ("classes.json", b"4", "data: .*classes.json: expected a list of class names"),
        ("classes.json", b'{"classes": {"0": "sky"}}', "data: .*classes.json: expected a list of class names"),
    ],
)
def test_labels_and_names_that_cannot_be_are_named(scored_run, tree, name, content, message):
    if content == "cut":
        content = (tree / name).read_bytes()[:50]
    if content == "16 bits":
        Image.fromarray(np.full((40, 60), 300, np.uint16)).save(tree / name)
    else:
        (tree / name).write_bytes(content)
    for attempt in (evaluate, lambda run, data, **_: probe(run, data, score_on=data, steps=1, device="cpu")):
        with pytest.raises(UsageError, match=message):
            attempt(scored_run, tree, device="cpu")
    if content == "16 bits":
        assert evaluate(scored_run, tree, void=300, device="cpu")["pixels"] == 2 * 40 * 60


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


@pytest.fixture
def seeds(run, tmp_path):
    """Copies of the finished run in one folder, their heads moved apart as if other seeds had been trained."""
    for number in (2, 0, 10):
        folder = shutil.copytree(run, tmp_path / "runs" / f"seed{number}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "seed": number, "workers": number}))
        with safe_open(run / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        tensors = load_file(folder / "model.safetensors")
        tensors["clusters.centroids"] += torch.randn(3, 16, generator=torch.Generator().manual_seed(number))
        save_file(tensors, folder / "model.safetensors", metadata)
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    return tmp_path / "runs"


def test_mean_and_sd_over_seeds(seeds, tree, capsys):
    from hpseg.cli.main import main

    assert main(["eval", str(seeds), str(tree), "--seeds", "--seed", "5", "--device", "cpu"]) == 0
    results, table = json.loads((seeds / "eval.json").read_text()), capsys.readouterr().out
    assert results["run_seeds"] == [0, 2, 10] and list(results["runs"]) == ["seed0", "seed2", "seed10"]
    assert results["seeds"] == [5, 6, 7] and "pictures" not in results and "confusion" not in results["trained"]
    for scores in results["runs"].values():
        assert len(scores["pictures"]) == 3 and np.sum(scores["trained"]["confusion"]) == results["pixels"]
    alone = [evaluate(seeds / name, tree, device="cpu") for name in results["runs"]]
    for method, each in (("trained", alone), ("kmeans_features", results["runs"].values())):
        for key in ("miou", "accuracy"):
            values = [scores[method][key] for scores in each]
            assert results[method][key] == pytest.approx(statistics.mean(values))
            assert results[method]["sd"][key] == pytest.approx(statistics.stdev(values), abs=1e-9)
    assert results["trained"]["sd"]["miou"] > 0
    rows = [scores["trained"]["iou"] for scores in alone]
    assert results["trained"]["iou"] == pytest.approx([statistics.mean(column) for column in zip(*rows, strict=True)])
    assert "mean ± sd of 3 runs" in table
    assert f"{results['trained']['miou']:.1f} ± {results['trained']['sd']['miou']:.1f}" in table
    assert f"{results['trained']['iou'][1]:.1f} ± {results['trained']['sd']['iou'][1]:.1f}" in table.splitlines()[-1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 0}, "seed0 and seed10 in .* both have the seed 0"),
        ({"steps": 30}, "differ in steps: 20 in seed0, 30 in seed10"),
        ("results.json", "seed10 is not finished"),
        ("others", "expected two or more folders .* which holds: notes.txt, seed10"),
        ("run", "is one run, expected the folder that holds"),
        ("nothing", "expected two or more folders .* which holds: nothing"),
    ],
)
def test_seeds_that_are_not_repetitions(seeds, tree, change, message):
    config = seeds / "seed10" / "config.json"
    if isinstance(change, dict):
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    elif change == "results.json":
        (seeds / "seed10" / change).unlink()
    elif change == "others":
        shutil.rmtree(seeds / "seed0")
        shutil.rmtree(seeds / "seed2")
    folder = {"run": seeds / "seed0", "nothing": seeds / "missing"}.get(str(change), seeds)
    with pytest.raises(UsageError, match=message):
        evaluate_seeds(folder, tree, device="cpu")
    assert not (seeds / "eval.json").exists()


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
    with pytest.raises(UsageError, match="linear: .* holds no probe.safetensors; run `hpseg probe"):
        evaluate(scored_run, tree, linear=True, device="cpu")
    with pytest.raises(UsageError, match="protocol: expected one of default, stego"):
        evaluate(scored_run, tree, protocol="paper", device="cpu")


def test_a_linear_probe_is_scored_after_the_crf_too(scored_run, tree):
    probe(scored_run, tree, score_on=tree, steps=20, lr=0.1, device="cpu")
    results = evaluate(scored_run, tree, crf=True, linear=True, device="cpu")
    assert results["linear_crf"]["cluster_of"] == results["linear"]["cluster_of"] == [0, 3]
    segmenter, fitted = load(scored_run, "cpu"), load_file(scored_run / "probe.safetensors")
    counts = np.zeros((256, 256), np.int64)
    for path, label in open_folder(tree).pairs:
        picture = load_image(path)
        codes = segmenter.codes(segmenter.prepare(picture)[0]).movedim(1, -1)
        scores = F.linear(codes, fitted["linear.weight"], fitted["linear.bias"]).movedim(-1, 1)
        probabilities = F.interpolate(scores, (40, 60), mode="bilinear")[0].softmax(0)
        labels = dense_crf(torch.from_numpy(np.array(picture)[..., ::-1].copy()), probabilities).argmax(0)
        counts += confusion(labels.numpy(), read_ids(label), 256, 256)
    expected = score(counts[:, [0, 3]], np.array([0, 3]))
    assert results["linear_crf"]["miou"] == pytest.approx(expected.miou, abs=0.01)
    assert results["linear_crf"]["miou"] != results["linear"]["miou"] and "linear probe + CRF" in format_table(results)


def test_codes_of_a_mirrored_description_are_averaged(run):
    import hpseg
    from hpseg.evaluation.contenders import codes_of

    segmenter = hpseg.load(run, device="cpu")
    features, mirrored = torch.randn(2, 1, 3, 5, segmenter.backbone.channels).unbind(0)
    colours = torch.rand(1, 3, 5, 3)
    both = codes_of(segmenter, {"features": features, "mirrored": mirrored, "colours": colours})
    one, other = (codes_of(segmenter, {"features": x, "colours": colours}) for x in (features, mirrored.flip(2)))
    torch.testing.assert_close(both, (one + other) / 2)


def test_refined_marginals_start_from_cosines(run):
    """Without iterations the CRF gives back softmax(2 cos) of the codes at the picture's size."""
    import hpseg
    from hpseg.inference import segmenter as predict

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
