"""Weights that do not fit, that are described wrongly, or that hold no numbers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCH, SMALL

import hpseg
from hpseg.models.backbone import load_backbone
from hpseg.run.errors import RunStopped, UsageError
from hpseg.run.folder import load_state


def test_weights_of_another_model(photos, vit_file, tmp_path, tally):
    with pytest.raises(UsageError, match="weights: .*tiny.safetensors does not fit"):
        hpseg.train(photos, tmp_path / "run", **{**SMALL, "weights": vit_file, "backbone": "vit_tiny_patch16_224"})
    assert not (tmp_path / "run").exists()
    tally("weights of another model")


def test_descriptions_of_weights(vit_file, tmp_path, tally):
    good = {"arch": ARCH, "mean": [0.5] * 3, "std": [0.25] * 3}
    for content in (
        "",
        "{",
        "[1]",
        "{}",
        {**good, "arch": [1]},
        {**good, "arch": {**ARCH, "img_size": "x"}},
        {**good, "arch": {**ARCH, "depth": "many"}},
        {**good, "arch": {**ARCH, "spam": 1}},
        {**good, "mean": "abc"},
        {**good, "mean": [0.5]},
        {**good, "std": [0, 1, 1]},
        {**good, "std": [1, 1, float("nan")]},
        {"arch": ARCH},
    ):
        shutil.copy(vit_file, tmp_path / "a.safetensors")
        (tmp_path / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UsageError, match="weights: .*a.json"):
            load_backbone(weights=tmp_path / "a.safetensors")
        tally("damaged descriptions of weights")


def test_numbers_that_are_none(photos, vit_file, scored_run, tmp_path, tally):
    """NaN in the weights of a backbone or in a run is named, not turned into labels."""
    weights = load_file(vit_file)
    weights["blocks.0.mlp.fc1.weight"][3, 4] = torch.nan
    save_file(weights, tmp_path / "a.safetensors")
    shutil.copy(vit_file.with_suffix(".json"), tmp_path / "a.json")
    with pytest.raises(UsageError, match=r"a.safetensors: expected finite numbers, .* blocks.0.mlp.fc1.weight"):
        hpseg.train(photos, tmp_path / "run", weights=tmp_path / "a.safetensors", steps=2, **SMALL)
    assert not (tmp_path / "run").exists()

    state = load_state(scored_run / "state.pt")
    state["method"]["head.linear.weight"][0, 0] = torch.nan
    state["step"] = 19
    torch.save(state, scored_run / "state.pt")
    with pytest.raises(RunStopped, match="loss: .*finite"):
        hpseg.train(photos, scored_run, resume=True, weights=vit_file, **SMALL)
    model = load_file(scored_run / "model.safetensors")
    model["head.linear.weight"][0, 0] = torch.inf
    save_file(model, scored_run / "model.safetensors")
    with pytest.raises(UsageError, match="run: .*model.safetensors: expected finite numbers, .* head.linear.weight"):
        hpseg.load(scored_run, "cpu")
    tally("files with NaN", 3)
