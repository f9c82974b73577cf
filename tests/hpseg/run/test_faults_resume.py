"""Runs that go on with what is not theirs, and with what is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from runs import SETTINGS
from safetensors.torch import load_file
from tiny import SMALL

import hpseg
from hpseg.run.config import Config, make_config
from hpseg.run.errors import UsageError
from hpseg.run.folder import load_state


def test_settings_that_are_not_the_runs(scored_run, photos, vit_file, tally):
    config = json.loads((scored_run / "config.json").read_text())
    for change in ({"dim": 17}, {"classes": 2}, {"weights": 5}, {"images": None}, {"seed": "x"}, {"spam": 1}):
        (scored_run / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UsageError, match="do not belong together|expected (str|int)|unknown setting 'spam'"):
            hpseg.load(scored_run, "cpu")
        tally("settings that are not a run's")


def test_a_state_of_another_run(scored_run, photos, vit_file, tally):
    state = load_state(scored_run / "state.pt")
    lacking = {name: value for name, value in state.items() if name != "optimizers"}
    smaller = {**state, "method": {**state["method"], "head.linear.bias": torch.zeros(3)}}
    for content in ({}, [1], lacking, smaller, {**state, "dropout_rng": torch.zeros(3)}, {**state, "extra": 5}):
        torch.save(content, scored_run / "state.pt")
        with pytest.raises(UsageError, match="resume: .*state.pt is not of a run with these settings"):
            hpseg.train(photos, scored_run, resume=True, weights=vit_file, steps=20, **SMALL)
        tally("damaged files of a run")


def test_pictures_added_or_removed_before_a_run_goes_on(photos, vit_file, tmp_path, tally):
    here = shutil.copytree(photos, tmp_path / "photos")
    hpseg.train(here, tmp_path / "run", weights=vit_file, steps=2, **SMALL)
    state = load_state(tmp_path / "run" / "state.pt")
    (here / "a.jpg").rename(here / "z.jpg")
    with pytest.raises(UsageError, match="images: pictures were added to, removed from or renamed in .*photos since"):
        hpseg.train(here, tmp_path / "run", resume=True)
    del state["pictures"]  # as an older version saved it
    torch.save(state, tmp_path / "run" / "state.pt")
    hpseg.train(here, tmp_path / "run", resume=True, quiet=True)
    tally("folders of photographs that changed")


ADDED = {  # to those of old_config.json, but for settings of methods that came with them: what was done before
    **{"resize": "bilinear", "jitter": "image", "local_scale": 28.0, "finetune": False, "grad_checkpointing": False},
    **{"contrast_grad_scale": 1.0, "contrast_by_class": False, "ohem_pixels": 0},
}


def test_a_run_from_before_a_setting_goes_on_as_it_began(photos, vit_file, tmp_path, tally):
    """old_config.json is of the first version that numbered its format, with preset cocostuff."""
    old = json.loads((Path(__file__).parent / "old_config.json").read_text())
    out = tmp_path / "run"
    out.mkdir()
    own = {**{name: SETTINGS[name] for name in SETTINGS if name != "clusters"}, "weights": str(vit_file), "steps": 2}
    (out / "config.json").write_text(json.dumps({**old, **own, "images": os.path.realpath(photos)}))
    loaded = Config.load(out / "config.json")
    assert {name: getattr(loaded, name) for name in ADDED} == ADDED
    assert make_config("cocostuff").resize == "nearest"  # what its preset says now
    with pytest.raises(UsageError, match="resize: .* was started with 'bilinear', got 'nearest'; resume with the same"):
        hpseg.train(photos, out, resume=True, preset="cocostuff", resize="nearest")
    hpseg.train(photos, out, resume=True, preset="cocostuff", quiet=True, **own)
    hpseg.train(photos, tmp_path / "new", preset="cocostuff", quiet=True, crop="five", resize="bilinear", **own)
    went_on, new = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "new"))
    assert all(torch.equal(went_on[name], new[name]) for name in new)
    tally("runs of an older version")
