"""Odd command lines, odd files and odd machines: a sentence and an exit status, never a traceback, nothing lost.

With test_faults.py this is the fault suite; counts are printed at the end.
"""

from __future__ import annotations

import csv
import ctypes
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ARCH, SMALL, in_child, paint
from torch import distributed as dist

import hpseg
from hpseg.cli.main import main
from hpseg.data.folder import _say_nothing_of_lost_connections, load_batches
from hpseg.features.tokens import Encoder
from hpseg.models.backbone import load_backbone
from hpseg.run.config import Config, make_config
from hpseg.run.errors import RunStopped, UsageError
from hpseg.run.files import TEMPORARY, RunLock, remove_temporaries
from hpseg.run.folder import load_state
from hpseg.runtime import interruption
from hpseg.runtime.distributed import ALONE, explained
from hpseg.runtime.interruption import ASKED, Interrupted, Stop
from hpseg.training import loop as training
from hpseg.training.report import Report

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def flags(settings):
    """Settings as words of a command line."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


SETTINGS = {name: value for name, value in SMALL.items() if name != "quiet"}


def train_words(photos, out, weights, **changes):
    return ["train", str(photos), "--out", str(out), *flags({**SETTINGS, "weights": weights, "steps": 2, **changes})]


@pytest.fixture
def refused(capsys):
    """refused(message, *words): the command line is refused, with status 2 and one sentence that holds the message."""

    def check(message, *words):
        assert main([str(word) for word in words]) == 2, words
        said = capsys.readouterr().err
        error = said.splitlines()[-1]
        assert error.startswith(f"hpseg {words[0]}: error: ") and message in error and "Traceback" not in said, said

    return check


# Command lines -------------------------------------------------------------------------------------------------------


def test_outputs_that_cannot_be(run, photos, vit_file, tmp_path, refused, tally):
    """Folders where files are written and the reverse, a place below a file, links to nothing, no name at all."""
    (tmp_path / "file").write_text("")
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "maps" / "a.png").mkdir(parents=True)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("")
    folders = [
        lambda out: ["predict", run, photos, "--out", out],
        lambda out: train_words(photos, out, vit_file),
        lambda out: ["demo", "--out", out, "--seeds", "1", "--steps", "1"],
    ]
    for words in folders:
        for out in ("file/run", "nothing", "loop", "loop/run"):
            refused("expected a folder", *words(tmp_path / out))
    for words in folders[:2]:
        refused("file is a file, expected a folder", *words(tmp_path / "file"))
        refused("out: expected something, got an empty text", *words(""))
    refused("a.png is a folder, expected a file for the label map", *folders[0](tmp_path / "maps"), "--overwrite")

    for words, ending in (
        (["show", run, photos], ".png"),
        (["export", run], ".pt2"),
        (["export", run, "--format", "hp"], ".pth"),
        (["pretrain", photos], ".safetensors"),
    ):
        folder = tmp_path / f"folder{ending}"
        folder.mkdir()
        refused("is a folder, expected the name of a file", *words, "--overwrite", "--out", folder)
        refused("file is a file, expected a folder", *words, "--out", tmp_path / "file" / f"a{ending}")

    refused("pass --resume to go on with a run, --overwrite", *train_words(photos, full, vit_file))
    refused("it has no config.json to go on from; pass --overwrite", *train_words(photos, full, vit_file), "--resume")
    assert [path.name for path in full.iterdir()] == ["mine.txt"]  # not even a lock
    assert not (tmp_path / "gone").exists()
    tally("outputs that cannot be", 12 + 4 + 1 + 8 + 2)


def test_import_into_a_folder_in_use(run, photos, tmp_path, refused, tally):
    assert main(["export", str(run), "--format", "hp", "--out", str(tmp_path / "a.pth")]) == 0
    held = shutil.copytree(run, tmp_path / "held")
    words = ["import-hp", tmp_path / "a.pth", "--out", held]
    refused("is not empty (it holds config.json", *words)
    with pytest.raises(UsageError, match="; pass --overwrite to replace it, or another folder$"):  # and no --resume
        hpseg.import_hp(tmp_path / "a.pth", held)
    with RunLock(held) as lock:
        lock.acquire()
        refused("another program is writing to", *words, "--overwrite")
    assert main([str(word) for word in [*words, "--overwrite"]]) == 0
    tally("second programs")


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


def test_options_of_pretrain(photos, tmp_path, refused, tally):
    for option, value in (
        *(("--patch-size", "0"), ("--heads", "0"), ("--width", "-3"), ("--crop", "0"), ("--lr", "nan")),
        *(("--minutes", "inf"), ("--small-crops", "-1"), ("--device", "xyz")),
    ):
        name = option.removeprefix("--") if option == "--device" else option
        refused(f"{name}: expected", "pretrain", photos, "--out", tmp_path / "a.safetensors", option, value)
        tally("options that cannot be")
    assert not list(tmp_path.iterdir())


# Weights, settings, states -------------------------------------------------------------------------------------------


def test_states_of_pretrain(photos, tmp_path, refused, tally):
    out = tmp_path / "vit.safetensors"
    state = out.with_suffix(".state.pt")
    words = ["pretrain", photos, "--out", out, "--batch-size", "2", "--width", "24", "--heads", "3", "--depth", "1"]
    words += ["--crop", "32", "--prototypes", "16", "--device", "cpu"]
    assert main([str(word) for word in [*words, "--steps", "1"]]) == 0
    whole, before = state.read_bytes(), out.read_bytes()
    parts = torch.load(state, weights_only=True)

    def saved(changed):
        content = io.BytesIO()
        torch.save(changed, content)
        return content.getvalue()

    for content in (
        *(b"", b"text", whole[:1000], whole[: len(whole) // 2], bytes(len(whole))),
        *map(saved, ([1, 2], torch.zeros(3))),
        *(saved({name: part for name, part in parts.items() if name != gone}) for gone in parts),
        saved({**parts, "student": {**parts["student"], "vit.norm.bias": torch.zeros(7)}}),
        saved({**parts, "optimizer": parts["student"]}),
        *(saved({**parts, name: value}) for name, value in (("step", "two"), ("step", -1), ("seconds", None))),
    ):
        state.write_bytes(content)
        refused("resume: ", *words, "--steps", "2", "--resume")
        assert state.read_bytes() == content and out.read_bytes() == before
        tally("damaged files of a run")


def test_labels_that_cannot_be(photos, vit_file, tmp_path, refused, tally):
    data, out = tmp_path / "data", tmp_path / "run"
    for i in range(4):
        for folder, picture in (("images", paint(48, 48, i)), ("labels", Image.new("L", (48, 48), i % 3))):
            (data / folder).mkdir(parents=True, exist_ok=True)
            picture.save(data / folder / f"{i}.png")
    lists = {"binary": b"\xff\xfe\x00", "blank": b"\n \n", "wrong": b"0\nnobody\n", "folder": None}
    for name, content in lists.items():
        (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    dgcl = dict(method="dgcl", classes=3, batch_size=2, size=32, dim=16, bank_rows=60, weights=vit_file, steps=2)
    shares = ("", "0/4", "5/4", "1/0", "1/2/3", "half", "9" * 50 + "/1")
    for labeled in (*shares, *(tmp_path / name for name in (*lists, "missing"))):
        refused("labeled: ", "train", data, "--out", out, *flags({**dgcl, "labeled": labeled}))
        tally("options that cannot be")
    with pytest.raises(UsageError, match="labeled: "):
        hpseg.train(data, out, **dgcl, labeled="a\0b")
    refused("labeled: expected with method", *train_words(data, out, vit_file, labeled="1/2"))
    for labelled in (tmp_path / "missing", tmp_path / "binary", tmp_path / "folder", photos):
        refused("", *train_words(data, out, vit_file, select_on_labels=labelled))
        tally("options that cannot be")
    with pytest.raises(SystemExit, match="2"):
        main(train_words(photos, out, vit_file, preset="smal"))
    with pytest.raises(UsageError, match="preset: expected one of .*small.*, got 'smal'"):
        hpseg.train(photos, out, weights=vit_file, preset="smal")
    assert not out.exists()


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


# Names ---------------------------------------------------------------------------------------------------------------


def test_names_of_all_kinds(run, vit_file, tmp_path, capsys, tally):
    """Names that begin with a dash, break the line, are no UTF-8, are as long as the system lets them be."""
    names = ["-dash", "new\nline", "tab\t", " spaces ", "quote'\"", "a" * 251, os.fsdecode(b"\xff\xfe"), "東京é"]
    folder = tmp_path / "-photos"
    folder.mkdir()
    for number, name in enumerate(names):
        paint(40, 30, number).save(folder / f"{name}.png")
    (folder / os.fsdecode(b"bad\xff\n.png")).write_bytes(b"")
    for cached in (False, True):
        out = tmp_path / f"run\n{cached}"
        words = train_words(folder, out, vit_file, steps=9, cache_features=cached, consistency_weight=0.0)
        assert main(words) == 0
        assert len(json.loads((out / "results.json").read_text())["unreadable"]) == 1
        assert main([*words, "--resume"]) == 0
    assert main(["predict", str(run), str(folder), "--out", str(tmp_path / "maps")]) == 0
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {f"{name}.png" for name in names}
    assert main(["show", str(run), str(folder), "--out", str(tmp_path / os.fsdecode(b"\xff.png"))]) == 0
    assert main(train_words(folder, tmp_path / ("n" * 300), vit_file)) == 1
    assert "hpseg train: error: File name too long: " in capsys.readouterr().err
    tally("pictures of odd names", 4 * len(names))


# Several programs, and what they leave -------------------------------------------------------------------------------


@needs_fork
def test_predictions_at_once_into_one_folder(run, photos, tmp_path, tally):
    def work():
        raise SystemExit(main(["predict", str(run), str(photos), "--out", str(tmp_path / "out"), "--overwrite"]))

    children = [in_child(work) for _ in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert not [path for path in (tmp_path / "out").iterdir() if TEMPORARY.fullmatch(path.name)]
    assert main(["predict", str(run), str(photos), "--out", str(tmp_path / "alone")]) == 0
    for path in (tmp_path / "alone").rglob("*.png"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "alone")).read_bytes() == path.read_bytes()
    tally("predictions at once", 4)


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


def test_an_error_of_a_loading_process_is_a_sentence(vit_file, tmp_path, refused, tally):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(b"")
    words = train_words(tmp_path / "photos", tmp_path / "run", vit_file, workers=1)
    refused("images: none of the 3 pictures can be decoded", *words)
    told = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\nRuntimeError: no shared memory"
    sentence = r"^workers: a data loading process failed \(RuntimeError: no shared memory\); "
    with pytest.raises(RunStopped, match=sentence), explained(ALONE, tmp_path):
        raise RuntimeError(told)
    tally("errors in a loading process", 2)


def where_the_hook_is_from(_items):
    return [sys.excepthook.__module__]


def test_a_loading_process_says_nothing_of_a_training_process_that_ended(monkeypatch):
    """A race of milliseconds, between a batch that is handed over and the death of another loading process."""
    assert next(load_batches([0], [[0]], 1, where_the_hook_is_from)) == ["hpseg.data.folder"]
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(kind))
    _say_nothing_of_lost_connections(0)
    for error in (ConnectionResetError(104, "Connection reset by peer"), EOFError(), KeyError("name")):
        sys.excepthook(type(error), error, None)
    assert told == [KeyError]


@needs_fork
def test_no_shared_memory_is_a_sentence(photos, vit_file, tmp_path, tally):
    """A loading process that cannot hand over its batches: an end, not a wait."""

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
        with open(tmp_path / "said", "w") as sys.stderr:
            raise SystemExit(main(train_words(photos, tmp_path / "run", vit_file, size=224, workers=1)))

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 1
    said = (tmp_path / "said").read_text()
    assert "error: workers: a data loading process failed (RuntimeError: unable to" in said and "Traceback" not in said
    tally("errors in a loading process")


# Signals -------------------------------------------------------------------------------------------------------------


def interrupted_at(step, number, monkeypatch):
    """The process gets signal `number` after step `step`, while the next one is made."""
    row = Report.row

    def signalled(report, values):
        row(report, values)
        if values["step"] == step:
            signal.raise_signal(number)

    monkeypatch.setattr(Report, "row", signalled)


def test_a_signal_saves_the_step_that_it_meets(photos, vit_file, tmp_path, monkeypatch, capsys, tally):
    """A run that was interrupted by every signal in turn ends as one that never was."""
    settings = {"steps": 8, "save_every": 100, "preview_every": 0}
    words = train_words(photos, tmp_path / "cut", vit_file, **settings)
    for step, number in enumerate(ASKED, 1):
        with monkeypatch.context() as patch:
            interrupted_at(2 * step - 2, number, patch)
            assert main([*words, "--resume"] if step > 1 else words) == 128 + number
        by = "Ctrl-C" if number == signal.SIGINT else number.name
        said = f"hpseg train: interrupted by {by} after step {2 * step} of 8, which is saved; --resume"
        assert said in capsys.readouterr().err
        assert load_state(tmp_path / "cut" / "state.pt")["step"] == 2 * step
        assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
        tally(f"interruptions by {number.name}")
    assert main([*words, "--resume"]) == 0
    assert main(train_words(photos, tmp_path / "whole", vit_file, **settings)) == 0
    cut, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    rows = list(csv.DictReader((tmp_path / "cut" / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(8))


def test_a_signal_outside_of_a_step_interrupts_at_once(photos, vit_file, run, tmp_path, monkeypatch, capsys, tally):
    from hpseg.inference import predict_files as labelling

    def asked(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "fill", asked)
        assert main(train_words(photos, tmp_path / "run", vit_file)) == 143
        patch.setattr(labelling, "write_image", asked)
        assert main(["predict", str(run), str(photos), "--out", str(tmp_path / "out")]) == 143
    said = capsys.readouterr().err.splitlines()
    assert "hpseg train: interrupted by SIGTERM" in said and "hpseg predict: interrupted by SIGTERM" in said
    assert main([*train_words(photos, tmp_path / "run", vit_file), "--resume"]) == 0
    tally("interruptions by SIGTERM", 2)


def test_a_second_signal_does_not_wait(monkeypatch):
    with pytest.raises(Interrupted, match="^interrupted$") as error, Stop() as stop:
        stop.later = True
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # at once: torchrun passes on what the terminal has sent already
        assert stop.number == signal.SIGTERM
        monkeypatch.setattr(interruption, "AGAIN_SECONDS", 0.0)
        signal.raise_signal(signal.SIGINT)
    assert error.value.number == signal.SIGINT and isinstance(error.value, KeyboardInterrupt)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a system without SIGHUP")
def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.number == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# Streams -------------------------------------------------------------------------------------------------------------


class Unread:
    """A stream that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    flush = fileno = lambda self: self.write("")

    def isatty(self):
        return True  # so that bars are drawn, too


