"""Two thousand steps: `pytest -m slow tests/hpseg/training/test_soak.py`. Prints memory and open files over the run."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from tiny import SMALL

import hpseg
from hpseg.training import loop as training

GROWTH_BYTES = 16 << 20  # over 1,500 steps; an image of a batch kept each step would be 9 MiB, its features 12 MiB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("method", ["hp", "stego"])
def test_two_thousand_steps(photos, vit_file, tmp_path, monkeypatch, record_property, method):
    """Memory and open files stay as they are, and the log begins as that of a run that was stopped early."""
    settings = {**SMALL, "weights": vit_file, "steps": 2000, "save_every": 50, "preview_every": 500, "workers": 1}
    settings |= {"method": method, "consistency_weight": 0.0}
    memory, files, save = [], [], training.save_state

    class Stop(Exception):
        pass

    def stopped(out, state):
        save(out, state)
        if state["step"] == 400:
            raise Stop

    def watched(out, state):
        save(out, state)
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        files.append(len(os.listdir("/proc/self/fd")))

    monkeypatch.setattr(training, "save_state", stopped)
    with pytest.raises(Stop):
        hpseg.train(photos, tmp_path / "short", **settings)
    monkeypatch.setattr(training, "save_state", watched)
    hpseg.train(photos, tmp_path / "long", **settings)

    settled = np.array(memory[10:], float)
    slope = np.polyfit(np.arange(len(settled)), settled, 1)[0] * (len(settled) - 1)
    print(
        f"{method}: {settled.mean() / 2**20:.0f} MiB, {slope / 2**20:+.1f} MiB over 1,500 steps, {files[-1]} files open"
    )
    assert slope < GROWTH_BYTES
    assert max(files[1:]) <= files[1]
    rows = [list(csv.DictReader((tmp_path / run / "log.csv").open())) for run in ("short", "long")]
    assert len(rows[0]) == 400 and len(rows[1]) == 2000
    for short, long in zip(rows[0], rows[1], strict=False):
        assert all(short[name] == long[name] for name in short if name not in ("images_per_s", "seconds"))
    record_property("tally", ("steps of soaked runs", 2000))
