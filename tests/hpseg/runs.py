"""Runs to train and to compare."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import SMALL

import hpseg
from hpseg.data.transforms import load_image
from hpseg.run.folder import load_state

SETTINGS = {name: value for name, value in SMALL.items() if name != "quiet"}  # as `train_words` has them

# In fp32, largest deviation of any trained tensor as a share of its largest entry. Products of half as many rows round
# differently; eight steps of Adam leave 2e-7 of that, a hundred a few times more. k-means sums 65,536 rows in fp32.
TOLERANCE, KMEANS_TOLERANCE = 1e-5, 1e-4


def state_of(run):
    return torch.load(run / "state.pt", weights_only=True)


def train_until(step, method, images, out, /, **settings):
    """A run that is stopped by an error in step `step` of `method`, a class, after its optimisers."""

    class Stop(Exception):
        pass

    follow_up = method.follow_up

    def stopping(self, now):
        if now == step:
            raise Stop
        follow_up(self, now)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(method, "follow_up", stopping)
        hpseg.train(images, out, **settings)


def assert_same(a, b, where=""):
    """Bitwise equality through dictionaries, lists and tensors."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def moments(run):
    optimizers = torch.load(run / "state.pt", weights_only=True)["optimizers"]
    return {
        f"{name}.{number}.{moment}": state[moment]
        for name, optimizer in optimizers.items()
        for number, state in optimizer["state"].items()
        for moment in ("exp_avg", "exp_avg_sq")
    }


def assert_runs_agree(one, other, tolerance, kmeans=False):
    """model.safetensors, gradients in the optimizers (Adam's steps hide their scale) and log.csv but for its times."""
    a, b = ({**load_file(run / "model.safetensors"), **moments(run)} for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        allowed = max(tolerance, KMEANS_TOLERANCE) if kmeans and name == "clusters.centroids" else tolerance
        # What starts at 0 is a few of Adam's steps, as large for a gradient that is rounding as for any other: it is
        # held to the scale at which linear layers start.
        usual = a[name].shape[-1] ** -0.5 if name.startswith("head.context.out.") else 0.0
        assert (a[name] - b[name]).abs().max() <= allowed * max(a[name].abs().max().item(), usual), name
    rows, others = (list(csv.DictReader((run / "log.csv").read_text().splitlines())) for run in (one, other))
    assert len(rows) == len(others)
    for row, other_row in zip(rows, others, strict=True):
        for name in row.keys() - {"images_per_s", "seconds"}:
            assert row[name] == other_row[name] or float(row[name]) == pytest.approx(
                float(other_row[name]), rel=tolerance + 1e-5, abs=tolerance
            ), (row["step"], name)


def flags(settings):
    """Settings as words of a command line."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def train_words(photos, out, weights, **changes):
    settings = {**SETTINGS, "weights": weights, "steps": 2, **changes}
    return ["train", str(photos), "--out", str(out), "--no-report", *flags(settings)]


def assert_whole(folder):
    """Every file under its own name can be read; those under temporary names do not count."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".pt":
            load_state(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".png", ".jpg"):
            load_image(path)
        elif path.suffix == ".npy":
            np.load(path)
