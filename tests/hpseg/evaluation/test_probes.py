"""Probes on frozen codes: what they learn, what they write, what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import paint

from hpseg.evaluation.evaluate import format_table
from hpseg.evaluation.probes import probe
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


def test_what_is_kept_changes_nothing(scored_run, two_sets, monkeypatch):
    from hpseg.evaluation import probes

    fit, held = two_sets
    scores = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(probes, "CACHE_BYTES", limit)
        scores.append(probe(scored_run, fit, score_on=held, steps=5, batch_size=3, device="cpu"))
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
