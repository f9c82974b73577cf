"""Probes on frozen codes: what they learn, what they write, what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import paint
from torch import nn
from torch.nn import functional as F

from hpseg.data.datasets import open_folder
from hpseg.data.folder import hash_seed
from hpseg.data.transforms import load_image
from hpseg.evaluation.evaluate import format_table
from hpseg.evaluation.probes import probe
from hpseg.evaluation.protocols import PROTOCOLS
from hpseg.inference.segmenter import load
from hpseg.models.heads import ClusterProbe
from hpseg.run.errors import UsageError


@pytest.fixture
def two_sets(tmp_path):
    """Labels that a linear probe can learn: bright or dark half of a picture."""
    for part, seeds in (("fit", range(4)), ("held", range(4, 6))):
        for folder in ("images", "labels"):
            (tmp_path / part / folder).mkdir(parents=True)
        for seed in seeds:
            pixels = np.asarray(paint(64, 48, seed)) // 4
            side = np.zeros((48, 64), np.uint8)
            side[:, 32:] = 1
            if seed % 2:
                side = 1 - side
            Image.fromarray(pixels + 190 * side[..., None]).save(tmp_path / part / "images" / f"{seed}.png")
            side[0, :5] = 255
            Image.fromarray(side).save(tmp_path / part / "labels" / f"{seed}.png")
        (tmp_path / part / "classes.json").write_text(json.dumps(["dark", "bright"]))
    return tmp_path / "fit", tmp_path / "held"


def test_probes_learn_what_is_there_and_repeat(scored_run, two_sets):
    fit, held = two_sets
    settings = dict(score_on=held, steps=60, batch_size=4, lr=2e-2, device="cpu")
    results = probe(scored_run, fit, **settings)
    assert results["linear"]["accuracy"] > 85 and results["classes"] == ["dark", "bright"]
    assert results["linear"]["cluster_of"] == [0, 1] and results["pixels"] == 2 * (48 * 64 - 5)
    assert json.loads((scored_run / "probe.json").read_text()) == results
    before = load_file(scored_run / "probe.safetensors")
    assert before["linear.weight"].shape[0] == 2
    probe(scored_run, fit, **settings)
    after = load_file(scored_run / "probe.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "linear probe" in format_table(results)


@pytest.mark.parametrize("protocol", ["default", "stego"])
def test_probes_are_those_of_a_plain_loop(scored_run, two_sets, protocol):
    """Picture by picture through torch's interpolation and cross-entropy, as published. Sums over pixels are in another
    order, and Adam divides by their roots: a share of 1e-4 after ten steps."""
    fit, held = two_sets
    found = probe(scored_run, fit, score_on=held, steps=10, batch_size=3, lr=2e-2, protocol=protocol, device="cpu")
    assert found["images"] == 2
    segmenter, labelled = load(scored_run, "cpu"), open_folder(fit)
    torch.manual_seed(hash_seed("probe", 0))
    linear, clusters = nn.Linear(16, 2), ClusterProbe(16, 2)
    optimizers = (torch.optim.Adam(linear.parameters(), 2e-2), torch.optim.Adam(clusters.parameters(), 5e-3))
    generator, order = torch.Generator().manual_seed(hash_seed("probe order", 0)), []
    for _ in range(10):
        supervised, clustering, pixels = 0, 0, 0
        for _ in range(3):
            order = order or torch.randperm(4, generator=generator).tolist()
            image, label = labelled.pairs[order.pop()]
            picture = load_image(image)
            view = PROTOCOLS[protocol](picture, labelled.labels(label, picture.size), 48, 8)
            codes = segmenter.codes(segmenter.pixels(view.shown), view.window).half().float().movedim(1, -1)
            truth = torch.from_numpy(view.truth)[None]
            logits = F.interpolate(linear(codes).movedim(-1, 1), truth.shape[1:], mode="bilinear")
            supervised = supervised + F.cross_entropy(logits, truth, ignore_index=-1, reduction="sum")
            clustering, pixels = clustering + clusters.loss(codes), pixels + int((truth >= 0).sum())
        for optimizer in optimizers:
            optimizer.zero_grad()
        (supervised / pixels + clustering / 3).backward()
        for optimizer in optimizers:
            optimizer.step()
    fitted = load_file(scored_run / "probe.safetensors")
    for name, expected in (("linear.weight", linear.weight), ("linear.bias", linear.bias)):
        torch.testing.assert_close(fitted[name], expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fitted["cluster.centroids"], clusters.centroids.detach(), rtol=1e-4, atol=1e-4)


def test_what_is_kept_changes_nothing(scored_run, two_sets, monkeypatch):
    from hpseg.evaluation import probes

    fit, held = two_sets
    scores = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(probes, "CACHE_BYTES", limit)
        scores.append(probe(scored_run, fit, score_on=held, steps=5, batch_size=3, device="cpu"))
    for one in scores:
        del one["seconds"], one["phases"]
    assert scores[0] == scores[1]


def test_held_out_labels_are_needed(scored_run, two_sets):
    with pytest.raises(UsageError, match="score_on: expected a folder"):
        probe(scored_run, two_sets[0], device="cpu")
    with pytest.raises(UsageError, match="protocol: expected one of"):
        probe(scored_run, two_sets[0], score_on=two_sets[1], protocol="paper", device="cpu")


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": -1}, "batch_size: expected at least 1, got -1"),
        ({"lr": float("nan")}, "lr: expected a finite number of at least 0, got nan"),
        ({"cluster_lr": -0.1}, "cluster_lr: expected a finite number of at least 0, got -0.1"),
        ({"lr": 3e37, "steps": 5}, r"lr, cluster_lr: the loss is (nan|inf) with 3e\+37"),
    ],
)
def test_settings_that_cannot_be(scored_run, two_sets, setting, message):
    with pytest.raises(UsageError, match=message):
        probe(scored_run, two_sets[0], score_on=two_sets[1], device="cpu", **setting)
    assert not (scored_run / "probe.json").exists()


def test_labels_that_are_all_void(scored_run, two_sets):
    for path in (two_sets[0] / "labels").iterdir():
        Image.new("L", (64, 48), 255).save(path)
    (two_sets[0] / "classes.json").unlink()
    with pytest.raises(UsageError, match="data: no labelled pixel in fit"):
        probe(scored_run, two_sets[0], score_on=two_sets[1], device="cpu")
