"""Machines that lack something: permissions, files, memory, a network, a home."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from processes import in_child, needs_fork
from runs import assert_whole, train_words
from tiny import SMALL, paint

import hpseg
from hpseg.cli.main import main
from hpseg.run.errors import RunStopped
from hpseg.training import loop as training


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


@needs_fork
@pytest.mark.parametrize("limit", [200, 5_000, 20_000])
def test_a_disk_that_takes_no_more(photos, vit_file, tmp_path, limit, tally):
    """The system refuses to let a file grow past `limit` bytes: one sentence, and what is there is whole."""
    out = tmp_path / "run"

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(RunStopped, match=r"out: File too large: .*run.*, --resume goes on"):
            hpseg.train(photos, out, weights=vit_file, steps=6, save_every=2, **SMALL)

    child = in_child(work)
    assert os.waitpid(child, 0)[1] == 0
    assert_whole(out)
    assert not list(out.glob(".*.tmp"))
    hpseg.train(photos, out, resume=(out / "config.json").exists(), overwrite=not (out / "config.json").exists(),
                weights=vit_file, steps=6, save_every=2, **SMALL)  # fmt: skip
    tally("full disks")


OFFLINE = """
import socket, sys

def refuse(*args, **options):
    raise SystemExit(f"network: {args[1:]}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import hpkernels, hpseg
hpseg.train(sys.argv[1], sys.argv[2], classes=3, steps=2, batch_size=2, size=64, predict_size=64, workers=0, quiet=True)
hpseg.load(sys.argv[2]).predict(sys.argv[3])
"""


def test_no_network(photos, tmp_path, tally):
    command = [sys.executable, "-c", OFFLINE, str(photos), str(tmp_path / "run"), str(photos / "a.jpg")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tally("programs without a network")
    assert socket.getaddrinfo is not None
