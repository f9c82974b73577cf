"""Processes to do harm to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]

# Every case on each rank, within a process group of its own: argv holds the folders, stdin the cases.
DRIVER = """
import gc, json, sys, weakref, torch, hpseg, hpkernels
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
group = weakref.ref(torch.distributed.group.WORLD)
for name, (photos, settings) in json.load(open(sys.argv[1])).items():
    hpseg.train(photos, f"{sys.argv[2]}/{name}", **settings)
torch.distributed.barrier()
gc.collect()
torch.distributed.destroy_process_group()
assert group() is None, gc.get_referrers(group())  # its threads would abort the process now and then
"""


def in_child(work):
    """Runs work() in a forked process that says nothing and ends with it, with status 0 or what SystemExit it raises;
    returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        work()
        status = 0
    except SystemExit as error:
        status = error.code
    finally:
        os._exit(status)


def killed_after(seconds, work):
    """Whether work(), in a process of its own, was killed before it was done; a failure of its own is one here."""
    child = in_child(work)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (status := os.waitpid(child, os.WNOHANG))[0]:
            assert status[1] == 0, "the process failed by itself"
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def spawn(command, **options):
    """Starts a command whose stderr finish() reads. Its ranks share that pipe: they write whole lines, so that none is
    cut by another's. Without a buffer each word of a print is a write of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("PYTHONUNBUFFERED", None)
    environment.update(options.pop("env", {}))
    return subprocess.Popen(
        [str(part) for part in command], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process, seconds=180):
    """Exit status and what was said; a process that hangs fails the test."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail("the run hangs")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, said


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.is_file():
        assert time.monotonic() < end and process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def marked(marker):
    """Processes that inherited the marker, youngest first: {pid: environment}."""
    found = {}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda folder: -int(folder.name)):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if marker.encode() in environment:
            found[int(folder.name)] = environment
    return found