def test_a_run_goes_on_when_nobody_reads_its_messages(photos, vit_file, tmp_path, monkeypatch, tally):
    monkeypatch.setattr(sys, "stderr", Unread())
    assert main(train_words(photos, tmp_path / "run", vit_file)) == 0
    assert (tmp_path / "run" / "results.json").is_file()
    tally("streams that nobody reads")


@needs_fork
def test_streams_that_are_closed_or_full(photos, vit_file, run, tmp_path, tally):
    """Without the three standard streams no file of a run gets one of their numbers; a result that cannot be printed is
    an error, or the end of a pipe."""

    def closed():
        os.closerange(0, 3)
        sys.stdin = sys.stdout = sys.stderr = None
        status = main(train_words(photos, tmp_path / "run", vit_file))
        os.write(1, b"x"), os.write(2, b"x")
        raise SystemExit(status)

    def show_to(stream):
        def work():
            sys.stdout = stream()
            raise SystemExit(main(["show", str(run), str(photos), "--out", str(tmp_path / "a.png"), "--overwrite"]))

        return work

    works = [closed, show_to(Unread), show_to(partial(open, "/dev/full", "w"))]
    found = [os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) for work in works]
    assert found == [0, 141, 1]
    load_file(tmp_path / "run" / "model.safetensors"), load_state(tmp_path / "run" / "state.pt")
    assert Image.open(tmp_path / "a.png").size[0] > 0
    tally("streams that nobody reads", 3)


