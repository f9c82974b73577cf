"""Run folders that are damaged, foreign, in use or gone."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import train_words
from tiny import SMALL

import hpseg
from hpseg.cli.main import main
from hpseg.inference.predict_files import predict_files
from hpseg.run.errors import RunStopped, UsageError
from hpseg.run.files import RunLock, remove_temporaries, write_atomically
from hpseg.training import loop as training


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, tally):
    (tmp_path / "a.json").write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*a.json"):
        write_atomically(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    tally("full disks")


def test_two_programs_and_one_run(photos, vit_file, tmp_path, tally):
    out = tmp_path / "run"
    settings = {**SMALL, "weights": vit_file, "steps": 2}
    hpseg.train(photos, out, **settings)
    before = (out / "model.safetensors").read_bytes()
    with RunLock(out) as lock:
        lock.acquire()
        for option in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match="out: another program is writing to .*run"):
                hpseg.train(photos, out, **option, **settings)
            tally("second programs")
        hpseg.load(out, "cpu")  # reading is free
    assert (out / "model.safetensors").read_bytes() == before
    hpseg.train(photos, out, overwrite=True, **settings)


def test_a_run_of_another_version(run, tmp_path, scored_run, tally):
    config = json.loads((scored_run / "config.json").read_text())
    for number in (None, 2):
        (scored_run / "config.json").write_text(json.dumps({**config, "format": number}))
        with pytest.raises(UsageError, match=f"format {number}, this hpseg reads format 1"):
            hpseg.load(scored_run, "cpu")
        tally("runs of another format")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "state.pt", "labels.json"])
@pytest.mark.parametrize("how", ["empty", "cut", "noise"])
def test_a_damaged_run_is_named(scored_run, photos, vit_file, name, how, tally):
    path = scored_run / name
    content = path.read_bytes() if path.exists() else b'{"clusters": []}'
    noise = random.Random(0).randbytes(len(content))
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": noise}[how])
    with pytest.raises(UsageError, match=name):
        if name == "state.pt":
            hpseg.train(photos, scored_run, resume=True, weights=vit_file, steps=20, **SMALL)
        else:
            hpseg.load(scored_run, "cpu")
    tally("damaged files of a run")


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def test_nothing_is_unpickled(photos, scored_run, vit_file, tmp_path, monkeypatch, tally):
    """Where a torch file or an array is read, a pickle that would run something is refused and has not run."""
    monkeypatch.chdir(tmp_path)
    torch.save({"blocks": Evil()}, "weights.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Evil()))
    np.save("objects.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    torch.save({"step": Evil()}, scored_run / "state.pt")
    for name in ("weights.pth", "plain.pth"):
        with pytest.raises(UsageError, match=name):
            hpseg.train(photos, tmp_path / "run", **{**SMALL, "weights": name})
        assert main(["import-hp", name, "--out", "imported"]) == 2
        tally("malicious pickles", 2)
    with pytest.raises(UsageError, match="objects.npy"):
        predict_files(scored_run, ["objects.npy"], tmp_path / "out")
    with pytest.raises(UsageError, match="state.pt"):
        hpseg.train(photos, scored_run, resume=True, weights=vit_file, steps=20, **SMALL)
    tally("malicious pickles", 2)
    assert not Path("evil").exists()


def test_a_runs_paths_stay_in_it(scored_run, tally):
    config = json.loads((scored_run / "config.json").read_text())
    (scored_run / "link.safetensors").symlink_to("../other.safetensors")
    for setting, message in (
        ({"weights": "../other.safetensors"}, r"lie outside of it: '../other.safetensors'"),
        ({"weights": "link.safetensors"}, r"lie outside of it: 'link.safetensors'"),
        ({"backbone": "local-dir:../other", "weights": None}, "backbone: expected 'embedded' or the name of a timm"),
        ({"backbone": "hf-hub:a/b", "weights": None}, "backbone: expected 'embedded' or the name of a timm model"),
        ({"method": "../hp"}, "method: expected one of"),
    ):
        (scored_run / "config.json").write_text(json.dumps({**config, **setting}))
        with pytest.raises(UsageError, match=message):
            hpseg.load(scored_run, "cpu")
        tally("paths out of a run")


def test_files_of_a_run_that_are_folders(run, photos, vit_file, tmp_path, refused, tally):
    for name in ("config.json", "model.safetensors", "state.pt", "log.csv", "results.json"):
        out = shutil.copytree(run, tmp_path / name)
        before = {path.name for path in out.iterdir()}
        (out / name).unlink()
        (out / name).mkdir()
        for option in ("--resume", "--overwrite"):
            words = train_words(photos, out, vit_file, steps=20)
            refused(f"{name} is a folder, expected a file of the run", *words, option)
            tally("damaged files of a run")
        assert {path.name for path in out.iterdir()} == before


def test_what_killed_writers_left(tmp_path):
    """Goes where nobody else writes; elsewhere once it is old. Other files stay."""
    names = [".hpseg-0123456789abcdef.tmp", ".hpseg-fedcba9876543210.tmp", ".mine.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / names[0], (0, 0))
    remove_temporaries([tmp_path, tmp_path / "none"], own=False)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])
    remove_temporaries([tmp_path], own=True)
    assert [path.name for path in tmp_path.iterdir()] == [".mine.tmp"]


def test_a_run_folder_that_is_gone(photos, vit_file, tmp_path, monkeypatch, tally):
    save = training.save_state

    def lost(out, state):
        shutil.rmtree(out)
        save(out, state)

    monkeypatch.setattr(training, "save_state", lost)
    with pytest.raises(RunStopped, match="out: No such file or directory: .*state.pt$"):
        hpseg.train(photos, tmp_path / "run", weights=vit_file, steps=2, **SMALL)
    tally("folders removed while a run writes to them")


def test_a_run_that_was_moved(scored_run, run, photos, vit_file, tmp_path, tally):
    """Renamed, or reached by a link on the way: predicts the same and goes on."""
    (tmp_path / "link").symlink_to(tmp_path)
    moved = scored_run.rename(tmp_path / "moved")
    picture = photos / "a.jpg"
    expected = hpseg.load(run, "cpu").predict(picture)
    assert np.array_equal(hpseg.load(tmp_path / "link" / "moved", "cpu").predict(picture), expected)
    hpseg.train(photos, tmp_path / "link" / "moved", resume=True, weights=vit_file, steps=20, **SMALL)
    hpseg.train(photos, moved, resume=True, quiet=True, classes=3)  # what is not said is the run's own
    assert np.array_equal(hpseg.load(moved, "cpu").predict(picture), expected)
    tally("runs that were moved")
