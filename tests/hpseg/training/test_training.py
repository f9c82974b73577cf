"""Training from a folder to a run folder, and going on after a kill as if nothing had happened."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import assert_same, state_of
from safetensors.torch import load_file, save_file
from tiny import SMALL, make_vit, paint

import hpseg
from hpseg.run.errors import RunStopped, UsageError


def test_five_pictures_twenty_steps(run):
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "config.json",
        "log.csv",
        "model.safetensors",
        "preview",
        "results.json",
        "state.pt",
    ]
    with open(run / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(20))
    assert all(float(row["loss"]) == float(row["loss"]) for row in rows)
    assert float(rows[2]["lambda"]) == 0 and float(rows[-1]["lambda"]) == pytest.approx(17 / 18, rel=1e-5)
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 20 and results["photographs"] == 5 and results["unreadable"] == []
    assert not any(name.startswith("backbone") for name in load_file(run / "model.safetensors"))


def test_training_moves_every_trained_part(run, photos, vit_file, tmp_path):
    hpseg.train(photos, tmp_path / "one", weights=vit_file, steps=20, save_every=1, **SMALL)
    first, last = state_of(run)["method"], state_of(tmp_path / "one")["method"]
    assert_same(first, last)  # how often a run is saved changes nothing
    from hpseg.data.folder import hash_seed
    from hpseg.methods.hp import HiddenPositives
    from hpseg.run.config import make_config

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_seed("init", 0))
        start = HiddenPositives(32, make_config(classes=3, dim=16)).state_dict()
    assert all(not torch.equal(start[name], last[name]) for name in start)


def test_leaves_the_callers_random_numbers_alone(photos, vit_file, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    hpseg.train(photos, tmp_path / "run", weights=vit_file, steps=2, **SMALL)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "extra",
    [
        {"steps": 150},
        {"steps": 60, "workers": 2, "crop": "five"},
        {"steps": 80, "accumulate": 2, "dtype": "bf16"},
        {"steps": 150, "preset": "stego-small", "consistency_weight": 0.0},
    ],
    ids=["plain", "workers", "accumulate", "stego"],
)
def test_resume_after_sigkill_equals_an_uninterrupted_run(photos, vit_file, tmp_path, extra):
    settings = {**SMALL, "weights": vit_file, "save_every": 7, "renew_interval": 8, **extra}
    hpseg.train(photos, tmp_path / "whole", **{**settings, "save_every": 1000})
    arguments = f"{str(photos)!r}, {str(tmp_path / 'cut')!r}, **{ {**settings, 'weights': str(vit_file)}!r}"
    command = f"import hpseg, torch; torch.set_num_threads(1); hpseg.train({arguments})"
    process = subprocess.Popen([sys.executable, "-c", command], start_new_session=True)
    try:
        while not (tmp_path / "cut" / "state.pt").is_file():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        time.sleep(random.random() * 0.4)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "cut" / "results.json").exists()
    assert 0 < state_of(tmp_path / "cut")["step"] < settings["steps"]
    hpseg.train(photos, tmp_path / "cut", resume=True, **settings)
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))
    assert_same(load_file(tmp_path / "whole" / "model.safetensors"), load_file(tmp_path / "cut" / "model.safetensors"))
    with open(tmp_path / "cut" / "log.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(settings["steps"]))


def test_workers_change_nothing(photos, vit_file, tmp_path):
    for workers in (0, 2):
        hpseg.train(
            photos, tmp_path / str(workers), weights=vit_file, steps=4, crop="random", **{**SMALL, "workers": workers}
        )
    assert_same(state_of(tmp_path / "0"), state_of(tmp_path / "2"))


def test_cached_features(photos, vit_file, tmp_path):
    from hpseg.data.folder import PhotoFolder, find_images
    from hpseg.features.tokens import Encoder
    from hpseg.models.backbone import load_backbone
    from hpseg.run.config import make_config

    backbone = load_backbone(weights=vit_file)
    config = make_config(classes=3, crop="random", cache_features=True, consistency_weight=0.0, workers=0)
    folder = PhotoFolder(find_images(photos), 32, "random", 0, False)
    encoder = Encoder(backbone, folder, config, torch.device("cpu"), tmp_path)
    encoder.fill()
    rows, columns = encoder.cache[4].grid
    assert rows == 4 and columns > 4
    tokens, twin = next(encoder([[(0, 4), (1, 4), (2, 4)]]))
    assert twin is None and tokens.grid == (4, 4) and tokens.features.shape == (3, 16, 32)
    whole = encoder.cache[4].features[0].view(rows, columns, -1)
    lefts = [
        left
        for left in range(columns - 3)
        for view in tokens.features
        if torch.equal(whole[:, left : left + 4].flatten(0, 1), view)
    ]
    assert len(lefts) == 3
    taps = tokens.neighbors.view(3, 4, 4, 3, 3)
    for outside in (taps[:, 0, :, 0], taps[:, 3, :, 2], taps[:, :, 0, :, 0], taps[:, :, 3, :, 2]):
        assert (outside == 0).all()
    settings = {**SMALL, "weights": vit_file, "cache_features": True, "consistency_weight": 0.0, "clusters": "kmeans"}
    hpseg.train(photos, tmp_path / "a", steps=6, **settings)
    hpseg.train(photos, tmp_path / "b", steps=6, **settings)
    assert_same(load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors"))


def test_other_settings_run(photos, vit_file, tmp_path):
    hpseg.train(
        photos,
        tmp_path / "a",
        **{
            **SMALL,
            "weights": vit_file,
            "steps": 5,
            "negative_rate": 1.0,
            "weighting": "separate",
            "head_in_denominator": True,
            "clusters": "kmeans",
            "consistency_weight": 0.0,
            "mining_dropout": 0.0,
            "dtype": "bf16",
        },
    )
    assert load_file(tmp_path / "a" / "model.safetensors")["clusters.centroids"].norm(dim=1).allclose(torch.ones(3))


def test_out_must_be_empty_unless_told(run, photos, vit_file, tmp_path):
    settings = dict(weights=vit_file, steps=2, **SMALL)
    with pytest.raises(UsageError, match="out: .* is not empty .*--resume.*--overwrite"):
        hpseg.train(photos, run, **settings)
    with pytest.raises(UsageError, match="steps: .* started with 20, got 2"):
        hpseg.train(photos, run, resume=True, **settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file, expected a folder"):
        hpseg.train(photos, tmp_path / "file", **settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="mine.txt"):
        hpseg.train(photos, tmp_path / "other", **settings)
    hpseg.train(photos, tmp_path / "other", overwrite=True, **settings)
    assert (tmp_path / "other" / "mine.txt").read_text() == "kept"


def test_resume_refuses_another_backbone(photos, vit_file, tmp_path):
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(vit_file.read_bytes())
    weights.with_suffix(".json").write_bytes(vit_file.with_suffix(".json").read_bytes())
    settings = dict(weights=weights, steps=4, **SMALL)
    hpseg.train(photos, tmp_path / "run", **settings)
    save_file(make_vit(seed=1).state_dict(), weights)
    with pytest.raises(UsageError, match="other weights"):
        hpseg.train(photos, tmp_path / "run", resume=True, **settings)
    with pytest.raises(UsageError, match="was trained on"):
        hpseg.load(tmp_path / "run")


def test_corrupt_pictures_are_skipped_and_counted(vit_file, tmp_path, news):
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(4):
        paint(60, 50, i).save(root / f"{i}.png")
    (root / "2b.jpg").write_bytes(b"not a picture")
    (root / "3.png").write_bytes((root / "3.png").read_bytes()[:300])
    results = hpseg.train(root, tmp_path / "run", weights=vit_file, steps=6, **{**SMALL, "quiet": False})
    assert [name.rsplit("/")[-1] for name in results["unreadable"]] == ["2b.jpg", "3.png"]
    assert any(line.startswith("2 unreadable pictures were skipped") for line in news())
    for path in root.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="none of the 5 pictures can be decoded"):
        hpseg.train(root, tmp_path / "none", weights=vit_file, steps=6, **SMALL)


def test_never_opens_a_label(photos, vit_file, tmp_path):
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for i in range(3):
        paint(40, 40, i).save(root / "images" / f"{i}.png")
        (root / "labels" / f"{i}.txt").write_text("no picture")
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    hpseg.train(root / "images", tmp_path / "run", weights=vit_file, steps=2, **SMALL)
    assert any("images" in name for name in opened) and not any(str(root / "labels") in name for name in opened)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"classes": 1}, "classes: expected at least 2, got 1"),
        ({"classes": 300}, "at most 255, got 300"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
        ({"steps": "many"}, "steps: expected int, got 'many'"),
        ({"crop": "big"}, "crop: expected one of center, random, five"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 0.99\], got 1.0"),
        ({"mining_dropout": 1.0}, r"mining_dropout: expected a number in \[0, 0.99\], got 1.0"),
        ({"negative_rate": 1.5}, r"negative_rate: expected a number in \[0, 1\], got 1.5"),
        ({"lr": float("inf")}, "lr: expected a finite number, got inf"),
        ({"knn_shift": float("nan")}, "knn_shift: expected a finite number, got nan"),
        ({"seed": 2**63}, r"seed: expected a number in \[-9223372036854775808, 9223372036854775807\]"),
        ({"method": "stego", "preset": "cocostuff"}, "preset: 'cocostuff' is one of method hp; for stego"),
        ({"method": "hp", "preset": "stego-small"}, "preset: 'stego-small' is one of method stego; for hp"),
        ({"temperature": 0.0}, "temperature"),
        ({"preset": "imagenet"}, "preset: expected one of cocostuff"),
        ({"step": 3}, "unknown setting 'step'"),
        ({"cache_features": True, "consistency_weight": 0.1}, "cache_features: there are no jittered"),
        ({"device": "tpu9"}, "device: expected auto, cpu"),
        ({"device": "meta"}, "device: expected auto, cpu or cuda"),
        ({"weights": "nowhere.pt"}, "weights: no file"),
    ],
)
def test_settings_that_cannot_be(photos, vit_file, tmp_path, setting, message):
    with pytest.raises(UsageError, match=message):
        hpseg.train(photos, tmp_path / "run", **{"weights": vit_file, **SMALL, **setting})
    assert not (tmp_path / "run").exists()


DIVERGED = "loss: .*finite.*smaller lr helps; what .* holds is intact"


def test_training_that_diverges_says_so(photos, vit_file, tmp_path):
    with pytest.raises(RunStopped, match=DIVERGED):
        hpseg.train(photos, tmp_path / "run", weights=vit_file, steps=9, **{**SMALL, "lr": 1e30, "clip_norm": 0.0})


def test_a_last_step_that_diverges_is_not_saved(photos, vit_file, tmp_path, monkeypatch):
    """No later loss meets the parameters that it makes."""
    step = torch.optim.AdamW.step

    def diverging(optimizer: torch.optim.AdamW) -> None:
        step(optimizer)
        next(iter(optimizer.param_groups[0]["params"])).data.view(-1)[0] = torch.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", diverging)
    with pytest.raises(RunStopped, match=DIVERGED):
        hpseg.train(photos, tmp_path / "run", weights=vit_file, steps=1, **SMALL)
    assert not (tmp_path / "run" / "state.pt").exists() and not (tmp_path / "run" / "model.safetensors").exists()


def test_a_damaged_state_is_named(run, photos, vit_file, tmp_path):
    for number, content in enumerate((b"", b"{}", (run / "state.pt").read_bytes()[:500])):
        damaged = shutil.copytree(run, tmp_path / str(number))
        (damaged / "state.pt").write_bytes(content)
        with pytest.raises(UsageError, match="resume: .*state.pt is not a torch file of plain tensors"):
            hpseg.train(photos, damaged, weights=vit_file, steps=20, resume=True, **SMALL)
        assert (damaged / "state.pt").read_bytes() == content