# Machines ------------------------------------------------------------------------------------------------------------


def give_up_rootship():
    """Permissions of files hold for this process from here on, also if it is root's (Linux: capabilities 1 and 2)."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        sets[0] &= ~0b110  # effective: overriding what may be read, written and searched
        assert libc.capset(header, sets) == 0


@needs_fork
def test_a_read_only_output(run, photos, vit_file, tmp_path, tally):
    locked, said = tmp_path / "locked", tmp_path / "said"
    locked.mkdir(mode=0o555)

    def work(words):
        def without_rights():
            give_up_rootship()
            with open(said, "w") as sys.stderr:
                raise SystemExit(main(words))

        return without_rights

    for words in (
        ["predict", str(run), str(photos), "--out", str(locked / "out")],
        ["show", str(run), str(photos), "--out", str(locked / "sheet.png")],
        train_words(photos, locked / "run", vit_file),
    ):
        status = os.waitstatus_to_exitcode(os.waitpid(in_child(work(words)), 0)[1])
        message = said.read_text()
        assert status == 1 and "Permission denied" in message and "Traceback" not in message, message
        tally("read-only outputs")
    assert not any(locked.iterdir())


@needs_fork
@pytest.mark.parametrize("files", [64, 24])
def test_few_open_files(photos, vit_file, tmp_path, files, tally):
    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        raise SystemExit(main(train_words(photos, tmp_path / "run", vit_file, workers=2 if files > 24 else 0)))

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 0
    tally("limits on open files")


@needs_fork
def test_out_of_memory(photos, vit_file, tmp_path, monkeypatch, capsys, tally):
    def greedy(*_, **__):
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(training, "save_state", greedy)
    assert main(train_words(photos, tmp_path / "run", vit_file)) == 1
    said = capsys.readouterr().err
    assert "error: out of memory; smaller pictures or batches need less; what" in said and "--resume" in said
    tally("memory that is not there")


def test_a_clock_that_jumps(photos, vit_file, tmp_path, monkeypatch, tally):
    clock, jumps = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: clock() + jumps.uniform(-1e6, 1e6))
    hpseg.train(photos, tmp_path / "run", weights=vit_file, steps=3, **SMALL)
    tally("clocks that jump")


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


# By real processes ---------------------------------------------------------------------------------------------------


def spawn(command):
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, seconds=180):
    """What was said, and the exit status; a process that hangs is killed, and a failure."""
    try:
        return process.communicate(timeout=seconds)[1], process.returncode
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end and process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
@needs_fork
def test_interrupted_at_twenty_random_moments(photos, vit_file, tmp_path, tally):
    """By any of the signals: the run goes on and ends as one that was never stopped; it says why it ended."""
    settings = {"steps": 12, "save_every": 5, "workers": 1}
    started = time.monotonic()
    assert main(train_words(photos, tmp_path / "whole", vit_file, **settings)) == 0
    whole, seconds = load_file(tmp_path / "whole" / "model.safetensors"), time.monotonic() - started
    moments, asked, run, said = random.Random(2), 0, 0, tmp_path / "said"
    while asked < 20:
        out, number = tmp_path / f"run{run}", moments.choice(ASKED)
        words = train_words(photos, out, vit_file, **settings) + ["--resume"] * out.exists()

        def work(words=words):
            with open(said, "w") as sys.stderr:
                raise SystemExit(main(words))

        said.write_text("")
        child = in_child(work)
        time.sleep(0.05 + moments.uniform(0, seconds))
        os.kill(child, number)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            run += 1
            continue
        # A signal may come before main has begun to handle it, or after it has ended.
        assert status in (128 + number, -number, 1) and "Traceback" not in said.read_text(), said.read_text()
        asked += status == 128 + number
        tally(f"interruptions by {signal.Signals(number).name}", int(status == 128 + number))
    if (tmp_path / f"run{run}").exists():
        assert main([*train_words(photos, tmp_path / f"run{run}", vit_file, **settings), "--resume"]) == 0
        run += 1
    for number in range(run):
        found = load_file(tmp_path / f"run{number}" / "model.safetensors")
        assert all(torch.equal(found[name], whole[name]) for name in whole), f"run{number} ended otherwise"


@pytest.mark.slow
@needs_gloo
def test_two_programs_of_two_ranks_and_one_run(photos, vit_file, tmp_path, tally):
    """The second gets the sentence and ends all of its ranks; the first goes on. A scheduler's signal to the first is
    heard on all its ranks: it saves one step and goes on later."""
    out = tmp_path / "run"
    words = [*TORCHRUN, "-m", "hpseg", *train_words(photos, out, vit_file, steps=2000, save_every=5)]
    first = spawn(words)
    wait_for(out / "state.pt", first)
    said, status = finish(spawn([*words, "--resume"]))
    assert status != 0
    (line,) = (line for line in said.splitlines() if line.startswith("hpseg train: error:"))
    assert "out: another program is writing to" in line
    assert first.poll() is None
    os.kill(first.pid, signal.SIGTERM)
    said, status = finish(first)
    assert status != 0
    (line,) = (line for line in said.splitlines() if line.startswith("hpseg train: "))
    step = load_state(out / "state.pt")["step"]
    assert f"interrupted by SIGTERM after step {step} of 2000, which is saved" in line
    assert len((out / "log.csv").read_text().splitlines()) == step + 1
    tally("second programs")
    tally("interruptions by SIGTERM")


@pytest.mark.slow
def test_bare_surroundings(photos, vit_file, run, tmp_path, tally):
    """No home, no locale, no stdin, a working folder that may not be written to."""
    (tmp_path / "bare").mkdir(mode=0o555)
    paint(40, 30, 0).save(tmp_path / "東京.png")
    bare = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    bare |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words in (
        train_words(photos, tmp_path / "run", vit_file, workers=1),
        ["predict", str(run), str(tmp_path / "東京.png"), "--out", str(tmp_path / "out")],
        ["show", str(run), str(tmp_path / "東京.png"), "--out", str(tmp_path / "東.png")],
    ):
        command = [sys.executable, "-m", "hpseg", *words]
        done = subprocess.run(command, cwd=tmp_path / "bare", env=bare, capture_output=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        tally("bare surroundings")
