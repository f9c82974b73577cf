"""Processes that are killed: what goes on ends as what was never stopped."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import uuid
from functools import partial

import pytest
import torch
from processes import TORCHRUN, finish, killed_after, marked, needs_fork, needs_gloo, needs_proc, spawn, wait_for
from runs import TOLERANCE, assert_runs_agree, assert_whole, flags
from safetensors.torch import load_file
from tiny import SMALL

import hpseg
from hpseg.features import cache as feature_cache
from hpseg.run.errors import UsageError

CACHED = {**SMALL, "consistency_weight": 0.0, "cache_features": True, "preview_every": 4}


@needs_fork
def test_killed_at_twenty_random_moments(photos, vit_file, tmp_path, monkeypatch, tally):
    """Training, its checkpoints, its feature cache and its previews: what goes on ends as what was never stopped."""
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1)  # a shard per photograph
    settings = {**CACHED, "weights": vit_file, "steps": 30, "save_every": 2}
    started = time.monotonic()
    hpseg.train(photos, tmp_path / "whole", **settings)
    whole, seconds = load_file(tmp_path / "whole" / "model.safetensors"), time.monotonic() - started
    moments, kills, run = random.Random(0), 0, 0
    while kills < 20:
        out = tmp_path / f"run{run}"
        train = partial(hpseg.train, photos, out, resume=out.exists(), **settings)
        if killed_after(moments.uniform(0, seconds), train):
            kills += 1
            if out.exists():
                assert_whole(out)
        else:
            run += 1
    hpseg.train(photos, tmp_path / f"run{run}", resume=(tmp_path / f"run{run}").exists(), **settings)
    for number in range(run + 1):
        found = load_file(tmp_path / f"run{number}" / "model.safetensors")
        assert all(torch.equal(found[name], whole[name]) for name in whole), f"run{number} ended otherwise"
        steps = [line.split(",")[0] for line in (tmp_path / f"run{number}" / "log.csv").read_text().splitlines()[1:]]
        assert steps == [str(step) for step in range(30)]
    tally("kills of a training process", kills)


@needs_gloo
@needs_proc
def test_a_killed_rank_ends_the_run_which_then_goes_on(photos, vit_file, tmp_path):
    settings = {**SMALL, "weights": vit_file, "steps": 60, "save_every": 4, "renew_interval": 8}
    del settings["quiet"]
    hpseg.train(photos, tmp_path / "one", **{**settings, "batch_size": 4}, quiet=True)
    two, marker = tmp_path / "two", f"HPSEG_TEST_{uuid.uuid4().hex}"
    command = [*TORCHRUN, "-m", "hpseg", "train", photos, "--out", two, *flags(settings)]
    process = spawn(command, env={marker: "1"})
    wait_for(two / "state.pt", process)
    ranks = [pid for pid, environment in marked(marker).items() if b"\0RANK=1\0" in environment]
    os.kill(min(ranks), signal.SIGKILL)
    status, said = finish(process)
    assert status != 0 and "Signal 9" in said and not (two / "results.json").exists()
    shutil.copytree(two, tmp_path / "alone")

    with pytest.raises(UsageError, match=r"batch_size \(of all ranks together\): .* was started with 4, got 2"):
        hpseg.train(photos, tmp_path / "alone", resume=True, quiet=True, **settings)
    hpseg.train(photos, tmp_path / "alone", resume=True, **{**settings, "batch_size": 4}, quiet=True)
    status, said = finish(spawn([*command, "--resume"]))
    assert status == 0, said
    assert "going on from step" in said and said.count("trained; the run is in") == 1
    for run in (two, tmp_path / "alone"):
        assert_runs_agree(tmp_path / "one", run, 10 * TOLERANCE)


@needs_proc
def test_a_killed_loader_process_ends_the_run_which_then_goes_on(photos, vit_file, tmp_path):
    settings = {**SMALL, "weights": vit_file, "steps": 150, "save_every": 6, "workers": 2}
    del settings["quiet"]
    hpseg.train(photos, tmp_path / "whole", quiet=True, **settings)
    cut, marker = tmp_path / "cut", f"HPSEG_TEST_{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "hpseg", "train", photos, "--out", cut, *flags(settings)]
    process = spawn(command, env={marker: "1"})
    wait_for(cut / "state.pt", process)
    os.kill(next(iter(marked(marker))), signal.SIGKILL)  # the youngest is a loader process
    status, said = finish(process)
    assert status == 1 and "Traceback" not in said
    assert "hpseg train: error: workers: a data loading process was killed" in said and "--resume" in said
    hpseg.train(photos, cut, resume=True, quiet=True, **settings)
    assert_runs_agree(tmp_path / "whole", cut, 0.0)
