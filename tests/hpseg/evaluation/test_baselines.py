"""k-means beside a trained head: fitted once for the same photographs, and then read."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import paint

import hpseg
from hpseg.data.folder import find_images
from hpseg.data.transforms import load_image
from hpseg.evaluation import baselines
from hpseg.evaluation.evaluate import evaluate, evaluate_runs
from hpseg.models.heads import fit_centroids
from hpseg.run.errors import UsageError


@pytest.fixture
def fits(monkeypatch):
    """The seeds of the fits so far."""
    seeds, fit = [], baselines.fit_centroids
    monkeypatch.setattr(baselines, "fit_centroids", lambda *args: seeds.append(args[2]) or fit(*args))
    return seeds


@pytest.fixture
def photographs(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "photographs")


def test_centroids_are_those_of_random_patches_of_every_photograph(scored_run, photographs, data, monkeypatch):
    monkeypatch.setattr(baselines, "KMEANS_ROWS", 50)
    evaluate(scored_run, data, fit_on=photographs, device="cpu", seed=3)
    segmenter, rng, rows = hpseg.load(scored_run, device="cpu"), torch.Generator().manual_seed(3), []
    for path in find_images(photographs):
        features = segmenter.backbone(segmenter.prepare(load_image(path))[0]).features[0]
        rows.append(features[torch.randperm(len(features), generator=rng)[:10]])
    expected = fit_centroids(torch.cat(rows), 3, 3)
    assert torch.equal(load_file(scored_run / "baselines.safetensors")["features"], expected)


def test_a_fit_is_read_the_next_time(scored_run, photographs, data, fits):
    options = dict(fit_on=photographs, device="cpu")
    first = evaluate(scored_run, data, **options)
    again = evaluate(scored_run, data, **options)
    assert fits == [0] and first["kmeans_features"] == again["kmeans_features"]
    assert "kmeans_rgb" in evaluate(scored_run, data, rgb=True, **options) and fits == [0, 0, 0]
    for path in photographs.rglob("*.*"):  # what is read needs no photograph
        status = path.stat()
        path.write_bytes(b"-" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert evaluate(scored_run, data, **options)["kmeans_features"] == first["kmeans_features"] and fits == [0, 0, 0]


@pytest.mark.parametrize("change", ["seed", "photograph", "fewer", "damage"])
def test_another_fit_is_made_anew(scored_run, photographs, data, fits, change):
    options = dict(fit_on=photographs, device="cpu")
    evaluate(scored_run, data, **options)
    if change == "photograph":
        paint(90, 70, 99).save(photographs / "a.jpg")
    elif change == "fewer":
        (photographs / "a.jpg").unlink()
    elif change == "damage":
        (scored_run / "baselines.safetensors").write_bytes(b"nothing")
    evaluate(scored_run, data, seed=int(change == "seed"), **options)
    assert len(fits) == 2
    evaluate(scored_run, data, seed=int(change == "seed"), **options)
    assert len(fits) == 2


def test_runs_keep_their_own(scored_run, photographs, data, fits, tmp_path):
    runs = [scored_run, shutil.copytree(scored_run, tmp_path / "other")]
    found = [evaluate_runs(runs, data, fit_on=photographs, device="cpu") for _ in range(2)]
    assert fits == [0, 1]
    for first, again in zip(*found, strict=True):
        assert first["kmeans_features"] == again["kmeans_features"]
    assert evaluate(runs[1], data, fit_on=photographs, seed=1, device="cpu")["seed"] == 1 and fits == [0, 1]


def test_photographs_that_cannot_be_read_are_named_every_time(scored_run, photographs, data, caplog):
    (photographs / "z.png").write_bytes(b"no picture")
    for _ in range(2):
        caplog.clear()
        assert "kmeans_features" in evaluate(scored_run, data, fit_on=photographs, device="cpu")
        assert any("z.png" in record.getMessage() for record in caplog.records)
    with pytest.raises(UsageError, match="strict: .*z.png"):
        evaluate(scored_run, data, fit_on=photographs, strict=True, device="cpu")
