"""Signals that ask a program to end: the step is saved, and the run goes on as if nothing had happened."""

from __future__ import annotations

import csv
import os
import random
import signal
import sys
import time

import pytest
import torch
from processes import TORCHRUN, finish, in_child, needs_fork, needs_gloo, spawn, wait_for
from runs import train_words
from safetensors.torch import load_file

from hpseg.cli.main import main
from hpseg.features.tokens import Encoder
from hpseg.run.folder import load_state
from hpseg.runtime import interruption
from hpseg.runtime.interruption import ASKED, Interrupted, Stop
from hpseg.training.report import Report


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
    status, said = finish(spawn([*words, "--resume"]))
    assert status != 0
    (line,) = (line for line in said.splitlines() if line.startswith("hpseg train: error:"))
    assert "out: another program is writing to" in line
    assert first.poll() is None
    os.kill(first.pid, signal.SIGTERM)
    status, said = finish(first)
    assert status != 0
    (line,) = (line for line in said.splitlines() if line.startswith("hpseg train: "))
    step = load_state(out / "state.pt")["step"]
    assert f"interrupted by SIGTERM after step {step} of 2000, which is saved" in line
    assert len((out / "log.csv").read_text().splitlines()) == step + 1
    tally("second programs")
    tally("interruptions by SIGTERM")
